"""Cuts that a closed form chose in, cuts that the simulator prefers out.

Few cuts are all simulated, so that the result is exact. Of many, one boundary after the other is moved by a segment, as
long as that helps. The closed form is nearly exact where there are many micro-batches, which is also where simulating
costs most, so that one budget serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import StagePlan, Strategy
from autoparallel.search.relax import Relaxation
from autoparallel.search.stage_times import StageSeconds, stage_seconds
from autoparallel.search.step import run_step

BUDGET_ACTIONS = 20_000
"""Actions to simulate for one strategy: about 15 ms."""

Firsts = tuple[int, ...]
"""First segment of every stage."""


@dataclass
class Cuts:
    """The cuts of one strategy, and what they cost."""

    workload: Workload
    strategy: Strategy
    fits: Callable[[Firsts], bool]
    """Whether each stage has a block and fits into memory."""
    _seconds: dict[StagePlan, StageSeconds] = field(default_factory=dict)

    @cached_property
    def _relaxation(self) -> Relaxation:
        return Relaxation(self.workload, self.strategy)

    def plans(self, firsts: Firsts) -> tuple[StagePlan, ...]:
        """The stages, recomputing no more than the strategy asks for and memory needs."""
        ends = (*firsts[1:], len(self.workload.segment_classes))
        plans = tuple(
            StagePlan(first_segment=first, last_segment=end - 1, recomputation=self.strategy.recomputation)
            for first, end in zip(firsts, ends, strict=True)
        )
        return self._relaxation.stages(plans)

    def step_time_s(self, firsts: Firsts) -> float:
        plans = self.plans(firsts)
        strategy = self.strategy.model_copy(update={"stages": plans})
        return run_step(self.workload, strategy, [self._stage_seconds(plan) for plan in plans]).step_time_s

    def _stage_seconds(self, plan: StagePlan) -> StageSeconds:
        if plan not in self._seconds:
            self._seconds[plan] = stage_seconds(self.workload, self.strategy, plan)
        return self._seconds[plan]

    def everything(self) -> Iterator[Firsts]:
        """All cuts with a block in every stage, whether they fit or not."""
        for rest in combinations(range(2, len(self.workload.segment_classes) - 1), self.strategy.num_stages - 1):
            yield (0, *rest)


def polish(cuts: Cuts, firsts: Firsts) -> Firsts:
    """The fastest of all cuts where they are few, otherwise the best in reach of `firsts`; ties stay where they are."""
    strategy = cuts.strategy
    if strategy.num_stages == 1:
        return firsts
    budget = BUDGET_ACTIONS // (2 * strategy.num_stages * strategy.num_micro_batches)
    num_cuts = math.comb(max(0, cuts.workload.num_blocks - 1), strategy.num_stages - 1)
    if num_cuts > budget:
        return _descend(cuts, firsts, budget=budget)
    best, best_s = firsts, cuts.step_time_s(firsts)
    for cut in cuts.everything():
        if cuts.fits(cut) and (step_time_s := cuts.step_time_s(cut)) < best_s:
            best, best_s = cut, step_time_s
    return best


def _descend(cuts: Cuts, firsts: Firsts, *, budget: int) -> Firsts:
    """Move boundaries back or on by one segment, in turn, until no move helps or `budget` cuts are simulated."""
    best, best_s = firsts, cuts.step_time_s(firsts) if budget else 0.0
    moves = [(stage, step) for stage in range(1, len(firsts)) for step in (-1, 1)]
    turn = since_last_gain = 0
    while budget > 0 and since_last_gain < len(moves):
        stage, step = moves[turn % len(moves)]
        cut = (*best[:stage], best[stage] + step, *best[stage + 1 :])
        turn, since_last_gain = turn + 1, since_last_gain + 1
        if not cuts.fits(cut):
            continue
        budget -= 1
        if (step_time_s := cuts.step_time_s(cut)) < best_s:
            best, best_s, since_last_gain = cut, step_time_s, 0
    return best
