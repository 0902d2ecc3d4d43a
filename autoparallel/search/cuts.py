"""Stage cuts: a strategy in, stages that fit into memory out and a bound that no step of the strategy undercuts, or by
how much memory is short.

`paths` cuts where a rank has one stage, `interleaved` where it has several; `polish` moves stages on by simulation.
"""

from __future__ import annotations

from typing import NamedTuple

from autoparallel.cost.memory import capacity_bytes
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import StagePlan, Strategy
from autoparallel.search.interleaved import Interleaved
from autoparallel.search.paths import Cut, Paths
from autoparallel.search.polish import Cuts, polish
from autoparallel.search.runs import RunCosts, runs_of
from autoparallel.search.stage_costs import StageCosts
from autoparallel.search.windows import UNLIMITED_S, Firsts


class Found(NamedTuple):
    """Stages that fit."""

    stages: tuple[StagePlan, ...]
    bound_s: float
    """No step of the strategy is shorter, whatever its stages."""


class Shortfall(NamedTuple):
    """The pipeline rank that misses its memory by most, in the cut where that is least."""

    rank: int
    stages: tuple[StagePlan, ...]
    excess_bytes: int


class TooSlow(NamedTuple):
    """No cut that fits is within the limit."""

    limit_s: float


class TooLarge(NamedTuple):
    """No cut fits, and nobody asked by how much; said of a search within a limit only."""


def find_cuts(
    workload: Workload,
    strategy: Strategy,
    *,
    costs: RunCosts | None = None,
    limit_bytes: int | None = None,
    within_s: float = UNLIMITED_S,
    polished: bool = True,
) -> Found | Shortfall | TooSlow | TooLarge:
    """The stages of a strategy with at most as many stages as the model has blocks.

    `costs` are of that strategy, whatever its schedule; `limit_bytes` is the memory of a rank, by default what the
    workload allows. Cuts whose bound is beyond `within_s` are not looked at. Unless `polished`, the closed form alone
    decides.
    """
    costs = costs or RunCosts(workload, strategy, runs_of(workload))
    limit_bytes = capacity_bytes(workload) if limit_bytes is None else limit_bytes
    cuts = Cuts(StageCosts(workload, strategy, costs.runs, costs, limit_bytes))
    found = (_one_a_rank if strategy.virtual_stages == 1 else _several_a_rank)(cuts, within_s)
    if not isinstance(found, Cut):
        return found
    if not polished:
        return Found(cuts.plans(found.firsts), found.bound_s)
    # Few cuts are all tried: none is better.
    return Found(cuts.plans(polish(cuts, found.firsts)), UNLIMITED_S if cuts.are_few else found.bound_s)


def _one_a_rank(cuts: Cuts, within_s: float) -> Cut | TooSlow | TooLarge | Shortfall:
    paths = Paths(cuts.stages)
    if within_s < UNLIMITED_S and not cuts.stages.hold_all_blocks:
        return TooLarge()
    if (found := paths.best(within_s)) is not None:
        return found
    return TooSlow(within_s) if within_s < UNLIMITED_S else _shortfall(cuts, paths.leanest())


def _several_a_rank(cuts: Cuts, within_s: float) -> Cut | TooSlow | TooLarge | Shortfall:
    """The most even cut; where cuts are few and it does not fit, the leanest of all."""
    search = Interleaved(cuts.stages)
    even = search.even()
    if not cuts.stages.is_limited:
        return Cut(even, UNLIMITED_S)
    bound_s = search.bound_s(even)
    if cuts.are_few:
        if not cuts.all_fit(even):
            even = min(cuts.everything(), key=lambda firsts: max(cuts.excess_bytes(firsts)))
            if max(cuts.excess_bytes(even)) > 0:
                return _shortfall(cuts, even)
        return Cut(even, 0.0)
    if within_s < bound_s < UNLIMITED_S:
        return TooSlow(within_s)
    if within_s < UNLIMITED_S and bound_s == UNLIMITED_S:
        return TooLarge()
    if bound_s == UNLIMITED_S or max(cuts.excess_bytes(even)) > 0:
        return _shortfall(cuts, even)
    return Cut(even, UNLIMITED_S)


def _shortfall(cuts: Cuts, firsts: Firsts) -> Shortfall:
    stages = cuts.plans(firsts, relaxed=False)
    excess = cuts.excess_bytes_of(stages)
    return Shortfall(rank=excess.index(max(excess)), stages=stages, excess_bytes=max(excess))
