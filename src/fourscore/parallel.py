"""Several processes: data parallel, or parameters sharded with FSDP2, on `torch.distributed` directly.

Roles stay the objects they are: nothing wraps them. Data parallel adds up gradients after a minibatch's last
backward; FSDP2 (`fully_shard`) changes a model in place.
"""

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourscore.errors import FourscoreError
from fourscore.models.forward import microbatches, without_peft
from fourscore.models.unpadded import can_unpad


@dataclass
class Parallel:
    """This process among the others.

    Attributes:
        device: where this process computes.
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        sharded: parameters are sharded with FSDP2.
    """

    device: torch.device
    rank: int
    world_size: int
    sharded: bool

    @classmethod
    def start(cls, args: Any) -> "Parallel":
        """Join the process group that `accelerate launch` or `torchrun` describes; alone without one.

        Args:
            args: `PPOConfig`; its `device` property starts the process group.

        Raises:
            FourscoreError: FSDP with a single process.
        """
        device = args.device
        if device.type == "cpu":
            device = torch.device("cpu")  # moving to "cpu:0", as launchers call it, would copy what is mapped
        sharded = is_sharded(args)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if sharded and world_size == 1:
            raise FourscoreError(
                "--fsdp needs more than one process: start with `accelerate launch --num_processes N`, or leave it out."
            )
        if world_size > 1:
            # Threads of the group that outlive the interpreter abort the process, after all its work is done.
            atexit.register(_leave_group)
        rank = dist.get_rank() if world_size > 1 else 0
        return cls(device, rank, world_size, sharded)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def loss_scale(self) -> float:
        """What a summed loss is multiplied by, so that its gradient adds up over processes: FSDP2 averages."""
        return float(self.world_size) if self.sharded else 1.0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes, on each of them."""
        if self.world_size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def max(self, x: float) -> float:
        """The largest of one number a process."""
        return max(self.gather([x]))

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in rank order, on each of them."""
        if self.world_size == 1:
            return items
        lists: list[Any] = [None] * self.world_size
        dist.all_gather_object(lists, items)
        return [item for each in lists for item in each]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, model: nn.Module, *, frozen_too: bool) -> None:
        """Give every process rank 0's trainable parameters (and, if asked, its frozen ones and its buffers).

        Frozen weights come from the same files everywhere; writing to them would only break their memory mapping.
        """
        if self.world_size == 1:
            return
        tensors = [p.data for p in model.parameters() if frozen_too or p.requires_grad]
        if frozen_too:
            tensors += list(model.buffers())
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def shard(self, model: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        """Shard a model in place with FSDP2: a group for each transformer layer, one for the rest.

        A score head is a group of its own in its own dtype, because values are fp32 whatever autocast says.

        Under PEFT the base model is sharded with its adapters inside, so that `generate` and adapter switches, which
        call the base directly, find it as the root.

        Args:
            model: the role, on the CPU or on its device.
            autocast_dtype: what weights are gathered in, if not their own dtype.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        base = without_peft(model)
        names = set(getattr(base, "_no_split_modules", None) or ())
        layers = [m for m in base.modules() if type(m).__name__ in names]
        if not layers:
            raise FourscoreError(
                f"{type(base).__name__} does not name its layers (_no_split_modules), so FSDP cannot shard it: "
                "leave out --fsdp."
            )
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.world_size,)),
            "reshard_after_forward": True,
        }
        if autocast_dtype is not None:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=autocast_dtype, reduce_dtype=torch.float32)
        for layer in layers:
            fully_shard(layer, **options)
        # A value model under PEFT has two: its own, and the reward model's.
        for head in (m for m in getattr(base, "score", nn.Identity()).modules() if isinstance(m, nn.Linear)):
            fully_shard(head, mesh=options["mesh"], reshard_after_forward=True)
        fully_shard(base, **options)

    def reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up gradients over processes; FSDP2 has done so in its backward."""
        if self.world_size == 1 or self.sharded:
            return
        pending = []
        for parameter in parameters:
            # An expert, say, that only the samples of other processes have met: all must take part.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pending.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in pending:
            work.wait()


def forward_passes(
    model: nn.Module, lens: Tensor, size: int, tokens: int | None = None, *, padded: bool = False
) -> list[Tensor]:
    """`microbatches` for a model, without padding where it needs none.

    They are as many on every process where the model is sharded: a pass gathers weights from all of them.

    Args:
        model: that the passes are of.
        lens: `[n]` tokens, `n` equal on all processes.
        size: see `microbatches`.
        tokens: see `microbatches`.
        padded: even if the model needs none.
    """
    groups = microbatches(lens, size, tokens, padded=padded or not can_unpad(model, int(lens.max())))
    if isinstance(next(model.parameters()), DTensor):
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, len(groups))
        while len(groups) < max(counts):
            at = max(range(len(groups)), key=lambda i: len(groups[i]))
            groups[at : at + 1] = groups[at].tensor_split(2)
    return groups


def is_sharded(args: Any) -> bool:
    """Whether flags or launcher ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their joint norm is at most `max_norm`; 0 leaves them.

    Returns:
        `[]` the norm before.
    """
    limit = max_norm if max_norm > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
