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

from autoparallel.cost.memory import copy_bytes, peaks, update_workspace_bytes
from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import Recomputation, Strategy
from autoparallel.search.stage_times import Overheads, windows, with_head

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
        forward_ps = np.array([_ps(cost.forward_s + cost.forward_comm_s) for cost in self.costs], dtype=np.int64)
        return _running_sums(forward_ps + self._backward_ps) + self._exposed_ps

    @cached_property
    def _exposed_ps(self) -> Array:
        """Collectives of data parallelism of one micro-batch, less what the compute of their segments hides."""
        sharding = self.overheads.sharding
        gather, reduce = sharding.forward_gathers * self._gather_ps, sharding.backward_reduces * self._reduce_ps
        again = sharding.backward_gathers * self._gather_ps
        exposed = np.maximum(0, gather - self._windows_ps[0]) + np.maximum(0, again + reduce - self._windows_ps[1])
        sums: Array = np.triu(exposed).cumsum(axis=1)
        if self.strategy.keeps_head and sharding.backward_gathers:
            for first in range(self.num_segments):
                for segment in with_head(self.workload, first):
                    backward_ps = self._windows_ps[1][segment]
                    given, kept = again[first, segment] + reduce[first, segment], reduce[first, segment]
                    sums[first, -1] -= max(0, given - backward_ps) - max(0, kept - backward_ps)
        return sums

    @cached_property
    def step_ps(self) -> Array:
        """What happens once a step: gathers, reductions, tied gradients, optimizer."""
        sharding = self.overheads.sharding
        forward_ps, backward_ps = (_running_sums(window) for window in self._windows_ps)
        trainable = self.trainable.cumsum(axis=1)
        ahead_ps = forward_ps if self.workload.practice.gathers_ahead else np.zeros_like(forward_ps)
        once = _beside(sharding.gathers_per_step * self._gather_ps, ahead_ps)
        once = once + _beside(sharding.reduces_per_step * self._reduce_ps, backward_ps)
        whole, last = (_each(f, trainable) for f in (self.overheads.all_reduce_s, self.overheads.last_bucket_s))
        once = once + np.maximum(last, whole - backward_ps) + _each(self.overheads.optimizer_s, trainable)
        if self.workload.addends:
            once += _each(self.overheads.addends_s, _running_sums(np.array(self.workload.addends, dtype=np.int64)))
        for shared in self.workload.shared if self.strategy.num_stages > 1 else ():
            tie_s = self.overheads.tie_s(shared, num_holders=2, distance=self.strategy.num_stages - 1)
            once += _ps(tie_s) * self._split(shared.segments)
        return once

    @cached_property
    def _gather_ps(self) -> Array:
        """[first, segment]: of one segment's parameters."""
        return _each(self.overheads.gather_s, self.total) if any(self.overheads.sharding) else np.zeros_like(self.total)

    @cached_property
    def _reduce_ps(self) -> Array:
        if not any(self.overheads.sharding):
            return np.zeros_like(self.total)
        return _each(self.overheads.reduce_scatter_s, self.trainable)

    @cached_property
    def _windows_ps(self) -> tuple[Array, Array]:
        """[segment]: forward and backward, as far as they hide collectives."""
        room = windows(self.workload, self.strategy, range(self.num_segments))
        forward, backward = ([_ps(window[i]) for window in room] for i in (0, 1))
        return np.array(forward, dtype=np.int64), np.array(backward, dtype=np.int64)

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
        largest: Array = np.maximum(self._fixed_bytes + peak + entering + leaving, self._update_bytes)
        return largest

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
        transients = [cost.transient_bytes(self._level(i)) for i, cost in enumerate(self.costs)]
        transient = _from_first(np.array(transients, dtype=np.int64))
        gradient_bytes, ways = self.workload.precision.gradient_bytes, self.strategy.state_ways
        trainable = self.trainable.cumsum(axis=1)
        if ways == 1 or (self.strategy.distribute_param == 1 and self.strategy.num_micro_batches > 1):
            return self._state_bytes + trainable * gradient_bytes + _running_max(transient)
        return self._state_bytes + -(-trainable // ways) * gradient_bytes + self._moments(transient)

    @cached_property
    def _update_bytes(self) -> Array:
        """While the optimizer steps."""
        each = self.workload.precision.gradient_bytes + update_workspace_bytes(self.workload)
        return self._state_bytes + -(-self.trainable.cumsum(axis=1) // self.strategy.state_ways) * each

    @cached_property
    def _state_bytes(self) -> Array:
        """Parameters, optimizer states and reserve."""
        trainable, total, ways = self.trainable.cumsum(axis=1), self.total.cumsum(axis=1), self.strategy.state_ways
        of_shard, of_all = copy_bytes(self.workload, self.strategy)
        optimizer = -(-trainable // ways) * self.workload.precision.optimizer_state_bytes
        reserve = int(self.workload.table.reserve_bytes.value)
        return -(-total // ways) * of_shard + total * of_all + optimizer + reserve

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


def _beside(each: Array, compute: Array) -> Array:
    """[first, last]: what is left of collectives beside compute, of which the first segment's has none."""
    total = np.triu(each).cumsum(axis=1)
    exposed: Array = np.maximum(np.minimum(np.diag(each)[:, None], total), total - compute)
    return exposed


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
