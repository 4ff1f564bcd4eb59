"""The plan of a run: what each role is made of and what it takes, from configs and headers alone."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fourscore.config import ModelConfig, PPOConfig
from fourscore.errors import FourscoreError
from fourscore.models.checkpoint import inspect_checkpoint
from fourscore.models.checks import Inspected, check_models
from fourscore.models.layout import Layout
from fourscore.models.packed import packed_bytes
from fourscore.models.pass_graphs import share_that_fits
from fourscore.models.unpadded import can_unpad
from fourscore.parallel import is_sharded
from fourscore.plan.memory import Capacity, anonymous_bytes, capacity, local_processes, own_server_bytes
from fourscore.plan.phases import Sizes, quiet, support_bytes, trace_phases
from fourscore.plan.skeleton import Skeleton, build_roles, layers_of, logical_numel
from fourscore.ppo.optim import state_bytes
from fourscore.rewards.function import names_function
from fourscore.runs.memory import can_set_malloc

_ROOMY = 0.8
"""Share of what there is that a run may take for the faster way with more memory, where nobody asked for either.

A plan is not exact, and an accelerator's memory is broken up as it is used.
"""
FULL_PASS = 1024
"""Tokens that passes of an update are filled up to on a CPU.

By the cost that `microbatches` reckons with, 64 tokens a pass, what a pass costs by itself is then a sixteenth.
"""
PHASES = ("load", "rollout", "scoring", "update")
ROLES = ("policy", "ref_policy", "reward_model", "value_model")
ASSUMED_PROMPT = 512
"""Tokens of the longest prompt where neither the prompts nor `max_prompt_length` tell."""

RUNNING = 16 * 2**20
"""What a process on a CPU takes beside all that is counted: datasets, the progress line, the autograd engine.

Measured on Linux (15 to 20 MiB from the first rollout on, whatever the model).
"""

IDLE = 24 * 2**20
IDLE_SHARE = 2 / 3
"""What memory that is kept for the next pass (`keep_freed_memory`) adds to rollout, scoring and update: bytes, and a
share of the most that one of them makes.

It lies in holes between what is in use. How much depends on the order in which blocks come and go, and on what the
phases before have left of the heap: measured on Linux (docs/plan.md), 0.1 to 1.2 times what the largest phase makes.
"""


class NoPlan(FourscoreError):
    """The model's code cannot run on tensors without data, so that nothing is known of its activations."""


@dataclass(frozen=True)
class RolePlan:
    """What one role takes in one process; bytes.

    Attributes:
        parameters: weights, shared ones included; quantized ones count as the weights they stand for.
        trainable: of those, the ones that train.
        dtype: of the trained weights and of the frozen ones, such as "float32" or "float32, nf4".
        weights: in memory of its own.
        mapped: read from the file's pages, which cost no memory of their own.
        shared: weights that a role further up in `Plan.roles` holds already.
        shared_with: those roles.
        gradients: while it is updated.
        optimizer: state, and the moving average of the weights (`--ema_decay`).
    """

    parameters: int
    trainable: int
    dtype: str
    weights: int
    mapped: int
    shared: int
    shared_with: tuple[str, ...]
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Plan:
    """A run's memory, and the layout that the loader obeys.

    Attributes:
        layout: which weights each role stands on.
        roles: by name, in the order in which shared weights are booked; then further reward models.
        sizes: lengths and batches on one process.
        device: type of device that the roles live on.
        world_size: processes.
        sharding: "none" or "fsdp".
        baseline: bytes of a process before it loads anything; 0 on an accelerator.
        kv_cache: bytes of the cache at the end of the longest completions.
        packed: bytes of the rollout's own copy of the policy's weights.
        graphs: bytes that CUDA graphs compute with, the KV cache among them; held in each phase but load.
        idle: bytes that are freed and kept for the next pass, in each phase but load.
        support: bytes of what the tokens of a rollout batch were drawn from, at most; held until the update is done.
        parts: phase -> part of it -> bytes beside weights and optimizer state.
        peak_bytes: by phase, of one process.
        mapped_bytes: file pages of frozen weights; all processes of a machine share them.
        capacity: of this machine.
        processes_here: processes that share this machine's memory.
        assumptions: what had to be assumed, one sentence each.
    """

    layout: Layout
    roles: dict[str, RolePlan]
    sizes: Sizes
    device: str
    world_size: int
    sharding: str
    baseline: int
    kv_cache: int
    packed: int
    graphs: int
    idle: int
    support: int
    parts: dict[str, dict[str, int]]
    peak_bytes: dict[str, int]
    mapped_bytes: int
    capacity: Capacity
    processes_here: int
    assumptions: tuple[str, ...] = field(default=())

    @property
    def largest(self) -> str:
        """The phase with the largest peak."""
        return max(self.peak_bytes, key=lambda phase: self.peak_bytes[phase])

    @property
    def fits(self) -> bool:
        """Whether the largest peak is within what one process may take."""
        return self.peak_bytes[self.largest] <= self.available

    @property
    def available(self) -> int:
        """Bytes that one process may take."""
        if self.capacity.device is not None:
            return self.capacity.device
        return self.capacity.host // self.processes_here


