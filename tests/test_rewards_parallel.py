"""Rewards in two processes: the numbers of one, and when one of them gets no reward, both stop in the same way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_parallel import HERE, tool
from tiny import make_encoder


def launch(out: Path, sft: Path, encoder: Path, world_size: int, *launcher: str) -> None:
    path = os.pathsep.join([str(HERE), *sys.path])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [*(launcher or [sys.executable]), str(HERE / "rewards_worker.py"), str(out), str(world_size)]
    done = subprocess.run(
        [*command, str(sft), str(encoder)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun --standalone --nproc_per_node 2",
        "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 --main_process_port 0",
    ],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_have_the_rewards_of_one(launcher: str, llama_policy: Path, tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    launch(alone, llama_policy, encoder, 1)
    program, *options = launcher.split()
    launch(together, llama_policy, encoder, 2, tool(program), *options)
    one, two = (
        [json.loads(line) for line in (folder / "sound" / "metrics.jsonl").read_text().splitlines()]
        for folder in (alone, together)
    )
    names = [name for name in one[0] if name.startswith(("rewards/", "objective/"))]
    assert {"rewards/mixed/share", "rewards/offset", "rewards/running_std", "objective/token_rewards"} <= set(names)
    for a, b in zip(one, two, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
        assert a["longest"] >= b["longest"]  # a mean over processes of what each has noted
    messages = [json.loads((together / f"message-{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "'breaks' gave nan" in messages[0] and "checkpoint-1" in messages[0]
    assert [path.name for path in (together / "broken").glob("checkpoint-*")] == ["checkpoint-1"]
