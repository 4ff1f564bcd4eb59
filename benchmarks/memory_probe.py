"""Peak memory of this process by phase. Needs torch alone: it runs where fourscore is not installed, too."""

import sys
import threading
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
MIB = 2**20


def memory() -> dict[str, float]:
    """What this process holds now, in MiB: `anon` is its own (RssAnon), `file` are mapped file pages (RssFile)."""
    if not STATUS.exists():
        sys.exit("memory is read from /proc/self/status: run this on Linux")
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(lines[field].split()[0]) / 1024 for name, field in (("anon", "RssAnon"), ("file", "RssFile"))}


class MemoryProbe:
    """A thread that samples every 2 ms and keeps each phase's peak.

    Attributes:
        peaks: by phase, `anon` and `file` in MiB, and `device`: the peak of the CUDA allocator, 0 without CUDA.
    """

    def __init__(self, interval: float = 0.002) -> None:
        self.peaks: dict[str, dict[str, float]] = {}
        self._interval = interval
        self._phase = ""
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def phase(self, name: str) -> None:
        """What is sampled from now on counts for this phase; the first call starts the sampling."""
        if self._phase:
            self._sample()
        with self._lock:
            self._phase = name
            self.peaks.setdefault(name, {"anon": 0.0, "file": 0.0, "device": 0.0})
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
        self._sample()
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        """Sample for the last time."""
        self._sample()
        self._stopped.set()
        self._thread.join()

    def peak(self, kind: str) -> float:
        """Over all phases, in MiB."""
        return max(phase[kind] for phase in self.peaks.values())

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._sample(device=False)

    def _sample(self, *, device: bool = True) -> None:
        with self._lock:  # around the reading, too: what was read in one phase must not count for the next
            now = memory()
            # The allocator keeps its peak by itself, and asking it takes long.
            if device and torch.cuda.is_initialized():
                now["device"] = torch.cuda.max_memory_allocated() / MIB
            peak = self.peaks[self._phase]
            for kind, value in now.items():
                peak[kind] = max(peak[kind], value)
