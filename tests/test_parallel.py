"""Two processes do what one does: the same gradients for samples of unequal length, and nobody hangs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import make_adapter

HERE = Path(__file__).parent
WHOLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
WEIGHTS = {
    "full": (WHOLE, WHOLE),
    "lora": (ADAPTER, ADAPTER),
    "frozen": (WHOLE, WHOLE),
    "trunk": (WHOLE, "score.safetensors"),
    "options": (WHOLE, WHOLE),
    "groups": (WHOLE, WHOLE),
    "on an adapter": (ADAPTER, ADAPTER),
}


def launch(out: Path, checkpoints: list[Path], kinds: list[str], *launcher: str) -> None:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "HF_HUB_OFFLINE": "1",
    }
    world_size = "2" if launcher else "1"
    command = [*(launcher or [sys.executable]), str(HERE / "parallel_worker.py"), str(out), world_size, ",".join(kinds)]
    command += [str(path) for path in checkpoints]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} is not installed"
    return found


@pytest.fixture(scope="module")
def checkpoints(llama_policy: Path, llama_reward: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """SFT and reward model, and an SFT model that is an adapter of the first, with a module that it saved whole."""
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(llama_policy, folder, target_modules=["q_proj"], modules_to_save=["norm"])
    return [llama_policy, llama_reward, folder]


@pytest.fixture(scope="module")
def alone(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    launch(out, checkpoints, list(WEIGHTS))
    return out


@pytest.mark.parametrize(
    ("launcher", "kinds"),
    [
        ("torchrun --standalone --nproc_per_node 2", ["full", "lora", "frozen", "trunk", "options", "groups"]),
        (
            "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 --main_process_port 0",
            ["full", "lora", "frozen", "options", "on an adapter"],
        ),
    ],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_equal_one(
    launcher: str, kinds: list[str], alone: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    program, *options = launcher.split()
    launch(tmp_path, checkpoints, kinds, tool(program), *options)
    for training in kinds:
        files = list(zip((".", "value_model"), WEIGHTS[training], strict=True))
        files += [("policy_ema", WHOLE)] if training == "options" else []
        for role, name in files:
            ours = load_file(tmp_path / training / role / name)
            theirs = load_file(alone / training / role / name)
            assert ours.keys() == theirs.keys()
            for key in ours:
                # Adam turns a rounding of a tiny gradient into a visible step, hence not tighter than this.
                assert (ours[key] - theirs[key]).abs().max() < 2e-4, (training, role, key)
        one, two = (
            [json.loads(line) for line in (folder / training / "metrics.jsonl").read_text().splitlines()]
            for folder in (alone, tmp_path)
        )
        assert len(one) == len(two) == 2
        for a, b in zip(one, two, strict=True):
            measured = {key for key in a if key.startswith(("objective/", "loss/", "value/", "policy/", "val/"))}
            assert {"objective/kl", "objective/scores", "loss/value_avg", "value/explained_variance"} < measured
            assert "loss/policy_avg" in measured or (training == "options" and a is one[0])
            for key in measured - {"policy/first_ratio_mean", "policy/first_ratio_max", "val/ratio_var"}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (training, key)
            assert a["tokens/completion"] == b["tokens/completion"]
            assert a["episode"] == b["episode"]
