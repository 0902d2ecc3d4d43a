"""What one stage of a strategy holds and recomputes, for every run of segments that it could be."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from autoparallel.cost.memory import capacity_bytes, held_at_peaks, peaks
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import StagePlan, Strategy
from autoparallel.search.relax import Relaxation
from autoparallel.search.runs import Floats, Mask, RunCosts, Runs
from autoparallel.search.stage_times import Overheads

UNLIMITED_BYTES = 2**62


@dataclass
class StageCosts:
    """What the stages of one strategy hold and recompute, for every run of segments."""

    workload: Workload
    strategy: Strategy
    runs: Runs
    costs: RunCosts
    limit_bytes: int
    """Memory of a rank; `UNLIMITED_BYTES` where nobody asks whether it fits."""
    relaxation: Relaxation = field(init=False)

    def __post_init__(self) -> None:
        self.relaxation = Relaxation(self.workload, self.strategy)
        self._recomputed: dict[int, Floats] = {}
        self._known: dict[int, Mask] = {}
        self._fits: dict[int, Mask] = {}

    def bytes_at(self, stage: int, *, least: bool = False) -> Floats:
        """[run]: peak memory of a rank with that run as `stage` alone, at the highest or the least level."""
        level = self.strategy.recomputation
        if least and self.strategy.least_recomputation is not None:
            level = self.strategy.least_recomputation
        forwarded, deferred = self.costs.forwarded_bytes(level), self.costs.deferred_bytes
        peak = np.maximum.reduce([f * forwarded + h * deferred for f, h in self._held[stage]])
        found: Floats = np.maximum(self.costs.fixed_bytes(level) + peak, self.costs.update_bytes)
        return found

    @cached_property
    def sends_before_s(self) -> Floats:
        """[rank]: the shortest sends from the first stage to the first one of a rank."""
        size, segments = self.strategy.batch_per_device, range(1, self.runs.num_segments)
        least_bytes = min(self.workload.cost(segment, size).input_bytes for segment in segments)
        overheads = Overheads(self.workload, self.strategy)
        sends_s = [overheads.send_s(least_bytes, stage=stage) for stage in range(self.strategy.num_stages - 1)]
        return np.concatenate([[0.0], np.cumsum(sends_s)])

    @property
    def is_limited(self) -> bool:
        return self.limit_bytes < UNLIMITED_BYTES

    @cached_property
    def _held(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        s = self.strategy
        return held_at_peaks(s.schedule, s.num_stages, s.num_micro_batches, s.virtual_stages)

    def fits(self, stage: int) -> Mask:
        """[run]: whether it does at the highest level, which holds least: what a block rebuilds while it is alone it
        would else keep for every micro-batch in flight.
        """
        if stage not in self._fits:
            if self.is_limited:
                self._fits[stage] = self.bytes_at(stage) <= self.limit_bytes
            else:
                self._fits[stage] = np.ones(len(self.runs.first), dtype=np.bool_)
        return self._fits[stage]

    @cached_property
    def hold_all_blocks(self) -> bool:
        """Whether the stages could hold the model's blocks, if each held as many as fit into it somewhere. Stages of
        one rank are taken to be alone on it.
        """
        most = [
            int(np.max(self.runs.num_blocks, where=self.fits(s), initial=-1)) for s in range(self.strategy.total_stages)
        ]
        return min(most) >= 0 and sum(most) >= self.runs.num_segments - 2

    def recompute_s(self, stage: int) -> Floats:
        """[run]: of one micro-batch; until it is known, a bound that it does not undercut."""
        if stage not in self._recomputed:
            highest, least = self.strategy.recomputation, self.strategy.least_recomputation
            if least is None:
                self._recomputed[stage] = self.costs.recompute_s(highest)
                self._known[stage] = np.ones(len(self.runs.first), dtype=np.bool_)
            else:
                excess_bytes = self.bytes_at(stage, least=True) - capacity_bytes(self.workload)
                in_flight = max(forwarded for forwarded, _ in self._held[stage])
                self._recomputed[stage] = self.costs.least_recompute_s(excess_bytes / max(in_flight, 1), least, highest)
                self._known[stage] = excess_bytes <= 0
        return self._recomputed[stage]

    def learn(self, stage: int, run: int) -> bool:
        """Make the recomputation of a run known; whether it was not."""
        self.recompute_s(stage)
        is_new = not self._known[stage][run]
        if is_new:
            self._recomputed[stage][run] = self._relaxed_s(stage, run)
            self._known[stage][run] = True
        return is_new

    def _relaxed_s(self, stage: int, run: int) -> float:
        moments = peaks(self.strategy)[stage]
        if (run, moments) not in self.costs.relaxed_s:
            first, last = self.runs.first[run], self.runs.last[run]
            plan = StagePlan(first_segment=first, last_segment=last, recomputation=self.strategy.recomputation)
            relaxed = self.relaxation.stage((plan,) * self.strategy.num_stages, stage)
            levels = [relaxed.recomputation_of(i, num_segments=self.runs.num_segments) for i in range(first, last + 1)]
            costs = (self.workload.cost(i, self.strategy.batch_per_device) for i in range(first, last + 1))
            time_s = sum(cost.recompute_s(level) for cost, level in zip(costs, levels, strict=True))
            self.costs.relaxed_s[run, moments] = time_s
        return self.costs.relaxed_s[run, moments]
