import os
import sys
from pathlib import Path

# Set before transformers is imported: no test may reach for the hub, and forked workers stay quiet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from tiny import make_checkpoint

from fourscore.models import kernels
from fourscore.models.onednn import has_products

torch.set_num_threads(1)


@pytest.fixture
def kernels_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which the kernels for decoding are used."""
    if not sys.platform.startswith("linux") or not has_products():
        pytest.skip("not Linux, or no AVX2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.fixture
def kernels_are_there(kernels_would_do: None) -> None:
    """And a compiler that has made them."""
    if not kernels.are_there():
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def llama_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama_policy"), "policy")


@pytest.fixture(scope="session")
def llama_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama_reward"), "reward", seed=1)


@pytest.fixture(scope="session")
def gpt2_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gpt2", tmp_path_factory.mktemp("gpt2_policy"), "policy", pad="none")


@pytest.fixture(scope="session")
def gpt2_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gpt2", tmp_path_factory.mktemp("gpt2_reward"), "reward", pad="none", seed=1)
