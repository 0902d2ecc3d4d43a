"""Seconds of a call on a device whose kernels may run later than the call returns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

BLOCK_S = 2e-3
"""Calls that end sooner are timed as many together as take so long."""


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once_s(self, call: Callable[[], object], *, times: int = 1) -> float:
        """Of one call, the mean of `times` that follow each other."""
        self.synchronize()
        begin_s = time.perf_counter()
        for _ in range(times):
            call()
        self.synchronize()
        return (time.perf_counter() - begin_s) / times

    def typical_s(self, call: Callable[[], object], *, budget_s: float) -> float:
        """The median of as many calls as fit into the budget, after one that warms up; at least two."""
        end_s = time.perf_counter() + budget_s
        times = max(1, int(BLOCK_S / max(self.once_s(call), 1e-9)))
        found = [self.once_s(call, times=times) for _ in range(2)]
        while time.perf_counter() < end_s:
            found.append(self.once_s(call, times=times))
        return statistics.median(found)
