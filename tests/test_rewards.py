"""Rewards: functions as TRL's GRPO calls them, their sum, its shaping, and what becomes of a run when one fails."""

import asyncio
import json
import math
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import CHAT_TEMPLATE, make_model, make_tokenizer

from fourscore import FourscoreError, PPOConfig, PPOTrainer
from fourscore.errors import RewardError
from fourscore.parallel import Parallel
from fourscore.ppo.advantages import shaped_rewards
from fourscore.ppo.experience import Experience
from fourscore.rewards.function import Function, load_function
from fourscore.rewards.samples import Notes, Samples
from fourscore.rewards.scorer import Scorer, check_weights, distinct, parse
from fourscore.rewards.shaping import Moments, Shaping, overlong, shaped_scores

ALONE = Parallel(torch.device("cpu"), rank=0, world_size=1, sharded=False)
PROMPTS = ["the movie", "a film is", "this", "good acting and", "it was a plot", "so"]


def experience(prompts: list[list[int]], completions: list[list[int]]) -> Experience:
    return Experience(
        input_ids=torch.tensor([i for p, c in zip(prompts, completions, strict=True) for i in p + c]),
        prompt_lens=torch.tensor([len(p) for p in prompts]),
        completion_lens=torch.tensor([len(c) for c in completions]),
        has_eos=torch.tensor([c[-1] == 0 for c in completions]),
    )


def samples(**columns: list[Any]) -> Samples:
    """Three samples of 2, 1 and 3 completion tokens; the first and the last end with EOS."""
    tokenizer = make_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("the film", "a plot", "so")]
    completions = [[40, 0], [41], [42, 43, 0]]
    return Samples(experience(prompts, completions), tokenizer, lambda: columns)


def scorer(*functions: Any, weights: list[float] | None = None, **shaping: Any) -> Scorer:
    return Scorer([Function(f) for f in functions], weights, Shaping(**shaping), ALONE)


def config(out: Path, **changes: Any) -> PPOConfig:
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "response_length": 6,
        "save_strategy": "no",
        "num_sample_generations": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PPOConfig(**(settings | changes))


def trainer_on(args: PPOConfig, *functions: Any, chat: bool = False, **changes: Any) -> PPOTrainer:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE if chat else None)
    parts = {
        "processing_class": tokenizer,
        "model": make_model("llama", tokenizer),
        "ref_model": None,
        "reward_model": None,
        "value_model": make_model("llama", tokenizer, "reward", seed=1),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS, "target": list(range(len(PROMPTS)))}),
        "reward_funcs": list(functions) or None,
    }
    return PPOTrainer(args=args, **(parts | changes))


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "eps" and not k.startswith(("time/", "memory/"))} for r in rows]


# ------------------------------------------------------------------------------------------------------------- shaping


def test_overlong_is_equation_13_of_dapo() -> None:
    # L_max 100, L_cache 20: nothing up to 80 tokens, then a twentieth for each token more.
    lens = torch.tensor([1, 80, 81, 90, 99, 100])
    assert overlong(lens, 100, 20).tolist() == pytest.approx([0, 0, 0.05, 0.5, 0.95, 1])


def test_the_order_of_shaping() -> None:
    shaping = Shaping(
        missing_eos_penalty=3.0,
        length_penalty=0.1,
        response_length=10,
        overlong_buffer=4,
        overlong_penalty=2.0,
        score_clip=1.0,
    )
    shaped = shaped_scores(
        torch.tensor([5.0, 1.5, -9.0, 0.0]),
        torch.tensor([True, True, True, False]),
        torch.tensor([5, 8, 10, 1]),
        torch.tensor([True, True, False, True]),
        shaping,
        offset=1.0,
        std=4.0,
    )
    # (5-1)/4 = 1, (1.5-1)/4 = 0.125, (-9-1)/4 = -2.5 clipped to -1, and nothing applied to the last one.
    expected = [1 - 0.5, 0.125 - 0.8 - 2 * 0.5, -1 - 3 - 1.0 - 2.0, 0 - 0.1]
    assert shaped.tolist() == pytest.approx(expected)


def test_running_moments_are_those_of_all_scores() -> None:
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([6.0]), torch.tensor([]), torch.tensor([3.0, -7.0, 1e4])]
    moments = Moments()
    for batch in batches:
        moments = moments.with_scores(batch, lambda x: x)
    everything = torch.cat(batches).double()
    assert moments.count == 6
    assert moments.mean == pytest.approx(everything.mean().item())
    assert moments.std == pytest.approx(everything.std(correction=0).item())
    assert Moments().std == 1.0
    assert Moments().with_scores(torch.tensor([4.0, 4.0]), lambda x: x).std == 1.0


