"""A run that is killed and resumed is the run that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_adapter
from transformers import AutoModelForCausalLM

from fourscore import FourscoreError
from fourscore.parallel import Parallel
from fourscore.runs.checkpoint import Training, load, prune, resumable, rng_state, written_whole

HERE = Path(__file__).parent
ALONE = Parallel(torch.device("cpu"), rank=0, world_size=1, sharded=False)


def run(out: Path, checkpoints: tuple[Path, Path], adapter: str, kill_before: int = -1, resume: bool = False) -> int:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "HF_HUB_OFFLINE": "1",
    }
    words = [out, *checkpoints, adapter, kill_before, "resume" if resume else "new"]
    command = [sys.executable, str(HERE / "run_worker.py"), *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def lines(folder: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "eps" and not k.startswith(("time/", "memory/"))} for r in rows]


@pytest.mark.parametrize(
    ("adapter", "weights"),
    [
        ("full", "model.safetensors"),
        ("lora", "adapter_model.safetensors"),
        ("on an adapter", "adapter_model.safetensors"),
        ("groups", "model.safetensors"),
    ],
)
def test_killed_and_resumed(adapter: str, weights: str, llama_policy: Path, llama_reward: Path, tmp_path: Path) -> None:
    checkpoints = (llama_policy, llama_reward)
    if adapter == "on an adapter":
        checkpoints = (make_adapter(llama_policy, tmp_path / "sft", target_modules=["q_proj", "v_proj"]), llama_reward)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, checkpoints, adapter) == 0
    assert run(broken, checkpoints, adapter, kill_before=5) == -signal.SIGKILL
    assert not (broken / "checkpoint-6").exists()
    # Update 5 was done, and written down, after the last checkpoint: it is done again, not counted twice.
    assert lines(broken, "metrics.jsonl")[-1]["step"] == 5
    # A write that was cut off leaves only a draft, which is no checkpoint.
    shutil.copytree(broken / "checkpoint-4", broken / ".checkpoint-9.part")
    assert run(broken, checkpoints, adapter, resume=True) == 0
    assert lines(broken, "metrics.jsonl") == lines(whole, "metrics.jsonl")
    assert [row["step"] for row in lines(whole, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert lines(broken, "samples.jsonl") == lines(whole, "samples.jsonl")
    for role in (".", "value_model"):
        ours, theirs = (load_file(folder / "checkpoint-6" / role / weights) for folder in (broken, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {p.name for p in whole.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_a_damaged_checkpoint_is_named_and_a_whole_one_too(
    llama_policy: Path, llama_reward: Path, tmp_path: Path
) -> None:
    for update in (2, 4):
        folder = tmp_path / f"checkpoint-{update}"
        shutil.copytree(llama_policy, folder)
        for name in ("trainer_state.json", "optimizers.pt", "rng.pt"):
            torch.save([rng_state()], folder / name)
    assert resumable(tmp_path) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]
    policy = AutoModelForCausalLM.from_pretrained(llama_policy)
    training = Training({"policy": policy}, {}, {})
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(FourscoreError, match=rf"{folder}: cannot be read .*; try .*/checkpoint-2$"):
        load(folder, training, ALONE)
    (folder / "optimizers.pt").unlink()
    with pytest.raises(FourscoreError, match=r"optimizers.pt is missing, .*; .*/checkpoint-2 is whole$"):
        load(folder, training, ALONE)
    assert resumable(tmp_path) == [tmp_path / "checkpoint-2"]
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(FourscoreError, match=r"optimizers.pt is missing, .*; weights alone can be passed"):
        load(folder, training, ALONE)


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-2"
    with (
        pytest.raises(FourscoreError, match=r"No space left.*--resume_from_checkpoint"),
        written_whole(target, ALONE) as d,
    ):
        (d / "half").write_text("x")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with written_whole(target, ALONE) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    with written_whole(target, ALONE) as draft:
        (draft / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 3
    prune(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-10"}
