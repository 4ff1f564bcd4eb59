"""Where the time of an update goes."""

import time


class Clock:
    """Seconds since the last lap, by name, and in all.

    Attributes:
        laps: seconds by the name of the lap, and `time/total_s`.
    """

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a lap."""
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.laps["time/total_s"] = now - self.start
        self.last = now
