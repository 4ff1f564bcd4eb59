"""Rollout: where completions end, padding, the checkpoint's own generation config, and the distribution drawn from."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import ARCHITECTURES, make_model, make_tokenizer
from torch import Tensor
from transformers import GenerationConfig

from fourscore.config import PPOConfig
from fourscore.models.adapters import add_policy_adapter
from fourscore.models.dropout import disable_dropout
from fourscore.models.forward import completion_logprobs, rectangle
from fourscore.rollout import transformers as rollout
from fourscore.rollout.decode import can_decode
from fourscore.rollout.sampling import Sampling, restrict_
from fourscore.rollout.stopping import StopStrings
from fourscore.rollout.transformers import generate, overridden_settings

TOKENIZER = make_tokenizer("own")
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, PAD, 31, 0, 32], [0, 40, 41], [PAD, PAD, 50]]


def model(arch: str = "llama", **cfg: Any) -> Any:
    if arch.startswith("gemma"):
        cfg = {"sliding_window": 4} | cfg  # shorter than a prompt, so that the window matters
    policy = make_model(arch, TOKENIZER, "policy", **cfg)
    disable_dropout(policy)
    return policy.eval()


def sampling(**changes: Any) -> Sampling:
    values: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "stop_ids": (), "eos_id": EOS, "batch_size": 8}
    return Sampling(**(values | changes))


def greedy(policy: Any, prompt: list[int], steps: int) -> list[int]:
    """The likeliest continuation of one unpadded prompt, a whole forward pass for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(autouse=True, params=["decode", "generate"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own decoding, and the policy's `generate` for architectures that it does not fit."""
    if request.param == "generate":
        monkeypatch.setattr(rollout, "can_decode", lambda policy: False)


# ------------------------------------------------------------------ padding and order


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ragged_prompts_give_the_tokens_of_each_prompt_alone(arch: str, batch_size: int) -> None:
    policy = model(arch)
    e = generate(policy, PROMPTS, sampling(batch_size=batch_size))
    assert e.prompts() == PROMPTS
    expected = [greedy(policy, prompt, 8) for prompt in PROMPTS]
    assert e.completions() == expected
    assert len({tuple(c) for c in expected}) > 1, "every prompt gives the same: the comparison says nothing"


def test_experience_is_flat_and_typed() -> None:
    e = generate(model(), PROMPTS, sampling(max_new_tokens=3))
    assert e.input_ids.shape == (sum(map(len, PROMPTS)) + 3 * len(PROMPTS),)
    assert e.input_ids.dtype == e.prompt_lens.dtype == e.completion_lens.dtype == torch.int64
    assert e.prompt_lens.tolist() == [len(p) for p in PROMPTS]
    assert e.completion_lens.tolist() == [3] * len(PROMPTS)
    assert e.has_eos.dtype == torch.bool
    assert e.logprobs is None and e.scores is None


def test_the_prompts_of_the_caller_are_left_alone() -> None:
    prompts = copy.deepcopy(PROMPTS)
    generate(model(), prompts, sampling(max_new_tokens=1))
    assert prompts == PROMPTS


# ------------------------------------------------------------------ where a completion ends


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_completions_end_with_the_first_stop_token(arch: str, temperature: float) -> None:
    """Stop ids that the policy does choose; among them 0, which also fills rows that are done."""
    policy = model(arch, vocab_size=16)
    prompts = [[i, 3 + i] for i in range(12)]
    torch.manual_seed(0)
    free = generate(policy, prompts, sampling(temperature=temperature)).completions()
    # The commonest tokens of an unstopped rollout, so that many rows stop and some do not.
    flat = [token for c in free for token in c]
    stop_ids = (0, max(sorted(set(flat)), key=flat.count))
    torch.manual_seed(0)
    e = generate(policy, prompts, sampling(temperature=temperature, stop_ids=stop_ids, eos_id=None))
    lens = []
    for completion, ended in zip(e.completions(), e.has_eos.tolist(), strict=True):
        lens.append(len(completion))
        assert not set(completion[:-1]) & set(stop_ids)
        assert ended == (completion[-1] in stop_ids)
        assert ended or len(completion) == 8
    assert len(set(lens)) > 1 and e.has_eos.any()
    if temperature == 0:
        for completion, unstopped in zip(e.completions(), free, strict=True):
            assert completion == unstopped[: len(completion)]


def test_a_completion_may_be_one_token() -> None:
    e = generate(model(), PROMPTS, sampling(stop_ids=tuple(range(len(TOKENIZER)))))
    assert e.completion_lens.tolist() == [1] * len(PROMPTS)
    assert e.has_eos.all()


@pytest.mark.parametrize(("eos_id", "has_eos"), [(4, True), (3, False), (None, False)])
def test_without_stop_ids_completions_have_full_length(eos_id: int | None, has_eos: bool) -> None:
    """Even when the policy does nothing but emit its EOS, and its own generation config names it."""
    policy = model(vocab_size=16, eos_token_id=4, tie_word_embeddings=False)
    policy.generation_config.eos_token_id = 4
    with torch.no_grad():
        policy.lm_head.weight.zero_()
        policy.model.norm.weight.fill_(1.0)
        policy.lm_head.register_forward_hook(lambda m, a, out: out + 50 * (torch.arange(16) == 4))
    e = generate(policy, [[5], [6, 7]], sampling(eos_id=eos_id))
    assert e.completions() == [[4] * 8] * 2
    assert e.has_eos.tolist() == [has_eos] * 2


# ------------------------------------------------------------------ the checkpoint's own generation config


OWN = {
    "repetition_penalty": 5.0,
    "top_k": 1,
    "top_p": 0.1,
    "temperature": 0.01,
    "min_length": 12,
    "min_new_tokens": 6,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(100)),
    "do_sample": True,
}


@pytest.mark.parametrize("under_lora", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop_ids", [(), tuple(range(0, 300, 3))])
def test_the_own_generation_config_changes_nothing(under_lora: bool, temperature: float, stop_ids: Any) -> None:
    policy = model()
    torch.manual_seed(7)
    expected = generate(policy, PROMPTS, sampling(temperature=temperature, stop_ids=stop_ids)).completions()
    own = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, **OWN)
    policy.generation_config = own
    before = own.to_dict()
    base = policy
    if under_lora:
        policy = add_policy_adapter(policy, LoraConfig(r=4, target_modules=["q_proj"])).eval()
    for _ in range(2):
        torch.manual_seed(7)
        got = generate(policy, PROMPTS, sampling(temperature=temperature, stop_ids=stop_ids)).completions()
        assert got == expected
        assert base.generation_config is own and policy.generation_config is own
        assert own.to_dict() == before
    with torch.no_grad():
        torch.manual_seed(7)
        influenced = base.generate(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=8)[0, len(PROMPTS[0]) :]
    assert influenced.tolist() != expected[0], "these settings do nothing: the comparison says nothing"


def test_the_own_generation_config_comes_back_after_an_error() -> None:
    policy = model()
    own = policy.generation_config
    with pytest.raises(IndexError):
        generate(policy, [[10_000]], sampling())
    assert policy.generation_config is own


def test_overridden_settings_reports_what_would_have_mattered() -> None:
    policy = model()
    policy.generation_config = GenerationConfig(
        eos_token_id=EOS, pad_token_id=PAD, bos_token_id=EOS, max_length=50, **OWN
    )
    reported = overridden_settings(policy)
    assert reported == {name: value for name, value in OWN.items() if name != "do_sample"}
    adapted = add_policy_adapter(policy, LoraConfig(r=4, target_modules=["q_proj"]))
    assert overridden_settings(adapted) == reported


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "do_sample": True},
        {"repetition_penalty": 1.0, "min_length": 0, "num_beams": 1, "no_repeat_ngram_size": 0},
    ],
)
def test_overridden_settings_of_plain_sampling_is_empty(own: dict[str, Any]) -> None:
    policy = model()
    policy.generation_config = GenerationConfig(eos_token_id=EOS, **own)
    assert overridden_settings(policy) == {}


