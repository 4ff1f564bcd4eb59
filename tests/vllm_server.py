"""A server of vLLM 0.32's wire shape, over a tiny model: `python tests/vllm_server.py PORT CHECKPOINT [FACTS]`.

What it answers, and what it refuses, was taken from a real server; `benchmarks/evidence/vllm_engine.py` runs against
such a one. It computes in its own, slow way, so that equal tokens say something.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answered = tuple[int, Any]


@dataclass
class Facts:
    """How the server was started, and what goes wrong with it.

    Attributes:
        die_after: the process ends when it is asked for so many completions, one after the other; 0: it does not.
        stall_s: seconds before every completion.
        eager_stops: a text that begins in the prompt ends a completion, too.
    """

    path: str = "./sft"
    max_model_len: int = 128
    dtype: str = "torch.float32"
    logprobs_mode: str = "processed_logprobs"
    max_lora_rank: int = 16
    runtime_loras: bool = True
    dev: bool = True
    scale_out: bool = True
    weights: str = "default"
    die_after: int = 0
    stall_s: float = 0.0
    eager_stops: bool = False


def failed(status: int, message: str, kind: str = "BadRequestError") -> Answered:
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


NOWHERE = 404, {"detail": "Not Found"}


def described(method: str, path: str, facts: Facts) -> Answered | None:
    """Answers that need no model; None for all others."""
    place = path.partition("?")[0]
    if (method, place) == ("GET", "/v1/models"):
        base = {"id": facts.path, "object": "model", "owned_by": "vllm", "root": facts.path, "parent": None}
        return 200, {"object": "list", "data": [base | {"max_model_len": facts.max_model_len}]}
    if place == "/health":
        return 200, {}
    if place == "/inference/v1/generate" and not facts.scale_out:
        return failed(403, "Scale-out endpoints are disabled.", "PermissionDeniedError")
    if not facts.dev and not place.startswith(("/v1/", "/inference/")):
        return NOWHERE
    if (method, place) == ("GET", "/weight_info"):
        return 200, {"weight_version": facts.weights}
    if (method, place) == ("GET", "/server_info"):
        lora = {"max_lora_rank": facts.max_lora_rank} if facts.max_lora_rank else None
        model = {"model": facts.path, "dtype": facts.dtype, "logprobs_mode": facts.logprobs_mode}
        config = {"model_config": model, "lora_config": lora}
        env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": facts.runtime_loras}
        return 200, {"vllm_config": config, "vllm_env": env, "system_env": {}}
    return None


def handler(answer: Any) -> type[BaseHTTPRequestHandler]:
    """Handles requests by `answer(method, path, body)`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            status, given = answer(self.command, self.path, body)
            content = given.encode() if isinstance(given, str) else json.dumps(given).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the other side has stopped waiting
                self.close_connection = True

        do_GET = do_POST = handle_any

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


KNOWN = {
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "stop"),
    *("include_stop_str_in_output", "skip_special_tokens", "logprobs"),
}