def test_scores_are_divided_by_the_deviation_but_keep_their_mean() -> None:
    s = scorer(lambda completions: [1.0, 2.0, 6.0], normalize=True)
    given = samples()
    shaped, noted = s.shape(s.rate(given), given.experience)
    # Mean 3, deviations -2, -1 and 3: variance 14/3.
    assert shaped.tolist() == pytest.approx([x / math.sqrt(14 / 3) for x in (1.0, 2.0, 6.0)])
    assert noted == {"rewards/running_std": pytest.approx(math.sqrt(14 / 3))}


# ----------------------------------------------------------------------------------------------------------- functions


def test_a_function_is_given_what_grpo_gives() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts, completions, completion_ids, target, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids, target=target)
        kwargs["log_metric"]("longest", max(map(len, completion_ids)))
        kwargs["log_extra"]("seen", ["x", "y", "z"])
        return [0.5, None, 2]

    state = object()
    given = samples(prompt=["the film", "a plot", "so"], target=[7, 8, 9], more=["a", "b", "c"])
    rated = scorer(reward).rate(given, state)
    assert seen["prompts"] == ["the film", "a plot", "so"]
    assert seen["completions"] == given.completions
    assert seen["completion_ids"] == [[40, 0], [41], [42, 43, 0]]
    assert (seen["target"], seen["more"]) == ([7, 8, 9], ["a", "b", "c"])
    assert seen["trainer_state"] is state
    assert rated.scores.tolist() == [0.5, 0, 2]
    assert rated.applies.tolist() == [True, False, True]
    assert rated.columns == {"seen": ["x", "y", "z"]}
    assert rated.metrics == {
        "rewards/reward/mean": 1.25,
        "rewards/reward/std": pytest.approx(math.sqrt(2 * 0.75**2)),
        "rewards/reward/share": pytest.approx(2 / 3),
        "longest": 3,
    }


def test_conversations_come_as_messages() -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("a", "b", "c")]
    seen: list[Any] = []

    def format_reward(completions, **kwargs):  # as written for GRPO
        seen.extend(kwargs["prompts"])
        return [float(bool(re.search("a|e", completion[0]["content"]))) for completion in completions]

    given = samples(prompt=conversations)
    rated = scorer(format_reward).rate(given)
    assert seen == conversations
    assert given.answers[1] == [{"role": "assistant", "content": given.completions[1]}]
    assert rated.scores.tolist() == [float(bool(re.search("a|e", text))) for text in given.completions]


def test_prompts_that_are_ids_come_as_text() -> None:
    assert samples().prompts == ["the film", "a plot", "so"]


def test_a_function_without_kwargs_is_given_what_it_names() -> None:
    def short(completions, target=None):
        return [target[0]] * len(completions)

    class Object:
        def __call__(self, completion_ids):
            return torch.tensor([len(ids) for ids in completion_ids])

    both = scorer(short, Object(), partial(short, target=[10.0]), weights=[1.0, 0.5, -1.0])
    assert [r.name for r in both.rewards] == ["short", "Object", "short_2"]
    # Columns win over a partial's own values, as keywords do in Python.
    assert both.rate(samples(target=[4.0, 0.0, 0.0])).scores.tolist() == [1.0, 0.5, 1.5]


def test_token_rewards_are_added_where_they_belong() -> None:
    def by_token(completion_ids):
        return [[0.1 * i for i in ids] if len(ids) > 1 else None for ids in completion_ids]

    def mixed(completion_ids):
        return [[1.0, 2.0], 5.0, None]

    given = samples()
    rated = scorer(by_token, mixed, weights=[2.0, 3.0]).rate(given)
    assert rated.scores.tolist() == [0, 15, 0]
    assert rated.token_rewards.tolist() == pytest.approx([8 + 3, 0 + 6, 0, 8.4, 8.6, 0])
    assert rated.totals.tolist() == pytest.approx([17, 15, 17])
    assert rated.whole.tolist() == [False, True, False] and rated.applies.all()
    assert rated.metrics["rewards/by_token/mean"] == pytest.approx((4 + 8.5) / 2)
    assert rated.metrics["rewards/by_token/share"] == pytest.approx(2 / 3)
    e = given.experience
    rewards = shaped_rewards(torch.zeros(6), rated.scores, e.completion_lens, 0.1) + rated.token_rewards
    assert rewards.tolist() == pytest.approx([11, 6, 15, 8.4, 8.6, 0])


