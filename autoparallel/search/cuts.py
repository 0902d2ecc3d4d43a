"""Stage cuts: a workload and a strategy in, the best stages that fit into memory out, or by how much none fits.

With `m` micro-batches, `c` a stage's time for one and `e` its once-a-step time (`Ranges`), a pipeline takes about

    sum c  +  (m - 1) · max c  +  max (e - backward of the stages before)

since a stage ends that much before stage 0. The sum is the same for every cut; the rest is minimised exactly over all
contiguous cuts with a block in every stage. As in Alpa (arXiv 2201.12023), bounds on the slowest stage are enumerated
and a dynamic program finds the best end under each; the walk stops once the bound alone exceeds the best. Among equals
the most even cut is taken, then the one whose last stages begin earliest. `polish` goes on from there by simulation.

With virtual stages the formula is a guide only, and a rank's memory is no bound on each of its stages: a cut found for
stages that are alone on their ranks is checked as it is, then the one that needs least memory, sought among all cuts
where they are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.memory import capacity_bytes
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import StagePlan, Strategy
from autoparallel.search.polish import Cuts, Firsts, polish
from autoparallel.search.ranges import Array, Ranges

Mask = NDArray[np.bool_]
UNREACHABLE = np.int64(2**62)
EVENNESS_STEPS = 2**15
"""Resolution of a stage's share of the slowest one, when cuts are compared by evenness."""


@dataclass(frozen=True)
class Shortfall:
    """The pipeline rank that misses its memory by most, in the cut where that is least."""

    rank: int
    stages: tuple[StagePlan, ...]
    excess_bytes: int


def find_cuts(
    workload: Workload, strategy: Strategy, *, limit_bytes: int | None = None, polished: bool = True
) -> tuple[StagePlan, ...] | Shortfall:
    """The stages of a strategy with at most as many stages as the model has blocks.

    `limit_bytes` is the memory of a rank, by default what the workload allows; unless `polished`, the closed form
    alone decides.
    """
    limit_bytes = capacity_bytes(workload) if limit_bytes is None else limit_bytes
    ranges = Ranges(workload, strategy)
    legal = has_block(ranges.num_segments, num_stages=strategy.total_stages)
    excess = [ranges.memory_bytes(stage) - limit_bytes for stage in range(strategy.total_stages)]
    fits = [legal & (stage_excess <= 0) for stage_excess in excess]
    cuts = Cuts(workload, strategy, fits, limit_bytes)
    fast = least_formula(ranges, fits)
    if fast is not None and cuts.all_fit(fast):
        return cuts.plans(polish(cuts, fast) if polished else fast)
    lean = _partition(excess, [legal] * len(excess), np.maximum)
    assert lean is not None, "fewer blocks than stages"
    others = cuts.everything() if strategy.virtual_stages > 1 and cuts.are_few else ()
    leanest = min([lean, *others], key=lambda firsts: max(cuts.excess_bytes(firsts)))
    # Masks are of the highest recomputation level, which need not be the leanest: relaxed stages may fit all the same.
    if max(cuts.excess_bytes(leanest)) > 0:
        return _shortfall(cuts, leanest)
    return cuts.plans(polish(cuts, leanest) if polished else leanest)


def _shortfall(cuts: Cuts, firsts: Firsts) -> Shortfall:
    excess = cuts.excess_bytes(firsts)
    return Shortfall(rank=excess.index(max(excess)), stages=cuts.plans(firsts), excess_bytes=max(excess))


def has_block(num_segments: int, *, num_stages: int) -> Mask:
    """[first, last]: ranges with a block between the first segment and the last one; a single stage needs none."""
    first, last = np.ogrid[:num_segments, :num_segments]
    legal: Mask = np.maximum(first, 1) <= np.minimum(last, num_segments - 2)
    if num_stages == 1:
        legal[0, -1] = True
    return legal


def least_formula(ranges: Ranges, fits: list[Mask]) -> Firsts | None:
    """The cut that minimises the module's formula; None where no cut fits."""
    cost = ranges.micro_batch_ps
    end = ranges.step_ps - ranges.backward_before_ps[:, None]
    slowest = _least_maximum(cost, fits)
    if slowest is None:
        return None
    following = ranges.strategy.num_micro_batches - 1
    least_end = _least_maximum(end, fits)
    latest = _least_maximum(end, _limited(fits, cost <= slowest))
    assert least_end is not None
    assert latest is not None
    best = (following * slowest + latest, slowest, latest)
    while latest > least_end:
        slowest = _least_maximum(cost, _limited(fits, end < latest))
        assert slowest is not None
        if following * slowest + least_end >= best[0]:
            break
        latest = _least_maximum(end, _limited(fits, cost <= slowest))
        assert latest is not None
        best = min(best, (following * slowest + latest, slowest, latest))
    _, slowest, latest = best
    share = cost * EVENNESS_STEPS // max(1, slowest)
    return _partition([share**2] * len(fits), _limited(fits, (cost <= slowest) & (end <= latest)), np.add)


def _limited(allowed: list[Mask], limit: Mask) -> list[Mask]:
    return [mask & limit for mask in allowed]


def _least_maximum(values: Array, allowed: list[Mask]) -> int | None:
    """The smallest possible maximum of the stages' values."""
    best = _sweep([values] * len(allowed), allowed, np.maximum)[-1]
    return None if best[-1] == UNREACHABLE else int(best[-1])


def _partition(values: Sequence[Array], allowed: list[Mask], combine: Any) -> Firsts | None:
    """First segment of every stage, of the partition whose combined value is least."""
    before = _sweep(values, allowed, combine)
    if before[-1][-1] == UNREACHABLE:
        return None
    firsts, end = [], len(before[0]) - 1
    for stage in reversed(range(len(allowed))):
        through = _through(before[stage], values[stage], allowed[stage], combine)
        end = int(through[:, end - 1].argmin())
        firsts.append(end)
    return tuple(firsts[::-1])


def _sweep(values: Sequence[Array], allowed: list[Mask], combine: Any) -> list[Array]:
    """[stage][segment]: least combined value of the stages before `stage`, if they end just before `segment`."""
    before = np.full(len(values[0]) + 1, UNREACHABLE)
    before[0] = 0 if combine is np.add else -UNREACHABLE
    sweep = [before]
    for stage_values, mask in zip(values, allowed, strict=True):
        after = np.full_like(before, UNREACHABLE)
        after[1:] = _through(sweep[-1], stage_values, mask, combine).min(axis=0)
        sweep.append(after)
    return sweep


def _through(before: Array, values: Array, mask: Mask, combine: Any) -> Array:
    """[first, last]: value of the stages so far and one more, `first .. last`."""
    starts = before[:-1, None]
    through: Array = np.where(mask & (starts < UNREACHABLE), combine(starts, values), UNREACHABLE)
    return through
