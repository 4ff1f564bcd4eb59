"""The speed benchmark: the work it counts, the samples it lays down, and that it runs at a tiny size."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import growth  # noqa: E402
import limits  # noqa: E402
import speed  # noqa: E402
from checkpoints import Pair, random_pair  # noqa: E402
from limits import Limits  # noqa: E402
from memory_probe import STATUS  # noqa: E402
from scripted import EOS, WORKLOADS, Batch, Lengths, Script, Workload  # noqa: E402
from side_by_side import Resident, Work, run_residents  # noqa: E402
from work import Samples, Sizes, forward_flops, least_seconds, scoring_flops, sizes_of, update_flops  # noqa: E402

linux = pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")

SIZES = Sizes(backbone=1000, head=200, hidden=10, layers=2)
SAMPLES = Samples([3, 5], [2, 4])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return random_pair(tmp_path_factory.mktemp("bench") / "models", "tiny", torch.float32)


def test_useful_work_by_hand() -> None:
    # 14 tokens, 6 of completions, 2 samples.
    policy, value, reward = 2 * (14_000 + 6 * 200), 2 * (14_000 + 60), 2 * (14_000 + 20)
    assert scoring_flops(SIZES, SAMPLES) == policy + reward
    assert update_flops(SIZES, SAMPLES, 3, "full") == 3 * 3 * (policy + value)
    assert update_flops(SIZES, SAMPLES, 3, "lora") == 3 * 2 * (policy + value)


def test_least_seconds_of_a_rollout_by_hand() -> None:
    # 4,800 bytes of weights take 2 ms. A step of two rows is 4,800 operations: 4.8 ms; of one row 2.4 ms.
    machine = Limits(flops=1e6, bandwidth=2.4e6)
    least = least_seconds(SIZES, SAMPLES, 1, "full", 4, machine)
    assert least["read"] == pytest.approx((2 * 1000 * 8 + 2 * 200 * 2) / 1e6)
    assert least["decode"] == pytest.approx(0.0048 + 2 * 0.0024)  # the first token comes from reading
    assert least["rollout"] == least["read"] + least["decode"]
    slow = least_seconds(SIZES, SAMPLES, 1, "full", 4, replace(machine, bandwidth=4.8e5))
    assert slow["decode"] == pytest.approx(3 * 0.010)
    quantized = least_seconds(SIZES, SAMPLES, 1, "4bit", 2, replace(machine, flops=1e12))
    assert quantized["decode"] == pytest.approx(3 * (500 + 400) / 2.4e6)


def test_counted_work_is_what_the_models_do(pair: Pair) -> None:
    """PyTorch counts a forward pass's products; norms are weights that multiply no matrix, and attention is extra."""
    ids = torch.arange(40).view(2, 20)
    samples = Samples([5, 5], [15, 15])
    sizes = sizes_of(pair.policy)
    for kind, folder, outputs in (
        (AutoModelForCausalLM, pair.policy, sizes.head * 40),
        (AutoModelForSequenceClassification, pair.reward, sizes.hidden * 40),
    ):
        model = kind.from_pretrained(folder, attn_implementation="eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
        assert linear == pytest.approx(forward_flops(sizes, samples, outputs), rel=0.02)


def test_every_batch_has_the_same_lengths_and_other_prompts() -> None:
    assert Lengths(0, 100).of_batch(4) == [20, 40, 60, 80]
    assert Lengths(1, 10_000, log=True).of_batch(3) == [10, 100, 1000]
    workload = WORKLOADS["ragged"]
    first, second = workload.batch_of(1), workload.batch_of(2)
    assert sorted(first.prompt_lens()) == sorted(second.prompt_lens())
    assert first.prompts != second.prompts
    assert first == workload.batch_of(1)
    assert Workload.of(json.loads(json.dumps(asdict(workload)))) == workload
    for name, each in WORKLOADS.items():
        batch = each.batch_of(1)
        assert len(batch.prompts) == each.batch, name
        assert max(batch.completion_lens) <= each.response_length, name


def test_script_leaves_forwards_without_a_cache_alone(pair: Pair) -> None:
    policy = AutoModelForCausalLM.from_pretrained(pair.policy).eval()
    ids = torch.tensor([[2000, 1000], [2001, 1001]])
    with torch.no_grad():
        before = policy(input_ids=ids, use_cache=False).logits
        script = Script(policy)
        script.begin(Batch([[2000, 1000], [2001, 1001]], [3, 5]))
        assert torch.equal(policy(input_ids=ids, use_cache=False).logits, before)
        out = policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, eos_token_id=EOS)
    assert out[:, 2:].tolist() == [[1000, 1000, EOS, 1, 1], [1001, 1001, 1001, 1001, EOS]]
    assert script.read > 0


