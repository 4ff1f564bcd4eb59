"""Decoder layers of one new token by a kernel: the tokens and logprobs of layer by layer, and where they are not."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_one_token import called  # noqa: F401
from test_rollout import sampling
from test_unpadded import policy_of

from fourscore.models import kernels
from fourscore.models import layer_of_one_token as module
from fourscore.models.layer_of_one_token import FAMILIES
from fourscore.ppo.experience import Experience
from fourscore.rollout.transformers import generate

pytestmark = pytest.mark.usefixtures("kernels_are_there")

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
STEPS = 6


def policy(family: str, **changes: Any) -> Any:
    return policy_of(family, **({"hidden_size": 64, "head_dim": 16, "sliding_window": None} | changes)).eval()


def rollout(model: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> Experience:
    torch.manual_seed(0)
    draw = sampling(**{"max_new_tokens": STEPS, "temperature": 0.8, "batch_size": 80})
    return generate(model, prompts, draw, **changes)


def compare(model: Any, prompts: list[list[int]] = PROMPTS) -> None:
    with patch.object(kernels, "call", wraps=kernels.call) as call:
        found = rollout(model, prompts)
    assert "decode" in {each.args[0] for each in call.call_args_list}
    with patch.object(module, "_described", lambda layer: None):
        wanted = rollout(model, prompts)
    assert found.completions() == wanted.completions()
    assert found.logprobs is not None and wanted.logprobs is not None
    torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_families_decode_the_same(family: str, called: list[str]) -> None:  # noqa: F811
    model = policy(family)
    compare(model)
    called.clear()
    steps = int(rollout(model).completion_lens.max()) - 1
    assert called.count("decode") == 2 * steps > 0
    assert called.count("few_rows") - steps <= 15, "only the head is left, and prompts"


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 31, 64])
def test_so_do_all_numbers_of_rows(rows: int) -> None:
    compare(policy("llama"), [[5 + row % 7] * (1 + row % 5) for row in range(rows)])


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)], ids=str)
def test_so_do_all_groups_of_heads_and_widths(heads: tuple[int, int]) -> None:
    sizes = {"hidden_size": 60, "intermediate_size": 50, "head_dim": 32}
    compare(policy("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1], **sizes))


def test_biases_and_layers_that_do_not_rotate() -> None:
    compare(policy("llama", attention_bias=True, mlp_bias=True))
    compare(policy("smollm3", no_rope_layers=[1, 0]))


def test_adapters_are_folded_in(called: list[str]) -> None:  # noqa: F811
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(policy("llama"), config).eval()
    compare(model)
    assert "decode" in called
    called.clear()
    rollout(model, pack=False)
    assert "decode" not in called and "few_rows" in called


def test_without_copies_plain_weights_are_enough(called: list[str]) -> None:  # noqa: F811
    rollout(policy("llama"), pack=False)
    assert "decode" in called


@pytest.mark.parametrize("why", ["family", "attention", "hook", "activation", "size of heads", "dtype", "rows"])
def test_all_else_is_layer_by_layer(why: str, called: list[str]) -> None:  # noqa: F811
    changes = {"activation": {"hidden_act": "gelu"}, "size of heads": {"head_dim": 24}}
    model = policy("gemma" if why == "family" else "llama", **changes.get(why, {}))
    seen: list[int] = []
    if why == "hook":
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    if why == "attention":
        model.set_attn_implementation("eager")
    if why == "dtype":
        model = model.double()
    rollout(model, PROMPTS * 25 if why == "rows" else PROMPTS)
    assert bool(seen) == (why == "hook")
    assert "decode" not in called
