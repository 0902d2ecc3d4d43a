"""Every run of segments that could be a stage, equal ones once: a workload in, how its runs are made up out; then a
strategy too, and vectors of their seconds and bytes.

The same formulas as `stage_times.stage_seconds` and `cost.memory.rank_memory`; a test holds them equal for every run.
Segments are of few kinds, so that a sum over a run is a product with the number of segments of each kind, and a largest
moment that of the triples (before, segment, after) that occur in it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.memory import copy_bytes, update_workspace_bytes
from autoparallel.cost.traffic import BUCKET_BYTES
from autoparallel.cost.workload import ParameterCount, SegmentCost, SharedParameters, Workload
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, Recomputation, Strategy
from autoparallel.schedule.actions import InFlight
from autoparallel.search.stage_times import Overheads, windows, with_head

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
NONE = -1
ROUNDED_BYTES = 4096
"""By so much bounds on memory are lower: shards are rounded up for a stage, not for its blocks, nor for a rank's stages
together.
"""


@dataclass(frozen=True)
class Kind:
    """Segments that cost and hold the same."""

    segment: int
    """One of them."""
    count: ParameterCount
    """Shared parameters among it, where the segment is the first in its stage that uses them."""
    is_block: bool


class Offer(NamedTuple):
    """What one block frees of one micro-batch when it goes to a higher level of recomputation."""

    seconds_per_byte: float
    freed_bytes: int
    kind: int


class Makeup(NamedTuple):
    """What a workload says of its segments, costs left out."""

    segment_classes: tuple[int, ...]
    parameters: tuple[ParameterCount, ...]
    shared: tuple[SharedParameters, ...]
    addends: tuple[int, ...]


def runs_of(workload: Workload) -> Runs:
    """The same object for all workloads of one makeup."""
    return _runs_of(Makeup(workload.segment_classes, workload.parameters, workload.shared, workload.addends))


@lru_cache(maxsize=64)
def _runs_of(makeup: Makeup) -> Runs:
    return Runs(makeup)


class Runs:
    """The runs of one workload. A run is distinct by the kinds of its segments and by what it hands on."""

    def __init__(self, makeup: Makeup) -> None:
        self.num_segments = len(makeup.segment_classes)
        kinds, of_segment = _kinds(makeup)
        self.kinds = kinds
        found: dict[tuple[bytes, int], int] = {}
        self.ids = np.full((self.num_segments, self.num_segments), NONE)
        """[first, last]: which distinct run; `NONE` where first > last."""
        self.first: list[int] = []
        """Of an example of each distinct run."""
        self.last: list[int] = []
        for first in range(self.num_segments):
            row = of_segment[first]
            for last in range(first, self.num_segments):
                after = makeup.segment_classes[last + 1] if last + 1 < self.num_segments else NONE
                key = (row[first : last + 1].tobytes(), after)
                if key not in found:
                    found[key] = len(found)
                    self.first.append(first)
                    self.last.append(last)
                self.ids[first, last] = found[key]
        inside = [of_segment[f][f : last + 1] for f, last in zip(self.first, self.last, strict=True)]
        self.counts = np.array([np.bincount(run, minlength=len(kinds)) for run in inside], dtype=np.float64)
        """[run, kind]: how many segments; sums stay far below 2**53, where they are exact."""
        self.num_blocks = self.counts @ np.array([float(kind.is_block) for kind in kinds])
        """[run]"""
        self.first_kind = np.array([run[0] for run in inside])
        self.kept_counts = np.zeros_like(self.counts)
        """The same of segments that are gathered together with the head."""
        for run, (first, last) in enumerate(zip(self.first, self.last, strict=True)):
            if last == self.num_segments - 1:
                for segment in with_head(makeup.shared, self.num_segments - 1, first):
                    self.kept_counts[run, of_segment[first][segment]] += 1
        triples: dict[tuple[int, int, int], int] = {}
        rows = []
        for run in inside:
            ends = [NONE, *run.tolist(), NONE]
            rows.append(
                {triples.setdefault(triple, len(triples)) for triple in zip(ends, ends[1:], ends[2:], strict=False)}
            )
        self.triples = np.array(list(triples))
        """[triple]: the kinds of a segment, the one before and the one after; `NONE` at the ends of a stage."""
        self.has_triple = np.zeros((len(inside), len(triples)), dtype=np.bool_)
        for run, members in enumerate(rows):
            self.has_triple[run, sorted(members)] = True

    @cached_property
    def essence(self) -> Runs:
        """The whole model, its first segment alone, its last one, and each kind of block: runs enough for a first look,
        which have no `ids`.
        """
        alone = [0, self.num_segments - 1, *(kind.segment for kind in self.kinds if kind.is_block)]
        members = [self.ids[0, -1], *(self.ids[segment, segment] for segment in alone)]
        few = copy(self)
        few.first, few.last = ([of[i] for i in members] for of in (self.first, self.last))
        few.counts, few.kept_counts = self.counts[members], self.kept_counts[members]
        few.first_kind, few.has_triple = self.first_kind[members], self.has_triple[members]
        return few


def _kinds(makeup: Makeup) -> tuple[tuple[Kind, ...], Ints]:
    """The kinds, and [first, segment]: which one a segment is in a stage that begins at `first`."""
    num_segments = len(makeup.segment_classes)
    addends = makeup.addends or (0,) * num_segments
    found: dict[tuple[object, ...], int] = {}
    kinds: list[Kind] = []
    of_segment = np.zeros((num_segments, num_segments), dtype=np.int64)
    plain = [(makeup.segment_classes[i], makeup.parameters[i], addends[i]) for i in range(num_segments)]
    ids = {key: place for place, key in enumerate(dict.fromkeys(plain))}
    for first in range(num_segments):
        carried: dict[int, list[int]] = {}
        for group, shared in enumerate(makeup.shared):
            if (user := min((s for s in shared.segments if s >= first), default=None)) is not None:
                carried.setdefault(user, []).append(group)
        for segment in range(first, num_segments):
            groups = carried.get(segment, [])
            users = [group for group, shared in enumerate(makeup.shared) if segment in shared.segments]
            key = (ids[plain[segment]], *groups, NONE, *users)
            if key not in found:
                found[key] = len(kinds)
                own, more = makeup.parameters[segment], [makeup.shared[group].count for group in groups]
                count = ParameterCount(
                    trainable=own.trainable + sum(c.trainable for c in more),
                    frozen=own.frozen + sum(c.frozen for c in more),
                )
                kinds.append(Kind(segment, count, is_block=0 < segment < num_segments - 1))
            of_segment[first, segment] = found[key]
    return tuple(kinds), of_segment


class RunCosts:
    """Seconds and bytes of every distinct run under one strategy, whatever its schedule and number of micro-batches
    but for whether there are several. Recomputation is left out of the seconds.
    """

    def __init__(self, workload: Workload, strategy: Strategy, runs: Runs) -> None:
        self.workload, self.strategy, self.runs = workload, strategy, runs
        self._overheads = Overheads(workload, strategy)
        self._costs = [workload.cost(kind.segment, strategy.batch_per_device) for kind in runs.kinds]
        self._windows = [windows(workload, strategy, range(k.segment, k.segment + 1))[0] for k in runs.kinds]
        self._sharding = self._overheads.sharding
        self._offers: dict[tuple[Recomputation, Recomputation], list[Offer]] = {}
        self._by_level: dict[tuple[str, Recomputation], Floats] = {}
        self.even_cuts: dict[int, tuple[int, ...]] = {}
        """By number of stages (kept here by `interleaved`)."""
        self.relaxed_s: dict[tuple[int, tuple[InFlight, ...]], float] = {}
        """By run and what is in flight: the least recomputation of one micro-batch that fits (kept here by `cuts`)."""

    # --- seconds ---

    def recompute_s(self, level: Recomputation) -> Floats:
        """Of one micro-batch with every block at one level."""
        each = [c.recompute_s(level) if k.is_block else 0.0 for c, k in zip(self._costs, self.runs.kinds, strict=True)]
        return self._sums(self._of_kinds(each))

    def least_recompute_s(self, excess_bytes: Floats, least: Recomputation, highest: Recomputation) -> Floats:
        """What blocks at the least level recompute at least when they give up so many bytes of one micro-batch: the
        blocks and levels that free most for their time first, the last of them in part.
        """
        left, found = np.maximum(0.0, excess_bytes), np.zeros(len(self.runs.first))
        for offer in self.offers(least, highest):
            given = np.minimum(left, offer.freed_bytes * self.runs.counts[:, offer.kind])
            found, left = found + offer.seconds_per_byte * given, left - given
        return found

    def offers(self, least: Recomputation, highest: Recomputation) -> list[Offer]:
        """What the kinds of blocks free when they go from a least level to higher ones, the cheapest first."""
        if (least, highest) not in self._offers:
            self._offers[least, highest] = self._new_offers(least, highest)
        return self._offers[least, highest]

    def _new_offers(self, least: Recomputation, highest: Recomputation) -> list[Offer]:
        found = []
        for place, (cost, kind) in enumerate(zip(self._costs, self.runs.kinds, strict=True)):
            if kind.is_block:
                found += _offers(cost, place, least, highest)
        return sorted(found)

    @cached_property
    def forward_s(self) -> Floats:
        """Of one micro-batch, with what collectives of data parallelism compute does not hide."""
        gather_s = self._sharding.forward_gathers * self._gather_s
        shown_s = np.maximum(0.0, gather_s - self._of_kinds([w.forward_s for w in self._windows]))
        return self._sums(self._of_kinds([c.forward_s + c.forward_comm_s for c in self._costs]) + shown_s)

    @cached_property
    def input_gradient_s(self) -> Floats:
        """Of one micro-batch, without recomputation."""
        own_s = [c.backward_s - c.weight_gradient_s + c.backward_comm_s for c in self._costs]
        shown_s = np.maximum(0.0, self._again_s - self._backward_window_s)
        return self._sums(self._of_kinds(own_s) + shown_s) - self._kept(shown_s)

    @cached_property
    def weight_gradient_s(self) -> Floats:
        """Of one micro-batch."""
        reduce_s = self._reduces_s(self._overheads.backward_reduce_s)
        room_s = np.maximum(0.0, self._backward_window_s - self._again_s)
        shown_s, kept_s = (np.maximum(0.0, reduce_s - room) for room in (room_s, self._backward_window_s))
        own_s = self._of_kinds([c.weight_gradient_s for c in self._costs])
        return self._sums(own_s + shown_s) - self._kept(shown_s - kept_s)

    @cached_property
    def start_s(self) -> Floats:
        """Before the first micro-batch."""
        ahead_s = self._window_sums_s[0] if self.workload.practice.gathers_ahead else np.zeros(len(self.runs.first))
        return self._beside(self._sharding.gathers_per_step * self._gather_s, ahead_s)

    @cached_property
    def end_s(self) -> Floats:
        """After the last one: reductions and the optimizer; the gradients of tied parameters left out."""
        overheads, backward_s = self._overheads, self._window_sums_s[1]
        reduce_s = self._beside(self._reduces_s(overheads.step_reduce_s), backward_s)
        bucket = BUCKET_BYTES // self.workload.precision.gradient_bytes
        whole_s = _affine(overheads.all_reduce_s, self._trainable)
        last_s = _affine(overheads.all_reduce_s, np.minimum(self._trainable, bucket))
        found = reduce_s + np.maximum(last_s, whole_s - backward_s)
        ways = self.strategy.state_ways
        found += _affine(lambda held: overheads.optimizer_s(held * ways), self._shard(self._trainable))
        if self.workload.addends:
            addends = self._sums(self._of_kinds([self.workload.addends[k.segment] for k in self.runs.kinds]))
            found += _affine(lambda held: overheads.addends_s(held * ways), self._shard(addends))
        return found

    @cached_property
    def _gather_s(self) -> Floats:
        """[kind]"""
        counts = [kind.count.trainable + kind.count.frozen for kind in self.runs.kinds]
        return self._of_kinds([self._overheads.gather_s(n) if any(self._sharding) else 0.0 for n in counts])

    @cached_property
    def _again_s(self) -> Floats:
        return self._sharding.backward_gathers * self._gather_s

    def _reduces_s(self, seconds_of: Callable[[int], float]) -> Floats:
        """[kind]"""
        return self._of_kinds([seconds_of(kind.count.trainable) for kind in self.runs.kinds])

    @cached_property
    def _backward_window_s(self) -> Floats:
        return self._of_kinds([window.backward_s for window in self._windows])

    @cached_property
    def _window_sums_s(self) -> tuple[Floats, Floats]:
        """Forward and backward of a run, as far as they hide collectives."""
        forward_s = self._of_kinds([window.forward_s for window in self._windows])
        return self._sums(forward_s), self._sums(self._backward_window_s)

    def _beside(self, each_s: Floats, compute_s: Floats) -> Floats:
        """What is left of collectives beside compute, of which the first segment's has none."""
        total_s = self._sums(each_s)
        left: Floats = np.maximum(np.minimum(each_s[self.runs.first_kind], total_s), total_s - compute_s)
        return left

    def _kept(self, values: Floats) -> Floats:
        if not self.strategy.keeps_head:
            return np.zeros(len(self.runs.first))
        found: Floats = self.runs.kept_counts @ values
        return found

    # --- bytes ---

    def fixed_bytes(self, level: Recomputation) -> Floats:
        """The largest moment of forward and backward, without what micro-batches in flight keep."""
        if ("fixed", level) not in self._by_level:
            self._by_level["fixed", level] = self.held_bytes + self.moment_bytes(level) + self.edge_bytes
        return self._by_level["fixed", level]

    @cached_property
    def held_bytes(self) -> Floats:
        """Parameters, gradients, optimizer states and reserve."""
        ways = 1 if self._sums_whole_gradients else self.strategy.state_ways
        return self._state_bytes + np.ceil(self._trainable / ways) * self.workload.precision.gradient_bytes

    @property
    def _sums_whole_gradients(self) -> bool:
        return self.strategy.distribute_param == 1 and self.strategy.num_micro_batches > 1

    @cached_property
    def update_bytes(self) -> Floats:
        """While the optimizer steps."""
        each = self.workload.precision.gradient_bytes + update_workspace_bytes(self.workload)
        return self._state_bytes + self._shard(self._trainable) * each

    def forwarded_bytes(self, level: Recomputation) -> Floats:
        """Kept of one micro-batch from forward to backward."""
        if ("forwarded", level) not in self._by_level:
            self._by_level["forwarded", level] = self.kept_bytes(level) + self._leaving
        return self._by_level["forwarded", level]

    def kept_bytes(self, level: Recomputation) -> Floats:
        """The same, what it hands on left out: sums over segments."""
        levels = [level if kind.is_block else "none" for kind in self.runs.kinds]
        kept = [cost.kept_bytes(own) + cost.input_bytes for cost, own in zip(self._costs, levels, strict=True)]
        return self._sums(self._of_kinds(kept))

    def _transients(self, level: Recomputation) -> Floats:
        """[kind]"""
        levels = [level if kind.is_block else "none" for kind in self.runs.kinds]
        return self._of_kinds([cost.transient_bytes(own) for cost, own in zip(self._costs, levels, strict=True)])

    @cached_property
    def deferred_bytes(self) -> Floats:
        """Kept of one micro-batch between the halves of a split backward."""
        return self._sums(self._of_kinds([c.deferred_bytes for c in self._costs]))

    @cached_property
    def _leaving(self) -> Floats:
        after = [last + 1 for last in self.runs.last]
        return np.array([float(self._boundary_bytes(segment)) for segment in after])

    @cached_property
    def edge_bytes(self) -> Floats:
        """At the stage's boundaries."""
        return self._leaving + np.array([float(self._boundary_bytes(segment)) for segment in self.runs.first])

    def _boundary_bytes(self, segment: int) -> int:
        if not 0 < segment < self.runs.num_segments:
            return 0
        return self.workload.cost(segment, self.strategy.batch_per_device).input_bytes

    @cached_property
    def _trainable(self) -> Floats:
        return self._sums(self._of_kinds([kind.count.trainable for kind in self.runs.kinds]))

    @cached_property
    def _state_bytes(self) -> Floats:
        """Parameters, optimizer states and reserve."""
        total = self._trainable + self._sums(self._of_kinds([kind.count.frozen for kind in self.runs.kinds]))
        of_shard, of_all = copy_bytes(self.workload, self.strategy)
        optimizer = self._shard(self._trainable) * self.workload.precision.optimizer_state_bytes
        reserve = int(self.workload.table.reserve_bytes.value)
        return self._shard(total) * of_shard + total * of_all + optimizer + reserve

    def moment_bytes(self, level: Recomputation, *, alone: bool = False) -> Floats:
        """What is gathered and reduced at a time, and the workspace of a backward; or the part of it that each segment
        needs `alone`, whatever runs beside it.
        """
        strategy, kinds, triples = self.strategy, self.runs.kinds, self.runs.triples
        gradient_bytes = self.workload.precision.gradient_bytes
        transient = self._transients(level)
        before, own, after = triples.T
        several = strategy.num_micro_batches > 1
        if strategy.state_ways == 1 or self._sums_whole_gradients:
            return self._largest(transient[own])
        gathers = self.workload.precision.compute_bytes if strategy.distribute_param == 3 else 0
        trainable = self._of_kinds([kind.count.trainable for kind in kinds])
        total = self._of_kinds([kind.count.trainable + kind.count.frozen for kind in kinds])
        follows = several and not alone
        again = gradient_bytes * trainable[self.runs.first_kind] if follows else np.zeros(len(self.runs.first))
        ahead = np.where(before == NONE, 0.0, total[before])
        running = gathers * (total[own] + ahead) + transient[own]
        inside = np.where(after == NONE, 0.0, running + gradient_bytes * trainable[after])
        largest: Floats = np.maximum.reduce(
            [
                self._largest(inside),
                self._largest(np.where(after == NONE, running, 0.0)) + again,
                self._largest(gathers * ahead + 2 * gradient_bytes * trainable[own]),
                self._largest(2 * gathers * total[own]) + again,
            ]
        )
        return largest

    def _largest(self, of_triples: Floats) -> Floats:
        found: Floats = np.where(self.runs.has_triple, of_triples, 0.0).max(axis=1)
        return found

    def _shard(self, elements: Floats) -> Floats:
        return np.ceil(elements / self.strategy.state_ways)

    def _of_kinds(self, values: list[float] | list[int]) -> Floats:
        return np.array(values, dtype=np.float64)

    def _sums(self, of_kinds: Floats) -> Floats:
        found: Floats = self.runs.counts @ of_kinds
        return found


def _affine(seconds_of: Callable[[int], float], elements: Floats) -> Floats:
    """Of a function that is affine in elements and zero at none."""
    one, two = 2**20, 2**21
    slope = (seconds_of(two) - seconds_of(one)) / one
    found: Floats = np.where(elements > 0, seconds_of(one) + slope * (elements - one), 0.0)
    return found


def _offers(cost: SegmentCost, kind: int, least: Recomputation, highest: Recomputation) -> list[Offer]:
    allowed = range(RECOMPUTATION_LEVELS[least], RECOMPUTATION_LEVELS[highest] + 1)
    levels = [name for name, level in RECOMPUTATION_LEVELS.items() if level in allowed]
    points = [(cost.kept_bytes(least) - cost.kept_bytes(name), cost.recompute_s(name)) for name in levels]
    found, (freed, time_s) = [], (0, 0.0)
    while beyond := [point for point in points if point[0] > freed]:
        slopes = [((point[1] - time_s) / (point[0] - freed), *point) for point in beyond]
        slope, more, later_s = min(slopes)
        found.append(Offer(max(0.0, slope), more - freed, kind))
        freed, time_s = more, later_s
    return found
