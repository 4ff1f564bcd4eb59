"""The phases of an update, run on the skeleton of the roles: what each holds beside weights and optimizer state."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fourscore.config import ModelConfig, PPOConfig
from fourscore.models.forward import without_peft
from fourscore.models.layout import Layout
from fourscore.models.support import ALLOWED, PACKED, Support, packed_words
from fourscore.parallel import Parallel
from fourscore.plan.skeleton import build_roles, depth_of, fake_tensors, layers_of
from fourscore.plan.trace import Trace
from fourscore.ppo.experience import Experience
from fourscore.ppo.optim import build_optimizer
from fourscore.ppo.roles import Roles, prepare_roles
from fourscore.ppo.scoring import fill_in, scores_of
from fourscore.ppo.targets import Targets
from fourscore.ppo.update import UpdateSettings, makes_values, update
from fourscore.rewards.text_model import longest_input, text_scores
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import generate

_DEPTHS = (2, 3)


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, batches in samples on one process."""

    prompt: int
    response: int
    rollout_batch: int
    minibatch: int
    microbatch: int


def trace_phases(
    layout: Layout, model_args: ModelConfig, training_args: PPOConfig, sizes: Sizes, device: torch.device
) -> dict[str, dict[str, int]]:
    """Peak bytes of what each phase makes: activations, gradients, KV cache, logits, temporaries.

    The code that trains runs for real, on tensors without data. Models of more than three layers run with two and with
    three: each layer adds the same, so the rest follows. That holds for each part of a phase by itself (peaks of
    different parts may grow at different rates), which is why parts are told apart.

    Args:
        layout: what each role is made of.
        model_args: attention, PEFT, quantization.
        training_args: everything about the update.
        sizes: lengths and batches.
        device: where the roles are to live.

    Returns:
        phase (`rollout`, `scoring`, `update`) -> part -> bytes.
    """
    depths = {name: depth_of(backbone.checkpoint) for name, backbone in layout.backbones.items()}
    deepest = max(depths.values())
    if deepest <= _DEPTHS[1]:
        return _trace(layout, model_args, training_args, sizes, device, None)
    # Frozen layers make no gradients and keep no activations: one stands for all of them.
    args, short = _one_frozen_layer(training_args, layout)
    low, high = (_trace(short, model_args, args, sizes, device, depth) for depth in _DEPTHS)

    def extended(phase: str, part: str) -> int:
        few, more = low[phase].get(part, 0), high[phase].get(part, 0)
        role = layout.roles[next((r for r in ("value_model", "reward_model") if part.startswith(r[:5])), "policy")]
        depth = depths[role.backbone]
        if phase == "update" and role.frozen_layers:
            depth -= role.frozen_layers - 1
        return max(0, more + (more - few) * (depth - _DEPTHS[1]))

    return {phase: {part: extended(phase, part) for part in parts} for phase, parts in high.items()}


def _one_frozen_layer(args: PPOConfig, layout: Layout) -> tuple[PPOConfig, Layout]:
    if not any(role.frozen_layers for role in layout.roles.values()):
        return args, layout
    fewer: Any = copy.copy(args)
    fewer.freeze_layers = 1
    roles = {name: replace(role, frozen_layers=min(role.frozen_layers, 1)) for name, role in layout.roles.items()}
    return fewer, replace(layout, roles=roles)


def _trace(
    layout: Layout,
    model_args: ModelConfig,
    training_args: PPOConfig,
    sizes: Sizes,
    device: torch.device,
    depth: int | None,
) -> dict[str, dict[str, int]]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # It stands for a real tensor on any device.
    granule = 512 if device.type == "cuda" else 64
    with quiet():
        skeleton = build_roles(layout, model_args, training_args, depth)
        fake_tensors(skeleton, fake, device)
        r = skeleton.roles
        roles = prepare_roles(
            training_args,
            r["policy"],
            r.get("ref_policy"),
            r.get("reward_model"),
            r["value_model"],
            None,
            Parallel(device, 0, 1, False),
            reads_text="reward_model" in layout.roles and layout.roles["reward_model"].reads_text,
        )
        rollout = _rollout(roles, training_args, sizes, Trace(fake, granule=granule), Trace(fake, granule=granule))
        support = _support_of(layout, training_args)
        experience = _samples(sizes.rollout_batch, sizes, support, fake)
        scoring = _scoring(roles, experience, training_args, sizes, Trace(fake, granule=granule))
        trained = _update(roles, training_args, sizes, support, fake, Trace(fake, granule=granule))
    return {"rollout": rollout, "scoring": scoring, "update": trained}


