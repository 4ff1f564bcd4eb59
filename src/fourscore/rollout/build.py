"""The rollout engine of a run, from its flags, and what can be known of it before weights are read."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import AutoConfig

from fourscore.errors import Findings, FourscoreError
from fourscore.models.adapters import can_be_one, is_lora, joint_rank
from fourscore.models.checkpoint import Checkpoint
from fourscore.models.checks import lora_config
from fourscore.models.forward import without_peft
from fourscore.models.frozen_layers import has_tied_head
from fourscore.parallel import Parallel
from fourscore.plan.memory import local_processes
from fourscore.ppo.roles import Roles
from fourscore.rollout.engine import Engine
from fourscore.rollout.transformers import InProcess
from fourscore.rollout.vllm import VLLM, unfit
from fourscore.rollout.vllm_process import own_server, why_none
from fourscore.rollout.vllm_server import Served, Server
from fourscore.runs.directory import SERVER_LOG

if TYPE_CHECKING:
    from fourscore.config import ModelConfig, PPOConfig

_QUICK_S = 30.0
"""That a check waits for an answer."""
_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def build_engine(
    args: Any, roles: Roles, parallel: Parallel, save: Callable[[Path], Path], folder: Path, longest: Callable[[], int]
) -> Engine:
    """What `--rollout_engine` names.

    Args:
        args: `PPOConfig`.
        roles: with the policy.
        parallel: the processes.
        save: writes the policy's weights, or its adapter as one, into a folder and returns where they are; every
            process calls it.
        folder: for what is handed over in files.
        longest: says how many tokens the longest prompt has.

    Raises:
        FourscoreError: the engine cannot take the policy, or a server of the run's own cannot be started.
    """
    if args.rollout_engine == "transformers":
        return InProcess(
            roles.policy,
            roles.autocast,
            synced=parallel.sharded,
            pack=args.pack_rollout_weights,
            graphs=args.cuda_graphs != "none",
        )
    if isinstance(roles.policy, PeftModel) and not (is_lora(roles.policy) and can_be_one(roles.policy)):
        raise FourscoreError(
            "--rollout_engine vllm: the policy's adapters are no single LoRA together, and a server takes one; use "
            "--rollout_engine transformers"
        )
    adapter, log = isinstance(roles.policy, PeftModel), folder.parent / SERVER_LOG
    own, process = args.vllm_server_url is None, None
    if own:
        for failure in parallel.gather([why_none_here(args)]):
            if failure is not None:
                raise FourscoreError(failure)
        rank = joint_rank(roles.policy) if adapter else None
        process = own_server(args, without_peft(roles.policy), parallel.device, rank, longest(), log)
    return VLLM(
        Server(
            args.vllm_server_url or "",  # of its own known when it is started
            timeout=args.vllm_timeout,
            retries=min(1, args.vllm_retries) if own else args.vllm_retries,  # a dead one is started again
            concurrency=args.local_rollout_forward_batch_size,
            own=log if own else None,
        ),
        save,
        folder,
        parallel,
        own=own,
        process=process if parallel.is_main else None,
        adapter=adapter,
        vocabulary=int(roles.policy.config.get_text_config().vocab_size),
        tied=_tied(roles.policy) if has_tied_head(roles.policy) else None,
    )


def why_none_here(args: Any) -> str | None:
    """Why a run cannot start a server of its own, if so.

    Args:
        args: `PPOConfig`.
    """
    if local_processes(args.world_size or 1) < (args.world_size or 1):
        return (
            "--rollout_engine vllm: a server that the run starts cannot be reached from its other machines; start one "
            "yourself and pass --vllm_server_url, docs/rollout.md says how"
        )
    return why_none(args.vllm_python)


def _tied(policy: Any) -> tuple[str, str]:
    """Names of the weights of embedding and output layer."""
    base = without_peft(policy)
    names = {id(module): name for name, module in base.named_modules()}
    embedding, output = (names[id(layer)] for layer in (base.get_input_embeddings(), base.get_output_embeddings()))
    return f"{embedding}.weight", f"{output}.weight"


def check_engine(
    args: "PPOConfig", model_args: "ModelConfig", sft: Checkpoint | None, longest: int | None, findings: Findings
) -> None:
    """Ask the server what it serves, and hold it against what it will be asked for.

    Args:
        args: `PPOConfig`.
        model_args: the adapter.
        sft: the SFT checkpoint, if it could be had.
        longest: tokens of the longest prompt, if they are known.
        findings: takes errors and warnings.
    """
    if args.rollout_engine != "vllm":
        return
    rank = None
    if model_args.use_peft:
        with findings.collect():
            rank = _rank(model_args, sft)
    if args.vllm_server_url is None:
        if failure := why_none_here(args):
            findings.error(failure)
        return
    server = Server(args.vllm_server_url, timeout=min(_QUICK_S, args.vllm_timeout), retries=0, concurrency=1)
    with findings.collect():
        served = server.describe()
        length = None if longest is None else longest + args.response_length
        for line in unfit(served, adapter=model_args.use_peft, rank=rank, length=length):
            findings.error(str(server.error(line)))
        if sft is not None:
            _check_model(server, served, sft, findings)
        expected = "bfloat16" if args.bf16 or model_args.dtype == "bfloat16" else "float32"
        if served.dtype != expected:
            findings.warn(
                str(
                    server.error(
                        f"computes in {served.dtype}, the policy in {expected}: start it with --dtype {expected}"
                    )
                )
            )


def _rank(model_args: "ModelConfig", sft: Checkpoint | None) -> int | None:
    """The rank of the adapter that will be handed over, which holds that of the SFT checkpoint, too."""
    for name, value in (
        ("use_dora", model_args.use_dora),
        ("lora_modules_to_save", model_args.lora_modules_to_save),
        ("lora_target_parameters", model_args.lora_target_parameters),
    ):
        if value:
            raise FourscoreError(
                f"--{name} with --rollout_engine vllm: vLLM cannot take such an adapter; leave out one of the two"
            )
    try:
        config = lora_config(model_args)
    except FourscoreError:
        return None  # said elsewhere
    own = 0 if config is None else int(config.r)
    below: Any = None if sft is None or sft.adapter is None else sft.adapter.config
    return own + (0 if below is None else max([below.r, *below.rank_pattern.values()]))


def _check_model(server: Server, served: Served, sft: Checkpoint, findings: Findings) -> None:
    """Whether the model that is served is that of the SFT checkpoint, as far as it can be told from here."""
    there = Path(served.path)
    if served.path in (sft.path, sft.given) or (there.exists() and there.resolve() == Path(sft.path).resolve()):
        return
    try:
        config: Any = AutoConfig.from_pretrained(there, local_files_only=True)
    except (OSError, ValueError):
        findings.warn(
            str(server.error(f"serves {served.path}, which is not to be found here; it is taken to be {sft.path}"))
        )
        return
    for name in _SIZES:
        theirs, ours = (getattr(each.get_text_config(), name, None) for each in (config, sft.config))
        if theirs != ours:
            raise server.error(
                f"serves {served.path}, whose {name} is {theirs}, but {sft.named} has {ours}; start it with that one"
            )
    findings.warn(str(server.error(f"serves {served.path}, of the same sizes; it is taken to be {sft.path}")))
