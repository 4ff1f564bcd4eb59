"""The benchmarks at a tiny size: they run, and they measure what they say."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from checkpoints import random_pair  # noqa: E402
from memory_probe import MIB, STATUS, MemoryProbe  # noqa: E402
from side_by_side import Work, ratio, run, run_in_turn  # noqa: E402

linux = pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def bench(script: str, cache: Path, *flags: str) -> tuple[str, list[dict[str, Any]]]:
    """What a benchmark prints, and its measurements; TRL is not among what tests install."""
    common = ["--without_trl", "--cache", str(cache), "--json", str(cache / "out.json")]
    command = [sys.executable, str(BENCHMARKS / script), *common, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((cache / "out.json").read_text())


@linux
def test_own_memory_is_told_from_mapped_files(tmp_path: Path) -> None:
    size = 64 * MIB
    file = tmp_path / "mapped"
    file.write_bytes(bytes(size))
    probe = MemoryProbe()
    probe.phase("before")
    time.sleep(0.01)

    probe.phase("own")
    own = torch.ones(size, dtype=torch.uint8)
    time.sleep(0.2)  # long enough to be seen on a busy machine
    del own  # only the peak remembers it
    probe.phase("mapped")
    mapped = np.memmap(file, mode="r")
    int(mapped.sum())
    time.sleep(0.2)
    probe.phase("after")
    probe.stop()

    above = {
        phase: {kind: probe.peaks[phase][kind] - probe.peaks["before"][kind] for kind in ("anon", "file")}
        for phase in probe.peaks
    }
    assert above["own"]["anon"] == pytest.approx(64, abs=4)
    assert above["own"]["file"] < 4
    assert above["mapped"]["file"] == pytest.approx(64, abs=4)
    assert above["mapped"]["anon"] < 4
    assert above["after"]["anon"] < 4
    assert probe.peak("anon") == probe.peaks["own"]["anon"]


@linux
def test_trl_opens_each_file_twice_and_what_it_loads_is_counted(cache: Path) -> None:
    pair = random_pair(cache / "models", "tiny", torch.bfloat16)
    job = {
        "system": "trl",
        "policy": str(pair.policy),
        "reward": str(pair.reward),
        "warm_up": [str(pair.policy), str(pair.reward)],
        "dtype": "float32",
        "lora": None,
        "batch": (2, 32),
        "device": "cpu",
    }
    result = run(Work(sys.executable, "load_worker.py", job))
    assert result["openings_by_file"] == {str(file.resolve()): 2 for file in pair.files()}, result
    assert 0 < result["load_s"] < result["total_s"]


@linux
def test_loading_benchmark(cache: Path) -> None:
    flags = ["--models", "tiny", "--repetitions", "1", "--dtypes", "float32", "--page_cache", "cold"]
    printed, measured = bench("load.py", cache, *flags)
    results = {entry["name"]: entry["results"] for entry in measured}
    assert {"full, fourscore", "lora, fourscore", "lora, one base, fourscore"} <= set(results)
    for name in ("full, fourscore", "lora, fourscore"):
        assert results[name][0]["openings"] == 1, results[name]
        assert name in printed


@linux
def test_update_benchmark(cache: Path) -> None:
    flags = ["--model", "tiny", "--files", "float32", "--cases", "lora", "--checkpointing", "true", "--updates", "1"]
    printed, measured = bench("update_memory.py", cache, *flags)
    for entry in measured:
        (result,) = entry["results"]
        assert result["anon"] > result["anon_above_imports"] > 0, result
        assert result["update_s"] > 0
        assert entry["name"] in printed
    assert len(measured) == 3


@pytest.mark.parametrize("at_once", [2, 5])
def test_rollout_benchmark(cache: Path, at_once: int) -> None:
    """It fails by itself if they do not give the same tokens, of the lengths asked for."""
    flags = ["--model", "tiny", "--pairs", "2", "--batch", "5", "--prompts", "2", "9", "--response_length", "7"]
    flags += ["--at_once", str(at_once)]
    command = [sys.executable, str(BENCHMARKS / "rollout.py"), *flags, "--cache", str(cache)]
    command += ["--json", str(cache / "rollout.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads((cache / "rollout.json").read_text())
    assert all(len(times) == 2 and min(times) > 0 for times in measured["seconds"].values())
    assert measured["ratios"]["fourscore: time"][0] == pytest.approx(
        measured["seconds"]["fourscore"][0] / measured["seconds"]["generate"][0]
    )


def test_a_failing_case_is_reported_and_not_repeated(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import sys\nprint('noise')\nprint(sys.argv[1])\nsys.exit('broken' if '1' in sys.argv[1] else 0)")
    reason = "needs 9 GiB of memory, 1 are free"
    works = {
        "good": Work(sys.executable, str(script), {"size": 2}),
        "bad": Work(sys.executable, str(script), {"size": 1}),
        "large": Work(sys.executable, str(script), {"size": 3}, skip=reason),
    }
    results = run_in_turn(works, repetitions=2)
    assert results == {"good": [{"size": 2}] * 2, "bad": [{"failed": "broken"}], "large": [{"failed": reason}]}


def test_ratio_of_medians_against_its_aim() -> None:
    trl = [{"anon": 10.0}, {"anon": 1000.0}, {"anon": 20.0}]
    assert ratio([{"anon": 4.0}], trl, "anon") == "0.20"
    assert ratio([{"anon": 4.0}], trl, "anon", aim=0.2) == "0.200 (≤ 0.20)"
    assert ratio([{"anon": 4.02}], trl, "anon", aim=0.2) == "0.201 (> 0.20)"
    assert ratio([{"anon": 5.0}], trl, "anon", aim=0.2) == "0.250 (> 0.20)"
    assert ratio([{"anon": 5.0}], [{"failed": "no memory"}], "anon", aim=0.2) == ""