# ------------------------------------------------------------------ the distribution


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def test_draws_follow_the_policys_distribution_at_the_temperature() -> None:
    """4000 draws of a first and a second token, ragged prompts, a checkpoint that asks for top_k=2."""
    policy = model(vocab_size=8)
    policy.generation_config = GenerationConfig(top_k=2, temperature=0.1, do_sample=True)
    prompts = [[3, 4, 5], [6]]
    torch.manual_seed(0)
    e = generate(policy, prompts * 4000, sampling(max_new_tokens=2, temperature=0.7, batch_size=2000))
    completions = torch.tensor(e.completions())
    for which, prompt in enumerate(prompts):
        drawn = completions[which::2]
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([prompt])).logits[0, -1]
            after = policy(input_ids=torch.tensor([[*prompt, t] for t in range(8)])).logits[:, -1]
        first = drawn[:, 0].bincount(minlength=8)
        # 7 degrees of freedom: above 29.9 once in 10,000.
        assert chi_square(first, (logits / 0.7).softmax(0)) < 29.9
        assert chi_square(first, logits.softmax(0)) > 40, "the test would not notice another temperature"
        commonest = int(first.argmax())
        second = drawn[drawn[:, 0] == commonest, 1].bincount(minlength=8)
        assert chi_square(second, (after[commonest] / 0.7).softmax(0)) < 29.9