def plan_of_run(training_args: PPOConfig, model_args: ModelConfig, **options: Any) -> Plan:
    """Plans a run, and settles what nobody asked for: where the plan has room, the faster way with more memory.

    On an accelerator with activation checkpointing only where there is no room without; on a CPU keeping freed memory,
    and with passes of `FULL_PASS` tokens where microbatches are smaller.

    Args:
        training_args: batches, lengths, optimizer, precision; `gradient_checkpointing`, `keep_freed_memory` and
            `tokens_per_microbatch` may change.
        model_args: dtype of frozen weights, PEFT, quantization.
        options: more of `make_plan`'s.

    Raises:
        FourscoreError: as `make_plan`.
    """
    faster: dict[str, Any] = {}
    on_cpu = training_args.device.type == "cpu"
    if training_args.checkpointing_open:
        faster |= {"gradient_checkpointing": False, "activation_checkpointing": False}
    settles_memory = training_args.keep_freed_memory is None and on_cpu
    if settles_memory:
        faster["keep_freed_memory"] = True
    ways = [faster] if faster else []
    if on_cpu and training_args.tokens_per_microbatch is None:
        longest = _prompt_length(training_args, options.get("prompt")) + training_args.response_length
        if training_args.per_device_train_batch_size * longest < FULL_PASS:
            ways.insert(0, faster | {"tokens_per_microbatch": FULL_PASS})
    for way in ways:
        tried = copy.copy(training_args)
        for name, value in way.items():
            setattr(tried, name, value)
        plan = make_plan(tried, model_args, **options)
        if plan.peak_bytes[plan.largest] <= _ROOMY * plan.available:
            for name, value in way.items():
                setattr(training_args, name, value)
            return plan
    if settles_memory:
        training_args.keep_freed_memory = False
    if training_args.checkpointing_open:
        training_args.gradient_checkpointing = training_args.activation_checkpointing = True
    return make_plan(training_args, model_args, **options)


def _prompt_length(training_args: PPOConfig, prompt: int | None) -> int:
    """Tokens of the longest prompt, as far as they are known."""
    return prompt or training_args.max_prompt_length or ASSUMED_PROMPT


