"""Stages at a strategy's highest recomputation level in, the same stages with the least recompute time that fits out.

With `f` micro-batches in flight, a block at level `l` holds `f · kept(l)` bytes, and its stage one transient, the
largest of its segments' `transient(l)`. Blocks of equal cost are interchangeable, so it is enough to choose how many of
each kind have which level. Every bound on the transient is tried; under it all counts of a kind are listed, those stay
than which nothing smaller is as fast, and kinds are combined one after the other. This is exact for stages with one
kind of block, and with several as long as no list outgrows `MAX_CHOICES`; longer lists are thinned evenly, which always
fits and may miss the optimum by a step of the list.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.memory import capacity_bytes, num_in_flight, stage_memory
from autoparallel.cost.workload import SegmentCost, Workload
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, Recomputation, StagePlan, Strategy
from autoparallel.search.ranges import PICO

Array = NDArray[np.int64]
MAX_CHOICES = 512


class Option(NamedTuple):
    """One block at one level, for one micro-batch."""

    level: Recomputation
    kept_bytes: int
    transient_bytes: int
    recompute_ps: int


Kind = tuple[Option, ...]
"""What equal blocks may be, the highest level first."""


class Choice(NamedTuple):
    """How many blocks of each kind have which level."""

    recompute_ps: int
    kept_bytes: int
    levels: tuple[tuple[Recomputation, ...], ...]
    """By kind, the highest level first."""


class Front(NamedTuple):
    """Choices of which each is the fastest within its bytes: bytes rise, times fall."""

    kept_bytes: Array
    recompute_ps: Array
    counts: Array
    """[choice, option], the options of one kind after those of the other."""


@dataclass
class Relaxation:
    """Gives blocks back to cheaper levels, as far as one strategy allows and its stages fit."""

    workload: Workload
    strategy: Strategy
    _found: dict[tuple[int, StagePlan], StagePlan] = field(default_factory=dict)

    def stages(self, plans: tuple[StagePlan, ...]) -> tuple[StagePlan, ...]:
        """`plans` are at the strategy's level; a stage that does not fit stays there."""
        if self.strategy.least_recomputation is None:
            return plans
        cut = self.strategy.model_copy(update={"stages": plans})
        return tuple(self._stage(cut, stage, plan) for stage, plan in enumerate(plans))

    def _stage(self, cut: Strategy, stage: int, plan: StagePlan) -> StagePlan:
        if (stage, plan) not in self._found:
            spare_bytes = capacity_bytes(self.workload) - sum(stage_memory(self.workload, cut, stage=stage).values())
            fits = spare_bytes >= 0 and len(plan.blocks(len(self.workload.segment_classes))) > 0
            self._found[stage, plan] = self._relaxed(stage, plan, spare_bytes) if fits else plan
        return self._found[stage, plan]

    def _relaxed(self, stage: int, plan: StagePlan, spare_bytes: int) -> StagePlan:
        blocks = plan.blocks(len(self.workload.segment_classes))
        kinds = [self._kinds[block] for block in blocks]
        ends = {plan.first_segment, plan.last_segment}.difference(blocks)
        ends_bytes = max((self._kinds[segment][0].transient_bytes for segment in ends), default=0)
        # What the stage's blocks take now, and what it leaves free, is theirs to spend.
        transient_bytes = max(ends_bytes, *(kind[0].transient_bytes for kind in kinds))
        in_flight = num_in_flight(self.strategy, stage)
        kept_bytes = in_flight * sum(kind[0].kept_bytes for kind in kinds)
        counted = Counter(kinds)
        choice = cheapest(
            tuple(counted.items()),
            in_flight=in_flight,
            budget_bytes=kept_bytes + transient_bytes + spare_bytes,
            ends_bytes=ends_bytes,
        )
        # Backward begins at the stage's end: blocks that rebuild most come first, when others have given up theirs.
        remaining = {kind: iter(levels) for kind, levels in zip(counted, choice.levels, strict=True)}
        return StagePlan(
            first_segment=plan.first_segment,
            last_segment=plan.last_segment,
            recomputation=tuple(next(remaining[kind]) for kind in kinds),
        )

    @cached_property
    def _kinds(self) -> list[Kind]:
        """By segment; the first and the last one are never recomputed."""
        highest, least = self.strategy.recomputation, self.strategy.least_recomputation or self.strategy.recomputation
        allowed = range(RECOMPUTATION_LEVELS[highest], RECOMPUTATION_LEVELS[least] - 1, -1)
        levels = {rank: level for level, rank in RECOMPUTATION_LEVELS.items()}
        size, num_segments = self.strategy.batch_per_device, len(self.workload.segment_classes)
        of_block: tuple[Recomputation, ...] = tuple(levels[rank] for rank in allowed)
        return [
            _kind(self.workload.cost(segment, size), of_block if 0 < segment < num_segments - 1 else ("none",))
            for segment in range(num_segments)
        ]