def test_every_token_of_the_vocabulary_can_be_drawn() -> None:
    """A policy that finds all 300 tokens about equally likely: no top-k or top-p of any default cuts some off."""
    policy = model()
    # Not quite equal: top-k keeps ties.
    policy.lm_head.weight.data *= 0.01
    torch.manual_seed(2)
    e = generate(policy, [[5]] * 1000, sampling(max_new_tokens=6, temperature=1.0, batch_size=1000))
    counts = torch.tensor(e.completions()).flatten().bincount(minlength=300)
    # 299 degrees of freedom: 299 +- 24.5; four deviations.
    assert chi_square(counts, torch.full((300,), 1 / 300)) < 397


def test_logprobs_of_drawn_tokens_are_those_of_the_distribution_they_came_from() -> None:
    """The mean logprob of draws is minus the entropy: the two halves, rollout and scoring, agree."""
    policy = model(vocab_size=8)
    torch.manual_seed(1)
    e = generate(policy, [[3, 4, 5]] * 2000, sampling(max_new_tokens=3, temperature=0.7, batch_size=2000))
    with torch.no_grad():
        logprobs, entropy = completion_logprobs(policy, rectangle(e.samples(), e.prompt_lens), 0.7)
    error = (logprobs + entropy).mean() / ((logprobs + entropy).std() / len(logprobs) ** 0.5)
    assert abs(error) < 4


