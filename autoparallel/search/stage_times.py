"""What a stage spends its time on: a workload, a strategy and one stage in, seconds by kind out.

Sharding communicates segment by segment, as the runtime gathers and reduces (FSDP2, arXiv 2304.11277; ZeRO, arXiv
1910.02054). Where a device computes and communicates at once, that hides behind the compute of the same segment
(recomputation not counted), and what comes once a step behind one micro-batch's forward or backward, but for the first
segment's share, which has nothing beside it:

    exposed, each micro-batch   max(0, gather - forward) + max(0, gather + reduction - backward)
    exposed, once a step        max(first segment's, total - forward or backward of the stage)

Groups of replicas that hold the same shards sum their gradients once a step, like what level 1 reduces; where a split
backward reduces in two halves, with each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import add, attrgetter
from typing import NamedTuple

from autoparallel.cost.collectives import Topology
from autoparallel.cost.compute import Device
from autoparallel.cost.memory import segment_parameters
from autoparallel.cost.traffic import BUCKET_BYTES
from autoparallel.cost.workload import SharedParameters, Workload
from autoparallel.plans.strategy import StagePlan, Strategy
from autoparallel.schedule.actions import splits_backward


class Sharding(NamedTuple):
    """How often a sharded segment gathers its parameters and reduces its gradients."""

    gathers_per_step: int = 0
    reduces_per_step: int = 0
    sums_per_step: int = 0
    """Over the groups that hold the same shards."""
    forward_gathers: int = 0
    """These and the next: for every micro-batch."""
    backward_gathers: int = 0
    backward_reduces: int = 0
    backward_sums: int = 0


SHARDING = {
    0: Sharding(),
    1: Sharding(gathers_per_step=1, reduces_per_step=1, sums_per_step=1),
    2: Sharding(gathers_per_step=1, backward_reduces=1, sums_per_step=1),
    3: Sharding(forward_gathers=1, backward_gathers=1, backward_reduces=1, sums_per_step=1),
}


PARAMETERS_OF_A_BLOCK = 12
"""Tensors: four matrices and two norms with their biases, as GPT has them."""


@dataclass(frozen=True)
class Overheads:
    """Seconds by number of elements; groups lie over the devices as the strategy's mesh does."""

    workload: Workload
    strategy: Strategy

    @cached_property
    def topology(self) -> Topology:
        return Topology(self.workload.flavor, self.workload.table)

    @cached_property
    def device(self) -> Device:
        return Device(self.workload.table)

    @cached_property
    def sharding(self) -> Sharding:
        strategy = self.strategy
        found = SHARDING[strategy.distribute_param if strategy.state_ways > 1 else 0]
        if found.backward_reduces and splits_backward(strategy.schedule, strategy.num_stages):
            found = found._replace(sums_per_step=0, backward_sums=1)
        return found

    @cached_property
    def tensor(self) -> dict[str, int]:
        return {"group_size": self.strategy.tensor_parallel, "stride": self.strategy.stride_of("tp")}

    @cached_property
    def stages(self) -> dict[str, int]:
        return {"group_size": self.strategy.num_stages, "stride": self.strategy.stride_of("pp")}

    @cached_property
    def replicas(self) -> dict[str, int]:
        return {"group_size": self.strategy.num_replicas, "stride": self.strategy.stride_of("dp")}

    @cached_property
    def shards(self) -> dict[str, int]:
        return {"group_size": self.strategy.shard_ways, "stride": self.strategy.stride_of("dp")}

    @cached_property
    def shard_groups(self) -> dict[str, int]:
        """One rank of each of the groups that hold the same shards."""
        stride = self.strategy.shard_ways * self.strategy.stride_of("dp")
        return {"group_size": self.strategy.shard_groups, "stride": stride}

    def gather_s(self, elements: int) -> float:
        """All ranks get all parameters of a segment in compute dtype; frozen ones are sharded too."""
        if elements == 0:
            return 0.0
        calls, size_bytes = self._calls, elements * self.workload.precision.compute_bytes
        return calls * self.topology.all_gather_s(size_bytes / calls, **self.shards)

    def backward_reduce_s(self, trainable: int) -> float:
        """What one micro-batch sums of a segment's gradients."""
        sharding = self.sharding
        return self._reduce_s(trainable, reduces=sharding.backward_reduces, sums=sharding.backward_sums)

    def step_reduce_s(self, trainable: int) -> float:
        """What is summed of a segment's gradients once a step."""
        sharding = self.sharding
        return self._reduce_s(trainable, reduces=sharding.reduces_per_step, sums=sharding.sums_per_step)

    def _reduce_s(self, trainable: int, *, reduces: int, sums: int) -> float:
        """Every rank gets the summed gradients of its shard of a segment; groups with the same shards sum theirs."""
        if trainable == 0 or not any(self.sharding):
            return 0.0
        calls, size_bytes = self._calls, trainable * self.workload.precision.gradient_bytes
        reduce_s = calls * self.topology.reduce_scatter_s(size_bytes / calls, **self.shards)
        sum_s = self.topology.all_reduce_s(size_bytes / self.strategy.shard_ways, **self.shard_groups)
        return reduces * reduce_s + sums * sum_s

    @property
    def _calls(self) -> int:
        """Collectives for one segment."""
        return PARAMETERS_OF_A_BLOCK if self.workload.practice.gathers_each_parameter else 1

    def all_reduce_s(self, trainable: int) -> float:
        """Gradients of a whole stage, once a step, where nothing is sharded."""
        if trainable == 0 or self.strategy.distribute_param > 0:
            return 0.0
        size_bytes = trainable * self.workload.precision.gradient_bytes
        return self.topology.all_reduce_s(size_bytes, **self.replicas)

    def last_bucket_s(self, trainable: int) -> float:
        """Of `all_reduce_s`, what backward has nothing left to hide behind."""
        return self.all_reduce_s(min(trainable, BUCKET_BYTES // self.workload.precision.gradient_bytes))

    def addends_s(self, elements: int) -> float:
        """Gradients of which every tensor-parallel rank has an addend, in one bucket once a step."""
        if elements == 0:
            return 0.0
        size_bytes = self.held(elements) * self.workload.precision.gradient_bytes
        return self.topology.all_reduce_s(size_bytes, **self.tensor)

    def tie_s(self, shared: SharedParameters, holders: tuple[int, ...]) -> float:
        """Sum the gradients of a parameter that pipeline ranks share, after the reduction over replicas."""
        if len(holders) < 2 or shared.count.trainable == 0:
            return 0.0
        size_bytes = self.held(shared.count.trainable) * self.workload.precision.gradient_bytes
        return self.topology.all_reduce_s(size_bytes, holders, **self.stages)

    def send_s(self, size_bytes: float, *, stage: int) -> float:
        """From a stage to the next one, which is back on the first pipeline rank after the last; or back."""
        first, second = sorted((stage % self.strategy.num_stages, (stage + 1) % self.strategy.num_stages))
        if self.strategy.sequence_parallel or not self.workload.practice.scatters_sends:
            return self.topology.send_recv_s(size_bytes, (first, second), **self.stages)
        part_bytes = size_bytes / self.strategy.tensor_parallel
        gather_s = self.topology.all_gather_s(size_bytes, **self.tensor)
        return self.topology.send_recv_s(part_bytes, (first, second), **self.stages) + gather_s

    def optimizer_s(self, trainable: int) -> float:
        """AdamW on what a rank holds: reads gradients, masters and states, writes masters, states and compute copy."""
        precision = self.workload.precision
        moved_bytes = precision.gradient_bytes + 2 * precision.master_bytes + 2 * precision.optimizer_state_bytes
        if precision.separate_compute_copy:
            moved_bytes += precision.compute_bytes
        return self.device.optimizer_s(parameters=self.held(trainable), bytes_per_parameter=moved_bytes)

    def held(self, elements: int) -> int:
        """Elements in the largest shard of what is sharded over replicas."""
        return -(-elements // self.strategy.state_ways)


@dataclass(frozen=True)
class StageSeconds:
    """One stage on one device, or all stages of one. The first eleven are of one micro-batch, the others of a step;
    collectives of data parallelism without what hides behind compute.
    """

    forward_s: float
    backward_s: float
    """Without recomputation."""
    weight_gradient_s: float
    """The part of it that a schedule with a split backward makes later."""
    recompute_s: float
    forward_tensor_s: float
    """Collectives of tensor parallelism; the rest are those of data parallelism."""
    backward_tensor_s: float
    replicated_s: float
    """The part of forward and backward that every tensor-parallel rank repeats."""
    forward_comm_s: float
    backward_gather_s: float
    backward_reduce_s: float
    hidden_s: float
    """Collectives of data parallelism that compute hides."""
    start_s: float
    """Gathering parameters before the first micro-batch."""
    reduce_s: float
    """Summing gradients after the last micro-batch."""
    optimizer_s: float
    hidden_step_s: float
    """As `hidden_s`, of what comes once a step."""

    @property
    def comm_s(self) -> float:
        return self.forward_comm_s + self.backward_gather_s + self.backward_reduce_s

    @property
    def forward_action_s(self) -> float:
        return self.forward_s + self.forward_tensor_s + self.forward_comm_s

    @property
    def backward_action_s(self) -> float:
        return self.input_gradient_action_s + self.weight_gradient_action_s

    @property
    def input_gradient_action_s(self) -> float:
        compute_s = self.backward_s - self.weight_gradient_s + self.recompute_s
        return compute_s + self.backward_tensor_s + self.backward_gather_s

    @property
    def weight_gradient_action_s(self) -> float:
        return self.weight_gradient_s + self.backward_reduce_s

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(*map(add, _values(self), _values(other)))


_values = attrgetter(*(field.name for field in fields(StageSeconds)))


def with_head(shared_by: Sequence[SharedParameters], last: int, first: int) -> list[int]:
    """The model's last segment, and those of a stage from `first` to it that share a parameter with it: they are
    gathered together.
    """
    sharing = {i for shared in shared_by if last in shared.segments for i in shared.segments if i >= first}
    return sorted(sharing | {last})


class Window(NamedTuple):
    """Compute of one segment, for one micro-batch, recomputation left out."""

    forward_s: float
    backward_s: float


def windows(workload: Workload, strategy: Strategy, segments: range) -> list[Window]:
    """Of each segment: what its collectives of data parallelism can hide behind; nothing where they cannot."""
    if not overlaps(workload):
        return [Window(0.0, 0.0)] * len(segments)
    costs = [workload.cost(segment, strategy.batch_per_device) for segment in segments]
    return [Window(c.forward_s + c.forward_comm_s, c.backward_s + c.backward_comm_s) for c in costs]


def overlaps(workload: Workload) -> bool:
    """Processes that share a CPU's cores communicate on the same cores."""
    return workload.practice.overlap and not workload.flavor.is_cpu


def stage_seconds(workload: Workload, strategy: Strategy, plan: StagePlan) -> StageSeconds:
    """Times of one stage, by segment where segments communicate on their own."""
    overheads, size = Overheads(workload, strategy), strategy.batch_per_device
    sharding, segments = overheads.sharding, range(plan.first_segment, plan.last_segment + 1)
    costs = [workload.cost(segment, size) for segment in segments]
    levels = [plan.recomputation_of(i, num_segments=len(workload.segment_classes)) for i in segments]
    again = [cost.recompute_s(level) for cost, level in zip(costs, levels, strict=True)]
    trainable = workload.stage_parameters(plan.first_segment, plan.last_segment).trainable
    counts = segment_parameters(workload, plan)
    gathers_s = [overheads.gather_s(count.trainable + count.frozen) if any(sharding) else 0.0 for count in counts]
    reduces_s = [overheads.backward_reduce_s(count.trainable) for count in counts]
    last_s = [overheads.step_reduce_s(count.trainable) for count in counts]
    kept = set[int]()
    if strategy.keeps_head and plan.last_segment == len(workload.segment_classes) - 1:
        kept = set(with_head(workload.shared, len(workload.segment_classes) - 1, plan.first_segment))
    shown = _Exposed()
    room = windows(workload, strategy, segments)
    for segment, gather_s, reduce_s, window in zip(segments, gathers_s, reduces_s, room, strict=True):
        again_s = 0.0 if segment in kept else gather_s
        shown.add(sharding, gather_s, again_s, reduce_s, window)
    forward_s, backward_s = (sum(window[i] for window in room) for i in (0, 1))
    ahead_s = forward_s if workload.practice.gathers_ahead else 0.0
    start_s = _beside(sharding.gathers_per_step * sum(gathers_s), gathers_s[0], ahead_s)
    reduce_s = _beside(sum(last_s), last_s[0], backward_s)
    whole_s = overheads.all_reduce_s(trainable)
    reduce_s += _beside(whole_s, overheads.last_bucket_s(trainable), backward_s)
    once_s = sharding.gathers_per_step * sum(gathers_s) + sum(last_s) + whole_s
    return StageSeconds(
        forward_s=sum(cost.forward_s for cost in costs),
        backward_s=sum(cost.backward_s for cost in costs),
        weight_gradient_s=sum(cost.weight_gradient_s for cost in costs),
        recompute_s=sum(again),
        forward_tensor_s=sum(cost.forward_comm_s for cost in costs),
        backward_tensor_s=sum(cost.backward_comm_s for cost in costs),
        replicated_s=sum(cost.replicated_s for cost in costs),
        forward_comm_s=shown.forward_gather_s,
        backward_gather_s=shown.backward_gather_s,
        backward_reduce_s=shown.backward_reduce_s,
        hidden_s=shown.hidden_s,
        start_s=start_s,
        reduce_s=reduce_s + overheads.addends_s(sum(workload.addends[plan.first_segment : plan.last_segment + 1])),
        optimizer_s=overheads.optimizer_s(trainable),
        hidden_step_s=once_s - start_s - reduce_s,
    )


def _beside(total_s: float, first_s: float, compute_s: float) -> float:
    """What is left of collectives beside compute, of which the first segment's has none."""
    return max(min(first_s, total_s), total_s - compute_s)


@dataclass
class _Exposed:
    """Collectives of data parallelism of one micro-batch, as far as compute does not hide them."""

    forward_gather_s: float = 0.0
    backward_gather_s: float = 0.0
    backward_reduce_s: float = 0.0
    hidden_s: float = 0.0

    def add(self, sharding: Sharding, gather_s: float, again_s: float, reduce_s: float, window: Window) -> None:
        """One segment, whose parameters are gathered in `gather_s`, and in `again_s` for backward, and whose gradients
        are summed in `reduce_s`.
        """
        forward_s = sharding.forward_gathers * gather_s
        backward_s = sharding.backward_gathers * again_s
        shown = (
            max(0.0, forward_s - window.forward_s),
            max(0.0, backward_s - window.backward_s),
            max(0.0, reduce_s - max(0.0, window.backward_s - backward_s)),
        )
        self.forward_gather_s += shown[0]
        self.backward_gather_s += shown[1]
        self.backward_reduce_s += shown[2]
        self.hidden_s += forward_s + backward_s + reduce_s - sum(shown)
