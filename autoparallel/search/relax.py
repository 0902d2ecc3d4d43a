"""Stages at a strategy's highest recomputation level in, the same stages with the least recompute time that fits out.

With `f` micro-batches in flight, a block at level `l` holds `f · kept(l)` bytes, and its rank one transient, the
largest of its segments' `transient(l)`; both must fit at every moment that may be the rank's peak. Blocks of equal cost
are interchangeable (those at the ends of a stage, whose neighbours are gathered or reduced beside them, may differ), so
it is enough to choose how many of each kind have which level. Every bound on the transient is tried; under it all
counts of a kind are listed, those stay than which nothing smaller is as fast, and kinds are combined one after the
other. This is exact for stages with one kind of block, and with several as long as no list outgrows `MAX_CHOICES`;
longer lists are thinned evenly, which always fits and may miss the optimum by a step of the list. A rank with several
stages relaxes one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.memory import capacity_bytes, constant_bytes, in_flight_bytes, moments
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, Recomputation, StagePlan, Strategy

PICO = 1e-12

Array = NDArray[np.int64]
PICO = 1e-12
MAX_CHOICES = 512


class Option(NamedTuple):
    """One block at one level, for one micro-batch."""

    level: Recomputation
    kept_bytes: int
    transient_bytes: int
    """While its backward runs, beyond the least that its rank holds: rebuilt, worked with, gathered and reduced."""
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


@dataclass(frozen=True)
class Limits:
    """What the blocks of one stage may hold."""

    moments: tuple[tuple[int, int], ...]
    """Micro-batches in flight, and what the blocks may keep for them beside the transient; one entry a moment."""
    ends_bytes: int
    """The part of the transient that is no block's of this stage."""

    def kept_bytes(self, transient_bytes: int) -> int:
        """What they may keep of one micro-batch, given the largest transient."""
        return min((size_bytes - transient_bytes) // in_flight for in_flight, size_bytes in self.moments)


@dataclass
class Relaxation:
    """Gives blocks back to cheaper levels, as far as one strategy allows and its stages fit."""

    workload: Workload
    strategy: Strategy
    _found: dict[tuple[int, tuple[StagePlan, ...]], tuple[StagePlan, ...]] = field(default_factory=dict)
    _kinds: dict[tuple[int, int], Kind] = field(default_factory=dict)

    def stages(self, plans: tuple[StagePlan, ...]) -> tuple[StagePlan, ...]:
        """`plans` are at the strategy's level; a rank that does not fit stays there."""
        if self.strategy.least_recomputation is None:
            return plans
        by_rank = [
            self._rank(plans, rank, plans[rank :: self.strategy.num_stages]) for rank in range(self.strategy.num_stages)
        ]
        return tuple(stage for stages in zip(*by_rank, strict=True) for stage in stages)

    def stage(self, plans: tuple[StagePlan, ...], rank: int) -> StagePlan:
        """The only stage of one rank."""
        (found,) = self._rank(plans, rank, plans[rank :: self.strategy.num_stages])
        return found

    def _rank(self, plans: tuple[StagePlan, ...], rank: int, mine: tuple[StagePlan, ...]) -> tuple[StagePlan, ...]:
        if (rank, mine) not in self._found:
            cut = self.strategy.model_copy(update={"stages": plans})
            for virtual in range(len(mine)):
                stages = list(cut.stages or ())
                index = virtual * cut.num_stages + rank
                stages[index] = self._relaxed(cut, rank, virtual)
                cut = cut.model_copy(update={"stages": tuple(stages)})
            self._found[rank, mine] = cut.stages_of(rank)
        return self._found[rank, mine]

    def _relaxed(self, cut: Strategy, rank: int, virtual: int) -> StagePlan:
        """One stage of a rank, whose others stay as they are."""
        plans = cut.stages_of(rank)
        plan, needs = plans[virtual], moments(self.workload, cut, plans)
        blocks = plan.blocks(len(self.workload.segment_classes))
        least = min(need.parameters + need.gradients for need in needs)
        beside = {need.segment: need.parameters + need.gradients - least for need in needs}
        kinds = [self._kind(block, beside[block]) for block in blocks]
        counted = Counter(kinds)
        rest = [need for need in needs if need.segment not in blocks]
        limits = Limits(
            moments=tuple(self._limits(cut, rank, virtual, least)),
            ends_bytes=max((need.total - least for need in rest), default=0),
        )
        choice = cheapest(tuple(counted.items()), limits) if kinds else None
        if choice is None:
            return plan
        # Backward begins at the stage's end: blocks that rebuild most come first, when others have given up theirs.
        remaining = {kind: iter(levels) for kind, levels in zip(counted, choice.levels, strict=True)}
        return StagePlan(
            first_segment=plan.first_segment,
            last_segment=plan.last_segment,
            recomputation=tuple(next(remaining[kind]) for kind in kinds),
        )

    def _limits(self, cut: Strategy, rank: int, virtual: int, least: int) -> Iterator[tuple[int, int]]:
        """At each moment, the micro-batches that the stage has in flight, and what its blocks may keep for them and for
        what the rank needs beyond its `least` parameters and gradients.
        """
        available_bytes = capacity_bytes(self.workload) - constant_bytes(self.workload, cut, rank=rank) - least
        blocks = cut.stages_of(rank)[virtual].blocks(len(self.workload.segment_classes))
        kept_bytes = sum(self._kind(block, 0)[0].kept_bytes for block in blocks)
        for moment, size_bytes in in_flight_bytes(self.workload, cut, rank):
            in_flight = moment.forwarded[virtual]
            if in_flight:
                yield in_flight, available_bytes - size_bytes + in_flight * kept_bytes

    def _kind(self, segment: int, beside_bytes: int) -> Kind:
        """The levels of a block beside whose backward the rank holds so many bytes."""
        if (segment, beside_bytes) not in self._kinds:
            cost = self.workload.cost(segment, self.strategy.batch_per_device)
            self._kinds[segment, beside_bytes] = tuple(
                Option(
                    level,
                    cost.kept_bytes(level),
                    beside_bytes + cost.transient_bytes(level),
                    round(cost.recompute_s(level) / PICO),
                )
                for level in self._levels
            )
        return self._kinds[segment, beside_bytes]

    @cached_property
    def _levels(self) -> tuple[Recomputation, ...]:
        highest, least = self.strategy.recomputation, self.strategy.least_recomputation or self.strategy.recomputation
        allowed = range(RECOMPUTATION_LEVELS[highest], RECOMPUTATION_LEVELS[least] - 1, -1)
        levels = {rank: level for level, rank in RECOMPUTATION_LEVELS.items()}
        return tuple(levels[rank] for rank in allowed)


def cheapest(kinds: tuple[tuple[Kind, int], ...], limits: Limits) -> Choice | None:
    """The fastest levels for the given numbers of blocks, of equals the smallest; None where nothing fits."""
    transients = {option.transient_bytes for kind, _ in kinds for option in kind}
    bounds = sorted({max(limits.ends_bytes, transient_bytes) for transient_bytes in transients})
    found = [_within(kinds, transient_bytes, limits.kept_bytes(transient_bytes)) for transient_bytes in bounds]
    return min((choice for choice in found if choice is not None), key=lambda choice: choice[:2], default=None)


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
