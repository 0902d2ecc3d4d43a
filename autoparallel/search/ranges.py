"""Every run of segments that could be a stage, at once: a workload and a strategy in, arrays [first, last] out.

The same formulas as `stage_times.stage_seconds` and `cost.memory.rank_memory`, as prefix sums and running maxima; a
test holds them equal for every range. Times are whole picoseconds, so that equal stages compare equal. Entries with
first > last mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.memory import peaks
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import Recomputation, Strategy
from autoparallel.search.stage_times import Overheads, with_head

Array = NDArray[np.int64]
PICO = 1e-12


class Ranges:
    """Times and memory of the stages `first .. last` under one strategy."""

    def __init__(self, workload: Workload, strategy: Strategy) -> None:
        self.workload, self.strategy = workload, strategy
        self.num_segments = len(workload.segment_classes)
        self.overheads = Overheads(workload, strategy)
        self.costs = [workload.cost(segment, strategy.batch_per_device) for segment in range(self.num_segments)]

    @cached_property
    def trainable(self) -> Array:
        """[first, segment]: elements that a stage beginning at `first` counts in `segment`."""
        return self._elements(lambda count: count.trainable)

    @cached_property
    def total(self) -> Array:
        return self._elements(lambda count: count.trainable + count.frozen)

    def _elements(self, of: Callable[..., int]) -> Array:
        """A shared parameter counts in the first segment of the stage that uses it."""
        own = np.array([of(count) for count in self.workload.parameters], dtype=np.int64)
        counts = _from_first(own)
        for shared in self.workload.shared:
            for first in range(max(shared.segments) + 1):
                counts[first, min(s for s in shared.segments if s >= first)] += of(shared.count)
        return counts

    @cached_property
    def micro_batch_ps(self) -> Array:
        """Forward, backward, recomputation and collectives of one micro-batch."""
        sharding = self.overheads.sharding
        gathers = sharding.forward_gathers + sharding.backward_gathers
        forward_ps = np.array([_ps(cost.forward_s + cost.forward_comm_s) for cost in self.costs], dtype=np.int64)
        compute_ps = _running_sums(forward_ps + self._backward_ps)
        sharded_ps = self._sharded_ps(gathers=gathers, reduces=sharding.backward_reduces)
        if self.strategy.keeps_head:
            sharded_ps[:, -1] -= sharding.backward_gathers * self._head_gather_ps
        return compute_ps + sharded_ps

    @cached_property
    def step_ps(self) -> Array:
        """What happens once a step: gathers, reductions, tied gradients, optimizer."""
        sharding = self.overheads.sharding
        once: Array = self._sharded_ps(gathers=sharding.gathers_per_step, reduces=sharding.reduces_per_step)
        trainable = self.trainable.cumsum(axis=1)
        once = once + _each(self.overheads.all_reduce_s, trainable) + _each(self.overheads.optimizer_s, trainable)
        if self.workload.addends:
            once += _each(self.overheads.addends_s, _running_sums(np.array(self.workload.addends, dtype=np.int64)))
        for shared in self.workload.shared if self.strategy.num_stages > 1 else ():
            tie_s = self.overheads.tie_s(shared, num_holders=2, distance=self.strategy.num_stages - 1)
            once += _ps(tie_s) * self._split(shared.segments)
        return once

    def _sharded_ps(self, *, gathers: int, reduces: int) -> Array:
        times: Array = np.zeros_like(self.total)
        if gathers:
            times = times + gathers * _each(self.overheads.gather_s, self.total)
        if reduces:
            times = times + reduces * _each(self.overheads.reduce_scatter_s, self.trainable)
        sums: Array = times.cumsum(axis=1)
        return sums

    @property
    def _head_gather_ps(self) -> Array:
        """[first]: gathering what is gathered together with the last segment, once."""
        elements = [[int(self.total[f, i]) for i in with_head(self.workload, f)] for f in range(self.num_segments)]
        gathers = [sum(_ps(self.overheads.gather_s(n)) for n in counts) for counts in elements]
        return np.array(gathers, dtype=np.int64)

    def _split(self, segments: tuple[int, ...]) -> Array:
        """1 where a range holds some of the segments and not all."""
        first, last = np.ogrid[: self.num_segments, : self.num_segments]
        inside = np.array([(first <= s) & (s <= last) for s in segments])
        split: Array = np.where(inside.any(axis=0) & ~inside.all(axis=0), np.int64(1), np.int64(0))
        return split

    @cached_property
    def backward_before_ps(self) -> Array:
        """[first]: backward of one micro-batch on the segments before `first`."""
        before: Array = np.cumsum(self._backward_ps) - self._backward_ps
        return before

    @cached_property
    def _backward_ps(self) -> Array:
        """[segment], recomputation and collectives of tensor parallelism included."""
        times = [c.backward_s + c.backward_comm_s + c.recompute_s(self._level(i)) for i, c in enumerate(self.costs)]
        return np.array([_ps(time_s) for time_s in times], dtype=np.int64)

    def memory_bytes(self, stage: int) -> Array:
        """Peak bytes per device, were the range this stage; other stages of its rank come on top."""
        virtual, rank = divmod(stage, self.strategy.num_stages)
        leaving = self._input_bytes[None, 1:] if stage < self.strategy.total_stages - 1 else np.int64(0)
        entering = self._input_bytes[:-1, None] if stage > 0 else np.int64(0)
        forwarded_bytes = self._kept_bytes + leaving
        held = {(moment.forwarded[virtual], moment.half_done[virtual]) for moment in peaks(self.strategy)[rank]}
        peak: Array = np.maximum.reduce([f * forwarded_bytes + h * self._deferred_bytes for f, h in sorted(held)])
        return self._fixed_bytes + peak + entering + leaving

    @cached_property
    def _input_bytes(self) -> Array:
        """[segment], and a zero for what follows the last one."""
        return np.array([*(cost.input_bytes for cost in self.costs), 0], dtype=np.int64)

    @cached_property
    def _kept_bytes(self) -> Array:
        """Activations of one micro-batch."""
        kept = [cost.kept_bytes(self._level(i)) for i, cost in enumerate(self.costs)]
        return _running_sums(np.array(kept, dtype=np.int64) + self._input_bytes[:-1])

    @cached_property
    def _deferred_bytes(self) -> Array:
        """What one micro-batch keeps between the halves of a split backward."""
        return _running_sums(np.array([cost.deferred_bytes for cost in self.costs], dtype=np.int64))

    @cached_property
    def _fixed_bytes(self) -> Array:
        """Parameters, gradients, optimizer states, workspace and reserve: the largest moment of `cost.memory`."""
        precision, level, ways = self.workload.precision, self.strategy.distribute_param, self.strategy.data_parallel
        transients = [cost.transient_bytes(self._level(i)) for i, cost in enumerate(self.costs)]
        transient = _from_first(np.array(transients, dtype=np.int64))
        trainable, total = self.trainable.cumsum(axis=1), self.total.cumsum(axis=1)
        reserve = int(self.workload.table.reserve_bytes.value)
        if ways == 1 or level == 0:
            copies = precision.master_bytes + (precision.compute_bytes if precision.separate_compute_copy else 0)
            states = total * copies + trainable * (precision.gradient_bytes + precision.optimizer_state_bytes)
            return states + _running_max(transient) + reserve
        sharded = -(-total // ways) * precision.master_bytes + -(-trainable // ways) * precision.optimizer_state_bytes
        whole = 0 if level == 3 else total * precision.compute_bytes
        if level == 1 and self.strategy.num_micro_batches > 1:
            return sharded + whole + trainable * precision.gradient_bytes + _running_max(transient) + reserve
        return sharded + whole + -(-trainable // ways) * precision.gradient_bytes + self._moments(transient) + reserve

    def _moments(self, transient: Array) -> Array:
        """The largest of what a stage gathers, reduces and works with at one time, beside its shards."""
        gathers = self.workload.precision.compute_bytes if self.strategy.distribute_param == 3 else 0
        gradient_bytes = self.workload.precision.gradient_bytes
        again = np.diag(self.trainable)[:, None] if self.strategy.num_micro_batches > 1 else np.int64(0)
        ahead, later = np.zeros_like(self.total), np.zeros_like(self.trainable)
        ahead[:, 1:], later[:, :-1] = self.total[:, :-1], self.trainable[:, 1:]
        running = np.triu((self.total + ahead) * gathers + transient)
        inside = np.zeros_like(running)
        inside[:, 1:] = _running_max(running + np.triu(later) * gradient_bytes)[:, :-1]
        reduced = np.triu(ahead * gathers + 2 * self.trainable * gradient_bytes)
        gathered = _running_max(2 * self.total * gathers)
        before = again * gradient_bytes
        largest: Array = np.maximum.reduce([inside, running + before, _running_max(reduced), gathered + before])
        return largest

    def _level(self, segment: int) -> Recomputation:
        """The highest that the strategy allows."""
        return self.strategy.recomputation if 0 < segment < self.num_segments - 1 else "none"


def _ps(seconds: float) -> int:
    return round(seconds / PICO)


def _from_first(values: Array) -> Array:
    """[first, segment]: the values of the segments from `first` on, zeros before."""
    return np.triu(np.broadcast_to(values, (len(values), len(values))))


def _running_sums(values: Array) -> Array:
    return _from_first(values).cumsum(axis=1)


def _each(seconds_of: Callable[[int], float], elements: Array) -> Array:
    """Picoseconds for every entry; a model has few distinct ones."""
    distinct, where = np.unique(elements, return_inverse=True)
    return np.array([_ps(seconds_of(int(n))) for n in distinct], dtype=np.int64)[where].reshape(elements.shape)


def _running_max(values: Array) -> Array:
    found: Array = np.maximum.accumulate(values, axis=1)
    return found
