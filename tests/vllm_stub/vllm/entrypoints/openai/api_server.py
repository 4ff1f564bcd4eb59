"""What a run starts that has no vLLM, but the one of `tests/vllm_server.py`: it takes the flags that the run gives."""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[4]))

from vllm_server import main


def start() -> None:
    """Say how it was started, and serve."""
    parser = argparse.ArgumentParser()
    for name in ("model", "dtype", "logprobs-mode", "host", "port", "revision"):
        parser.add_argument(f"--{name}")
    for name in ("max-model-len", "max-lora-rank", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("enable-scale-out", "enforce-eager", "enable-lora"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args()
    assert given.host == "127.0.0.1"
    print(f"serving {given.model}", flush=True)
    if reason := os.environ.get("STUB_FAILS"):
        raise ValueError(reason)
    facts = {
        "path": given.model,
        "max_model_len": given.max_model_len,
        "dtype": f"torch.{given.dtype}",
        "logprobs_mode": given.logprobs_mode,
        "max_lora_rank": given.max_lora_rank if given.enable_lora else 0,
        "runtime_loras": os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1",
        "dev": os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
        "scale_out": given.enable_scale_out,
    }
    once = Path(os.environ.get("STUB_DIES_ONCE", "/nowhere"))  # a file that says after how many completions
    if once.exists():
        facts["die_after"] = int(once.read_text())
        once.unlink()
    main(given.port, given.model, json.dumps(facts))


start()
