"""What Linux says of the processor."""

from functools import cache
from pathlib import Path


@cache
def cpu_info() -> str:
    """The text of /proc/cpuinfo; empty where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
