"""A plan as people and machines read it."""

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fourscore.plan.advice import Advice
from fourscore.plan.estimate import Plan

_STORED = {
    "mapped": "mapped from its file",
    "converted": "one copy in memory",
    "quantized": "quantized, one copy in memory",
    "device": "one copy on the device",
}


def size(count: int) -> str:
    """Bytes for people: MiB below 10 GiB, else GiB."""
    return f"{count / 2**20:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.1f} GiB"


def as_json(plan: Plan, advice: list[Advice]) -> dict[str, Any]:
    """The plan as plain values; sizes are bytes, of one process."""
    layout = plan.layout
    return {
        "roles": {
            name: {
                "parameters": role.parameters,
                "trainable": role.trainable,
                "dtype": role.dtype,
                "weights_bytes": role.weights,
                "mapped_bytes": role.mapped,
                "shared_bytes": role.shared,
                "shared_with": list(role.shared_with),
                "gradients_bytes": role.gradients,
                "optimizer_bytes": role.optimizer,
            }
            for name, role in plan.roles.items()
        },
        "shared": {
            name: {
                "roles": roles,
                "checkpoint": layout.backbones[name].checkpoint.path,
                "dtype": str(layout.backbones[name].dtype).removeprefix("torch."),
                "storage": layout.backbones[name].storage,
            }
            for name, roles in layout.shared().items()
        },
        "total": {
            "weights_bytes": sum(role.weights for role in plan.roles.values()),
            "mapped_bytes": plan.mapped_bytes,
            "optimizer_bytes": sum(role.optimizer for role in plan.roles.values()),
            "trainable": sum(role.trainable for role in plan.roles.values()),
        },
        "peak_bytes": plan.peak_bytes,
        "parts_bytes": plan.parts,
        "kv_cache_bytes": plan.kv_cache,
        "packed_bytes": plan.packed,
        "cuda_graphs_bytes": plan.graphs,
        "idle_bytes": plan.idle,
        "support_bytes": plan.support,
        "baseline_bytes": plan.baseline,
        "mapped_bytes": plan.mapped_bytes,
        "sizes": {
            "prompt_tokens": plan.sizes.prompt,
            "response_tokens": plan.sizes.response,
            "rollout_batch": plan.sizes.rollout_batch,
            "minibatch": plan.sizes.minibatch,
            "microbatch": plan.sizes.microbatch,
        },
        "device": plan.device,
        "world_size": plan.world_size,
        "sharding": plan.sharding,
        "processes_here": plan.processes_here,
        "capacity_bytes": {"host": plan.capacity.host, "device": plan.capacity.device},
        "available_bytes": plan.available,
        "fits": plan.fits,
        "assumptions": list(plan.assumptions),
        "advice": [{"flags": a.flags, "cost": a.harm, "peak_bytes": a.peak_bytes, "fits": a.fits} for a in advice],
    }


def print_plan(console: Console, plan: Plan, advice: list[Advice]) -> None:
    """Tables of roles and phases, what is shared, and the verdict; at most 100 columns."""
    console.print(_roles_table(plan))
    for line in _sharing(plan):
        console.print(Text(line))
    console.print()
    console.print(_phases_table(plan))
    for sentence in plan.assumptions:
        console.print(Text(f"Assumed: {sentence}."))
    console.print(Text(verdict(plan), style="bold" if plan.fits else "bold red"))
    if advice:
        console.print(advice_table(advice))


def short_form(plan: Plan) -> list[str]:
    """The plan in a few lines, for the start of a run."""
    roles = ", ".join(
        f"{name} {_count(role.parameters)}" + (f" ({_count(role.trainable)} train)" if role.trainable else "")
        for name, role in plan.roles.items()
    )
    lines = [f"plan: {roles}"]
    lines += [f"plan: {line}" for line in _sharing(plan)]
    lines.append(f"plan: {verdict(plan)}")
    return lines


def verdict(plan: Plan) -> str:
    """Whether it fits, in one sentence."""
    peak = plan.peak_bytes[plan.largest]
    processes = "" if plan.world_size == 1 else f" in each of {plan.world_size} processes"
    where = "on the device" if plan.capacity.device is not None else "of this machine"
    room = f"the {size(plan.available)} free {where}"
    if plan.processes_here > 1 and plan.capacity.device is None:
        room = f"{size(plan.available)}, a process's share of this machine"
    return (
        f"the peak is {size(peak)}{processes}, in the {plan.largest} phase: "
        f"{'within' if plan.fits else 'DOES NOT FIT in'} {room}"
    )


