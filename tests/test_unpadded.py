"""Samples back to back in one row give what each of them gives alone, and no layer but attention sees padding."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_forward import (
    CLOSE,
    EOS,
    PROMPT_LENS,
    SAMPLES,
    TOKENIZER,
    in_training,
    own_scores,
    plain_logprobs,
    plain_values,
)
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from fourscore.models.adapters import add_policy_adapter
from fourscore.models.forward import completion_logprobs, completion_values, microbatches, rectangle, sample_scores
from fourscore.models.unpadded import FAMILIES, Layout, can_unpad
from fourscore.parallel import forward_passes

TOKENS, CELLS = sum(map(len, SAMPLES)), len(SAMPLES) * max(map(len, SAMPLES))


def make(family: str, kind: Any, **changes: Any) -> Any:
    """A small model with random weights, large enough that attention matters."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4 if family in ("gpt2", "gpt_neox", "phi") else 2, "head_dim": 8}
    sizes |= {"moe_intermediate_size": 24, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    ids = {"eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": None}
    config = CONFIG_MAPPING[family](vocab_size=len(TOKENIZER), num_labels=1, **(sizes | ids | changes))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind.from_config(config, attn_implementation=changes.get("attn_implementation"))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return in_training(model)


def policy_of(family: str, **changes: Any) -> Any:
    return make(family, AutoModelForCausalLM, **changes)


def critic_of(family: str, **changes: Any) -> Any:
    return make(family, AutoModelForSequenceClassification, **changes)


def rows_seen(model: nn.Module, run: Any) -> set[int]:
    """How many tokens the layers of each block see in a run."""
    seen: set[int] = set()

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.add(args[0].shape[:-1].numel())

    names = ("mlp", "feed_forward", "block_sparse_moe")
    handles = [m.register_forward_pre_hook(note) for name, m in model.named_modules() if name.endswith(names)]
    assert handles
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_what_each_sample_gives_alone(family: str) -> None:
    policy, critic = policy_of(family), critic_of(family)
    batch, weights = rectangle(SAMPLES, PROMPT_LENS), torch.linspace(-1, 1, 14)
    assert can_unpad(policy, 11) and can_unpad(critic, 11)
    for model, ours, plain in (
        (policy, lambda: completion_logprobs(policy, batch, 0.7)[0], lambda: plain_logprobs(policy, 0.7)[0]),
        (critic, lambda: completion_values(critic, batch), lambda: plain_values(critic)),
    ):
        found: list[Tensor] = []
        assert rows_seen(model, lambda ours=ours, found=found: found.append(ours())) == {TOKENS}
        (found[0] * weights).sum().backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        expected = plain()
        assert_close(found[0], expected, **CLOSE)
        assert expected.std() > 0.1
        (expected * weights).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_close(got[name], parameter.grad, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert_close(sample_scores(critic, SAMPLES).detach(), own_scores(critic, SAMPLES), **CLOSE)


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("a window shorter than a sample", {"sliding_window": 4}),
        ("another attention", {"attn_implementation": "eager"}),
        ("activations that are made again", {}),
    ],
)
def test_what_needs_padding_has_it(why: str, changes: dict[str, Any]) -> None:
    policy = policy_of("mistral", **changes)
    if not changes:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    batch = rectangle(SAMPLES, PROMPT_LENS)
    found: list[Tensor] = []
    assert rows_seen(policy, lambda: found.append(completion_logprobs(policy, batch, 0.7)[0])) == {CELLS}
    expected = plain_logprobs(policy, 0.7)[0]
    assert_close(found[0], expected, **CLOSE)
    query = policy.model.layers[0].self_attn.q_proj.weight
    found[0].sum().backward()
    got, query.grad = query.grad, None
    expected.sum().backward()
    assert_close(got, query.grad, rtol=1e-3, atol=2e-4)
    if not changes:  # without a backward pass nothing is made again
        with torch.no_grad():
            assert rows_seen(policy, lambda: completion_logprobs(policy, batch, 0.7)) == {TOKENS}


def test_samples_of_one_length_stay_as_they_are() -> None:
    policy = policy_of("llama")
    samples = [sample[:2] for sample in SAMPLES]
    shapes: list[Any] = []
    policy.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    completion_logprobs(policy, rectangle(samples, torch.tensor([1, 1, 1, 1])), 1.0)
    assert shapes == [(4, 2)]


def test_a_window_that_no_sample_leaves_is_none() -> None:
    assert can_unpad(policy_of("mistral", sliding_window=11), 11)
    assert not can_unpad(policy_of("mistral", sliding_window=10), 11)


def test_attention_is_as_before_after_an_error_and_for_layers_with_a_config_of_their_own() -> None:
    policy = policy_of("llama", attention_dropout=0.5)
    layer = policy.model.layers[0].self_attn
    assert layer.config is not policy.config
    batch = rectangle(SAMPLES, PROMPT_LENS)
    assert_close(completion_logprobs(policy, batch, 0.7)[0], plain_logprobs(policy, 0.7)[0], **CLOSE)
    batch.input_ids[0, 0] = 10_000
    with pytest.raises(IndexError):
        completion_logprobs(policy, batch, 0.7)
    assert policy.config._attn_implementation == layer.config._attn_implementation == "sdpa"


def test_a_layout_gives_every_token_its_cell() -> None:
    lens = torch.tensor([3, 1, 4, 2])
    layout = Layout.of(lens, [torch.tensor([2, 0]), torch.tensor([3, 1])])
    assert layout.shapes == [(2, 4), (2, 2)]
    # Rows of four cells for the samples 2 and 0, and of two for 3 and 1.
    assert layout.cells.tolist() == [4, 5, 6, 10, 0, 1, 2, 3, 8, 9]


def test_passes_without_padding_are_even_and_hold_no_more_tokens_than_so_many_of_the_longest() -> None:
    lens = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1] * 20)
    groups = microbatches(lens, 64, padded=False)
    assert sorted(i for group in groups for i in group.tolist()) == list(range(160))
    tokens = [int(lens[group].sum()) for group in groups]
    assert len(tokens) == 2 and max(tokens) - min(tokens) <= 8  # 720 tokens, at most 512 a pass
    assert [len(g) for g in microbatches(lens[:2], 1, tokens=1, padded=False)] == [1, 1]
    llama = policy_of("llama")
    assert [g.tolist() for g in forward_passes(llama, lens, 64)] == [g.tolist() for g in groups]
    padded = [g.tolist() for g in microbatches(lens, 64)]
    assert [g.tolist() for g in forward_passes(llama, lens, 64, padded=True)] == padded
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    assert [g.tolist() for g in forward_passes(llama, lens, 64)] == padded != [g.tolist() for g in groups]


def test_under_lora_every_config_is_found() -> None:
    model = add_policy_adapter(policy_of("qwen2"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    batch = rectangle(SAMPLES, PROMPT_LENS)
    found: list[Tensor] = []
    assert rows_seen(model, lambda: found.append(completion_logprobs(model, batch, 0.7)[0])) == {TOKENS}
    assert_close(found[0], plain_logprobs(model, 0.7)[0], **CLOSE)