@torch.no_grad()
def _rollout(roles: Roles, args: PPOConfig, sizes: Sizes, first: Trace, last: Trace) -> dict[str, int]:
    """Prefill of the prompts, and the last steps of the longest completions."""

    def complete(trace: Trace, prompt: int, new: int, stop_ids: tuple[int, ...] = ()) -> None:
        batch, top_k, top_p = sizes.rollout_batch, args.top_k, args.top_p
        sampling = Sampling(new, args.temperature, stop_ids, None, batch, top_k=top_k, top_p=top_p)

        def enter(module: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
            ids = named["input_ids"] if "input_ids" in named else positional[0]
            trace.enter_part("prefill" if ids.shape[1] > 1 else "decode")

        handle = without_peft(roles.policy).register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with trace, roles.autocast():
                # What supports hold depends on data: they are counted in `support_bytes`.
                # Each another one: those that are equal would be read once.
                prompts = [[row] * prompt for row in range(batch)]
                # A copy of the weights is counted by itself.
                generate(roles.policy, prompts, sampling, keep_support=False, pack=False)
        finally:
            handle.remove()

    roles.policy.eval()
    # Every token ends a completion, for all of which there is room while the prompts are read.
    complete(first, sizes.prompt, sizes.response, tuple(range(roles.policy.config.get_text_config().vocab_size)))
    steps = min(3, sizes.response)
    if steps > 1:
        complete(last, sizes.prompt + sizes.response - steps, steps)
    roles.policy.train()
    return {"prefill": first.peaks["prefill"], "decode": last.peaks.get("decode", 0)}


def _scoring(roles: Roles, e: Experience, args: PPOConfig, sizes: Sizes, trace: Trace) -> dict[str, int]:
    parts = {"value_model": roles.value_model, "policy": roles.policy}
    for name in ("reward_model", "ref_policy"):
        if getattr(roles, name) is not None:
            parts[name] = getattr(roles, name)
    handles = [without_peft(model).register_forward_pre_hook(_entering(trace, part)) for part, model in parts.items()]
    try:
        with trace:
            scores = fill_in(roles, e, args.temperature, sizes.rollout_batch, values=not makes_values(roles, args))
            if scores is None and roles.reads_text:
                limit = longest_input(roles.reward_model, None)
                texts = [{"input_ids": sample.tolist()[:limit]} for sample in e.samples()]
                text_scores(roles.reward_model, texts, sizes.rollout_batch)
            elif scores is None and roles.reward_model is not None:
                scores_of(roles, e, sizes.rollout_batch)
    finally:
        for handle in handles:
            handle.remove()
    return {part: peak for part, peak in trace.peaks.items() if part}


def _update(
    roles: Roles,
    args: PPOConfig,
    sizes: Sizes,
    support: "TokenSupport | None",
    fake: FakeTensorMode,
    trace: Trace,
) -> dict[str, int]:
    """One minibatch, of two microbatches if it has several: the second finds the gradients of the first."""
    microbatches = 2 if sizes.minibatch > sizes.microbatch else 1
    experience = _samples(min(sizes.minibatch, microbatches * sizes.microbatch), sizes, support, fake)
    tokens = int(experience.completion_lens.sum())
    for name in ("logprobs", "ref_logprobs", *(() if makes_values(roles, args) else ("values",))):
        setattr(experience, name, torch.zeros(tokens))
    experience.scores = torch.zeros(len(experience))
    settings = replace(
        UpdateSettings.of(args),
        epochs=1,
        minibatch=len(experience),
        microbatch=sizes.microbatch,
        microbatch_tokens=None,
        early_stop_kl=None,  # numbers without data say nothing of a distance
    )
    optimizers = {name: _warm_optimizer(model, args, fake) for name, model in roles.trained.items()}
    handles = []
    for name, model in roles.trained.items():
        handles.append(model.register_forward_pre_hook(_entering(trace, f"{name} forward, backward")))
        for parameter in _lowest_trained(model):
            entering = _entering(trace, f"{name} backward's end")
            handles.append(parameter.register_post_accumulate_grad_hook(entering))
        handles.append(optimizers[name].register_step_pre_hook(_entering(trace, f"{name} step")))
    generator = torch.Generator().manual_seed(0)
    try:
        with trace:
            update(
                roles.policy,
                roles.value_model,
                experience,
                settings,
                optimizers,
                Parallel(torch.device("cpu"), 0, 1, False),
                generator,
                roles.autocast,
                targets=_Zeros.of(args),
            )
    finally:
        for handle in handles:
            handle.remove()
    return {part: peak for part, peak in trace.peaks.items() if part}


class _Zeros(Targets):
    """Numbers without data make no others."""

    def returns(self, experience: Experience) -> torch.Tensor:
        return torch.zeros(int(experience.completion_lens.sum()))

    def fill_in(self, experience: Experience, reduce: Any) -> None:
        experience.advantages = experience.returns = self.returns(experience)


def _entering(trace: Trace, part: str) -> Any:
    return lambda *args: trace.enter_part(part)


def _lowest_trained(model: nn.Module) -> list[nn.Parameter]:
    """What trains in the lowest layer that trains at all; without one, everything that trains."""
    for layer in layers_of(model) if hasattr(model, "config") else ():  # a head on a shared trunk has none
        trained = [p for p in layer.parameters() if p.requires_grad]
        if trained:
            return trained
    return [p for p in model.parameters() if p.requires_grad]


def _samples(n: int, sizes: Sizes, support: "TokenSupport | None", fake: FakeTensorMode) -> Experience:
    """Samples of the longest prompts and completions; their ids are real, the words of a support are not.

    One is a token shorter: padding for attention alone takes more than rectangles that need none.
    """
    completion_lens = torch.full((n,), sizes.response)
    if n > 1 and sizes.response > 1:
        completion_lens[-1] -= 1
    tokens = int(completion_lens.sum())
    experience = Experience(
        input_ids=torch.ones(n * sizes.prompt + tokens, dtype=torch.long),
        prompt_lens=torch.full((n,), sizes.prompt),
        completion_lens=completion_lens,
        has_eos=torch.ones(n, dtype=torch.bool),
    )
    if support is not None:
        with fake:
            words = torch.zeros(tokens * support.words, dtype=torch.int32)
        kinds = torch.full((tokens,), support.kind, dtype=torch.uint8)
        experience.support = Support(words, torch.full((tokens,), support.words), kinds, support.vocabulary)
    return experience


@dataclass(frozen=True)
class TokenSupport:
    """The most that the support of one token can take.

    Attributes:
        words: of 4 bytes.
        kind: of the words, as in `Support`.
        vocabulary: ids there are.
    """

    words: int
    kind: int
    vocabulary: int

    @property
    def nbytes(self) -> int:
        """With what says how many words there are and of what kind."""
        return 4 * self.words + 8 + 1


def _support_of(layout: Layout, args: PPOConfig) -> TokenSupport | None:
    """None where every token is drawn from the whole vocabulary."""
    config: Any = layout.backbones[layout.roles["policy"].backbone].checkpoint.config.get_text_config()
    size: int = config.vocab_size
    if args.top_k or args.top_p < 1:
        packed = packed_words(size)
        listed = args.top_k and args.top_k <= packed
        return TokenSupport(args.top_k, ALLOWED, size) if listed else TokenSupport(packed, PACKED, size)
    stops = len(args.stop_token_id or ()) or int(args.stop_token == "eos")
    return TokenSupport(stops, ALLOWED, size) if stops and args.min_response_length > 1 else None


def support_bytes(layout: Layout, args: PPOConfig, samples: int) -> int:
    """The most that the supports of so many samples can take; 0 where tokens are drawn from the whole vocabulary."""
    support = _support_of(layout, args)
    return 0 if support is None else samples * args.response_length * support.nbytes


def _warm_optimizer(model: nn.Module, args: PPOConfig, fake: FakeTensorMode) -> torch.optim.Optimizer:
    """The optimizer after its first step, when its state is there; plain SGD for those that cannot run without data."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        optimizer = build_optimizer(model, args)
        with Trace(fake), torch.no_grad():
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except Exception:  # kernels of other packages, which know no fake tensors
        for parameter in trained:
            parameter.grad = None
        optimizer = torch.optim.SGD(trained, lr=0.0)
    return optimizer


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines and warnings: what is to be said of the roles is said when they are made for real."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
