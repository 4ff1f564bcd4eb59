"""Rollout by a vLLM server: a process of its wire shape on the loopback, which is killed and started again, too."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from test_parallel import HERE, tool
from test_reward_server import unused_port
from test_rewards import ALONE, PROMPTS, metrics
from tiny import make_checkpoint, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from fourscore import FourscoreError, ModelConfig, PPOConfig, PPOTrainer, load_models
from fourscore.errors import RolloutError
from fourscore.models.support import Support
from fourscore.rollout.build import why_none_here
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.stopping import StopStrings
from fourscore.rollout.transformers import generate
from fourscore.rollout.vllm import VLLM, parameters, write_tied_output
from fourscore.rollout.vllm_server import Server

SERVER = Path(__file__).parent / "vllm_server.py"
IDS = [[40, 50], [41], [42, 43, 44, 45, 46], [47, 48, 49], [60] * 9]
GREEDY = Sampling(12, 0.0, (0,), 0, 4)


class Running:
    """A server process; `log` is what it was asked but for completions."""

    def __init__(self, checkpoint: Path, folder: Path, **facts: Any) -> None:
        self.port = unused_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"{self.port}.log"
        self._command = [sys.executable, str(SERVER), str(self.port), str(checkpoint)]
        self.facts = facts
        self.process: subprocess.Popen[bytes]
        self.start()

    @property
    def log(self) -> list[tuple[str, Any]]:
        return [tuple(json.loads(line)) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def start(self) -> None:
        """Start it, and wait until it serves."""
        started = sum(place == "started" for place, _ in self.log)
        env = os.environ | {"VLLM_LOG": str(self._log), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*self._command, json.dumps(self.facts)], env=env)
        while sum(place == "started" for place, _ in self.log) == started:
            assert self.process.poll() is None, "the server did not start"
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pushes(self) -> int:
        """How often it was given weights or an adapter."""
        return sum(place in ("/collective_rpc", "/v1/load_lora_adapter") for place, _ in self.log)


@contextmanager
def serving(checkpoint: Path, folder: Path, **facts: Any) -> Iterator[Running]:
    running = Running(checkpoint, folder, **facts)
    try:
        yield running
    finally:
        running.kill()


@contextmanager
def restarted(running: Running) -> Iterator[None]:
    """Whenever it dies in this context it is started again, sound."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if running.process.poll() is not None:
                running.facts.pop("die_after", None)
                running.start()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def server(llama_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(llama_policy, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(llama_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose own weights nobody touches."""
    with serving(llama_policy, tmp_path_factory.mktemp("adapters")) as running:
        yield running


def engine_on(url: str, model: Any, folder: Path, **settings: Any) -> VLLM:
    def save(place: Path) -> Path:
        model.save_pretrained(place)
        return place

    client = Server(url, **({"timeout": 20.0, "retries": 2, "concurrency": 4} | settings))
    adapter = hasattr(model, "peft_config")
    return VLLM(client, save, folder, ALONE, adapter=adapter, vocabulary=model.config.vocab_size)


def moved(model: Any, seed: int = 0) -> Any:
    """The same model after some updates."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 * float(parameter.requires_grad))
    return model


def policy_of(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


# ------------------------------------------------------------------------------------------------------ the same tokens


def test_greedy_tokens_are_those_of_the_policy_before_and_after_an_update(
    server: Running, llama_policy: Path, tmp_path: Path
) -> None:
    policy = policy_of(llama_policy)
    engine = engine_on(server.url, policy, tmp_path / "out")
    before = engine.generate(IDS, GREEDY)
    expected = generate(policy, IDS, GREEDY)
    assert before.completions() == expected.completions() and before.prompts() == IDS
    assert before.has_eos.tolist() == expected.has_eos.tolist() and before.engine_logprobs is None
    moved(policy)
    assert engine.generate(IDS, GREEDY).completions() == before.completions()  # nobody has told it
    pushes = server.pushes()
    engine.weights_changed()
    after = engine.generate(IDS, GREEDY)
    assert after.completions() == generate(policy, IDS, GREEDY).completions() != before.completions()
    engine.generate(IDS, GREEDY)
    assert server.pushes() == pushes + 1
    last = [place for place, _ in server.log][-5:]
    assert last == ["/pause", "/update_weight_version", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert len(list((tmp_path / "out").iterdir())) == 1  # what it was given before is gone
    engine.close()
    assert not (tmp_path / "out").exists()
    assert engine.generate(IDS, GREEDY).completions() == after.completions()


def test_adapters_are_loaded_by_name_and_the_old_one_is_forgotten(
    adapters: Running, llama_policy: Path, tmp_path: Path
) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    policy = get_peft_model(policy_of(llama_policy), config).eval()
    engine = engine_on(adapters.url, policy, tmp_path)
    before = len(adapters.log)
    for seed in range(3):
        moved(policy, seed)
        engine.weights_changed()
        assert engine.generate(IDS, GREEDY).completions() == generate(policy, IDS, GREEDY).completions()
    log = [(place, body["lora_name"]) for place, body in adapters.log[before:] if place.startswith("/v1/")]
    names = [name for place, name in log if place == "/v1/load_lora_adapter"]
    assert len(set(names)) == 3
    assert [name for place, name in log if place == "/v1/unload_lora_adapter"] == names[:2]


def test_what_is_drawn_and_its_logprobs(server: Running, llama_policy: Path, tmp_path: Path) -> None:
    policy = policy_of(llama_policy)
    engine = engine_on(server.url, policy, tmp_path / "out")
    sampling = Sampling(12, 0.7, (0, 5), 0, 4, min_new_tokens=4)
    torch.manual_seed(3)
    drawn = engine.generate([[40, 50]] * 4 + IDS, sampling)
    assert len({tuple(c) for c in drawn.completions()[:4]}) > 1  # of one prompt, with seeds of their own
    torch.manual_seed(3)
    assert engine.generate([[40, 50]] * 4 + IDS, sampling).completions() == drawn.completions()
    assert min(map(len, drawn.completions())) >= 4
    for prompt, completion, logprobs in zip(
        drawn.prompts(),
        drawn.completions(),
        drawn.engine_logprobs.split(drawn.completion_lens.tolist()),
        strict=True,
    ):
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        logits[:3, [0, 5]] = -torch.inf
        expected = logits.log_softmax(1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert torch.allclose(logprobs, expected, atol=1e-5)
    assert drawn.support is not None
    barred = drawn.support.barred(policy.config.vocab_size)
    early = torch.cat([torch.arange(n) < 3 for n in drawn.completion_lens.tolist()])
    assert torch.equal(barred[:, 5], early) and torch.equal(barred[:, 0], early) and not barred[:, 6].any()
    assert engine.generate(IDS, sampling, keep_support=False).support is None


def test_support_without_a_few_ids() -> None:
    where = torch.tensor([True, False, True])
    allowed = torch.ones(3, 50, dtype=torch.bool)
    allowed[where] = allowed[where].index_fill(1, torch.tensor([3, 7]), False)
    ours, theirs = Support.without((7, 3, 7), where, 50), Support.of(allowed)
    for field in ("words", "lens", "kinds"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


@pytest.mark.parametrize(
    "change",
    [
        {"stop_ids": ()},
        {"stop_ids": (0, 30, 31, 32, 33, 34, 35, 36, 37, 38)},
        {"min_new_tokens": 6, "stop_ids": tuple(range(0, 150))},
        {"texts": ["e", "th"]},
        {"texts": ["e", "th"], "min_new_tokens": 5},
    ],
    ids=lambda change: " ".join(change),
)
def test_what_ends_a_completion(change: dict[str, Any], server: Running, llama_policy: Path, tmp_path: Path) -> None:
    policy = policy_of(llama_policy)
    if texts := change.pop("texts", None):
        change["stop_strings"] = StopStrings(texts, make_tokenizer())
    sampling = replace(GREEDY, **change)
    ours, expected = engine_on(server.url, policy, tmp_path).generate(IDS, sampling), generate(policy, IDS, sampling)
    assert ours.completions() == expected.completions()
    assert ours.has_eos.tolist() == expected.has_eos.tolist()
    if "stop_strings" in change:
        assert any(expected.has_eos.tolist())


def test_a_text_that_only_the_server_sees_does_not_end_a_completion(llama_policy: Path, tmp_path: Path) -> None:
    policy, tokenizer = policy_of(llama_policy), make_tokenizer()
    prompts = [tokenizer("the film")["input_ids"], *IDS]
    sampling = replace(GREEDY, stop_strings=StopStrings(["film"], tokenizer))
    with serving(llama_policy, tmp_path, eager_stops=True) as running:
        drawn = engine_on(running.url, policy, tmp_path / "out").generate(prompts, sampling)
    expected = generate(policy, prompts, sampling)
    assert drawn.completions() == expected.completions() and len(drawn.completions()[0]) > 1


def test_sampling_as_vllm_has_it() -> None:
    sampling = Sampling(9, 0.7, (3, 4), 0, 8, top_k=5, top_p=0.9, min_new_tokens=4)
    asked = parameters(sampling, 2, 11)
    assert asked["max_tokens"] == 7 and asked["min_tokens"] == 1 and asked["seed"] == 11 and asked["logprobs"] == 0
    assert (asked["top_k"], asked["top_p"], asked["stop_token_ids"], asked["ignore_eos"]) == (5, 0.9, [3, 4], True)
    assert parameters(replace(sampling, temperature=0.0), 0, 0)["logprobs"] is None
    assert parameters(replace(sampling, min_new_tokens=0), 0, 0)["min_tokens"] == 0


def test_tied_output_layers_are_in_the_files(tmp_path: Path) -> None:
    policy = make_model("llama", make_tokenizer(), tie_word_embeddings=True)
    for size in ("10GB", "60KB"):
        folder = tmp_path / size
        policy.save_pretrained(folder, max_shard_size=size)
        write_tied_output(folder, "model.embed_tokens.weight", "lm_head.weight")
        found = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
        assert found.keys() == policy.state_dict().keys()
        assert torch.equal(load_file(folder / found["lm_head.weight"])["lm_head.weight"], policy.lm_head.weight)
        if size == "60KB":
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["weight_map"] == found and len(set(found.values())) > 2


# ----------------------------------------------------------------------------------------------------------- whole runs


def config(out: Path, url: str | None, sft: Path, reward: Path, **changes: Any) -> PPOConfig:
    settings = {
        "output_dir": str(out),
        "sft_model_path": str(sft),
        "reward_model_path": str(reward),
        "rollout_engine": "vllm",
        "vllm_server_url": url,
        "vllm_timeout": 20.0,
        "vllm_retries": 7,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "response_length": 6,
        "temperature": 1.0,
        "save_strategy": "no",
        "num_sample_generations": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PPOConfig(**(settings | changes))


def trainer_on(args: PPOConfig, **model_args: Any) -> PPOTrainer:
    models = load_models(ModelConfig(**model_args), args)
    return PPOTrainer(
        args=args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}),
    )


def assert_on_policy(out: Path, updates: int = 3) -> None:
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, updates + 1))
    for row in rows:
        assert 0 < row["rollout/logprob_mismatch_mean"] <= row["rollout/logprob_mismatch_max"] < 1e-4
        assert row["rollout/ratio_mean"] == pytest.approx(1, abs=1e-4)
        assert row["policy/first_ratio_mean"] < 1e-4


def check_run(args: PPOConfig, running: Running, **model_args: Any) -> None:
    """Three updates: on policy, pushed as often as the weights have changed, and then the policy's own tokens."""
    before = running.pushes()
    trainer = trainer_on(args, **model_args)
    trainer.train()
    assert running.pushes() == before + 4  # one for each rollout, and one for the evaluation after the last update
    greedy = [row["completion_ids"] for row in trainer.complete_eval_prompts(0.0)]
    assert running.pushes() == before + 4
    prompts = trainer._prompt_ids(trainer.eval_dataset, range(3))
    sampling = replace(GREEDY, max_new_tokens=6)
    assert greedy == generate(trainer.model.eval(), prompts, sampling).completions()
    assert greedy != generate(trainer_on(args, **model_args).model.eval(), prompts, sampling).completions()
    assert_on_policy(Path(args.output_dir))
    assert not (Path(args.output_dir) / ".rollout").exists()


EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}


@pytest.mark.parametrize("changes", [{}, {"freeze_layers": 1}, {"share_value_backbone": True}], ids=str)
def test_runs(changes: dict[str, Any], server: Running, llama_policy: Path, llama_reward: Path, tmp_path: Path) -> None:
    check_run(config(tmp_path, server.url, llama_policy, llama_reward, **EVALUATED, **changes), server)


def test_a_run_with_a_tied_output_layer(llama_reward: Path, tmp_path: Path) -> None:
    tied = make_checkpoint("llama", tmp_path / "tied", tie_word_embeddings=True)
    with serving(tied, tmp_path) as running:
        check_run(config(tmp_path / "run", running.url, tied, llama_reward, **EVALUATED), running)


@pytest.mark.parametrize("kind", ["lora", "sft adapter"])
def test_runs_with_adapters(
    kind: str, adapters: Running, llama_policy: Path, llama_reward: Path, tmp_path: Path
) -> None:
    sft = llama_policy
    if kind == "sft adapter":
        below = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["v_proj"], init_lora_weights=False)
        adapted = get_peft_model(policy_of(llama_policy), below)
        adapted.peft_config["default"].base_model_name_or_path = str(llama_policy)
        sft = tmp_path / "adapter"
        adapted.save_pretrained(sft)
        make_tokenizer().save_pretrained(sft)
    args = config(tmp_path / "run", adapters.url, sft, llama_reward, **EVALUATED)
    check_run(args, adapters, use_peft=True, lora_r=8)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_server_that_is_killed_and_started_again(
    kind: str, llama_policy: Path, llama_reward: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(llama_policy, tmp_path, die_after=8) as running, restarted(running):  # in the second rollout
        args = config(tmp_path / "run", running.url, llama_policy, llama_reward)
        trainer_on(args, use_peft=kind == "lora").train()
        assert sum(place == "started" for place, _ in running.log) == 2
        assert running.pushes() == 4
    assert_on_policy(tmp_path / "run")
    assert "it gets them again" in caplog.text


def test_a_server_that_is_killed_between_rollouts(llama_policy: Path, tmp_path: Path) -> None:
    policy = policy_of(llama_policy)
    with serving(llama_policy, tmp_path) as running:
        engine = engine_on(running.url, policy, tmp_path / "out")
        engine.generate(IDS, GREEDY)
        moved(policy)
        engine.weights_changed()
        engine.generate(IDS, GREEDY)
        running.kill()
        running.start()
        assert engine.generate(IDS, GREEDY).completions() == generate(policy, IDS, GREEDY).completions()


def test_a_server_that_stays_dead_leaves_a_run_that_can_go_on(
    llama_policy: Path, llama_reward: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    with serving(llama_policy, tmp_path, die_after=12) as running:  # in the third rollout
        args = config(out, running.url, llama_policy, llama_reward, vllm_retries=1)
        with pytest.raises(RolloutError) as error:
            trainer_on(args).train()
    message = str(error.value)
    assert message.startswith(f"--vllm_server_url {running.url}: no answer to repeated requests (")
    assert "the 2 updates before are in" in message and "--resume_from_checkpoint true" in message
    assert (out / "checkpoint-2").is_dir()
    with serving(llama_policy, tmp_path) as running:
        trainer_on(config(whole, running.url, llama_policy, llama_reward)).train()
        trainer_on(config(out, running.url, llama_policy, llama_reward)).train(resume_from_checkpoint=True)
    assert metrics(out) == metrics(whole)


def test_a_server_that_stalls(llama_policy: Path, tmp_path: Path) -> None:
    with serving(llama_policy, tmp_path, stall_s=30.0) as running:
        engine = engine_on(running.url, policy_of(llama_policy), tmp_path / "out", timeout=1.0, retries=9)
        started = time.perf_counter()
        with pytest.raises(RolloutError, match=r"no answer to repeated requests \(.*[Rr]ead timed out"):
            engine.generate(IDS[:2], GREEDY)
        assert time.perf_counter() - started < 15


def test_weights_that_do_not_reach_the_server(server: Running, llama_policy: Path, tmp_path: Path) -> None:
    engine = engine_on(server.url, policy_of(llama_policy), tmp_path)
    engine._save = lambda folder: Path("/nowhere")
    with pytest.raises(RolloutError, match=r"/collective_rpc answered with status 500 .*must see the same files"):
        engine.generate(IDS, GREEDY)
    with pytest.raises(FourscoreError, match="does not say what top-k and top-p left"):
        engine.generate(IDS, Sampling(4, 1.0, (), 0, 4, top_k=5))
    assert [place for place, _ in server.log][-1] == "/resume"  # others may go on


def test_too_short_a_server(llama_policy: Path, tmp_path: Path) -> None:
    with serving(llama_policy, tmp_path, max_model_len=15) as running:
        engine = engine_on(running.url, policy_of(llama_policy), tmp_path / "out")
        with pytest.raises(RolloutError, match=r"ends completions at 15 tokens; .* a larger --max-model-len"):
            engine.generate(IDS, GREEDY)


def test_a_server_of_another_model_is_a_warning(
    llama_policy: Path, llama_reward: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_checkpoint("llama", tmp_path / "other", seed=5)
    with serving(other, tmp_path) as running:
        args = config(tmp_path / "run", running.url, llama_policy, llama_reward, max_steps=1)
        trainer_on(args, use_peft=True).train()
    assert "the server has another model or dtype" in caplog.text
    assert metrics(tmp_path / "run")[0]["rollout/logprob_mismatch_mean"] > 0.1


# ------------------------------------------------------------------------------------------------ a server of its own


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Python that has something like vLLM; the log of what it is asked."""
    log = tmp_path / "asked.jsonl"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "vllm_stub"), *sys.path]))
    monkeypatch.setenv("VLLM_LOG", str(log))
    yield log
    assert not [each for each in processes() if "vllm.entrypoints" in each], "a server is left"


def processes() -> list[str]:
    """Command lines of what this process has started, and of what those have."""
    return [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]


def asked_of(log: Path, *places: str) -> int:
    return sum(json.loads(line)[0] in places for line in log.read_text().splitlines())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_that_starts_its_server(
    kind: str, stub: Path, llama_policy: Path, llama_reward: Path, tmp_path: Path
) -> None:
    args = config(tmp_path / "run", None, llama_policy, llama_reward, **EVALUATED)
    trainer = trainer_on(args, use_peft=kind == "lora", lora_r=12)
    assert not stub.exists(), "started before it is needed"
    trainer.train()
    assert asked_of(stub, "started") == 1
    assert asked_of(stub, "/collective_rpc", "/v1/load_lora_adapter") == 4
    assert_on_policy(tmp_path / "run")
    [(_, facts), *_] = [json.loads(line) for line in stub.read_text().splitlines()]
    longest = max(len(row) for row in trainer.train_dataset["input_ids"])
    assert facts["max_model_len"] == longest + 6 and facts["max_lora_rank"] == (16 if kind == "lora" else 0)
    assert f"serving {llama_policy}" in (tmp_path / "run" / "vllm.log").read_text()
    assert not (tmp_path / "run" / ".rollout").exists()


def test_its_server_is_started_again_where_it_died(
    stub: Path,
    llama_policy: Path,
    llama_reward: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "once").write_text("8")  # in the second rollout
    monkeypatch.setenv("STUB_DIES_ONCE", str(tmp_path / "once"))
    asked: list[Any] = []
    complete = Server.complete
    monkeypatch.setattr(Server, "complete", lambda self, *words: asked.append(words) or complete(self, *words))
    trainer_on(config(tmp_path / "run", None, llama_policy, llama_reward)).train()
    assert asked_of(stub, "started") == 2 and asked_of(stub, "/collective_rpc") == 4
    assert 3 * 4 < len(asked) < 4 * 4, "what had been answered is not asked for again"
    assert "was started again, as it had died" in caplog.text
    assert_on_policy(tmp_path / "run")


def test_its_server_dies_as_weights_are_handed_over(
    stub: Path, llama_policy: Path, llama_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_on(config(tmp_path / "run", None, llama_policy, llama_reward))
    load, times = Server.load_weights, itertools.count(1)

    def load_weights(server: Server, folder: Path, version: str) -> None:
        if next(times) == 2:
            trainer.engine._process._process.kill()
        load(server, folder, version)

    monkeypatch.setattr(Server, "load_weights", load_weights)
    trainer.train()
    assert asked_of(stub, "started") == 2
    assert_on_policy(tmp_path / "run")


@pytest.mark.usefixtures("stub")
def test_its_server_does_not_start(
    llama_policy: Path, llama_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAILS", "Free memory on device cuda:0 is less than desired")
    trainer = trainer_on(config(tmp_path / "run", None, llama_policy, llama_reward))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vllm.log").write_text("OldError: of another run\n")
    expected = r"--rollout_engine vllm: the server ended .*\(ValueError: Free memory on device.*\).*vllm\.log has what"
    with pytest.raises(RolloutError, match=expected):
        trainer.train()


def test_no_vllm_to_start(llama_policy: Path, llama_reward: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({}, "--rollout_engine vllm: .* has no vLLM; install vllm there, name another Python with --vllm_python"),
        ({"vllm_python": "/nowhere/python"}, "--vllm_python /nowhere/python: is no Python that runs"),
    ):
        with pytest.raises(FourscoreError, match=message):
            trainer_on(config(tmp_path / "run", None, llama_policy, llama_reward, **changes))


@pytest.mark.usefixtures("stub")
def test_an_adapter_that_is_no_lora(llama_policy: Path, llama_reward: Path, tmp_path: Path) -> None:
    args = config(tmp_path / "run", None, llama_policy, llama_reward)
    models = load_models(ModelConfig(), args)
    scaled = IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=["v_proj"], feedforward_modules=[])
    with pytest.raises(FourscoreError, match="the policy's adapters are no single LoRA together"):
        PPOTrainer(
            args=args,
            processing_class=models.tokenizer,
            model=get_peft_model(models.policy, scaled),
            ref_model=None,
            reward_model=models.reward_model,
            value_model=models.value_model,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        )


@pytest.mark.usefixtures("stub")
def test_its_server_is_not_for_other_machines(
    llama_policy: Path, llama_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    args = config(tmp_path / "run", None, llama_policy, llama_reward)
    args.world_size = 2
    assert "cannot be reached from its other machines" in str(why_none_here(args))
    args.world_size = 1
    assert why_none_here(args) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it ends when the interpreter does")
def test_its_server_ends_with_a_process_that_is_killed(llama_policy: Path, tmp_path: Path, stub: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from fourscore.rollout.vllm_process import MODULE, OwnServer
server = OwnServer([sys.executable, "-m", MODULE, "--model", sys.argv[1]], dict(os.environ), Path(sys.argv[2]))
server.start()
print(server._process.pid, flush=True)
time.sleep(600)
"""
    words = [sys.executable, "-c", code, str(llama_policy), str(tmp_path / "vllm.log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert asked_of(stub, "started") == 1
    psutil.wait_procs([server], timeout=20)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun --standalone --nproc_per_node 2",
        "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 --main_process_port 0",
    ],
    ids=["ddp", "fsdp2"],
)
def test_two_processes(launcher: str, llama_policy: Path, llama_reward: Path, tmp_path: Path) -> None:
    program, *options = launcher.split()
    paths = os.pathsep.join([str(HERE), str(HERE / "vllm_stub"), *sys.path])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "VLLM_LOG": str(tmp_path / "own.jsonl")}
    (tmp_path / "once").write_text("7")  # in the second rollout
    env["STUB_DIES_ONCE"] = str(tmp_path / "once")
    with (
        serving(llama_policy, tmp_path, die_after=7) as whole,  # in the second rollout
        restarted(whole),
        serving(llama_policy, tmp_path) as adapted,
    ):
        words = [str(HERE / "vllm_worker.py"), str(tmp_path), whole.url, adapted.url]
        command = [tool(program), *options, *words, str(llama_policy), str(llama_reward)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (whole.pushes(), adapted.pushes()) == (3, 2)  # one process alone pushes, and once more after the restart
    assert asked_of(tmp_path / "own.jsonl", "started") == 2 and asked_of(tmp_path / "own.jsonl", "/collective_rpc") == 3
    for kind in ("full", "lora", "own"):
        assert_on_policy(tmp_path / kind, 2)
    messages = [json.loads((tmp_path / f"message-{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0] == messages[1] and "no answer (" in messages[0] and "no update was done yet" in messages[0]
