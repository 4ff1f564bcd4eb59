"""What this machine has, and what this process already takes."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

KV_GIB = 1
"""Of a vLLM server's cache on a CPU, unless `VLLM_CPU_KVCACHE_SPACE` says otherwise."""
_SERVER = 2**31
"""Bytes of such a server's processes without weights and cache."""

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Capacity:
    """Memory that a run may take, in bytes.

    Attributes:
        host: for all processes of this machine together, this one's share included.
        device: free on this process's accelerator; None without one.
    """

    host: int
    device: int | None

    def less(self, taken: int) -> "Capacity":
        """What is left where so many bytes go to something else: of the accelerator, where there is one."""
        if self.device is None:
            return Capacity(max(0, self.host - taken), None)
        return Capacity(self.host, max(0, self.device - taken))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: RssAnon on Linux, the resident set elsewhere."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def capacity(device: torch.device) -> Capacity:
    """What is free for a run on `device`."""
    free = psutil.virtual_memory().available
    limit = _cgroup_free()
    host = (free if limit is None else min(free, limit)) + anonymous_bytes()
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    elif device.type != "cpu" and hasattr(torch.accelerator, "get_memory_info"):
        on_device = torch.accelerator.get_memory_info(device)[0]
    return Capacity(host, on_device)


def own_server_bytes(device: torch.device, share: float, weights: int) -> int:
    """What a vLLM server that the run starts takes on its device.

    Args:
        device: of the run.
        share: `--vllm_gpu_memory_utilization`, of an accelerator.
        weights: bytes of the policy's weights, which it holds on a CPU beside its cache and itself.
    """
    if device.type == "cuda":
        return int(share * torch.cuda.get_device_properties(device).total_memory)
    return weights + int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", KV_GIB)) * 2**30) + _SERVER


def _cgroup_free() -> int | None:
    """What the control group of a container leaves, its file pages counted as free; None without a limit."""
    for folder, limit_file, used_file, cache in (
        (_CGROUP, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((folder / limit_file).read_text())
            used = int((folder / used_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        if limit < 2**60:
            return max(0, limit - used + int(stat.get(cache, 0)))
    return None


def local_processes(world_size: int) -> int:
    """How many of a run's processes share this host: what the launcher says, else all."""
    return min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