def advice_lines(advice: list[Advice]) -> list[str]:
    """One line a proposal."""
    return [f"{a.flags} ({a.harm}): {size(a.peak_bytes)}{'' if a.fits else ', not enough alone'}" for a in advice]


def advice_table(advice: list[Advice]) -> Table | Group:
    """The proposals, least harm first."""
    table = Table("add", "cost", title="what would help, least harm first", title_justify="left", width=100)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("fits")
    for a in advice:
        table.add_row(Text(a.flags), a.harm, size(a.peak_bytes), "yes" if a.fits else "no")
    return table


def _roles_table(plan: Plan) -> Table:
    each = "" if plan.world_size == 1 else f", one of {plan.world_size} processes"
    if plan.sharding == "fsdp":
        each = f", before sharding over {plan.world_size} processes"
    table = Table(title=f"roles{each}", title_justify="left")
    table.add_column("")
    for column in ("parameters", "train", "dtype", "weights", "mapped", "shared", "gradients", "optimizer"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for name, role in plan.roles.items():
        table.add_row(
            name,
            _count(role.parameters),
            _count(role.trainable),
            role.dtype,
            *(_cell(b) for b in (role.weights, role.mapped, role.shared, role.gradients, role.optimizer)),
        )
    roles = plan.roles.values()
    table.add_section()
    table.add_row(
        "together",
        "",
        _count(sum(r.trainable for r in roles)),
        "",
        _cell(sum(r.weights for r in roles)),
        _cell(sum(r.mapped for r in roles)),
        "",
        _cell(sum(r.gradients for r in roles)),
        _cell(sum(r.optimizer for r in roles)),
    )
    table.caption = "MiB"
    table.caption_justify = "left"
    return table


def _phases_table(plan: Plan) -> Table:
    s = plan.sizes
    table = Table("phase", title="peak by phase, MiB", title_justify="left")
    for column in ("process", "weights", "optimizer", "the phase itself", "peak"):
        table.add_column(column, justify="right")
    table.add_column("at most")
    shards = plan.world_size if plan.sharding == "fsdp" else 1
    weights = sum(r.weights for r in plan.roles.values()) // shards
    optimizer = sum(r.optimizer for r in plan.roles.values()) // shards
    total = s.prompt + s.response
    support = f", support {_cell(plan.support)}" if plan.support else ""
    copy = f", packed copy {_cell(plan.packed)}" if plan.packed else ""
    idle = f", {_cell(plan.idle)} kept idle" if plan.idle else ""
    idle += f", CUDA graphs {_cell(plan.graphs)}" if plan.graphs else ""
    notes = {
        "load": "",
        "rollout": f"{s.rollout_batch} x {total} tokens, KV cache {_cell(plan.kv_cache)}{copy}{support}{idle}",
        "scoring": f"{s.rollout_batch} x {total} tokens{idle}",
        "update": f"{s.microbatch} x {total} tokens{idle}",
    }
    for phase, peak in plan.peak_bytes.items():
        state = 0 if phase == "load" else optimizer
        rest = peak - plan.baseline - weights - state
        row = (_cell(plan.baseline), _cell(weights), _cell(state), _cell(rest), _cell(peak))
        table.add_row(phase, *row, notes[phase], style="bold" if phase == plan.largest else "")
    return table


def _sharing(plan: Plan) -> list[str]:
    lines = []
    for name, roles in plan.layout.shared().items():
        backbone = plan.layout.backbones[name]
        on = list(roles)
        if "ref_policy" not in plan.layout.roles and "policy" in on:
            on.insert(on.index("policy") + 1, "ref_policy (the policy without its adapter)")
        dtype = str(backbone.dtype).removeprefix("torch.")
        lines.append(f"{backbone.checkpoint.path} ({dtype}, {_STORED[backbone.storage]}): {', '.join(on)}")
    return lines


def _count(n: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g}{unit}"
    return str(n)


def _cell(count: int) -> str:
    return f"{count / 2**20:,.0f}" if count >= 2**20 or count == 0 else "<1"