def test_async_functions_run_at_the_same_time_in_one_loop() -> None:
    loops = []

    async def slow(completions, wait=0.3):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(wait)
        return [1.0] * len(completions)

    def blocking(completions):
        time.sleep(0.3)
        return [1.0] * len(completions)

    s = scorer(blocking, slow, partial(slow, wait=0.31))
    started = time.perf_counter()
    assert s.rate(samples()).scores.tolist() == [3.0] * 3
    assert time.perf_counter() - started < 0.75
    s.rate(samples())
    assert len(loops) == 4 and len(set(map(id, loops))) == 1
    assert threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0], "gave 2 rewards for 3 samples"),
        (3.0, "gave a float: it must give a list"),
        ({"a": 1}, "gave a dict: it must give a list"),
        ([1.0, math.nan, 1.0], "gave nan, which is not finite, for the sample 'a plot"),
        ([1.0, 1.0, -math.inf], "gave -inf, which is not finite, for the sample 'so"),
        ([1.0, "good", 1.0], "gave 'good', which is no number, for the sample 'a plot"),
        ([[1.0], 1.0, 1.0], "gave 1 token rewards for a completion of 2 tokens, for the sample 'the film"),
        ([1.0, 1.0, [0.0, math.inf, 0.0]], "gave inf for token 1, which is not finite, for the sample 'so"),
        ([1.0, 1e39, 1.0], "gave 1e+39, which is more than fp32 holds, for the sample 'a plot"),
        (torch.tensor([1.0, 1.0, -1e39], dtype=torch.double), "gave -1e+39, which is more than fp32 holds"),
        (torch.ones(3, 2), "gave 2 token rewards for a completion of 1 tokens, for the sample 'a plot"),
    ],
)
def test_what_is_no_reward_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"^reward 'named' {re.escape(message)}"):
        parse("reward 'named'", given, samples())
    with pytest.raises(RewardError, match=re.escape(message)):
        scorer(lambda completions: given).rate(samples())


def test_an_exception_below_a_function_is_named_by_its_own_line(tmp_path: Path) -> None:
    code = """
import json, sys
def deep(completions): return [json.loads(c + "{") for c in completions]

def ends(completions):
    sys.exit(3)
"""
    (tmp_path / "deep.py").write_text(code)
    for name, said in (
        ("deep", "JSONDecodeError: .*, in .*deep.py, line 3$"),
        ("ends", "SystemExit: 3, in .*, line 6$"),
    ):
        with pytest.raises(RewardError, match=f"^reward '{name}' failed: {said}"):
            scorer(load_function(f"{tmp_path}/deep.py:{name}")).rate(samples())
    (tmp_path / "later.py").write_text("import sys\nasync def ends(completions):\n    sys.exit(4)\n")
    for _ in range(2):  # the loop goes on
        with pytest.raises(RewardError, match=r"^reward 'ends' failed: .*SystemExit: 4, in .*later.py, line 3$"):
            scorer(load_function(f"{tmp_path}/later.py:ends")).rate(samples())
    (tmp_path / "typo.py").write_text("def f(\n")
    with pytest.raises(FourscoreError, match=r"cannot be imported \(SyntaxError: .*\(typo.py, line 1\)\)$"):
        load_function(f"{tmp_path}/typo.py:f")


def test_an_exception_in_a_function_says_where() -> None:
    def broken(completions):
        return [1 / 0]

    async def async_broken(completions):
        return [1 / 0]

    for function in (broken, async_broken):
        with pytest.raises(RewardError, match=rf"reward '{function.__name__}' failed: ZeroDivisionError.*line \d+$"):
            scorer(function).rate(samples())


