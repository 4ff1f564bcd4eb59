"""Logprobs, values and scores of padded batches against plain forwards of each sample alone, for every architecture."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import ARCHITECTURES, make_model, make_tokenizer
from torch import Tensor, nn
from torch.testing import assert_close

import fourscore.models.forward as forward_module
from fourscore.errors import FourscoreError
from fourscore.models import forward
from fourscore.models.adapters import add_policy_adapter, add_value_adapter
from fourscore.models.dropout import disable_dropout
from fourscore.models.forward import (
    Rectangle,
    completion_logprobs,
    completion_values,
    rectangle,
    sample_scores,
    score_head,
)
from fourscore.models.support import Support
from fourscore.models.unpadded import can_unpad
from fourscore.ppo.experience import Experience
from fourscore.ppo.scoring import logprobs_of, values_of
from fourscore.rewards.model import score

TOKENIZER = make_tokenizer("own")
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
SAMPLES = [
    torch.tensor([5, 6, 7, 80, 81, EOS]),
    torch.tensor([20, 82]),
    torch.tensor([30, PAD, 31, 0, 83, 84, 85, 86, 87, 88, 0]),
    torch.tensor([40, 41, 42, 89, EOS]),
]
PROMPT_LENS = torch.tensor([3, 1, 4, 2])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def short_window(arch: str) -> dict[str, int]:
    """Gemma's attention window, shorter than the samples, so that it matters."""
    return {"sliding_window": 4} if arch.startswith("gemma") else {}


def in_training(model: Any) -> Any:
    """As the trainer has it: training mode, without dropout."""
    disable_dropout(model)
    return model.train()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(arch: str) -> Any:
    return in_training(make_model(arch, TOKENIZER, "policy", **short_window(arch)))


@pytest.fixture(scope="module")
def critic(arch: str) -> Any:
    return in_training(make_model(arch, TOKENIZER, "reward", seed=1, **short_window(arch)))


def each_alone() -> Iterator[tuple[Tensor, int]]:
    yield from zip(SAMPLES, PROMPT_LENS.tolist(), strict=True)


def plain_logprobs(policy: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """From the whole logits of one unpadded sample after the other."""
    logprobs, entropies = [], []
    for sample, prompt_len in each_alone():
        logits = policy(input_ids=sample[None], attention_mask=torch.ones(1, len(sample)), use_cache=False).logits[0]
        distribution = (logits[prompt_len - 1 : -1] / temperature).log_softmax(-1)
        logprobs += [row[token] for row, token in zip(distribution, sample[prompt_len:], strict=True)]
        entropies.append(-(distribution.double().exp() * distribution.double()).sum(-1))
    return torch.stack(logprobs), torch.cat(entropies).float()


def entropies_that_train(policy: Any, batch: Rectangle) -> Tensor:
    return completion_logprobs(policy, batch, 0.7, entropy_trains=True)[1]


def plain_values(critic: Any) -> Tensor:
    values = []
    for sample, prompt_len in each_alone():
        hidden = critic.base_model(input_ids=sample[None], use_cache=False).last_hidden_state[0]
        values.append(critic.score(hidden[prompt_len - 1 : -1])[:, 0])
    return torch.cat(values)


def own_scores(model: Any, samples: list[Tensor]) -> Tensor:
    """What the checkpoint's own forward says of unpadded ids."""
    with torch.no_grad():
        return torch.cat([model(input_ids=sample[None]).logits[0] for sample in samples])


# ------------------------------------------------------------------ every architecture


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_equal_a_plain_forward(policy: Any, temperature: float) -> None:
    with torch.no_grad():
        logprobs, entropy = completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), temperature)
        expected, expected_entropy = plain_logprobs(policy, temperature)
    assert_close(logprobs, expected, **CLOSE)
    assert_close(entropy, expected_entropy, **CLOSE)
    assert expected.std() > 0.1, "all logprobs are the same: the comparison says nothing"


def test_values_equal_head_on_backbone(critic: Any) -> None:
    with torch.no_grad():
        values = completion_values(critic, rectangle(SAMPLES, PROMPT_LENS))
        expected = plain_values(critic)
    assert_close(values, expected, **CLOSE)
    assert expected.std() > 0.1


