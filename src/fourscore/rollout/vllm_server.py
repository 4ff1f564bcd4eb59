"""A vLLM server over HTTP: what it is asked, and what must be true of it; written against vLLM 0.32.

It is plain `vllm serve` in its development mode; `docs/rollout.md` has the command. urllib3 keeps connections and
repeats what fails.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from urllib3.util import Retry, Timeout

from fourscore.errors import RolloutError

FRESH = "default"
"""What vLLM calls the weights that it was started with."""

_CONNECT_S = 5.0
_BACKOFF_S = 0.5
_STALLS = 2
"""Times that a request is repeated whose answer did not come, or broke off; the others wait for a server to come up."""
_SAME_FILES = "; it must see the same files as this process, --output_dir among them"
_WORTH_REPEATING = (408, 425, 429, 502, 503, 504)


@dataclass(frozen=True)
class Served:
    """What a server says of itself.

    Attributes:
        path: folder or hub id of its model, as it was given to the server.
        max_length: most tokens of prompt and completion together.
        dtype: that it computes in, as `float32`.
        logprobs_mode: of which distribution its logprobs are.
        lora_rank: the largest that an adapter may have; 0 where it takes none.
        runtime_loras: adapters can be loaded while it runs.
        weights: the version of its weights, `FRESH` until somebody else's were loaded.
    """

    path: str
    max_length: int
    dtype: str
    logprobs_mode: str
    lora_rank: int
    runtime_loras: bool
    weights: str


@dataclass(frozen=True)
class Answer:
    """A completion, or a piece of one.

    Attributes:
        tokens: its ids, with the one that ended it.
        logprobs: of each of them, in nats; empty where none were asked for.
        reason: why it ends there, in vLLM's words: `stop`, `length`, `abort`.
        versions: of the weights that drew the tokens.
    """

    tokens: list[int]
    logprobs: list[float]
    reason: str
    versions: frozenset[str]


class Server:
    """The server at an address."""

    def __init__(self, url: str, *, timeout: float, retries: int, concurrency: int, own: Path | None = None) -> None:
        """Take the address; nothing is sent yet.

        Args:
            url: of the server, without a path.
            timeout: seconds that an answer may take.
            retries: times that a request is repeated, after pauses of 0, 1, 2, 4, ... seconds.
            concurrency: requests at a time.
            own: the log of a server that the run has started; None: somebody else has.
        """
        self.url = url.rstrip("/")
        self.name = "--rollout_engine vllm" if own else f"--vllm_server_url {self.url}"
        self._way_out = f"{own} has what the server printed" if own else "start the server, docs/rollout.md says how"
        key = os.environ.get("VLLM_API_KEY")  # as the server itself is given it
        self._repeats = retries > 0
        self._http = urllib3.PoolManager(
            maxsize=concurrency,
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=Timeout(connect=min(_CONNECT_S, timeout), read=timeout),
            retries=Retry(
                total=retries,
                read=min(_STALLS, retries),
                backoff_factor=_BACKOFF_S,
                status_forcelist=_WORTH_REPEATING,
                allowed_methods=None,
                raise_on_status=False,
            ),
        )

    def describe(self) -> Served:
        """Ask what it serves, and how it was started.

        Raises:
            RolloutError: nobody answers, or it is no vLLM server in development mode.
        """
        models = self._json("GET", "/v1/models")
        bases = [m for m in models.get("data", ()) if m.get("owned_by") == "vllm" and m.get("parent") is None]
        if not bases:
            raise self.error("is no vLLM server; give the address of one")
        if self._request("GET", "/server_info?config_format=json").status == 404:
            raise self.error("is not in development mode; start it with VLLM_SERVER_DEV_MODE=1")
        if self._request("POST", "/inference/v1/generate", {}).status in (403, 404):
            raise self.error("takes no token ids; start it with --enable-scale-out")
        info = self._json("GET", "/server_info?config_format=json")
        config, lora = info["vllm_config"]["model_config"], info["vllm_config"]["lora_config"]
        return Served(
            path=str(bases[0]["root"]),
            max_length=int(bases[0]["max_model_len"]),
            dtype=str(config["dtype"]).removeprefix("torch."),
            logprobs_mode=str(config["logprobs_mode"]),
            lora_rank=int(lora["max_lora_rank"]) if lora else 0,
            runtime_loras=bool(info["vllm_env"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]),
            weights=str(self._json("GET", "/weight_info")["weight_version"]),
        )

    def complete(self, prompt: list[int], sampling_params: dict[str, Any], adapter: str | None = None) -> Answer | None:
        """Complete a prompt.

        Args:
            prompt: token ids.
            sampling_params: vLLM's `SamplingParams`, those that are set.
            adapter: name of a loaded adapter; None: the model as it is.

        Returns:
            the completion; None if the server does not know the adapter.

        Raises:
            RolloutError: no answer, or none that makes sense.
        """
        body = {"token_ids": prompt, "sampling_params": sampling_params} | ({"model": adapter} if adapter else {})
        response = self._request("POST", "/inference/v1/generate", body)
        if response.status == 404 and adapter is not None:
            return None
        answer = self._checked(response, "/inference/v1/generate")
        try:
            choice = answer["choices"][0]
            content = (choice["logprobs"] or {}).get("content") or []
            return Answer(
                tokens=[int(token) for token in choice["token_ids"] or ()],
                logprobs=[float(each["logprob"]) for each in content],
                reason=str(choice["finish_reason"]),
                versions=frozenset(span["version"] for span in choice["weight_versions"] or ()),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self.error(f"its answer is none of vLLM 0.32 ({json.dumps(answer)[:200]})") from error

    def load_weights(self, folder: Path, version: str) -> None:
        """Put a checkpoint's weights in the place of the model's, and forget what was computed with those.

        Args:
            folder: of the checkpoint, at the same path for the server.
            version: name of the weights from now on.

        Raises:
            RolloutError: it did not work.
        """
        self._json("POST", "/pause?mode=abort")
        try:
            # The name first: a server that is started again between the two must not get it without the weights.
            self._json("POST", "/update_weight_version", {"new_version": version})
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._checked(self._request("POST", "/collective_rpc", body), "/collective_rpc", _SAME_FILES)
            if not self._json("POST", "/reset_prefix_cache").get("success"):
                raise self.error("did not reset its prefix cache; start it again")
        except RolloutError:
            with suppress(RolloutError):
                self._json("POST", "/resume")
            raise
        self._json("POST", "/resume")

    def load_adapter(self, folder: Path, name: str) -> None:
        """Load an adapter beside those that are there.

        A new name for each state of the adapter, and not `load_inplace`: vLLM reads an adapter that was loaded so from
        the disk again in every step, and keeps what its prefix cache has of the old one.

        Args:
            folder: of the adapter, at the same path for the server.
            name: that completions ask for.

        Raises:
            RolloutError: it did not work.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        response = self._request("POST", "/v1/load_lora_adapter", body)
        if response.status == 400 and name in self._adapters():
            return  # a repeated request whose first answer was lost
        if response.status != 200:
            self._checked(response, "/v1/load_lora_adapter", _SAME_FILES)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; it need not be there.

        Raises:
            RolloutError: no answer.
        """
        self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def error(self, what: str) -> RolloutError:
        """An error that names the server."""
        return RolloutError(f"{self.name}: {what}")

    def _adapters(self) -> set[str]:
        return {str(model["id"]) for model in self._json("GET", "/v1/models")["data"]}

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._checked(self._request(method, path, body), path.partition("?")[0])

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> urllib3.BaseHTTPResponse:
        content = None if body is None else json.dumps(body).encode()
        try:
            return self._http.request(method, f"{self.url}{path}", body=content)
        except urllib3.exceptions.HTTPError as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())[:200]
            again = " to repeated requests" if self._repeats else ""
            raise self.error(f"no answer{again} ({reason}); {self._way_out}") from error

    def _checked(self, response: urllib3.BaseHTTPResponse, path: str, hint: str = "") -> dict[str, Any]:
        """What an answer says, a JSON object.

        Args:
            response: the answer.
            path: that was asked, for messages.
            hint: what may be wrong if it is an error.
        """
        if response.status != 200:
            text = " ".join(response.data.decode("utf-8", "replace").split())
            with suppress(ValueError, KeyError, TypeError):
                text = " ".join(str(json.loads(response.data)["error"]["message"]).split())
            raise self.error(f"{path} answered with status {response.status} ({text[:300]}){hint}")
        try:
            answer = json.loads(response.data)
        except ValueError as error:
            raise self.error(f"{path} answered with what is no JSON ({response.data[:100]!r})") from error
        if not isinstance(answer, dict):
            raise self.error(f"{path} answered with what is no object ({response.data[:100]!r})")
        return answer