def make_plan(
    training_args: PPOConfig,
    model_args: ModelConfig,
    *,
    inspected: Inspected | None = None,
    world_size: int | None = None,
    sharding: str | None = None,
    layout: Layout | None = None,
    prompt: int | None = None,
    room: Capacity | None = None,
) -> Plan:
    """Plans a run; reads configs and headers, but no weights.

    Args:
        training_args: batches, lengths, optimizer, precision.
        model_args: dtype of frozen weights, PEFT, quantization.
        inspected: the checkpoints, where they were looked at already.
        world_size: processes; None: those of this run.
        sharding: "none", "fsdp", or None for what the flags say.
        layout: who shares what; None: decided here.
        prompt: tokens of the longest prompt; None: `--max_prompt_length`, else `ASSUMED_PROMPT`.
        room: memory to fit into; None: that of this machine, less what a vLLM server of the run's own takes.

    Raises:
        FourscoreError: the checkpoints, prompts or settings are unfit.
        NoPlan: the model's code cannot be traced.
    """
    device = training_args.device
    on_cpu = device.type == "cpu"
    if layout is None:
        inspected = inspected or check_models(model_args, training_args)
        layout = inspected.layout(model_args, training_args, on_cpu=on_cpu)
    world_size = world_size or training_args.world_size or 1
    if sharding is None:
        sharding = "fsdp" if is_sharded(training_args) else "none"
    if world_size == 1:
        sharding = "none"
    assumptions = []
    if prompt is None and training_args.max_prompt_length is None:
        assumptions.append(f"the longest prompt is taken to have {ASSUMED_PROMPT} tokens: see --max_prompt_length")
    prompt = _prompt_length(training_args, prompt)
    if "reward_model" in layout.roles and layout.roles["reward_model"].reads_text:
        assumptions.append("texts are taken to have as many tokens for the reward model as for the policy")
    local_batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    longest = prompt + training_args.response_length
    microbatch = training_args.per_device_train_batch_size
    if training_args.tokens_per_microbatch is not None:
        microbatch = max(1, training_args.tokens_per_microbatch // longest)
    sizes = Sizes(
        prompt=prompt,
        response=training_args.response_length,
        rollout_batch=min(training_args.local_rollout_forward_batch_size, local_batch),
        minibatch=local_batch // training_args.num_mini_batches,
        microbatch=min(microbatch, local_batch // training_args.num_mini_batches),
    )
    state, known = state_bytes(training_args.optim.value, training_args.optim_args)
    if not known:
        assumptions.append(f"optimizer {training_args.optim.value}: taken as 8 bytes a trained weight")

    try:
        with quiet():
            skeleton = build_roles(layout, model_args, training_args)
            averaged = {"policy"} if training_args.ema_decay is not None else set()
            roles = _role_plans(skeleton, layout, model_args, state, averaged, on_cpu)
        elsewhere, server = training_args.rollout_engine == "vllm", 0
        packs = on_cpu and training_args.pack_rollout_weights and sharding == "none" and not elsewhere
        packed = packed_bytes(skeleton.roles["policy"]) if packs and not training_args.bf16 else 0
        weights_of_policy = sum(p.numel() * p.element_size() for p in skeleton.roles["policy"].parameters())
        keeps = on_cpu and training_args.keep_freed_memory is not False and can_set_malloc(weights_of_policy)
        parts = trace_phases(layout, model_args, training_args, sizes, device)
        if elsewhere:
            parts["rollout"] = {"server": 0}
            if training_args.vllm_server_url is None:
                server = own_server_bytes(device, training_args.vllm_gpu_memory_utilization, weights_of_policy)
                assumptions.append(f"the vLLM server that the run starts takes {server / 2**30:.1f} GiB beside it")
            else:
                assumptions.append("completions are drawn by the vLLM server, whose memory is not counted")
        further = _further_rewards(training_args, model_args, on_cpu)
    except FourscoreError:
        raise
    except Exception as error:
        name = type(layout.backbones[layout.roles["policy"].backbone].checkpoint.config).__name__
        reason = " ".join(str(error).split())[:200]
        raise NoPlan(
            f"no plan for {name}: its code does not run without data ({type(error).__name__}: {reason})"
        ) from error

    # Now that all the code has run that a run will import.
    baseline = anonymous_bytes() if on_cpu else 0
    shards = world_size if sharding == "fsdp" else 1
    weights = sum(role.weights for role in roles.values())
    optimizer = sum(role.optimizer for role in roles.values())
    unsharded = sum(role.weights for role in further.values())
    held = baseline + (weights + optimizer) // shards + unsharded
    gathered = 0
    if shards > 1:
        # Mapped weights are copied into shards, and a layer is gathered while the next one is on its way.
        held += sum(role.mapped for role in roles.values()) // shards
        gathered = 2 * _largest_layer(skeleton)
        roles_gradients = {"policy": roles["policy"].gradients, "value": roles["value_model"].gradients}
    peaks = {"load": baseline + weights // shards + unsharded + gathered}
    roles |= further
    if further:
        assumptions.append("what further reward models take beside their weights is not counted")
    support = support_bytes(layout, training_args, local_batch)
    if support:
        parts["rollout"]["support"] = 2 * support  # put together and in order, beside what is held
    tops: dict[str, int] = {}
    for phase, by_part in parts.items():
        sizes_of_parts = []
        for part, size in by_part.items():
            if shards > 1 and phase == "update":
                size -= min(size, roles_gradients[part.split()[0]]) * (shards - 1) // shards
            sizes_of_parts.append(size)
        tops[phase] = max(sizes_of_parts)
    idle = IDLE + int(IDLE_SHARE * max(tops.values())) if keeps else 0
    for phase, top in tops.items():
        peaks[phase] = held + support + top + idle + gathered + (RUNNING if on_cpu else 0)
    peaks["rollout"] += packed
    kv_cache = 0 if elsewhere else _kv_cache(layout, sizes, training_args)
    recorded = {}
    policy = skeleton.roles["policy"]
    if device.type == "cuda" and sharding == "none" and can_unpad(policy, longest):
        share = share_that_fits(sizes.rollout_batch * longest, sum(p.numel() for p in policy.parameters()))
        recorded = _recorded(training_args, parts["rollout"].get("decode", 0), tops, share)
    graphs = sum(recorded.values())
    for phase in tops:
        peaks[phase] += graphs - recorded.get(phase, 0)  # its own is in its peak
    here = local_processes(world_size) if on_cpu else 1
    room = capacity(device).less(server) if room is None else room
    return Plan(
        layout=layout,
        roles=roles,
        sizes=sizes,
        device=device.type,
        world_size=world_size,
        sharding=sharding,
        baseline=baseline,
        kv_cache=kv_cache,
        packed=packed,
        graphs=graphs,
        idle=idle,
        support=support,
        parts=parts,
        peak_bytes=peaks,
        mapped_bytes=0 if shards > 1 else sum(role.mapped for role in roles.values()),
        capacity=room,
        processes_here=here,
        assumptions=tuple(assumptions),
    )


def _further_rewards(training_args: PPOConfig, model_args: ModelConfig, on_cpu: bool) -> dict[str, RolePlan]:
    """Checkpoints among `--reward_funcs`: each process has them whole, in fp32 on a CPU, else as they are stored."""
    plans: dict[str, RolePlan] = {}
    for spec in training_args.reward_funcs or ():
        if names_function(spec):
            continue
        checkpoint = inspect_checkpoint("--reward_funcs", spec, model_args)
        tensors = [t for t in (checkpoint.tensors or {}).values() if t.dtype is not None and t.dtype.is_floating_point]
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        dtype = torch.float32 if on_cpu else checkpoint.dtype or torch.float32
        size = parameters * dtype.itemsize
        mapped = on_cpu and checkpoint.dtype == dtype
        name = f"reward {spec.rstrip('/').rsplit('/', 1)[-1]}"
        plans[name] = RolePlan(
            parameters=parameters,
            trainable=0,
            dtype=str(dtype).removeprefix("torch."),
            weights=0 if mapped else size,
            mapped=size if mapped else 0,
            shared=0,
            shared_with=(),
            gradients=0,
            optimizer=0,
        )
    return plans


def _role_plans(
    skeleton: Skeleton, layout: Layout, model_args: ModelConfig, state: float, averaged: set[str], on_cpu: bool
) -> dict[str, RolePlan]:
    storage = {index: layout.backbones[name] for name, ids in skeleton.frozen.items() for index in ids}

    def is_mapped(index: int, packed: dict[int, int]) -> bool:
        backbone = storage.get(index)
        if backbone is None:
            return False
        # What quantization leaves alone (embeddings, heads, norms) stays in its file, too.
        whole = backbone.storage == "quantized" and index not in packed and on_cpu
        return backbone.storage == "mapped" or (whole and backbone.checkpoint.dtype == backbone.dtype)

    holder: dict[int, str] = {}

    plans: dict[str, RolePlan] = {}
    for name in [role for role in ROLES if role in skeleton.roles]:
        model = skeleton.roles[name]
        numel = logical_numel(model)
        count = trainable = weights = mapped = shared = 0
        trained_bytes = trained_numel = 0
        shared_with: list[str] = []
        dtypes: dict[str, None] = {}
        for parameter in model.parameters():
            size = parameter.numel() * parameter.element_size()
            logical = numel.get(id(parameter), parameter.numel())
            count += logical
            if parameter.requires_grad:
                trainable += logical
            if id(parameter) in holder:
                shared += size
                if holder[id(parameter)] not in shared_with:
                    shared_with.append(holder[id(parameter)])
            else:
                holder[id(parameter)] = name
                if is_mapped(id(parameter), numel):
                    mapped += size
                else:
                    weights += size
                if parameter.requires_grad:
                    trained_bytes += size
                    trained_numel += parameter.numel()
        for parameter in sorted(model.parameters(), key=lambda p: not p.requires_grad):
            if numel.get(id(parameter), 1):
                packed = "int8" if model_args.load_in_8bit else model_args.bnb_4bit_quant_type
                dtypes[packed if id(parameter) in numel else str(parameter.dtype).removeprefix("torch.")] = None
        plans[name] = RolePlan(
            parameters=count,
            trainable=trainable,
            dtype=", ".join(dtypes),
            weights=weights,
            mapped=mapped,
            shared=shared,
            shared_with=tuple(shared_with),
            gradients=trained_bytes,
            optimizer=int(trained_numel * state) + (trained_bytes if name in averaged else 0),
        )
    return plans


def _largest_layer(skeleton: Skeleton) -> int:
    """Bytes of the largest group of weights that FSDP2 gathers at a time."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    sizes = []
    for model in skeleton.roles.values():
        layers = [size(layer) for layer in layers_of(model)]
        sizes += [max(layers), size(model) - sum(layers)]
    return max(sizes)


def _recorded(args: PPOConfig, decode: int, tops: dict[str, int], share: float) -> dict[str, int]:
    """What the CUDA graphs of each phase compute with, at most, and keep in all others.

    Args:
        args: with `cuda_graphs`.
        decode: what steps of decoding take, with keys and values.
        tops: what phases take.
        share: of a pass of scoring that may be a graph.
    """
    if args.cuda_graphs == "none":
        return {}
    passes = {"scoring": int(share * tops["scoring"]), "update": tops["update"] * (args.cuda_graphs == "all")}
    return {"rollout": decode} | passes


def _kv_cache(layout: Layout, sizes: Sizes, args: PPOConfig) -> int:
    """Keys and values of every layer, at full length."""
    backbone = layout.backbones[layout.roles["policy"].backbone]
    config: Any = backbone.checkpoint.config.get_text_config()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    bf16 = args.bf16 or backbone.dtype == torch.bfloat16
    tokens = sizes.rollout_batch * (sizes.prompt + sizes.response)
    return 2 * int(config.num_hidden_layers) * tokens * groups * head * (2 if bf16 else 4)