class Model:
    """The model behind the server."""

    def __init__(self, checkpoint: str, facts: Facts, log: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.facts, self.log, self.lock = facts, log, threading.Lock()
        self.base = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.loras: dict[str, Any] = {}
        self.paused, self.asked, self.stale_cache = False, 0, False

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Answered:
        found = described(method, path, self.facts)
        place = path.partition("?")[0]
        if found is not None:
            if place == "/v1/models":
                found[1]["data"] += [{"id": name, "owned_by": "vllm", "parent": "base"} for name in self.loras]
            return found
        with self.lock:
            return self._locked(place, body)

    def _locked(self, place: str, body: dict[str, Any]) -> Answered:
        if place != "/inference/v1/generate":
            self.note(place, body)
        if place in ("/pause", "/resume"):
            self.paused = place == "/pause"
            return 200, {"status": "paused" if self.paused else "resumed"}
        if place == "/update_weight_version":
            self.facts.weights = body["new_version"]
            return 200, {"success": True, "new_version": body["new_version"]}
        if place == "/collective_rpc":
            return self._reload(body)
        if place == "/reset_prefix_cache":
            self.stale_cache = False
            return 200, {"success": True}
        if place in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and not self.facts.runtime_loras:
            return NOWHERE
        if place == "/v1/load_lora_adapter":
            return self._load_adapter(body["lora_name"], body["lora_path"])
        if place == "/v1/unload_lora_adapter":
            known = self.loras.pop(body["lora_name"], None)
            return (200, "Success") if known is not None else failed(404, "cannot be found", "NotFoundError")
        if place == "/inference/v1/generate":
            return self._generate(body)
        return NOWHERE

    def note(self, place: str, body: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps([place, body]) + "\n")

    def _reload(self, body: dict[str, Any]) -> Answered:
        from safetensors.torch import load_file

        if not self.paused or body["method"] != "reload_weights":
            return failed(500, f"cannot {body['method']} now")
        files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
        if not files:
            return failed(500, "Worker failed with error 'Repo id must use alphanumeric chars'", "InternalServerError")
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        # As on a CPU, where a tied output layer that is not in the files stays what it was.
        if missing := {n for n, _ in self.base.named_parameters(remove_duplicate=False)} - weights.keys():
            return failed(500, f"not loaded: {missing}")
        self.base.load_state_dict(weights, strict=False)
        self.stale_cache = True
        return 200, {"results": [None]}

    def _load_adapter(self, name: str, path: str) -> Answered:
        from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

        if name in self.loras:
            return failed(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (Path(path) / "adapter_config.json").is_file():
            return failed(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        config = PeftConfig.from_pretrained(path)
        if config.r > self.facts.max_lora_rank:
            return failed(500, f"LoRA rank {config.r} is greater than max_lora_rank {self.facts.max_lora_rank}.")
        import copy

        model = get_peft_model(copy.deepcopy(self.base), config).eval()
        set_peft_model_state_dict(model, load_peft_weights(path))
        self.loras[name] = model
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _generate(self, body: dict[str, Any]) -> Answered:
        self.asked += "token_ids" in body
        if "token_ids" in body and self.asked == self.facts.die_after:
            os._exit(1)
        if "token_ids" not in body or "sampling_params" not in body:
            return failed(400, "2 validation errors", "Bad Request")
        if self.facts.stall_s:
            self.lock.release()
            time.sleep(self.facts.stall_s)
            self.lock.acquire()
        params = body["sampling_params"]
        if unknown := params.keys() - KNOWN:
            return failed(400, f"unknown {unknown}")
        name = body.get("model")
        if name is not None and name not in (*self.loras, self.facts.path):
            return failed(404, f"The model `{name}` does not exist.", "NotFoundError")
        if self.paused or self.stale_cache:
            return failed(500, "paused, or with a prefix cache of other weights")
        tokens, logprobs, reason = self._drawn(self.loras.get(name, self.base), body["token_ids"], params)
        content = [{"token_id": t, "logprob": p, "rank": 1} for t, p in zip(tokens, logprobs, strict=True)]
        choice = {
            "index": 0,
            "finish_reason": reason,
            "stop_reason": None,
            "token_ids": tokens,
            "weight_versions": [{"version": self.facts.weights, "start": 0, "end": len(tokens)}],
            "logprobs": None if params["logprobs"] is None else {"content": content},
        }
        return 200, {"request_id": "generate-tokens-0", "output_mode": "tokens", "choices": [choice]}

    def _drawn(self, model: Any, prompt: list[int], params: dict[str, Any]) -> tuple[list[int], list[float], str]:
        import torch

        assert params["ignore_eos"] and not params["skip_special_tokens"] and params["include_stop_str_in_output"]
        generator = torch.Generator().manual_seed(params["seed"])
        tokens: list[int] = []
        logprobs: list[float] = []
        while True:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].float()
            if len(tokens) < params["min_tokens"]:
                logits[params["stop_token_ids"]] = -torch.inf
            if params["temperature"] == 0:
                token = int(logits.argmax())
                logprobs.append(0.0)
            else:
                distribution = (logits / params["temperature"]).log_softmax(0)
                token = int(torch.multinomial(distribution.exp(), 1, generator=generator))
                logprobs.append(float(distribution[token]))
            tokens.append(token)
            if token in params["stop_token_ids"]:
                return tokens, logprobs, "stop"
            text = self.tokenizer.decode(prompt * self.facts.eager_stops + tokens)
            if len(tokens) > params["min_tokens"] and any(stop in text for stop in params["stop"]):
                return tokens, logprobs, "stop"
            if len(tokens) == params["max_tokens"] or len(prompt + tokens) == self.facts.max_model_len:
                return tokens, logprobs, "length"


def main(port: str, checkpoint: str, facts: str = "{}") -> None:
    import torch

    torch.set_num_threads(1)
    given = Facts(**({"path": checkpoint} | json.loads(facts)))
    model = Model(checkpoint, given, Path(os.environ["VLLM_LOG"]))
    model.note("started", asdict(given))
    Server(("127.0.0.1", int(port)), handler(model.answer)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
