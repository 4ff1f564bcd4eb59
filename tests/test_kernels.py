"""Kernels for decoding: how they are made, and what there is without a compiler."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_model, make_tokenizer
from torch.profiler import ProfilerActivity, profile

from fourscore.models import kernels
from fourscore.models.packed import packed_bytes
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import generate


@pytest.fixture
def made_anew() -> Iterator[None]:
    """What a test makes of compilers is not to stay."""
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "c++ is not on the PATH"),
        ("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n", "c++ failed: fatal error: no headers"),
        ("#!/bin/sh\nexit 0\n", "kernels.so"),  # says that all is well, and makes nothing
        ("#!/nowhere/sh\n", "c++"),
    ],
    ids=["none", "fails", "makes nothing", "cannot run"],
)
def test_without_a_working_compiler_there_is_one_warning_and_rollouts_go_on_with_a_copy(
    script: str | None,
    said: str,
    tmp_path: Path,
    kernels_would_do: None,
    made_anew: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = make_model("llama", make_tokenizer("own"), "policy").eval()
    sampling = Sampling(6, 0.0, (), None, 2)
    prompts = [[5, 6, 7], [8, 9]]
    wanted = generate(policy, prompts, sampling).completions()
    kernels.library.cache_clear()
    if script is not None:
        (tmp_path / "c++").write_text(script)
        (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert not kernels.are_there()
        assert packed_bytes(policy) > 0
        assert generate(policy, prompts, sampling).completions() == wanted
    (warning,) = caplog.messages
    assert said in warning and "--pack_rollout_weights" in warning


def test_they_share_the_threads_of_torch(kernels_are_there: None) -> None:
    """In a new process, where another OpenMP is loaded before them."""
    script = """
import ctypes
from pathlib import Path
import torch
from fourscore.models import kernels

def loaded():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "omp" in Path(line.split()[-1]).name}

own = loaded()
for other in Path("/usr/lib").glob("*/libgomp.so.1"):
    ctypes.CDLL(str(other))
before = loaded()
assert kernels.library() is not None
assert loaded() == before and kernels._openmp() in own, (own, before, loaded())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_cxx_names_another_compiler(
    kernels_are_there: None, made_anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("c++")
    (tmp_path / "other").write_text(f'#!/bin/sh\ntouch {tmp_path}/"$1"\nshift\nexec {compiler} "$@"\n')
    (tmp_path / "other").chmod(0o755)
    monkeypatch.setenv("CXX", f"{tmp_path}/other was_called")
    kernels.library.cache_clear()
    assert kernels.are_there()
    assert (tmp_path / "was_called").exists()


def test_a_profile_shows_them(kernels_are_there: None) -> None:
    policy = make_model("llama", make_tokenizer("own"), "policy").eval()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        generate(policy, [[5, 6, 7]], Sampling(3, 0.0, (), None, 1))
    calls = {row.key: row.count for row in found.key_averages() if row.key.startswith("fourscore::")}
    layers = policy.config.num_hidden_layers
    # The prompt has seven products a layer; two tokens have a layer at once. All three end with a norm and the head.
    assert calls == {
        "fourscore::few_rows": 7 * layers + 3,
        "fourscore::norm": 2 * layers + 3,
        "fourscore::rotate": 2 * layers,
        "fourscore::swiglu": layers,
        "fourscore::decode": 2 * layers,
    }


@pytest.mark.parametrize("cxx", ['"c++', "nowhere/c++", "c++ -fvisibility=hidden", "c++ --no-such-flag"])
def test_a_cxx_that_makes_no_kernels_is_told_and_not_fatal(
    cxx: str,
    kernels_are_there: None,
    made_anew: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", cxx)
    kernels.library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.are_there()
    assert len(caplog.messages) == 1
    monkeypatch.setenv("CXX", "  ")
    kernels.library.cache_clear()
    assert kernels.are_there()
