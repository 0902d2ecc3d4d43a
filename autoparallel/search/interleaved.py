"""Several stages a rank: the most even cut of those whose slowest stage is fastest, and a bound on its step.

A rank's memory depends on all of its stages, so that no stage can be judged alone, and what a rank recomputes is known
when all of its stages are. The bound is that of a rank which is never idle between its first forward and its last
backward:

    forwards of the stages before + micro-batches × (all stages of the rank, recomputation too) + their backwards + end

Recomputation counts with the least time that frees what the rank lacks, the last block in part.
"""

from __future__ import annotations

import numpy as np

from autoparallel.cost.memory import capacity_bytes, peaks
from autoparallel.search.runs import ROUNDED_BYTES, RunCosts
from autoparallel.search.stage_costs import StageCosts
from autoparallel.search.windows import (
    NUDGE,
    UNLIMITED_S,
    Firsts,
    at,
    least_from,
    least_limit_s,
    least_sum,
    legal_windows,
    windows_below,
)


class Interleaved:
    """Cuts of one strategy with several stages a rank."""

    def __init__(self, stages: StageCosts) -> None:
        self.stages, self.runs, self.strategy = stages, stages.runs, stages.strategy

    def even(self) -> Firsts:
        """The most even of the cuts whose slowest stage is fastest; recomputation does not count here."""
        costs, num_stages = self.stages.costs, self.strategy.total_stages
        if num_stages not in costs.even_cuts:
            costs.even_cuts[num_stages] = _most_even(costs, num_stages)
        return costs.even_cuts[num_stages]

    def bound_s(self, firsts: Firsts) -> float:
        """No step with this cut is shorter; infinite where it does not fit whatever is recomputed."""
        ranks, costs, count = self.strategy.num_stages, self.stages.costs, self.strategy.num_micro_batches
        runs = [
            int(self.runs.ids[a, b - 1]) for a, b in zip(firsts, (*firsts[1:], self.runs.num_segments), strict=True)
        ]
        total_s = costs.forward_s + costs.input_gradient_s + costs.weight_gradient_s
        before_s, longest_s, sends_s = 0.0, 0.0, self.stages.sends_before_s
        for rank in range(ranks):
            mine = runs[rank::ranks]
            busy_s = float(total_s[mine].sum()) + self._recompute_s(rank, mine)
            once_s = float(costs.end_s[mine].sum())
            longest_s = max(longest_s, before_s + 2 * float(sends_s[rank]) + count * busy_s + once_s)
            before_s += float(total_s[runs[rank]])
        return longest_s

    def _recompute_s(self, rank: int, runs: list[int]) -> float:
        """At least so much for one micro-batch on every stage of a rank."""
        highest, least = self.strategy.recomputation, self.strategy.least_recomputation
        costs = self.stages.costs
        if least is None:
            return float(costs.recompute_s(highest)[runs].sum())
        moments = peaks(self.strategy)[rank]
        in_flight = np.array(max(moments, key=lambda moment: sum(moment.forwarded)).forwarded)
        reserve = int(self.stages.workload.table.reserve_bytes.value)
        own = (costs.held_bytes + costs.edge_bytes)[runs] - reserve - ROUNDED_BYTES
        kept = in_flight * costs.forwarded_bytes(least)[runs]
        needed = reserve + float((own + kept).sum()) + float(costs.moment_bytes(least)[runs].min())
        left, found = needed - capacity_bytes(self.stages.workload), 0.0
        if left <= 0:
            return found
        offers = [
            (offer.seconds_per_byte / ways, ways * offer.freed_bytes * self.runs.counts[run, offer.kind])
            for offer in costs.offers(least, highest)
            for ways, run in zip(in_flight.tolist(), runs, strict=True)
            if ways
        ]
        for seconds_per_byte, freed in sorted(offers):
            given = min(left, freed)
            found, left = found + seconds_per_byte * given, left - given
        return found if left <= 0 else UNLIMITED_S


def _most_even(costs: RunCosts, num_stages: int) -> Firsts:
    runs, total_s = costs.runs, costs.forward_s + costs.input_gradient_s + costs.weight_gradient_s
    each_s, passage_s = np.diff(total_s[runs.ids[0]], prepend=0.0), np.zeros(runs.num_segments)
    legal = legal_windows(runs.num_segments, num_stages)
    least_s = least_limit_s(each_s, count=1, passage_s=passage_s, legal=legal)
    windows = windows_below(least_s, each_s=each_s, count=1, passage_s=passage_s, legal=legal) or legal
    ids = [at(runs.ids, windows, stage) for stage in range(num_stages)]
    seconds = [np.where(of_stage >= 0, total_s[of_stage], UNLIMITED_S) for of_stage in ids]
    slowest_s = float(least_from(seconds, np.maximum)[0][0])
    return least_sum(windows, [np.where(time_s <= slowest_s * NUDGE, time_s**2, UNLIMITED_S) for time_s in seconds])
