"""Short runs, with full weights, with an adapter and on a server of their own, and one on a dead server.

Run under a launcher.
"""

import json
import sys
from pathlib import Path

import torch
from test_vllm import config, trainer_on, unused_port

from fourscore.errors import RolloutError


def main(out: Path, whole: str, adapted: str, sft: str, reward: str) -> None:
    for kind, url in (("full", whole), ("lora", adapted), ("own", None)):
        args = config(out / kind, url, Path(sft), Path(reward), max_steps=2, per_device_train_batch_size=2)
        trainer = trainer_on(args, use_peft=kind == "lora")
        assert trainer.parallel.world_size == 2
        trainer.train()
    [dead, _] = trainer.parallel.gather([f"http://127.0.0.1:{unused_port()}"])
    args = config(out / "dead", dead, Path(sft), Path(reward), vllm_retries=0)
    try:
        trainer_on(args).train()
        message = "went on"
    except RolloutError as error:
        message = str(error)
    (out / f"message-{trainer.parallel.rank}.json").write_text(json.dumps(message))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    main(Path(folder), *words)
