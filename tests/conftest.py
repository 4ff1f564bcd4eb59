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

torch.set_num_threads(1)


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
