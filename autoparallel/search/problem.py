"""What all candidates of one search share: the workload as each split of tensor parallelism has it, its runs of
segments and what these cost; and bounds on a step that take no search for stages.

With `c` the time of one micro-batch through the whole model, `m` micro-batches and `p` pipeline ranks, of which one has
at least ceil(blocks / p) blocks, each of them at least `b`:

    step >= m · max(c / p, ceil(blocks / p) · b)
    step >= (m · c + what comes once a step) / p
    step >= c / (1 - (1 - 1/m)^p)     1f1b and gpipe: through stage s there is a path of (stages before) + m · c_s, and
                                      no division of c makes the longest of these shorter
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, inf
from typing import NamedTuple

import numpy as np

from autoparallel.cost.memory import capacity_bytes, peaks
from autoparallel.cost.workload import Variant, Workload
from autoparallel.plans.grid import Axis
from autoparallel.plans.strategy import Strategy
from autoparallel.schedule.actions import splits_backward
from autoparallel.search.runs import ROUNDED_BYTES, RunCosts, Runs, runs_of
from autoparallel.space.candidates import EMITTED, Shape

MAX_COSTS = 256
"""Strategies that differ in their schedules and their cuts alone share costs; they come one after the other."""

Splits = tuple[tuple[str, ...], ...] | None


class Needs(NamedTuple):
    """Bytes that a segment needs, were it alone."""

    held: float
    """Parameters, gradients and optimizer states."""
    forwarded: float
    """Kept of one micro-batch at the highest level of recomputation."""
    deferred: float
    """Kept of one micro-batch between the halves of a split backward."""
    working: float
    """Its workspace, what its backward rebuilds, gathers and reduces."""

    def during(self, forwarded: int, half_done: int) -> float:
        """At least, with so many micro-batches forwarded, and half done; workspace left out."""
        return self.held + forwarded * self.forwarded + half_done * self.deferred - ROUNDED_BYTES


class Whole(NamedTuple):
    """The whole model on one device, and what its segments need at least."""

    micro_batch_s: float
    """Seconds, as the next two."""
    block_s: float
    """The least of one block in it."""
    once_s: float
    """What comes once a step."""
    held_bytes: float
    first: Needs
    last: Needs
    block: Needs
    """The least of each."""


@dataclass(eq=False)
class Local:
    """The workload as one rank has it under one split."""

    workload: Workload
    splits: Splits
    runs: Runs
    _costs: OrderedDict[tuple[object, ...], RunCosts] = field(default_factory=OrderedDict)
    _wholes: dict[tuple[object, ...], Whole] = field(default_factory=dict)

    def costs(self, strategy: Strategy) -> RunCosts:
        """Of a strategy with this split."""
        key = _what_costs_depend_on(strategy)
        if key not in self._costs:
            self._costs[key] = RunCosts(self.workload, strategy, self.runs)
            if len(self._costs) > MAX_COSTS:
                self._costs.popitem(last=False)
        return self._costs[key]

    def whole(self, strategy: Strategy) -> Whole:
        """Of a strategy with this split; the same for all schedules and cuts."""
        key = (*_what_costs_depend_on(strategy), strategy.recomputation)
        if key not in self._wholes:
            costs = RunCosts(self.workload, strategy, self.runs.essence)
            reserve, level = self.workload.table.reserve_bytes.value, strategy.recomputation
            each_s = costs.forward_s + costs.input_gradient_s + costs.weight_gradient_s
            working = costs.moment_bytes(level, alone=True)
            needs = np.array([costs.held_bytes - reserve, costs.kept_bytes(level), costs.deferred_bytes, working])
            self._wholes[key] = Whole(
                micro_batch_s=float(each_s[0]),
                block_s=float(each_s[3:].min(initial=each_s[0])),
                once_s=float(costs.start_s[0] + costs.end_s[0]),
                held_bytes=float(needs[0, 0]),
                first=Needs(*needs[:, 1].tolist()),
                last=Needs(*needs[:, 2].tolist()),
                block=Needs(*needs[:, 3:].min(axis=1, initial=inf).tolist()),
            )
        return self._wholes[key]


def _num_fitting(block: Needs, ends: list[Needs], room_bytes: float, forwarded: int, half_done: int) -> float:
    """Blocks that fit into a rank at one moment, beside some of the model's ends; negative where these do not."""
    room_bytes -= max(needs.working for needs in (block, *ends))
    room_bytes -= sum(max(0.0, needs.during(forwarded, half_done)) for needs in ends)
    if room_bytes < 0:
        return -1
    size_bytes = block.during(forwarded, half_done)
    return room_bytes // size_bytes if size_bytes > 0 else inf


def _what_costs_depend_on(strategy: Strategy) -> tuple[object, ...]:
    replicas = (strategy.data_parallel, strategy.context_parallel, strategy.shard_group_size, strategy.mesh_order)
    beside = strategy.num_stages if strategy.mesh_order else 1  # stages may lie between replicas
    return (
        *replicas,
        beside,
        strategy.batch_per_device,
        strategy.distribute_param,
        strategy.num_micro_batches > 1,
        strategy.keeps_head,
        splits_backward(strategy.schedule, strategy.num_stages) and strategy.shard_groups > 1,
    )


