"""Attention of one new token: the numbers of torch's, where it is the kernel's and where it is not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_rollout import model, sampling
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourscore.models import kernels, layer_of_one_token
from fourscore.models.one_token import _NAME, seen_from
from fourscore.rollout.transformers import generate

pytestmark = pytest.mark.usefixtures("kernels_are_there")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are called."""
    names: list[str] = []
    own = kernels.call

    def call(name: str, *arguments: Tensor | float | None) -> None:
        names.append(name)
        own(name, *arguments)

    monkeypatch.setattr(kernels, "call", call)
    return names


class Layer(nn.Module):
    """What attention asks of the layer that it is of."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.eval()


def attend(query: Tensor, key: Tensor, value: Tensor, begins: list[int], scaling: float | None = None) -> Tensor:
    layer = Layer(query.shape[1] // key.shape[1])
    with seen_from(torch.tensor(begins)):
        out, weights = ALL_ATTENTION_FUNCTIONS[_NAME](layer, query, key, value, None, scaling=scaling)
    assert weights is None
    return out


def exact(query: Tensor, key: Tensor, value: Tensor, begins: list[int], scaling: float | None = None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    hidden = torch.arange(key.shape[2]) < torch.tensor(begins)[:, None, None, None]
    out = F.scaled_dot_product_attention(query.double(), key, value, ~hidden, scale=scaling)
    return out.transpose(1, 2).float()


def room_behind(rows: int, heads: int, tokens: int, size: int) -> Tensor:
    """Keys or values with room for more tokens, in which nothing is that may be read."""
    whole = torch.full((rows, heads, tokens + 5, size), torch.nan)
    whole[:, :, :tokens] = torch.randn(rows, heads, tokens, size)
    return whole[:, :, :tokens]


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("size", [16, 64, 80])
@pytest.mark.parametrize("scaling", [None, 0.5], ids=["own scale", "scale"])
def test_what_it_gives_is_what_torch_gives(groups: int, size: int, scaling: float | None, called: list[str]) -> None:
    for tokens in (1, 2, 3, 4, 17, 40):
        key, value = room_behind(3, 2, tokens, size), room_behind(3, 2, tokens, size)
        query = torch.randn(3, 1, 2 * groups, size).transpose(1, 2)
        begins = [0, tokens - 1, tokens // 2]
        out = attend(query, key, value, begins, scaling)
        assert_close(out, exact(query, key, value, begins, scaling), rtol=1e-5, atol=1e-5)
    assert called == ["attend"] * 6


def test_large_scores_do_not_overflow() -> None:
    query = torch.randn(1, 2, 1, 16)
    key, value = room_behind(1, 2, 9, 16), room_behind(1, 2, 9, 16)
    assert_close(attend(query * 100, key * 10, value, [0]), exact(query * 100, key * 10, value, [0]))


@pytest.mark.parametrize("why", ["size", "order", "dtype", "several tokens", "begins", "not a step"])
def test_all_else_is_torchs(why: str, called: list[str]) -> None:
    size = 24 if why == "size" else 16
    query = torch.randn(2, 4, 3 if why == "several tokens" else 1, size)
    key, value = torch.randn(2, 2, 5, size), torch.randn(2, 2, 5, size)
    if why == "order":
        key = torch.randn(2, 5, 2, size).transpose(1, 2)
    if why == "dtype":
        query, key, value = query.double(), key.double(), value.double()
    mask = torch.ones(2, 1, query.shape[2], 5, dtype=torch.bool)
    mask[1, ..., :2] = False
    wanted = ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(2), query, key, value, mask)[0]
    if why == "not a step":
        assert torch.equal(ALL_ATTENTION_FUNCTIONS[_NAME](Layer(2), query, key, value, mask)[0], wanted)
    else:
        with seen_from(torch.tensor([0, 2], dtype=torch.int32 if why == "begins" else torch.long)):
            assert torch.equal(ALL_ATTENTION_FUNCTIONS[_NAME](Layer(2), query, key, value, mask)[0], wanted)
    assert not called


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "PEFT"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_a_rollout_attends_so_and_draws_the_same(
    arch: str, adapter: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_of_one_token, "_described", lambda layer: None)  # whole layers would leave nothing to do
    policy = model(arch)
    if adapter:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    prompts = [[5, 6, 7, 8], [9, 10], [11], [5, 6, 7, 8], [3, 4]]
    draw = sampling(max_new_tokens=12, batch_size=3)
    found = generate(policy, prompts, draw).completions()
    assert "attend" in called
    called.clear()
    monkeypatch.setattr(kernels, "are_there", lambda: False)
    assert generate(policy, prompts, draw).completions() == found
    assert not called
    configs = {m.config._attn_implementation for m in policy.modules() if hasattr(m, "config")}
    assert configs == {"sdpa"}


def test_under_autocast_and_in_half_precision_it_is_torchs(called: list[str]) -> None:
    policy, draw = model(), sampling(max_new_tokens=3, batch_size=3)
    with torch.autocast("cpu", torch.bfloat16):
        generate(policy, [[5, 6]], draw)
    generate(policy.bfloat16(), [[5, 6]], draw)
    assert not called