def test_scores_equal_the_checkpoints_own_forward(critic: Any) -> None:
    scores = sample_scores(critic, SAMPLES).detach()
    assert_close(scores, own_scores(critic, SAMPLES), **CLOSE)
    assert scores.std() > 0.1


@contextlib.contextmanager
def pad_token_id(model: Any, value: int | None) -> Iterator[None]:
    before, model.config.pad_token_id = model.config.pad_token_id, value
    yield
    model.config.pad_token_id = before


@pytest.mark.parametrize("pad", [None, EOS, PAD, 86])
def test_scores_equal_the_checkpoints_own_forward_whatever_its_pad_token(critic: Any, pad: int | None) -> None:
    """EOS as pad: such a checkpoint reads the token before EOS. 86 is a token in the middle of a sample."""
    with pad_token_id(critic, pad):
        expected = own_scores(critic, SAMPLES)
        scores = sample_scores(critic, SAMPLES).detach()
        assert critic.config.pad_token_id == pad
    assert_close(scores, expected, **CLOSE)
    if pad == EOS:
        assert not torch.allclose(scores[0], own_scores(critic, SAMPLES[:1])[0], atol=1e-3)


def test_scores_where_nothing_but_pad_tokens_is_left(critic: Any) -> None:
    samples = [torch.tensor([PAD, PAD]), SAMPLES[0]]
    assert_close(sample_scores(critic, samples).detach(), own_scores(critic, samples), **CLOSE)


def test_padding_never_leaks(policy: Any, critic: Any) -> None:
    """A sample's numbers are the same alone, beside a longer one, and beside another longer one."""
    sample, prompt_len = SAMPLES[0], PROMPT_LENS[:1]
    longer = [torch.arange(100, 100 + 40), torch.full((40,), PAD)]
    with torch.no_grad():
        alone = rectangle([sample], prompt_len)
        expected = [
            completion_logprobs(policy, alone, 1.0)[0],
            completion_values(critic, alone),
            sample_scores(critic, [sample]),
        ]
        for other in longer:
            beside = rectangle([sample, other], torch.tensor([3, 39]))
            got = [
                completion_logprobs(policy, beside, 1.0)[0][:-1],
                completion_values(critic, beside)[:-1],
                sample_scores(critic, [sample, other])[:1],
            ]
            for ours, theirs in zip(got, expected, strict=True):
                assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_head_sees_completion_states_only(policy: Any) -> None:
    shapes = []
    head = policy.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), 1.0)
    handle.remove()
    completion_tokens = 3 + 1 + 7 + 3
    # First the rest of the model's forward, with no rows: of the rectangle, or of all tokens in a row.
    width = sum(map(len, SAMPLES)) if can_unpad(policy, 11) else 11
    assert shapes == [(0, width, len(TOKENIZER)), (1, completion_tokens, len(TOKENIZER))]
    assert policy(input_ids=SAMPLES[0][None]).logits.shape == (1, 6, len(TOKENIZER))


def test_no_chunk_is_left_with_few_rows(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "CHUNK_BYTES", 4 * len(TOKENIZER) * 13)
    rows: list[int] = []
    handle = policy.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    with torch.no_grad():
        completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), 1.0)
    handle.remove()
    assert rows[1:] == [7, 7]  # of 14, and not 13 and 1