def test_functions_named_by_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neighbour.py").write_text("FACTOR = 2\n")
    (tmp_path / "my_rewards.py").write_text(
        "from neighbour import FACTOR\n"
        "RUNS = []\nRUNS.append(1)\n"
        "def good(completions, **kwargs):\n    return [FACTOR * len(RUNS)] * len(completions)\n"
        "class Box:\n    @staticmethod\n    def inner(completions):\n        return [7.0] * len(completions)\n"
    )
    path = str(tmp_path / "my_rewards.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    first, second = load_function(f"{path}:good"), load_function(f"{path}:good")
    assert first is second and first([0]) == [2]
    assert load_function(f"{path}:Box.inner")([0, 0]) == [7.0, 7.0]
    assert not list(tmp_path.glob("__pycache__/my_rewards*"))
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "inside.py").write_text("def f(completions): return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("pack.inside:f")(0) == [1.0]


def test_names_and_weights() -> None:
    assert distinct(["a", "b", "a", "a_2", "a"]) == ["a", "b", "a_2", "a_2_2", "a_3"]
    with pytest.raises(FourscoreError, match="--reward_weights 1 2: there are 3 rewards"):
        check_weights(3, [1.0, 2.0])
    with pytest.raises(FourscoreError, match="there is no reward: give --reward_model_path, --reward_funcs"):
        check_weights(0, None)


def test_a_signature_that_cannot_be_called() -> None:
    with pytest.raises(
        FourscoreError, match="asks for 'solution', which is neither a column of the prompts \\(target\\)"
    ):
        Function(lambda completions, solution: [], "--reward_funcs a.py:f").check(["target"])
    with pytest.raises(FourscoreError, match="takes 'completions' by position"):
        Function(eval("lambda completions, /: []"), "x").check([])
    Function(lambda completions, target, **kwargs: [], "x").check(["target"])


# --------------------------------------------------------------------------------------------------------------- a run


def short_is_good(completion_ids, target, **kwargs):
    kwargs["log_extra"]("tokens", [len(ids) for ids in completion_ids])
    return [-float(len(ids)) + 0.1 * t for ids, t in zip(completion_ids, target, strict=True)]


def test_a_run_on_functions_alone(tmp_path: Path) -> None:
    args = config(tmp_path, num_sample_generations=1, eval_strategy="steps", eval_steps=2)
    held_out = Dataset.from_dict({"prompt": PROMPTS[:3], "target": [0, 1, 2]})
    seen: list[Any] = []

    def whole(completions, prompts, target, **kwargs):
        seen.append((prompts, target))
        return [1.0] * len(completions)

    trainer = trainer_on(args, short_is_good, whole, eval_dataset=held_out)
    assert trainer.reward_model is None
    trainer.train()
    # Each prompt comes with its own row.
    assert all(PROMPTS[t] == p for prompts, targets in seen for p, t in zip(prompts, targets, strict=True))
    rows = metrics(tmp_path)
    assert rows[0]["rewards/whole/mean"] == 1.0
    assert rows[0]["objective/scores"] == pytest.approx(rows[0]["rewards/short_is_good/mean"] + 1)
    assert "eval/scores" in rows[1]
    table = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert all(row["tokens"] >= 1 for row in table if row["split"] == "train")


def test_a_reward_model_and_a_function_add_up(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    parts = {"reward_model": make_model("llama", tokenizer, "reward", seed=1)}
    for freeze in (0, 1):
        args = config(tmp_path / str(freeze), max_steps=1, reward_weights=[2.0, 1.0], freeze_layers=freeze)
        trainer_on(args, short_is_good, **parts, value_model=make_model("llama", tokenizer, "reward", seed=1)).train()
        [row] = metrics(tmp_path / str(freeze))
        expected = 2 * row["rewards/reward_model/mean"] + row["rewards/short_is_good/mean"]
        assert row["objective/scores"] == pytest.approx(expected, rel=1e-5)
        assert "rewards/reward_model/share" not in row


def test_token_rewards_reach_the_advantages(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=1, num_sample_generations=1)
    trainer = trainer_on(args, lambda completion_ids: [[1.0] * len(c) for c in completion_ids])
    kept: list[Experience] = []
    update = trainer._update
    trainer._update = lambda e, *rest: (kept.append(e), update(e, *rest))[1]
    trainer.train()
    [e] = kept
    assert e.scores.tolist() == [0] * 4
    written = [json.loads(line)["score"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert written == e.completion_lens.tolist()
    assert torch.allclose(e.rewards, 1 - 0.05 * e.kl)
    [row] = metrics(tmp_path)
    assert row["objective/token_rewards"] == pytest.approx(row["tokens/completion"] / 4)
    assert row["objective/rlhf_reward"] == pytest.approx(
        row["objective/token_rewards"] + row["objective/non_score_reward"], rel=1e-5
    )


class FailsAt:
    """A reward that is sound but for one call."""

    __name__ = "fails"

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def __call__(self, completion_ids, target):
        self.calls += 1
        scores = [0.1 * t - len(ids) for ids, t in zip(completion_ids, target, strict=True)]
        return [*scores[:-1], math.nan] if self.calls == self.call else scores


@pytest.mark.parametrize("save_only_model", [False, True])
def test_a_run_that_a_reward_stops_can_go_on(tmp_path: Path, save_only_model: bool) -> None:
    # One call is for center_scores, one for each update.
    settings = {"center_scores": 4, "normalize_scores": True, "score_clip": 3.0, "save_only_model": save_only_model}
    trainer_on(config(tmp_path / "whole", **settings), FailsAt(0)).train()
    whole = metrics(tmp_path / "whole")
    assert whole[0]["rewards/offset"] == whole[3]["rewards/offset"] != 0
    assert len({row["rewards/running_std"] for row in whole}) == 4

    broken = tmp_path / "broken"
    with pytest.raises(RewardError, match=r"'fails' gave nan.*the sample '.*2 updates before.*checkpoint-2.*--resume"):
        trainer_on(config(broken, **settings), FailsAt(4)).train()
    assert [p.name for p in broken.glob("checkpoint-*")] == ["checkpoint-2"]
    state = json.loads((broken / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["scorer"]["offset"] == whole[0]["rewards/offset"]
    function = FailsAt(0)
    trainer_on(config(broken, **settings), function).train(resume_from_checkpoint=True)
    assert function.calls == 2  # the mean of the SFT policy is not taken again
    assert metrics(broken) == whole


def test_a_reward_that_fails_in_evaluation_costs_no_update(tmp_path: Path) -> None:
    held_out = Dataset.from_dict({"prompt": PROMPTS[:3], "target": [0, 1, 2]})
    settings = {"eval_strategy": "steps", "eval_steps": 3}
    trainer_on(config(tmp_path / "whole", **settings), FailsAt(0), eval_dataset=held_out).train()
    with pytest.raises(RewardError, match="checkpoint-3"):
        trainer_on(config(tmp_path / "broken", **settings), FailsAt(4), eval_dataset=held_out).train()
    assert len(metrics(tmp_path / "broken")) == 3
    trainer_on(config(tmp_path / "broken", **settings), FailsAt(0), eval_dataset=held_out).train(True)
    assert metrics(tmp_path / "broken")[3] == metrics(tmp_path / "whole")[3]


def test_conversations_in_a_run(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    trainer_on(config(tmp_path, max_steps=1), reward, chat=True, train_dataset=Dataset.from_list(rows)).train()
    [(prompts, completions)] = seen
    assert all(p in [row["prompt"] for row in rows] for p in prompts)
    assert all([set(m) for m in c] == [{"role", "content"}] for c in completions)


def test_no_reward_at_all(tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="there is no reward"):
        trainer_on(config(tmp_path))
    with pytest.raises(FourscoreError, match="neither a column"):
        trainer_on(config(tmp_path), lambda completions, absent: [])
    with pytest.raises(FourscoreError, match="--reward_weights 1 1: there are 1 rewards"):
        trainer_on(config(tmp_path, reward_weights=[1.0, 1.0]), short_is_good)


def test_notes() -> None:
    s = scorer(lambda log_extra, completions: log_extra("a", [1]) or [0.0] * 3)
    with pytest.raises(
        RewardError, match=r"^reward '<lambda>': log_extra\('a', ...\) was given 1 values for 3 samples"
    ):
        s.rate(samples())
    assert Notes().columns == {}
    for metric in ("objective/kl", "rewards/mine/mean", "value/x", "lr"):
        with pytest.raises(
            RewardError, match=rf"^reward '<lambda>': log_metric\('{metric}', ...\): the run logs under"
        ):
            scorer(lambda log_metric, completions, metric=metric: log_metric(metric, 1.0)).rate(samples())
    with pytest.raises(RewardError, match=r"log_metric\('a', 'b'\): that is no number"):
        scorer(lambda log_metric, completions: log_metric("a", "b")).rate(samples())
    for column in ("prompt", "completion", "score", "step", "split"):
        with pytest.raises(RewardError, match=rf"log_extra\('{column}', ...\): samples have that; give another name"):
            scorer(lambda log_extra, completions, column=column: log_extra(column, [1] * 3)).rate(samples())