@pytest.mark.parametrize("changes", [{}, {"top_k": 12, "top_p": 0.8}, {"min_new_tokens": 4}], ids=str)
@pytest.mark.parametrize("under_lora", [False, True])
def test_the_rollouts_own_logprobs_are_those_of_a_forward_pass(
    under_lora: bool, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    policy = model(vocab_size=40)
    if under_lora:
        policy = add_policy_adapter(policy, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        policy.eval()
    torch.manual_seed(0)
    draw = sampling(temperature=0.7, stop_ids=(0, 1, 2, 3), max_new_tokens=16, batch_size=3, **changes)
    e = generate(policy, [[3, 4, 5], [6], [20, 21, 22, 23, 24]] * 3, draw)
    assert len(set(e.completion_lens.tolist())) > 2
    if "generate" in request.node.name:
        assert e.logprobs is None
        return
    with torch.no_grad():
        expected, _ = completion_logprobs(policy, rectangle(e.samples(), e.prompt_lens, e.support), 0.7)
    assert e.logprobs is not None and e.logprobs.dtype == torch.float32
    assert torch.allclose(e.logprobs, expected, atol=1e-5, rtol=0)


def test_logprobs_that_would_not_be_exact_are_not_kept() -> None:
    policy = model()
    assert generate(policy, PROMPTS, sampling()).logprobs is None  # greedy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(policy, PROMPTS, sampling(temperature=1.0)).logprobs is None
    assert generate(policy.double(), PROMPTS, sampling(temperature=1.0)).logprobs is None


def test_the_same_seed_draws_the_same() -> None:
    policy = model()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(generate(policy, PROMPTS, sampling(temperature=1.0)).completions())
    assert runs[0] == runs[1] != runs[2]


# ------------------------------------------------------------------ top-k, top-p, shortest completion


def likeliest(logits: Tensor, temperature: float, top_k: int, top_p: float, barred: tuple[int, ...] = ()) -> set[int]:
    """The ids that may be drawn, one at a time in float64: what HF's and our own sorting do is nowhere in here."""
    weights = {i: x / temperature for i, x in enumerate(logits.double().tolist()) if i not in barred}
    order = sorted(weights, key=lambda i: -weights[i])[: top_k or None]
    chances = torch.tensor([weights[i] for i in order], dtype=torch.float64).softmax(0).tolist()
    chosen, total = set(), 0.0
    for i, chance in zip(order, chances, strict=True):
        chosen.add(i)
        total += chance
        if total >= top_p:
            break
    return chosen


def sets_of(e: Any, vocabulary: int) -> list[set[int]]:
    return [{i for i, out in enumerate(row) if not out} for row in e.support.barred(vocabulary).tolist()]


RESTRICTIONS = [
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 0.97},
    {"top_k": 12, "top_p": 0.8},
    {"top_p": 0.6, "min_new_tokens": 4},
    {"min_new_tokens": 6},
]


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("restriction", RESTRICTIONS, ids=str)
def test_support_and_logprobs_are_those_of_the_truncated_distribution(restriction: Any, batch_size: int) -> None:
    policy = model(vocab_size=40)
    stop_ids = (0, 7, 11, 12, 13)
    draw = sampling(temperature=0.7, stop_ids=stop_ids, batch_size=batch_size, **restriction)
    torch.manual_seed(0)
    e = generate(policy, [[3, 4, 5], [6], [20, 21, 22, 23, 24]] * 4, draw)
    assert e.support is not None and len(set(e.completion_lens.tolist())) > 1 and e.has_eos.any()
    logprobs, entropy = completion_logprobs(policy, rectangle(e.samples(), e.prompt_lens, e.support), 0.7)
    found = iter(zip(sets_of(e, 40), logprobs.tolist(), entropy.tolist(), strict=True))
    lens = set()
    for prompt, completion in zip(e.prompts(), e.completions(), strict=True):
        for drawn, token in enumerate(completion):
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([prompt + completion[:drawn]])).logits[0, -1].double()
            barred = stop_ids if drawn + 1 < draw.min_new_tokens else ()
            expected = likeliest(logits, 0.7, draw.top_k, draw.top_p, barred)
            support, logprob, spread = next(found)
            assert support == expected and token in support
            inside = sorted(support)
            distribution = (logits[inside] / 0.7).log_softmax(0)
            assert logprob == pytest.approx(float(distribution[inside.index(token)]), abs=1e-5)
            assert spread == pytest.approx(float(-(distribution.exp() * distribution).sum()), abs=1e-5)
            lens.add(len(support))
    assert not list(found), "finished rows went on recording"
    assert len(lens) > 1 or draw.top_p == 1


