"""Checkpoints: all that a run needs to go on as if it had not stopped, written whole or not at all."""

import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fourscore.errors import FourscoreError
from fourscore.models.adapters import (
    adapter_folder,
    can_be_one,
    frozen_adapters,
    trained_adapter,
    write_combined_adapter,
)
from fourscore.models.average import MovingAverage
from fourscore.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fourscore.parallel import Parallel
from fourscore.runs import directory

OPTIMIZERS = "optimizers.pt"
RNG = "rng.pt"
STATE = "trainer_state.json"
HEAD = "score.safetensors"
"""A value head on the policy's backbone, which is all that its value model has of its own."""
AVERAGE = "policy_ema"
"""Folder of the moving average of the policy's weights."""
TRAINED = "trained_adapter"
"""Folder of the adapter that trains, where what lies above it holds a frozen one, too."""

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """What trains, by the name of the role: `policy` first, `value` second.

    Attributes:
        models: the roles.
        optimizers: one a role, or the policy's for both.
        schedules: one an optimizer.
        average: the moving average of the policy's weights, if there is to be one.
    """

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    schedules: dict[str, Any]
    average: MovingAverage | None = None

    def folders(self, root: Path) -> dict[str, Path]:
        """Where each role's weights are: the policy's at the root, as in a run directory."""
        return {"policy": root, "value": root / "value_model"}

    def save(self, root: Path, tokenizer: Any, parallel: Parallel, *, resumable: bool = False) -> None:
        """Write the weights of each role into its folder, and the average and the tokenizer. Every process calls it."""
        folders = self.folders(root)
        for name, place in folders.items():
            save_weights(self.models[name], place, parallel, resumable=resumable)
        with_tokenizer = [folders["policy"]]
        if self.average is not None:
            with self.average.in_place():
                save_weights(self.models["policy"], root / AVERAGE, parallel, resumable=resumable)
            with_tokenizer.append(root / AVERAGE)
        if parallel.is_main:
            for place in with_tokenizer:
                tokenizer.save_pretrained(place)
        parallel.barrier()

    def load(self, root: Path, parallel: Parallel) -> None:
        """Read back what `save` wrote; an average that is not there starts at the weights."""
        for name, place in self.folders(root).items():
            load_weights(self.models[name], place, parallel)
        if self.average is None:
            return
        if not (root / AVERAGE).is_dir():
            logger.warning("%s has no moving average (--ema_decay): it starts at the policy's weights there", root)
            self.average.restart()
            return
        with self.average.in_place():
            load_weights(self.models["policy"], root / AVERAGE, parallel)


def save(
    folder: Path, training: Training, state: Any, tokenizer: Any, parallel: Parallel, *, weights_only: bool
) -> None:
    """Write a checkpoint. Every process calls it.

    Args:
        folder: its name.
        training: roles, optimizers and schedules.
        state: transformers' `TrainerState`.
        tokenizer: to lie beside the policy.
        parallel: the processes.
        weights_only: leave out what only resuming needs.

    Raises:
        FourscoreError: it could not be written.
    """
    optimizers = {} if weights_only else optimizer_states(training.models, training.optimizers, parallel)
    rng = parallel.gather([rng_state()])
    with written_whole(folder, parallel) as draft:
        training.save(draft, tokenizer, parallel, resumable=not weights_only)
        if parallel.is_main:
            state.save_to_json(str(draft / STATE))
            if not weights_only:
                schedules = {name: schedule.state_dict() for name, schedule in training.schedules.items()}
                torch.save({"optimizers": optimizers, "schedules": schedules}, draft / OPTIMIZERS)
                torch.save(rng, draft / RNG)
    parallel.barrier()


def check_resumable(folder: Path) -> None:
    """Refuse a checkpoint that lacks what resuming needs.

    Raises:
        FourscoreError: names what is missing.
    """
    lacking = _lacking(folder)
    if lacking is not None:
        others = resumable(folder.parent)
        way_out = f"{others[-1]} is whole" if others else "weights alone can be passed as --sft_model_path"
        raise FourscoreError(
            f"--resume_from_checkpoint {folder}: {lacking} is missing, so it cannot be resumed (--save_only_model "
            f"leaves it out); {way_out}"
        )


def resumable(run: str | Path) -> list[Path]:
    """The checkpoints in a run directory that have all that resuming needs, the earliest first."""
    return [found for found in directory.checkpoints(Path(run)) if _lacking(found) is None]


def _lacking(folder: Path) -> str | None:
    return next((name for name in (STATE, OPTIMIZERS, RNG) if not (folder / name).is_file()), None)