@linux
def test_speed_benchmark(tmp_path: Path) -> None:
    flags = ["--models", "tiny", "--workloads", "ragged", "--training", "lora", "--pairs", "2", "--without_trl"]
    command = [sys.executable, str(BENCHMARKS / "speed.py"), *flags, "--cache", str(tmp_path)]
    command += ["--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny, lora, ragged: fourscore" in done.stdout
    (case,) = json.loads((tmp_path / "out.json").read_text())[0]["cases"]
    results = case["results"]["fourscore"]
    assert len(results) == 2
    for result in results:
        assert result["completion_lens"] == Lengths(1, 64).of_batch(16)
        assert 0 < result["read_s"] < result["rollout_s"]
        assert result["rollout_s"] + result["scoring_s"] + result["update_s"] == pytest.approx(result["whole_s"])
        assert result["anon"] > result["anon_above_imports"] > 0


def test_quantized_case_of_a_gpu_runs_as_its_command_line_says(pair: Pair) -> None:
    options = speed.parse(["--device", "cuda", "--pairs", "1", "--workloads", "even", "--training", "lora", "4bit"])
    lora, quantized = speed.cases_of(options)[:2]
    assert set(speed.works_of(lora, pair, "trl-python", options)) == {"TRL", "fourscore"}
    works = speed.works_of(quantized, pair, "trl-python", options)
    assert set(works) == {"fourscore"}
    job = works["fourscore"].job
    assert (job["dtype"], job["device"], job["load_in_4bit"]) == ("bfloat16", "cuda", True)
    short = asdict(replace(WORKLOADS["even"], batch=2, epochs=1, response_length=3))
    work = replace(works["fourscore"], job=job | {"device": "cpu", "workload": short, "microbatch": 2})
    (result,) = run_residents({"fourscore": work}, 1)["fourscore"]
    assert result["completion_lens"] == [3, 3], result


def test_residents_take_turns_and_one_that_ends_is_reported(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys\n"
        "for number, _ in enumerate(sys.stdin):\n"
        "    if number == json.loads(sys.argv[1]):\n"
        "        sys.exit('no more')\n"
        "    print(json.dumps({'number': number}), flush=True)\n"
    )
    works = {name: Work(sys.executable, str(script), job) for name, job in (("good", 9), ("bad", 2), ("worse", 0))}
    results = run_residents(works, 3)
    assert results["good"] == [{"number": 1}, {"number": 2}, {"number": 3}]
    assert results["bad"] == [{"number": 1}, {"failed": "no more"}]
    assert results["worse"] == [{"failed": "no more"}]
    apart = run_residents({"good": works["good"]}, 2, apart=True)
    assert apart["good"] == [{"number": 1}, {"number": 1}]


def test_a_waiting_resident_takes_no_processor_time(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import time\nwhile True:\n    input()\n    print(time.process_time(), flush=True)\n")
    worker = Resident(Work(sys.executable, str(script), {}))
    first = worker.turn()
    time.sleep(0.5)
    assert worker.turn() - first < 0.1
    worker.close()


def test_ratios_are_trl_by_fourscore() -> None:
    theirs = [{f"{phase}_s": value for phase in speed.PHASES} for value in (4.0, 6.0, 9.0)]
    ours = [{f"{phase}_s": value for phase in speed.PHASES} for value in (2.0, 2.0, 3.0)]
    cells = speed.ratios_of(speed.Case("tiny", "ragged", "lora"), {"TRL": theirs, "fourscore": ours})
    assert cells[0] == "3.00 (aim 2.5), 2.00 to 3.00"
    assert cells[1] == "3.00, 2.00 to 3.00"


def test_limits_are_of_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRODUCTS", {"cpu": ((512, 512, 512),)})
    monkeypatch.setattr(limits, "READ_BYTES", {"cpu": 2**26})
    found = limits.measure("cpu", torch.float32)
    assert 1e9 < found.flops < 1e14 and 1e8 < found.bandwidth < 1e13


def test_growth_is_an_exponent_of_the_work() -> None:
    rows = [{"work": 10.0 * 2**i, "seconds": 3.0 * 4**i} for i in range(3)]
    assert growth.exponent(rows, "seconds") == pytest.approx(2)
    sizes = {point.dimension: point.size for point in growth.points(4)}
    assert sizes == {"batch": 64, "completion tokens": 256, "vocabulary": 65536, "layers": 64}