@pytest.mark.parametrize("restriction", [{"top_k": 4}, {"top_p": 0.7}, {"min_new_tokens": 2}], ids=str)
def test_draws_follow_the_truncated_distribution(restriction: Any) -> None:
    policy = model(vocab_size=8)
    torch.manual_seed(0)
    draw = sampling(max_new_tokens=2, temperature=0.7, batch_size=4000, stop_ids=(1, 4), **restriction)
    e = generate(policy, [[3, 4, 5]] * 4000, draw)
    first = torch.tensor([c[0] for c in e.completions()])
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1]
    kept = sorted(likeliest(logits, 0.7, draw.top_k, draw.top_p, (1, 4) if draw.min_new_tokens else ()))
    assert 1 < len(kept) < 8 and set(first.tolist()) == set(kept)
    probabilities = (logits[kept] / 0.7).softmax(0)
    # At most 6 degrees of freedom: above 27.9 once in 10,000.
    assert chi_square(first.bincount(minlength=8)[kept], probabilities) < 27.9


def test_nucleus_of_a_large_flat_vocabulary() -> None:
    """More tokens than are sorted at first, and a support kept as bits; top-p above what rounding leaves keeps all."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5000, generator=generator) * 0.3
    for p in (0.1, 0.5, 0.9):
        kept = restrict_(logits.clone(), sampling(temperature=1.0, top_p=p), [0] * 3) > -torch.inf
        for row, inside in zip(logits, kept, strict=True):
            assert set(inside.nonzero()[:, 0].tolist()) == likeliest(row, 1.0, 0, p)
    kept = restrict_(logits.clone(), sampling(temperature=1.0, top_p=1 - 1e-9), [0] * 3) > -torch.inf
    assert kept.sum() > 0.999 * kept.numel()


def test_greedy_decoding_takes_no_notice_of_top_k_and_top_p() -> None:
    policy = model()
    free = generate(policy, PROMPTS, sampling())
    e = generate(policy, PROMPTS, sampling(top_k=2, top_p=0.1))
    assert e.completions() == free.completions() and e.support is None


def test_the_support_is_kept_only_where_it_is_wanted() -> None:
    policy = model()
    runs = []
    for keep in (True, False):
        torch.manual_seed(0)
        runs.append(generate(policy, PROMPTS, sampling(temperature=1.0, top_k=3), keep_support=keep))
    assert runs[0].support is not None and runs[1].support is None
    assert runs[0].completions() == runs[1].completions()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_no_stop_token_before_the_shortest_completion(temperature: float) -> None:
    policy = model(vocab_size=16)
    stop_ids = tuple(range(8))
    torch.manual_seed(0)
    e = generate(
        policy, [[i] for i in range(16)], sampling(temperature=temperature, stop_ids=stop_ids, min_new_tokens=4)
    )
    assert int(e.completion_lens.min()) == 4, "the stop token counts"
    for completion in e.completions():
        assert not set(completion[:-1]) & set(stop_ids)


# ------------------------------------------------------------------ stop strings


def texts(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


LETTERS = [i for i in range(2, len(TOKENIZER)) if texts([i]).strip().isalpha() and texts([i]).isascii()]


@pytest.mark.parametrize("minimum", [0, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop_ids", [(), (EOS, 70, 71, 72)])
def test_a_text_ends_a_completion(minimum: int, temperature: float, stop_ids: tuple[int, ...]) -> None:
    """Against the definition: the first token whose text holds the end of one, the whole decoded for each token."""
    policy = model()
    letters = torch.zeros(len(TOKENIZER)).index_fill(0, torch.tensor(LETTERS), 20.0)
    policy.lm_head.register_forward_hook(lambda m, a, out: out + letters)
    prompts = [[i, i + 40] for i in range(80, 120)]
    draw = {"max_new_tokens": 12, "temperature": temperature, "stop_ids": stop_ids, "min_new_tokens": minimum}
    torch.manual_seed(0)
    free = generate(policy, prompts, sampling(batch_size=9, **draw)).completions()
    # Texts that do come up: across the border of two tokens, at a completion's start, and within a token.
    border = len(texts(free[0][:5]))
    stops = [texts(free[0])[border - 1 : border + 1], texts(free[1][:2]), "a"]
    strings = StopStrings(stops, TOKENIZER)
    torch.manual_seed(0)
    e = generate(policy, prompts, sampling(batch_size=9, stop_strings=strings, eos_id=EOS, **draw))
    by_text = 0
    for completion, unstopped, ended in zip(e.completions(), free, e.has_eos.tolist(), strict=True):
        whole = unstopped if temperature == 0 else completion  # drawn anew where rows ended
        text = texts(whole)
        bounds = [len(texts(whole[:n])) for n in range(len(whole) + 1)]
        finished = [i + len(stop) for stop in stops for i in range(len(text)) if text.startswith(stop, i)]
        ends = [n for n in range(1, len(bounds)) if any(bounds[n - 1] < at <= bounds[n] for at in finished)]
        ends = [n for n in ends if n >= minimum]
        length = min([*ends, len(whole)])
        assert completion == whole[:length]
        assert ended == (length in ends or whole[length - 1] in stop_ids)
        assert ended or length == 12
        by_text += length in ends
    assert 3 < by_text < 40


def test_texts_cross_tokens_and_characters_cross_bytes() -> None:
    byte = {chr_: TOKENIZER.encode(chr_) for chr_ in ("a", "é", "🙂", "\n")}
    assert len(byte["é"]) == 2 and len(byte["🙂"]) == 4, "bytes of one character are tokens of their own"
    stop = StopStrings(["a🙂", "\n\n"], TOKENIZER)
    ids = byte["é"] + byte["a"] + byte["🙂"] + byte["a"]
    assert [stop.completed_by_last(ids[: n + 1]) for n in range(len(ids))] == [False] * 6 + [True, False]
    # A text that is there already does not end it again; a second one that overlaps the first does.
    ids = byte["\n"] * 3 + byte["a"]
    assert [stop.completed_by_last(ids[: n + 1]) for n in range(len(ids))] == [False, True, True, False]
    assert StopStrings([TOKENIZER.eos_token], TOKENIZER).completed_by_last([5, EOS])


def test_the_end_of_the_prompt_is_no_part_of_the_text() -> None:
    policy = model(vocab_size=len(TOKENIZER), tie_word_embeddings=False)
    newline = TOKENIZER.encode("\n")
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    policy.lm_head.register_forward_hook(lambda m, a, out: out + 50 * (torch.arange(len(TOKENIZER)) == newline[0]))
    e = generate(policy, [newline, [70]], sampling(stop_strings=StopStrings(["\n\n"], TOKENIZER)))
    assert e.completions() == [newline * 2] * 2 and e.has_eos.all()


def test_every_flag_of_the_rollout_reaches_it() -> None:
    flags = {"response_length": 9, "min_response_length": 2, "top_k": 5, "top_p": 0.5, "stop_strings": ["a", "bc"]}
    args = PPOConfig(local_rollout_forward_batch_size=3, **flags)
    draw = Sampling.of(args, TOKENIZER, (4, 5), 0.3)
    assert (draw.max_new_tokens, draw.min_new_tokens, draw.top_k, draw.top_p, draw.temperature) == (9, 2, 5, 0.5, 0.3)
    assert (draw.stop_ids, draw.eos_id, draw.batch_size) == ((4, 5), EOS, 3)
    assert draw.stop_strings is not None and draw.stop_strings.completed_by_last(TOKENIZER.encode("bc"))
    assert Sampling.of(PPOConfig(), TOKENIZER, (), 1.0).stop_strings is None
    assert not Sampling.of(PPOConfig(), TOKENIZER, (EOS,), 1.0).restricted


# ------------------------------------------------------------------ our own decoding


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures_of_our_own_decoding(arch: str) -> None:
    policy = model(arch)
    assert can_decode(policy) == (not arch.startswith("gemma")), "those have sliding windows"
    adapted = add_policy_adapter(policy, LoraConfig(r=4, target_modules="all-linear"))
    assert can_decode(adapted) == can_decode(policy)
    assert not can_decode(model("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=4))


def shapes_seen(policy: Any, prompts: list[list[int]], draw: Sampling) -> tuple[Any, list[tuple[int, int]]]:
    shapes: list[tuple[int, int]] = []
    handle = policy.register_forward_pre_hook(
        lambda m, a, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    grads = []
    policy.lm_head.register_forward_hook(lambda m, a, out: grads.append(out.requires_grad))
    e = generate(policy, prompts, draw)
    handle.remove()
    assert not any(grads)
    return e, shapes


def test_a_row_is_computed_until_its_completion_ends(request: pytest.FixtureRequest) -> None:
    policy = model(vocab_size=16)
    prompts = [[i, 3 + i] for i in range(12)]
    draw = sampling(stop_ids=(0, 1, 2, 3), temperature=1.0, max_new_tokens=20, batch_size=16)
    e, shapes = shapes_seen(policy, prompts, draw)
    lens = e.completion_lens.tolist()
    assert len(set(lens)) > 3
    if "generate" in request.node.name:
        assert shapes == [(12, 2)] + [(12, 1)] * (max(lens) - 1)
    else:
        assert shapes == [(12, 2)] + [(sum(n > drawn for n in lens), 1) for drawn in range(1, max(lens))]


def test_prompts_of_like_lengths_are_read_together_and_equal_ones_once(request: pytest.FixtureRequest) -> None:
    policy = model()
    prompts = [[7] * 4, [5, 6] * 25, [8] * 3, [5, 6] * 25, [9] * 49, [8] * 3, [5, 6] * 25]
    e, shapes = shapes_seen(policy, prompts, sampling(max_new_tokens=3))
    assert e.completions() == [greedy(policy, prompt, 3) for prompt in prompts]
    assert shapes == ([(7, 50)] if "generate" in request.node.name else [(2, 50), (2, 4)]) + [(7, 1)] * 2


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_further_prompts_take_the_rows_that_are_free(arch: str, request: pytest.FixtureRequest) -> None:
    """Forty prompts in eight rows, whose completions end at many places."""
    policy = model(arch, vocab_size=16)
    prompts = [[i % 16, 3, *range(i % 5)] for i in range(40)]
    stop_ids, most = (0, 5), 24
    e, shapes = shapes_seen(policy, prompts, sampling(stop_ids=stop_ids, max_new_tokens=most, batch_size=8))
    expected = []
    for prompt in prompts:
        free = greedy(policy, prompt, most)
        ends = [at for at, token in enumerate(free) if token in stop_ids]
        expected.append(free[: ends[0] + 1] if ends else free)
    lens = [len(completion) for completion in expected]
    assert len(set(lens)) > 4, "rows end together: the comparison says nothing"
    assert e.completions() == expected
    read = [rows for rows, n in shapes if n > 1]
    steps = [rows for rows, n in shapes if n == 1]
    assert max(steps) == 8
    # Those of eight prompts at a time, longest first, each until its last completion ends.
    order = sorted(range(40), key=lambda i: len(prompts[i]), reverse=True)
    in_groups = sum(max(lens[i] for i in order[start : start + 8]) - 1 for start in range(0, 40, 8))
    if "generate" in request.node.name:
        assert len(steps) == in_groups and len(read) == 5
        return
    assert sum(read) == 40 and sum(steps) == sum(lens) - 40, "no row is computed that has no token to give"
    assert len(steps) < 0.8 * in_groups