def _kind(cost: SegmentCost, levels: tuple[Recomputation, ...]) -> Kind:
    return tuple(
        Option(level, cost.kept_bytes(level), cost.transient_bytes(level), round(cost.recompute_s(level) / PICO))
        for level in levels
    )


def cheapest(kinds: tuple[tuple[Kind, int], ...], *, in_flight: int, budget_bytes: int, ends_bytes: int) -> Choice:
    """The fastest levels for the given numbers of blocks; of equals the smallest. All at their first option must fit.

    `budget_bytes` holds what blocks keep for all micro-batches in flight and the stage's largest transient, of which
    `ends_bytes` is the part that is no block's.
    """
    transients = {option.transient_bytes for kind, _ in kinds for option in kind}
    bounds = sorted({max(ends_bytes, transient_bytes) for transient_bytes in transients})
    found = [
        _within(kinds, transient_bytes, (budget_bytes - transient_bytes) // in_flight) for transient_bytes in bounds
    ]
    return min((choice for choice in found if choice is not None), key=lambda choice: choice[:2])


def _within(kinds: tuple[tuple[Kind, int], ...], transient_bytes: int, kept_bytes: int) -> Choice | None:
    """The fastest choice with no larger transient and no more bytes of one micro-batch."""
    small = tuple((tuple(o for o in kind if o.transient_bytes <= transient_bytes), count) for kind, count in kinds)
    if not all(options for options, _ in small):
        return None
    front = _front(small)
    index = int(np.searchsorted(front.kept_bytes, kept_bytes, side="right")) - 1
    if index < 0:
        return None
    counts = iter(front.counts[index].tolist())
    levels = tuple(tuple(o.level for o in options for _ in range(next(counts))) for options, _ in small)
    return Choice(int(front.recompute_ps[index]), int(front.kept_bytes[index]), levels)


@lru_cache(maxsize=1024)
def _front(kinds: tuple[tuple[Kind, int], ...]) -> Front:
    """Candidates differ in much else and ask for the same ones over and over."""
    return reduce(_combined, (_front_of_one(options, count) for options, count in kinds))


def _front_of_one(options: Kind, count: int) -> Front:
    counts = _splits(count, len(options))
    kept = counts @ np.array([option.kept_bytes for option in options], dtype=np.int64)
    times = counts @ np.array([option.recompute_ps for option in options], dtype=np.int64)
    best = _undominated(kept, times)
    return Front(kept[best], times[best], counts[best])


def _combined(one: Front, other: Front) -> Front:
    one, other = _thinned(one), _thinned(other)
    kept = np.add.outer(one.kept_bytes, other.kept_bytes).ravel()
    times = np.add.outer(one.recompute_ps, other.recompute_ps).ravel()
    best = _undominated(kept, times)
    ours, theirs = np.divmod(best, len(other.kept_bytes))
    return Front(kept[best], times[best], np.concatenate([one.counts[ours], other.counts[theirs]], axis=1))


def _undominated(kept_bytes: Array, recompute_ps: Array) -> Array:
    """Indices of the choices that are faster than everything smaller, by rising bytes."""
    order = np.lexsort((recompute_ps, kept_bytes))
    times = recompute_ps[order]
    is_faster = np.append(True, times[1:] < np.minimum.accumulate(times)[:-1])
    best: Array = order[is_faster]
    return best


def _thinned(front: Front) -> Front:
    """At most `MAX_CHOICES`, the smallest and the fastest among them."""
    if len(front.kept_bytes) <= MAX_CHOICES:
        return front
    some = np.linspace(0, len(front.kept_bytes) - 1, MAX_CHOICES).round().astype(np.int64)
    return Front(front.kept_bytes[some], front.recompute_ps[some], front.counts[some])


@lru_cache(maxsize=256)
def _splits(count: int, parts: int) -> Array:
    """[split, part]: every way to divide `count` blocks over so many levels."""
    if parts == 1:
        return np.array([[count]], dtype=np.int64)
    return np.concatenate(
        [np.insert(_splits(count - first, parts - 1), 0, first, axis=1) for first in range(count + 1)]
    )
