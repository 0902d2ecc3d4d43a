"""Cuts that a closed form chose in, cuts that the simulator prefers out.

Few cuts are all simulated, so that the result is exact. Of many, one boundary after the other is moved by a segment, as
long as that helps. The closed form is nearly exact where there are many micro-batches, which is also where simulating
costs most, so that one budget serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from autoparallel.cost.memory import rank_memory
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import StagePlan, Strategy
from autoparallel.search.stage_costs import StageCosts
from autoparallel.search.stage_times import StageSeconds, stage_seconds
from autoparallel.search.step import run_step
from autoparallel.search.windows import Firsts

BUDGET_ACTIONS = 20_000
"""Actions to simulate for one strategy: about 15 ms."""


@dataclass
class Cuts:
    """The cuts of one strategy, and what they cost."""

    stages: StageCosts
    _seconds: dict[StagePlan, StageSeconds] = field(default_factory=dict)
    _rank_bytes: dict[tuple[int, tuple[StagePlan, ...]], int] = field(default_factory=dict)

    @property
    def workload(self) -> Workload:
        return self.stages.workload

    @property
    def strategy(self) -> Strategy:
        return self.stages.strategy

    def plans(self, firsts: Firsts, *, relaxed: bool = True) -> tuple[StagePlan, ...]:
        """The stages, recomputing no more than the strategy asks for and memory needs; or as much as it allows."""
        ends = (*firsts[1:], len(self.workload.segment_classes))
        plans = tuple(
            StagePlan(first_segment=first, last_segment=end - 1, recomputation=self.strategy.recomputation)
            for first, end in zip(firsts, ends, strict=True)
        )
        return self.stages.relaxation.stages(plans) if relaxed else plans

    def all_fit(self, firsts: Firsts) -> bool:
        """Whether each stage has a block and each rank's stages fit into its memory."""
        ends = (*firsts[1:], len(self.workload.segment_classes))
        for stage, (first, end) in enumerate(zip(firsts, ends, strict=True)):
            alone = self.strategy.total_stages == 1
            if not alone and max(first, 1) > min(end - 1, self.workload.num_blocks):
                return False
            if not self.stages.fits(stage)[self.stages.runs.ids[first, end - 1]]:
                return False
        return self.strategy.virtual_stages == 1 or max(self.excess_bytes(firsts)) <= 0

    def excess_bytes(self, firsts: Firsts) -> list[int]:
        """By how much each rank's stages miss its memory; negative where they fit."""
        return self.excess_bytes_of(self.plans(firsts))

    def excess_bytes_of(self, stages: tuple[StagePlan, ...]) -> list[int]:
        """The same, of stages with their levels of recomputation."""
        cut = self.strategy.model_copy(update={"stages": stages})
        ranks = list(enumerate(cut.stages_of(rank) for rank in range(cut.num_stages)))
        for rank, plans in ranks:
            if (rank, plans) not in self._rank_bytes:
                self._rank_bytes[rank, plans] = sum(rank_memory(self.workload, cut, rank=rank).values())
        return [self._rank_bytes[key] - self.stages.limit_bytes for key in ranks]

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
        for rest in combinations(range(2, len(self.workload.segment_classes) - 1), self.strategy.total_stages - 1):
            yield (0, *rest)

    @property
    def budget(self) -> int:
        """How many cuts may be simulated."""
        return BUDGET_ACTIONS // (2 * self.strategy.total_stages * self.strategy.num_micro_batches)

    @property
    def are_few(self) -> bool:
        """Whether all of them may be simulated."""
        return math.comb(max(0, self.workload.num_blocks - 1), self.strategy.total_stages - 1) <= self.budget


def polish(cuts: Cuts, firsts: Firsts) -> Firsts:
    """The fastest of all cuts where they are few, otherwise the best in reach of `firsts`; ties stay where they are."""
    if cuts.strategy.num_stages == 1:
        return firsts
    if not cuts.are_few:
        return _descend(cuts, firsts)
    best, best_s = firsts, cuts.step_time_s(firsts)
    for cut in cuts.everything():
        if cuts.all_fit(cut) and (step_time_s := cuts.step_time_s(cut)) < best_s:
            best, best_s = cut, step_time_s
    return best


def _descend(cuts: Cuts, firsts: Firsts) -> Firsts:
    """Move boundaries back or on by one segment, in turn, until no move helps or the budget is spent."""
    budget = cuts.budget
    best, best_s = firsts, cuts.step_time_s(firsts) if budget else 0.0
    moves = [(stage, step) for stage in range(1, len(firsts)) for step in (-1, 1)]
    turn = since_last_gain = 0
    while budget > 0 and since_last_gain < len(moves):
        stage, step = moves[turn % len(moves)]
        cut = (*best[:stage], best[stage] + step, *best[stage + 1 :])
        turn, since_last_gain = turn + 1, since_last_gain + 1
        if not cuts.all_fit(cut):
            continue
        budget -= 1
        if (step_time_s := cuts.step_time_s(cut)) < best_s:
            best, best_s, since_last_gain = cut, step_time_s, 0
    return best