@pytest.mark.parametrize("positions", [1, 4, 5])
def test_chunks_change_neither_numbers_nor_gradients(
    policy: Any, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, weights = rectangle(SAMPLES, PROMPT_LENS), torch.linspace(-1, 1, 14)
    head = policy.get_output_embeddings()
    results = []
    for chunk in (14, positions):
        monkeypatch.setattr(forward_module, "CHUNK_BYTES", 4 * len(TOKENIZER) * chunk)
        shapes: list[int] = []
        handle = head.register_forward_hook(lambda module, args, out, shapes=shapes: shapes.append(out.shape[1]))
        logprobs, entropy = completion_logprobs(policy, batch, 0.7, entropy_trains=True)
        (logprobs * weights + entropy * weights.flip(0)).sum().backward()
        handle.remove()
        forward, backward = shapes[1 : 1 + -(-14 // chunk)], shapes[1 + -(-14 // chunk) :]
        assert forward == backward and sum(forward) == 14 and max(forward) == chunk
        results.append((logprobs.detach(), entropy.detach(), [p.grad for p in policy.parameters()]))
        policy.zero_grad(set_to_none=True)
    assert_close(results[1][:2], results[0][:2], rtol=0, atol=1e-6)
    assert_close(results[1][2], results[0][2], rtol=1e-3, atol=1e-4)


def test_gradients_equal_those_of_a_plain_forward(policy: Any, critic: Any) -> None:
    weights = torch.linspace(-1, 1, 14)
    batch = rectangle(SAMPLES, PROMPT_LENS)
    for model, ours, plain in (
        (policy, lambda: completion_logprobs(policy, batch, 0.7)[0], lambda: plain_logprobs(policy, 0.7)[0]),
        (policy, lambda: entropies_that_train(policy, batch), lambda: plain_logprobs(policy, 0.7)[1]),
        (critic, lambda: completion_values(critic, batch), lambda: plain_values(critic)),
    ):
        names, parameters = zip(*model.named_parameters(), strict=True)
        (ours() * weights).sum().backward()
        got = [p.grad for p in parameters]
        model.zero_grad(set_to_none=True)
        expected = torch.autograd.grad((plain() * weights).sum(), parameters)
        for name, a, b in zip(names, got, expected, strict=True):
            assert_close(a, b, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert all(g.abs().max() > 0 for name, g in zip(names, got, strict=True) if "weight" in name)


# ------------------------------------------------------------------ one architecture is enough


@pytest.fixture
def llama() -> Any:
    return make_model("llama", TOKENIZER, "policy")


@pytest.fixture
def llama_critic() -> Any:
    return make_model("llama", TOKENIZER, "reward", seed=1)


def randomize(model: nn.Module, part: str) -> None:
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("wanted", ["entropy", "logprobs", "both"])
@pytest.mark.parametrize("positions", [1, 4, 14])
def test_gradients_of_logprobs_and_entropies_in_float64(
    wanted: str, positions: int, restricted: bool, monkeypatch: Any
) -> None:
    """Chunk by chunk and analytically, against autograd on whole logits; also where each token has its own support."""
    generator = torch.Generator().manual_seed(6)
    monkeypatch.setattr(forward_module, "CHUNK_BYTES", 4 * 11 * positions)
    states, weights = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((14, 3), (14, 2)))
    head = nn.Linear(3, 11, bias=False).double()
    targets = torch.randint(11, (14,), generator=generator)
    allowed = torch.rand(14, 11, generator=generator) < (0.5 if restricted else 1.0)
    allowed[torch.arange(14), targets] = True
    support = Support.of(allowed) if restricted else None
    kept = {"entropy": torch.tensor([0.0, 1.0]), "logprobs": torch.tensor([1.0, 0.0]), "both": torch.ones(2)}[wanted]

    def gradients(function: Any) -> list[Tensor]:
        inputs = states.clone().requires_grad_()
        head.weight.grad = None
        out = function(inputs)
        sum((each * w).sum() for each, w, keep in zip(out, weights.T, kept, strict=True) if keep).backward()
        assert inputs.grad is not None and head.weight.grad is not None
        return [inputs.grad, head.weight.grad]

    def whole(inputs: Tensor) -> tuple[Tensor, Tensor]:
        logp = (head(inputs) / 0.7).masked_fill(~allowed, -torch.inf).log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp.masked_fill(~allowed, 0)).sum(-1)

    def chunked(inputs: Tensor) -> tuple[Tensor, Tensor]:
        size = forward_module.CHUNK_BYTES // (4 * 11)
        return forward_module._ChunkedLogprobs.apply(
            inputs, targets, support, 0.7, size, lambda states: head(states[None]), head, False
        )

    assert_close(gradients(chunked), gradients(whole), rtol=1e-12, atol=1e-14)


def test_entropy_slope_where_tokens_are_ruled_out() -> None:
    # H of (2/3, 1/3): the slope is -p (log p + H) there, and 0, not NaN, where a logit is minus infinity.
    logits = torch.tensor([[math.log(2), 0.0, -math.inf]], dtype=torch.float64)
    p = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    entropy = -(p * p.log()).sum()
    expected = torch.cat([-p * (p.log() + entropy), torch.zeros(1, dtype=torch.float64)])
    assert_close(forward_module._entropy_slope(logits, torch.ones(1, dtype=torch.float64))[0], expected)


def test_entropy_of_a_uniform_distribution(llama: Any) -> None:
    llama.lm_head.weight.data.zero_()
    logprobs, entropy = completion_logprobs(llama, rectangle(SAMPLES, PROMPT_LENS), 1.0)
    size = torch.tensor(float(len(TOKENIZER)))
    assert_close(entropy, size.log().expand(14))
    assert_close(logprobs.detach(), -size.log().expand(14))


@pytest.mark.parametrize("chunk", [4, 14])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_a_frozen_head_is_gone_through_once(arch: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are made once, and the gradients are those of whole logits; entropies have one where it is asked."""
    monkeypatch.setattr(forward_module, "CHUNK_BYTES", 4 * len(TOKENIZER) * chunk)
    # Gemma 2 asks for fp32 whatever its weights are in: a padded row's sum would round otherwise than the plain one's.
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    targets = ["c_attn"] if arch == "gpt2" else ["q_proj", "v_proj"]
    policy = in_training(make_model(arch, TOKENIZER, "policy"))
    model = add_policy_adapter(policy, LoraConfig(r=4, target_modules=targets, fan_in_fan_out=arch == "gpt2"))
    randomize(model, "lora_B")
    model.double()
    batch, weights = rectangle(SAMPLES, PROMPT_LENS), torch.linspace(-1, 1, 14)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: list[int] = []
    count = lambda module, args, output: rows.append(output.shape[1] * output.shape[0])  # noqa: E731

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        loss.backward()
        found = {name: p.grad.clone() for name, p in trained.items()}
        model.zero_grad(set_to_none=True)
        return found

    handle = model.get_base_model().get_output_embeddings().register_forward_hook(count)
    logprobs, entropy = completion_logprobs(model, batch, 0.7)
    got = gradients((logprobs * weights).sum())
    assert sum(rows) == 14 and not entropy.requires_grad
    rows.clear()
    both = completion_logprobs(model, batch, 0.7, entropy_trains=True)
    got_both = gradients(sum((each * weights).sum() for each in both))
    assert sum(rows) == 28, "made again where entropies train"
    handle.remove()
    plain = plain_logprobs(model, 0.7)
    assert_close(logprobs, plain[0], rtol=1e-10, atol=1e-10)
    assert_close(got, gradients((plain[0] * weights).sum()), rtol=1e-8, atol=1e-10)
    plain = plain_logprobs(model, 0.7)
    assert_close(got_both, gradients(sum((each * weights).sum() for each in plain)), rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in got.values()) > 0.1


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"], ["lm_head"]])
def test_logprobs_under_lora(llama: Any, targets: list[str]) -> None:
    model = add_policy_adapter(llama, LoraConfig(r=4, target_modules=targets))
    randomize(model, "lora_B")
    logprobs, _ = completion_logprobs(model, rectangle(SAMPLES, PROMPT_LENS), 1.0)
    assert_close(logprobs.detach(), plain_logprobs(model, 1.0)[0].detach(), **CLOSE)
    logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_a_head_that_trains_in_full_beside_adapters(llama: Any) -> None:
    model = add_policy_adapter(llama, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    batch = rectangle(SAMPLES, PROMPT_LENS)
    completion_logprobs(model, batch, 1.0)[0].sum().backward()
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    got, head.grad = head.grad, None
    plain_logprobs(model, 1.0)[0].sum().backward()
    assert_close(got, head.grad, rtol=1e-4, atol=1e-5)
    assert got.abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_tied_weights_under_autocast_and_checkpointing(checkpointing: bool) -> None:
    """Autocast lends out the casts of weights that it made without a graph: the head must not get those."""
    model = in_training(make_model("llama", TOKENIZER, "policy", tie_word_embeddings=True))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, grads = rectangle(SAMPLES, PROMPT_LENS), []
    for ours in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs = completion_logprobs(model, batch, 1.0)[0] if ours else plain_logprobs(model, 1.0)[0]
            logprobs.sum().backward()
        grads.append(model.lm_head.weight.grad)
        model.zero_grad(set_to_none=True)
    assert grads[0].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 0.999


def test_values_under_lora_read_and_train_the_adapters_head(llama_critic: Any) -> None:
    model = add_value_adapter(llama_critic, LORA)
    randomize(model, "lora_B")
    trained = model.get_base_model().score.modules_to_save["default"]
    randomize(trained, "weight")
    assert score_head(model) is trained
    values = completion_values(model, rectangle(SAMPLES, PROMPT_LENS))
    assert_close(values.detach(), plain_values(model.get_base_model()).detach(), **CLOSE)
    values.sum().backward()
    for name, parameter in model.named_parameters():
        wanted = "lora_" in name or "modules_to_save" in name
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == wanted, name


def test_a_head_with_a_bias(llama_critic: Any) -> None:
    llama_critic.score = nn.Linear(64, 1)
    llama_critic.score.bias.data.fill_(3.0)
    with torch.no_grad():
        assert_close(
            completion_values(llama_critic, rectangle(SAMPLES, PROMPT_LENS)), plain_values(llama_critic), **CLOSE
        )
        assert_close(sample_scores(llama_critic, SAMPLES), own_scores(llama_critic, SAMPLES), **CLOSE)


def test_hooks_and_pad_token_are_put_back_after_an_error(llama: Any, llama_critic: Any) -> None:
    batch = rectangle([torch.tensor([5, 10_000, 6])], torch.tensor([1]))
    with pytest.raises(IndexError):
        completion_logprobs(llama, batch, 1.0)
    assert not llama._forward_hooks and not llama.model._forward_hooks and "forward" not in vars(llama.model)
    with pad_token_id(llama_critic, None):
        with pytest.raises(IndexError):
            completion_values(llama_critic, batch)
        assert llama_critic.config.pad_token_id is None
    assert not llama_critic.score._forward_hooks


def test_a_model_without_a_linear_score_head_is_refused(llama: Any) -> None:
    with pytest.raises(FourscoreError, match="score"):
        score_head(llama)


def test_bf16_weights_give_fp32_numbers(llama: Any, llama_critic: Any) -> None:
    batch = rectangle(SAMPLES, PROMPT_LENS)
    llama, llama_critic = llama.bfloat16(), llama_critic.bfloat16()
    logprobs, entropy = completion_logprobs(llama, batch, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert completion_values(llama_critic, batch).dtype == torch.float32
    assert sample_scores(llama_critic, SAMPLES).dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_batched_scoring_keeps_the_order_of_samples(llama: Any, llama_critic: Any, batch_size: int) -> None:
    e = Experience(
        input_ids=torch.cat(SAMPLES),
        prompt_lens=PROMPT_LENS,
        completion_lens=torch.tensor([len(s) for s in SAMPLES]) - PROMPT_LENS,
        has_eos=torch.tensor([True, False, False, True]),
    )
    with torch.no_grad():
        expected, _ = plain_logprobs(llama, 0.7)
        got = logprobs_of(llama, e, 0.7, batch_size, contextlib.nullcontext)
        assert_close(got, expected, **CLOSE)
        assert_close(
            values_of(llama_critic, e, batch_size, contextlib.nullcontext), plain_values(llama_critic), **CLOSE
        )
        assert_close(score(llama_critic, e, batch_size), own_scores(llama_critic, SAMPLES), **CLOSE)
    assert not got.requires_grad


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_head_that_has_a_gradient_takes_up_the_next(arch: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(arch, make_tokenizer(), tie_word_embeddings=tied).double()
    batch = rectangle(SAMPLES, PROMPT_LENS)
    monkeypatch.setattr(forward, "CHUNK_BYTES", 4 * 300 * 5)

    def backward() -> None:
        logprobs, _ = completion_logprobs(model, batch, 0.7)
        (logprobs * torch.arange(len(logprobs))).sum().backward()

    backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    head = model.get_output_embeddings().weight
    held = head.grad
    backward()
    assert head.grad is held and head.requires_grad
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, 2 * once[name], rtol=1e-12, atol=1e-14)