class Problem:
    """One workload, and everything that was worked out for it."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._locals: dict[tuple[object, ...], list[Local]] = {}
        self._runs: dict[object, Runs] = {}
        self._variants: dict[tuple[int, int], list[Variant]] = {}
        for variant in workload.variants:
            self._variants.setdefault((variant.tensor_parallel, variant.batch_per_device), []).append(variant)

    def locals(self, strategy: Strategy) -> list[Local]:
        """One for every split that the strategy may use; none where its degree is impossible."""
        asked = (strategy.sequence_parallel, strategy.batch_per_device, strategy.splits)
        key = (strategy.tensor_parallel, strategy.stride_of("tp"), *asked)
        if key not in self._locals:
            found = self._near(strategy).under(strategy)
            self._locals[key] = [Local(local, split.splits, self._runs_of(local, split)) for local, split in found]
        return self._locals[key]

    def _near(self, strategy: Strategy) -> Workload:
        """The workload with no other variants than those of the strategy's degree and number of rows."""
        near = self._variants.get((strategy.tensor_parallel, strategy.batch_per_device), [])
        return self.workload.model_copy(update={"variants": tuple(near)})

    def _runs_of(self, local: Workload, strategy: Strategy) -> Runs:
        """What a rank holds of each segment depends on the split alone."""
        key = (strategy.tensor_parallel, strategy.sequence_parallel, strategy.splits)
        if key not in self._runs:
            self._runs[key] = runs_of(local)
        return self._runs[key]

    def shape_bound_s(self, shape: Shape, orders: Iterable[tuple[Axis, ...] | None] = (None,)) -> float:
        """What no step of any strategy of the shape undercuts: as `layout_bound_s`, collectives of data parallelism and
        what comes once a step left out.
        """
        strategies = [Strategy(**shape._asdict(), mesh_order=order) for order in orders]
        bounds = [self._quick_bound_s(local, s, partly=True) for s in strategies for local in self.locals(s)]
        return min(bounds, default=0.0)

    def layout_bound_s(self, strategy: Strategy) -> float:
        """What no step undercuts of a strategy like this one, whatever its schedule."""
        alike = [strategy]
        if strategy.num_stages > 1 and strategy.shard_groups > 1:
            alike.append(strategy.model_copy(update={"schedule": "zero_bubble"}))  # it sums groups more often
        bounds = [self._quick_bound_s(local, s, partly=False) for s in alike for local in self.locals(s)]
        return min(bounds, default=0.0)

    def quick_bound_s(self, strategy: Strategy) -> float:
        """What no step of the strategy undercuts, whatever its stages and what they recompute."""
        return min((self._quick_bound_s(local, strategy) for local in self.locals(strategy)), default=0.0)

    def shape_is_too_large(self, shape: Shape) -> bool:
        """Whether its parameters, gradients and states fit nowhere, sharded as far as they can be."""
        strategy = Strategy(**shape._asdict(), distribute_param=3, recomputation=EMITTED.recomputations[-1])
        return not self.holds_states(strategy)

    def is_too_large(self, strategy: Strategy, *, spare_bytes: float = 0.0) -> bool:
        """Whether no rank's parameters, gradients and states fit, or no division of the blocks over its ranks does at
        the highest level of recomputation, with so many more bytes on a rank.
        """
        room = self._room_bytes + spare_bytes
        if all(local.whole(strategy).held_bytes > room * strategy.num_stages for local in self.locals(strategy)):
            return True
        return not any(self._holds(local, strategy, room) for local in self.locals(strategy))

    def holds_states(self, strategy: Strategy) -> bool:
        """Whether parameters, gradients and states would fit, were they divided evenly over stages."""
        room = self._room_bytes * strategy.num_stages
        return any(local.whole(strategy).held_bytes <= room for local in self.locals(strategy))

    def lacks_bytes(self, strategy: Strategy) -> float:
        """Some rank lacks at least so much, or a little less."""
        low, high = 0.0, 1.0
        while self.is_too_large(strategy, spare_bytes=high):
            low, high = high, 2 * high
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.is_too_large(strategy, spare_bytes=middle) else (low, middle)
        return low

    @property
    def _room_bytes(self) -> float:
        """For the model, on one rank."""
        return capacity_bytes(self.workload) - self.workload.table.reserve_bytes.value + ROUNDED_BYTES

    def _holds(self, local: Local, strategy: Strategy, room_bytes: float) -> bool:
        """Whether ranks could hold all blocks, each as many as fit into it beside the ends of the model."""
        whole, num_blocks = local.whole(strategy), self.workload.num_blocks
        if num_blocks < 1:
            return True
        ends: list[list[Needs]] = [[] for _ in range(strategy.num_stages)]
        # One rank that holds both ends may hold one copy of what they share.
        ends[0].append(whole.first)
        ends[-1] = [whole.last]
        num_held = 0.0
        for moments, of_rank in zip(peaks(strategy), ends, strict=True):
            # Of several stages on a rank, the one with least in flight may hold all of its blocks.
            least = {(min(moment.forwarded), min(moment.half_done)) for moment in moments}
            fits = min(_num_fitting(whole.block, of_rank, room_bytes, *moment) for moment in least)
            if fits < 0:
                return False
            num_held += fits
        return num_held >= num_blocks

    def _quick_bound_s(self, local: Local, strategy: Strategy, *, partly: bool | None = None) -> float:
        """Of a strategy; or only what its layout, or in part what its shape, makes necessary."""
        whole = local.whole(strategy)
        ranks, count = strategy.num_stages, strategy.num_micro_batches
        work_s = count * whole.micro_batch_s + (0.0 if partly else whole.once_s)
        busiest_s = ceil(self.workload.num_blocks / ranks) * whole.block_s
        bounds = [work_s / ranks, count * max(whole.micro_batch_s / ranks, busiest_s)]
        if ranks > 1 and partly is None and strategy.schedule in ("1f1b", "gpipe"):
            bounds.append(whole.micro_batch_s / (1 - (1 - 1 / count) ** ranks))
        cores, hosts = self.workload.flavor.cores_per_host, self.workload.flavor.num_hosts
        if cores is not None:
            bounds.append(work_s * strategy.num_replicas * strategy.tensor_parallel / (cores * hosts))
        return max(bounds)