def load(folder: Path, training: Training, parallel: Parallel) -> dict[str, Any]:
    """Take up a checkpoint: weights, optimizers, schedules and this process's random generators.

    Returns:
        the saved `TrainerState`, as a dict.

    Raises:
        FourscoreError: it lacks what resuming needs, or was written by another number of processes.
    """
    check_resumable(folder)
    with _damage_named(folder):
        return _load(folder, training, parallel)


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turn what files that are cut off or overwritten raise into one clear line.

    Raises:
        FourscoreError: a file in `folder` is damaged.
    """
    try:
        yield
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, FourscoreError) or (isinstance(error, RuntimeError) and type(error) is not RuntimeError):
            raise  # no memory, or a process that is gone
        reason = " ".join(str(error).split())[:200]
        others = [other for other in resumable(folder.parent) if other.name != folder.name]
        way_out = f"try {others[-1]}" if others else "there is no other beside it"
        raise FourscoreError(
            f"--resume_from_checkpoint {folder}: cannot be read ({type(error).__name__}: {reason}), a file is damaged "
            f"or not of these models; {way_out}"
        ) from error


def _load(folder: Path, training: Training, parallel: Parallel) -> dict[str, Any]:
    rng = torch.load(folder / RNG, weights_only=True, map_location="cpu")
    if len(rng) != parallel.world_size:
        raise FourscoreError(
            f"--resume_from_checkpoint {folder}: written by {len(rng)} processes, this run has {parallel.world_size}: "
            "resume with the same number, so that it goes on as it was."
        )
    training.load(folder, parallel)
    saved = torch.load(folder / OPTIMIZERS, weights_only=True, map_location="cpu")
    load_optimizer_states(saved["optimizers"], training.models, training.optimizers, parallel)
    for name, schedule in training.schedules.items():
        schedule.load_state_dict(saved["schedules"][name])
        if not saved["optimizers"][name]:  # which leaves its learning rates out, too
            for group, rate in zip(training.optimizers[name].param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
    set_rng_state(rng[parallel.rank])
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one clear line.

    Raises:
        FourscoreError: `path` could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FourscoreError(
            f"{path} could not be written: {error}. Free some space (or choose another --output_dir) and go on with "
            "--resume_from_checkpoint true: earlier checkpoints are untouched."
        ) from error


@contextmanager
def written_whole(path: Path, parallel: Parallel) -> Iterator[Path]:
    """A folder to fill, which gets its name only when it is complete. Every process enters; the main one writes.

    Args:
        path: the name; a folder already there is replaced.
        parallel: the processes.

    Yields:
        the folder to write into.

    Raises:
        FourscoreError: it could not be written (a full disk, say); what was written of it is gone again.
    """
    draft, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    if not parallel.is_main:
        yield draft
        return
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with disk_errors_named(path):
            draft.mkdir(parents=True)
            yield draft
            if path.exists():
                os.replace(path, old)
            os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_weights(model: Any, folder: Path, parallel: Parallel, *, resumable: bool = False) -> None:
    """Write a role as `from_pretrained` reads it: whole weights, or the adapter under PEFT; of a mere head, a file.

    Where it trains on top of a frozen adapter, both are written as one, or else each into its folder. Every process
    calls it; only the main one writes.

    Args:
        model: the role.
        folder: to write into.
        parallel: the processes.
        resumable: write the adapter that trains by itself as well, if it is in one with another.
    """
    if isinstance(model, nn.Linear):
        if parallel.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({f"score.{name}": p.detach() for name, p in model.named_parameters()}, folder / HEAD)
        parallel.barrier()
        return
    state = None
    if parallel.sharded:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if parallel.is_main:
        model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
        if isinstance(model, PeftModel):
            (folder / directory.CARD).unlink(missing_ok=True)  # PEFT's form, which nobody has filled in
        if isinstance(model, PeftModel) and (frozen := frozen_adapters(model)):
            if can_be_one(model):
                if resumable:
                    (folder / TRAINED).mkdir()
                    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                        shutil.copy2(adapter_folder(model, folder) / name, folder / TRAINED)
                write_combined_adapter(model, folder, state)
            elif not resumable:
                logger.warning("%s holds two adapters: load %s first, and the other on top", folder, ", ".join(frozen))
    parallel.barrier()


def load_weights(model: Any, folder: Path, parallel: Parallel) -> None:
    """Read back what `save_weights` wrote, into the role's own parameters; those that do not train stay as they are."""
    if isinstance(model, nn.Linear):
        model.load_state_dict({key.removeprefix("score."): p for key, p in load_file(folder / HEAD).items()})
        return
    if isinstance(model, PeftModel):
        adapter = trained_adapter(model)
        alone = folder / TRAINED
        saved = load_peft_weights(str(alone if alone.is_dir() else adapter_folder(model, folder)), device="cpu")
        if not parallel.sharded:
            set_peft_model_state_dict(model, saved, adapter_name=adapter)
            return
        # PEFT's files leave the adapter's name out of the keys; tagging each parameter tells which key is which.
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        tags = {n: torch.tensor(i) for i, n in enumerate(names)}
        keys = get_peft_model_state_dict(model, state_dict=tags, adapter_name=adapter)
        weights = {names[int(tag)]: saved[key] for key, tag in keys.items()}
    else:
        weights = type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
        if not parallel.sharded:
            # Frozen layers are mapped from a file, or another role's, too: they are not to be written to.
            trained = {name: weights[name] for name, p in model.named_parameters() if p.requires_grad}
            model.load_state_dict(trained, strict=False)
            return
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def optimizer_states(
    models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], parallel: Parallel
) -> dict[str, Any]:
    """The state of each optimizer, whole, on the main process; empty where a sharded one has not stepped yet."""
    if not parallel.sharded:
        return {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # To have a state to look at, torch would take a step of one that has none, and Adam would count it.
    return {
        name: get_optimizer_state_dict(models[name], optimizer, options=options) if optimizer.state else {}
        for name, optimizer in optimizers.items()
    }


def load_optimizer_states(
    states: dict[str, Any],
    models: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    parallel: Parallel,
) -> None:
    """Put back what `optimizer_states` gave."""
    for name, optimizer in optimizers.items():
        if not parallel.sharded:
            optimizer.load_state_dict(states[name])
        elif states[name]:
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(models[name], optimizer, states[name], options=options)


def rng_state() -> dict[str, Any]:
    """The state of every random generator of this process."""
    numpy: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy[0], torch.tensor(numpy[1].astype(np.int64)), *numpy[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def prune(folder: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints until `limit` are left; None or 0 keeps all."""
    for old in directory.checkpoints(folder)[:-limit] if limit else []:
        shutil.rmtree(old)
