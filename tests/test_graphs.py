"""Decoding over rows that stay in their place, passes of a fixed size, and on a GPU both as CUDA graphs."""

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import ARCHITECTURES, make_config, make_tokenizer
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fourscore.models import pass_graphs
from fourscore.models.adapters import add_policy_adapter, add_value_adapter
from fourscore.models.forward import completion_logprobs, completion_values, rectangle, without_peft
from fourscore.models.forward_as import forward_as
from fourscore.models.unpadded import attention_is
from fourscore.rollout.decode import Rows, can_decode, decode
from fourscore.rollout.graphs import FixedRows, StepGraphs, can_record
from fourscore.rollout.sampling import Completed, Sampling
from fourscore.rollout.transformers import generate

TOKENIZER = make_tokenizer()
STOP = (0, 5)
PROMPTS = sorted([[i % 16, 3, *range(i % 7)] for i in range(21)], key=len, reverse=True)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model(arch: str = "llama", *, lora: bool = False, device: str = "cpu", **cfg: Any) -> Any:
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(make_config(arch, TOKENIZER, vocab_size=16, **cfg))
    if lora:
        policy = add_policy_adapter(policy, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return policy.eval().to(device)


def completed(policy: Any, rows_of: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> Completed:
    """What is drawn from one seed."""
    chosen = {"max_new_tokens": 24, "temperature": 1.0, "stop_ids": STOP, "eos_id": None, "batch_size": 6} | changes
    torch.manual_seed(1)
    return decode(policy, prompts, Sampling(**chosen), keep_support=False, keep_logprobs=False, rows_of=rows_of)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_that_stay_in_their_place_give_the_same_tokens(arch: str, lora: bool) -> None:
    policy = model(arch, lora=lora)
    if not can_decode(policy):
        pytest.skip("has a decoding of its own")
    expected = completed(policy, Rows).completions
    assert len({len(tokens) for tokens in expected}) > 4, "rows end together: the comparison says nothing"
    rows = FixedRows(policy, 6, 40)

    def again(*args: Any) -> FixedRows:
        rows.clear()
        return rows

    for _ in range(2):  # the second time over what the first has left
        assert completed(policy, again).completions == expected


def test_a_step_attends_to_as_many_rows_as_a_power_of_two() -> None:
    policy, seen = model(), []
    policy.register_forward_pre_hook(lambda m, a, named: seen.append(named["input_ids"].shape), with_kwargs=True)
    found = completed(policy, FixedRows, PROMPTS[:6])
    lens = [len(tokens) for tokens in found.completions]
    going_on = [sum(length > step for length in lens) for step in range(1, max(lens))]
    sizes = [rows for rows, tokens in seen if tokens == 1]
    assert sizes == [min(6, 1 << (count - 1).bit_length()) for count in going_on]
    assert len(set(sizes)) > 2


def test_rows_let_go_of_keys_and_values_at_once() -> None:
    rows = FixedRows(model(), 6, 40)
    completed(model(), lambda *args: rows)
    keys = weakref.ref(rows._layers[0].keys)
    gc.disable()
    try:
        rows.free()
        assert keys() is None
    finally:
        gc.enable()


def test_without_a_gpu_rows_are_as_ever() -> None:
    policy = model()
    assert not can_record(policy)
    assert type(StepGraphs().rows(policy, 2, 8)) is Rows


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The graphs that ran."""
    found: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (found.append(graph), replay(graph))[1])
    return found


@on_a_gpu
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_graphs_give_the_same_tokens(arch: str, lora: bool, replays: list[Any]) -> None:
    policy, graphs = model(arch, lora=lora, device="cuda"), StepGraphs()
    expected = completed(policy, Rows).completions
    for _ in range(2):
        assert completed(policy, graphs.rows).completions == expected
    assert len({id(graph) for graph in replays}) == 4, "rows of 6, 4, 2 and 1"
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    changed = completed(policy, Rows).completions
    assert changed != expected
    assert completed(policy, graphs.rows).completions == changed, "weights are read in every step"
    assert len({id(graph) for graph in replays}) == 4
    longer = [[7] * 90, *PROMPTS]
    assert completed(policy, graphs.rows, longer).completions == completed(policy, Rows, longer).completions
    moved = model(arch, lora=lora, device="cuda")
    assert completed(moved, graphs.rows).completions == expected, "another model has graphs of its own"


@on_a_gpu
def test_graphs_under_autocast_see_trained_adapters(replays: list[Any]) -> None:
    policy, graphs = model(lora=True, hidden_size=128, device="cuda"), StepGraphs()
    for name, parameter in policy.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            found = completed(policy, graphs.rows, PROMPTS[:4], stop_ids=())
        rows, eager = graphs._rows, FixedRows(policy, 4, 40)
        assert rows is not None
        with torch.autocast("cuda", torch.bfloat16):
            again = completed(policy, lambda *args, eager=eager: eager, PROMPTS[:4], stop_ids=())
        assert found.completions == again.completions
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora" in name:
                    parameter += torch.randn_like(parameter)
    assert len({id(graph) for graph in replays}) == 1


@on_a_gpu
@pytest.mark.parametrize("wait", [lambda out: out.sum().item() and None, lambda out: torch.cuda.synchronize()])
def test_what_cannot_be_a_graph_decodes_without(wait: Any, caplog: pytest.LogCaptureFixture) -> None:
    policy, graphs = model(device="cuda"), StepGraphs()
    handle = policy.model.layers[1].register_forward_hook(lambda m, a, out: wait(out))
    expected = completed(policy, Rows).completions
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert completed(policy, graphs.rows).completions == expected
    assert caplog.text.count("not made CUDA graphs") == 1
    handle.remove()


@on_a_gpu
def test_support_and_sampling_with_graphs() -> None:
    policy, graphs = model(device="cuda"), StepGraphs()
    draw = Sampling(24, 1.0, STOP, None, 6, top_k=5)
    drawn = []
    for kept in (None, graphs, graphs):
        torch.manual_seed(1)
        drawn.append(generate(policy, PROMPTS, draw, graphs=kept))
    for other in drawn[1:]:
        assert torch.equal(other.input_ids, drawn[0].input_ids)
        assert other.support is not None and len(other.support) == int(other.completion_lens.sum())


# ------------------------------------------------------------------ passes

SAMPLES = [torch.arange(1, 1 + n) % 16 for n in (11, 4, 7, 2, 9)]
PROMPT_LENS = torch.tensor([3, 1, 6, 1, 4])


def results(policy: Any, critic: Any) -> list[Tensor]:
    """Logprobs, values, and the gradients that two passes of each leave together."""
    device = next(policy.parameters()).device
    found = []
    for some in (slice(0, 3), slice(2, 5)):
        batch = rectangle([sample.to(device) for sample in SAMPLES[some]], PROMPT_LENS[some].to(device))
        weights = torch.linspace(-1, 1, len(batch.targets), device=device)
        logprobs = completion_logprobs(policy, batch, 0.7)[0]
        (logprobs * weights).sum().backward()
        values = completion_values(critic, batch)
        (values * weights).sum().backward()
        with torch.no_grad():
            found += [logprobs.detach(), values.detach(), completion_logprobs(policy, batch, 0.7)[0]]
            with policy.disable_adapter():
                found.append(completion_logprobs(policy, batch, 0.7)[0])
    trained = [p for each in (policy, critic) for p in each.parameters() if p.requires_grad]
    found += [p.grad.clone() for p in trained]
    for parameter in trained:
        parameter.grad = None
    return found


def adapted_pair(arch: str, device: str) -> tuple[Any, Any]:
    sizes = {"n_embd": 256} if arch == "gpt2" else {"hidden_size": 256, "intermediate_size": 512}
    policy = model(arch, lora=True, device=device, **sizes)
    torch.manual_seed(2)
    critic: Any = AutoModelForSequenceClassification.from_config(
        make_config(arch, TOKENIZER, "reward", vocab_size=16, **sizes)
    )
    critic = add_value_adapter(critic, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return policy, critic.eval().to(device)


def trunk_of(policy: Any) -> Any:
    return without_peft(policy).base_model


class WithoutAGraph:
    """Computes what a recorded pass does, without recording."""

    def __init__(self, policy: Any, trunk: Any, rows: int, columns: int, trained: list[Any]) -> None:
        self.policy, self.trunk, self.shape, self.own = policy, trunk, (rows, columns), trunk.forward

    def __call__(self, ids: Tensor) -> Any:
        n, width = ids.shape
        cells = ids.new_zeros(self.shape)
        cells[:n, :width] = ids
        with attention_is(self.policy, pass_graphs._NAME), forward_as(self.trunk, self.own):
            out = pass_graphs.bare_forward(self.trunk, cells)
        return type(out)(last_hidden_state=out.last_hidden_state[:n, :width])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_passes_of_a_fixed_size_give_the_same(arch: str, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, critic = adapted_pair(arch, "cpu")
    expected = results(policy, critic)
    recorded: list[WithoutAGraph] = []
    monkeypatch.setattr(pass_graphs, "_Pass", lambda *args: (recorded.append(WithoutAGraph(*args)), recorded[-1])[1])
    for each in (policy, critic):
        pass_graphs._allowed[trunk_of(each)] = pass_graphs._Graphs(1, gradients=gradients)
    assert_close(results(policy, critic), expected, atol=1e-4, rtol=1e-3)
    assert {one.shape for one in recorded} == {(4, 64)}
    expected_passes = 4 if gradients else 2
    assert len(recorded) == expected_passes, "to score, and without its adapter; to train, of each model"


def test_no_more_passes_are_recorded_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = adapted_pair("llama", "cpu")
    monkeypatch.setattr(pass_graphs, "_Pass", WithoutAGraph)
    trunk = trunk_of(policy)
    pass_graphs._allowed[trunk] = pass_graphs._Graphs(1, gradients=True)
    rows = range(1, pass_graphs._MOST_PASSES + 2)
    ids = [torch.zeros(1, 64 * n, dtype=torch.long) for n in rows]
    assert [pass_graphs.recorded_pass(policy, trunk, each) is not None for each in ids] == [n < rows[-1] for n in rows]
    assert pass_graphs.recorded_pass(policy, trunk, ids[0]) is not None, "what is recorded stays"
    policy.get_base_model().model.layers[0].register_forward_hook(lambda module, args, out: out)
    assert pass_graphs.recorded_pass(policy, trunk, ids[0]) is None, "a graph would not run the hook"


def test_without_a_gpu_no_pass_is_recorded() -> None:
    policy, _ = adapted_pair("llama", "cpu")
    with pass_graphs.allowed([trunk_of(policy)], gradients=True):
        assert pass_graphs.recorded_pass(policy, trunk_of(policy), torch.zeros(2, 8, dtype=torch.long)) is None


@on_a_gpu
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_recorded_passes_give_the_same(arch: str, gradients: bool, replays: list[Any]) -> None:
    policy, critic = adapted_pair(arch, "cuda")
    expected = results(policy, critic)
    with pass_graphs.allowed([trunk_of(policy), trunk_of(critic)], gradients=gradients):
        for _ in range(2):
            assert_close(results(policy, critic), expected, atol=1e-4, rtol=1e-3)
        assert len({id(graph) for graph in replays}) == (6 if gradients else 2), "forward, and backward where it trains"
        with torch.no_grad():
            for each in (policy, critic):
                for parameter in each.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        found = results(policy, critic)
    assert_close(found, results(policy, critic), atol=1e-4, rtol=1e-3)
    assert (found[0] - expected[0]).abs().max() > 0.1


@on_a_gpu
def test_a_pass_that_waits_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    policy, critic = adapted_pair("llama", "cuda")
    expected = results(policy, critic)
    layer = policy.get_base_model().model.layers[0]
    own = layer.forward
    layer.forward = lambda *args, **named: (torch.cuda.synchronize(), own(*args, **named))[1]
    with caplog.at_level(logging.WARNING), pass_graphs.allowed([trunk_of(policy)], gradients=True):
        assert_close(results(policy, critic), expected)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert caplog.text.count("not made CUDA graphs") == 1
    torch.rand(3, device="cuda")


@on_a_gpu
def test_a_pass_between_forward_and_backward_is_an_error() -> None:
    policy, critic = adapted_pair("llama", "cuda")
    batch = rectangle([sample.cuda() for sample in SAMPLES], PROMPT_LENS.cuda())
    with pass_graphs.allowed([trunk_of(policy), trunk_of(critic)], gradients=True):
        logprobs = completion_logprobs(policy, batch, 0.7)[0]
        completion_values(critic, batch)
        with pytest.raises(RuntimeError, match="--cuda_graphs forward"):
            logprobs.sum().backward()
