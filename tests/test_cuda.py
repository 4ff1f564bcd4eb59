"""On a GPU: what a CPU computes, in fp32; and whole runs in bf16, with adapters and in 4-bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_graphs import on_a_gpu
from test_unpadded import critic_of, policy_of
from torch import Tensor
from torch.testing import assert_close

from fourscore.cli import main
from fourscore.models.forward import completion_logprobs, completion_values, rectangle
from fourscore.runs.directory import METRICS

pytestmark = on_a_gpu

SAMPLES = [torch.arange(3, 3 + n) for n in (11, 4, 7, 2, 9)]
PROMPT_LENS = torch.tensor([3, 1, 6, 1, 4])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_logprobs_values_and_gradients_are_those_of_a_cpu(family: str) -> None:
    found: dict[str, list[Tensor]] = {}
    for device in ("cpu", "cuda"):
        policy, critic = policy_of(family).to(device), critic_of(family).to(device)
        batch = rectangle([sample.to(device) for sample in SAMPLES], PROMPT_LENS.to(device))
        logprobs, entropy = completion_logprobs(policy, batch, 0.7, entropy_trains=True)
        values = completion_values(critic, batch)
        weights = torch.linspace(-1, 1, len(values), device=device)
        ((logprobs + 0.1 * entropy + values) * weights).sum().backward()
        gradients = [p.grad for model in (policy, critic) for p in model.parameters() if p.grad is not None]
        found[device] = [each.detach().cpu() for each in (logprobs, entropy, values, *gradients)]
    assert len(found["cpu"]) > 10
    assert_close(found["cuda"], found["cpu"], atol=1e-4, rtol=1e-3)


FLAGS = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--max_steps", "4"]
FLAGS += ["--response_length", "24", "--report_to", "none", "--num_sample_generations", "0", "--logging_steps", "1"]


@pytest.mark.parametrize(
    "more",
    [
        ["--dtype", "bfloat16", "--use_peft"],
        ["--bf16"],
        ["--bf16", "--freeze_layers", "2"],
        ["--load_in_4bit", "--use_peft", "--dtype", "bfloat16"],
        ["--dtype", "bfloat16", "--use_peft", "--share_value_backbone", "--gradient_checkpointing", "true"],
        ["--cuda_graphs", "none", "--top_k", "50"],
        ["--cuda_graphs", "all", "--dtype", "bfloat16", "--use_peft"],
    ],
    ids=" ".join,
)
def test_runs(more: list[str], tmp_path: Path) -> None:
    assert main(["ppo", "--output_dir", str(tmp_path / "run"), *FLAGS, *more]) in (0, None)
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    rows = [row for row in rows if "policy/first_ratio_mean" in row]
    assert len(rows) == 4
    for row in rows:
        assert all(abs(value) < 1e6 for value in row.values() if isinstance(value, int | float)), row
        # The same weights, in passes of other shapes.
        assert row["policy/first_ratio_mean"] < 0.02


def test_a_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = [
        "--output_dir",
        str(out),
        *FLAGS,
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--dtype",
        "bfloat16",
        "--use_peft",
    ]
    assert main(["ppo", *flags]) in (0, None)
    first = (out / METRICS).read_text().splitlines()
    shutil.rmtree(out / "checkpoint-4")
    assert main(["ppo", *flags, "--resume_from_checkpoint", "true"]) in (0, None)
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows if "policy/first_ratio_mean" in row] == [1, 2, 3, 4]
    assert len(first) == len(rows)
