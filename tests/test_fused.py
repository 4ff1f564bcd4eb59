"""RMS norms, rotary positions and SwiGLU by kernels: exact numbers and gradients, in the models that have them."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_forward import PROMPT_LENS, SAMPLES, TOKENIZER
from test_one_token import called  # noqa: F401
from test_rollout import model, sampling
from test_unpadded import policy_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fourscore.models import fused as module
from fourscore.models.forward import completion_logprobs, rectangle
from fourscore.models.fused import fused
from fourscore.models.unpadded import FAMILIES
from fourscore.rollout.transformers import generate

pytestmark = pytest.mark.usefixtures("kernels_are_there")

KERNELS = {
    "norm": FAMILIES - {"gpt2", "gpt_neox", "phi"},
    "swiglu": {"llama", "mistral", "olmo2", "qwen2", "qwen2_moe", "qwen3", "smollm3"},
    "rotate": FAMILIES - {"gpt2", "gpt_neox"},
}
"""The families that have them; the others have no such layer, or another shape of it."""


def compare(wanted: Tensor, y: Tensor, inputs: list[Tensor], exact: list[Tensor]) -> None:
    """Outputs and gradients of fp32 with those of fp64."""
    assert_close(y, wanted.float(), rtol=1e-5, atol=1e-5)
    back = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, exact, back)
    assert_close(torch.autograd.grad(y, inputs, back.float()), [g.float() for g in gradients], rtol=1e-4, atol=1e-4)


def pairs(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [t.requires_grad_() for t in tensors]
    return inputs, [t.detach().double().requires_grad_() for t in tensors]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [1, 8, 20, 64])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_norms(size: int, kind: type[nn.Module]) -> None:
    layer = kind(size, eps=1e-3)
    inputs, exact = pairs(3 * torch.randn(5, 7, size), torch.randn(size))
    layer.weight = nn.Parameter(inputs[1].detach())
    inputs[1] = layer.weight
    scaled = exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-3).sqrt()
    y = module._normed(layer, layer.forward, inputs[0])
    compare(scaled * (exact[1] + (kind is GemmaRMSNorm)), y, inputs, exact)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("numbers", [1, 7, 8, 1000])
def test_swiglu(numbers: int) -> None:
    inputs, exact = pairs(5 * torch.randn(2, numbers), torch.randn(2, numbers))
    compare(F.silu(exact[0]) * exact[1], module._SwiGLU.apply(*inputs), inputs, exact)


def test_swiglu_of_gates_that_are_far_open_or_shut() -> None:
    inputs, exact = pairs(torch.tensor([-3e38, -1e4, -100.0, -88.0, 88.0, 100.0, 1e4]), torch.ones(7))
    compare(F.silu(exact[0]) * exact[1], module._SwiGLU.apply(*inputs), inputs, exact)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [2, 20, 64])
@pytest.mark.parametrize("rows", [1, 3], ids=["positions of all", "positions of each"])
def test_rotary_positions(size: int, rows: int) -> None:
    # The two halves of the angles are alike in transformers; here each number has its own.
    cos, sin = torch.randn(rows, 6, size), torch.randn(rows, 6, size)
    inputs, exact = pairs(torch.randn(3, 6, 4, size).transpose(1, 2), torch.randn(3, 2, 6, size))
    wanted = modeling_llama.apply_rotary_pos_emb(*exact, cos.double(), sin.double())
    with module._rotates(modeling_llama):
        y = modeling_llama.apply_rotary_pos_emb(*inputs, cos, sin)
    for i in range(2):
        compare(wanted[i], y[i], [inputs[i]], [exact[i]])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_of_all_families_compute_the_same(family: str, called: list[str]) -> None:  # noqa: F811
    policy = policy_of(family)
    ids = torch.randint(0, len(TOKENIZER), (3, 9))
    parameters = list(policy.parameters())

    def run() -> tuple[Tensor, Any]:
        logits = policy(input_ids=ids).logits
        return logits, torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)

    wanted = run()
    assert not called
    with fused(policy):
        found = run()
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    made = {name for name in called if not name.endswith("_backward")}
    assert made == {name for name, families in KERNELS.items() if family in families}
    assert set(called) >= {f"{name}_backward" for name in ("norm", "swiglu") if family in KERNELS[name]}
    called.clear()
    run()
    assert not called


def test_passes_and_rollouts_have_them(called: list[str]) -> None:  # noqa: F811
    policy = policy_of("llama")
    completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), 0.7)[0].sum().backward()
    layers = policy.config.num_hidden_layers
    counts = Counter(called)
    assert counts["swiglu"] == counts["swiglu_backward"] == layers
    assert counts["norm"] == counts["norm_backward"] == 2 * layers + 1
    assert counts["rotate"] == 4 * layers
    called.clear()
    generate(model("llama"), [[5, 6], [7]], sampling())
    assert {"norm", "rotate", "swiglu"} <= set(called)


def test_adapters_on_what_is_fused(called: list[str]) -> None:  # noqa: F811
    config = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"], init_lora_weights=False)
    policy = get_peft_model(policy_of("llama"), config)
    ids = torch.randint(0, len(TOKENIZER), (3, 9))
    trained = [p for p in policy.parameters() if p.requires_grad]

    def run() -> Any:
        logits = policy(input_ids=ids).logits
        return logits, torch.autograd.grad(logits.square().mean(), trained)

    wanted = run()
    with fused(policy):
        assert_close(run(), wanted, rtol=1e-4, atol=1e-5)
    assert {"norm", "rotate", "swiglu"} <= set(called)


@pytest.mark.parametrize("why", ["checkpointing", "dtype", "family", "autocast", "no kernels"])
def test_all_else_is_torchs(why: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    policy = policy_of("llama")
    if why == "checkpointing":
        policy.gradient_checkpointing_enable()
    if why == "dtype":
        policy = policy.double()
    if why == "family":
        policy.config.model_type = "another"
    if why == "no kernels":
        monkeypatch.setattr(module.kernels, "are_there", lambda: False)
    ids = torch.randint(0, len(TOKENIZER), (2, 5))
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        wanted = policy(input_ids=ids).logits
        with fused(policy):
            logits = policy(input_ids=ids).logits
    logits.sum().backward()
    assert not called
    assert_close(logits, wanted, rtol=0.02 if why == "autocast" else 0, atol=0.05 if why == "autocast" else 0)


@pytest.mark.parametrize("why", ["activation", "forward", "hook"])
def test_an_mlp_of_another_kind_stays(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act = "gelu" if why == "activation" else "silu"
    layer = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=8, hidden_act=act))
    if why == "forward":
        monkeypatch.setattr(layer, "forward", lambda x: x)
    if why == "hook":
        layer.act_fn.register_forward_hook(lambda *args: None)
    assert module._forward_of(layer) is None
