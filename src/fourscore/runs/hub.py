"""A finished run on the hub."""

from pathlib import Path
from typing import Any


def upload(args: Any, commit_message: str, blocking: bool) -> Any:
    """Upload the output directory but for its checkpoints to `args.hub_model_id`, or the directory's name.

    Args:
        args: `PPOConfig`.
        commit_message: of the upload.
        blocking: wait until it is done.

    Returns:
        the commit, or a future of it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    repo = api.create_repo(
        args.hub_model_id or Path(args.output_dir).resolve().name, private=args.hub_private_repo, exist_ok=True
    )
    return api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=args.output_dir,
        commit_message=commit_message,
        ignore_patterns=["checkpoint-*", ".checkpoint-*"],
        revision=args.hub_revision,
        run_as_future=not blocking,
    )
