"""Peak memory of a pipeline rank: a workload and a strategy with stages in, bytes per device by part out.

States follow ZeRO (Rajbhandari et al., arXiv 1910.02054), activations Korthikanti et al. (arXiv 2205.05198). With `N`
trainable and `F` frozen elements on the rank, `d` = shard_ways, and `x/d` the largest shard:

    level        parameters                                              gradients                 optimizer
    0, or d = 1  (N+F)·master + (N+F)·compute where separate             N·gradient                N·state
    1            (N+F)/d·master + (N+F)·compute, gathered once a step    N·gradient                N/d·state
    2            as 1                                                    N/d·gradient + reductions N/d·state
    3            (N+F)/d·master + gathered segments·compute              as 2                      N/d·state

Level 1 sums whole gradients and reduces them at the end, when activations are gone and each shard takes the place of
its whole; with one micro-batch it reduces as level 2 does. What is gathered and reduced changes from segment to segment
(`moments`): the peak is the largest moment.

The optimizer's own moment has no activations, and needs workspace for each element that it updates.

Parts and who computes them: optimizer (`_optimizer_bytes`), parameters, gradients and workspace (`moments`),
activations (`_activation_bytes`), reserve (the cost table).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autoparallel.cost.workload import ParameterCount, Workload
from autoparallel.ir.precision import Precision
from autoparallel.plans.strategy import ScheduleName, StagePlan, Strategy
from autoparallel.schedule.actions import InFlight, in_flight


def capacity_bytes(workload: Workload) -> int:
    """Memory of one device that a plan may use."""
    return int(workload.flavor.memory_bytes * workload.memory_ratio)


def rank_memory(workload: Workload, strategy: Strategy, *, rank: int) -> dict[str, int]:
    """Bytes per device at the peak of a training step, by part; the strategy's `stages` must be filled."""
    found = (_backward_memory(workload, strategy, rank), _update_memory(workload, strategy, rank))
    return max(found, key=lambda parts: sum(parts.values()))


def _backward_memory(workload: Workload, strategy: Strategy, rank: int) -> dict[str, int]:
    """The same, of the largest moment of forward and backward."""
    moment = max(moments(workload, strategy, strategy.stages_of(rank)), key=lambda moment: moment.total)
    return {
        "parameters": moment.parameters,
        "gradients": moment.gradients,
        "optimizer": _optimizer_bytes(workload, strategy, strategy.stages_of(rank)),
        "activations": _activation_bytes(workload, strategy, rank),
        "workspace": moment.workspace,
        "reserve": int(workload.table.reserve_bytes.value),
    }


def update_workspace_bytes(workload: Workload) -> int:
    """Of each element that the optimizer updates."""
    given, precision = workload.practice.optimizer_workspace_bytes, workload.precision
    if given is not None:
        return given
    return 0 if workload.flavor.is_cpu or precision.optimizer_state_bytes == 0 else precision.master_bytes


def _update_memory(workload: Workload, strategy: Strategy, rank: int) -> dict[str, int]:
    """The same, while the optimizer steps."""
    counts, precision = segment_parameters(workload, *strategy.stages_of(rank)), workload.precision
    mine = _shard(sum(count.trainable for count in counts), strategy.state_ways)
    return {
        "parameters": _parameter_bytes(workload, strategy, counts),
        "gradients": mine * precision.gradient_bytes,
        "optimizer": mine * precision.optimizer_state_bytes,
        "activations": 0,
        "workspace": mine * update_workspace_bytes(workload),
        "reserve": int(workload.table.reserve_bytes.value),
    }


def constant_bytes(workload: Workload, strategy: Strategy, *, rank: int) -> int:
    """What a rank holds at every moment of forward and backward, whatever its blocks keep and recompute; parameters and
    gradients left out.
    """
    optimizer = _optimizer_bytes(workload, strategy, strategy.stages_of(rank))
    return optimizer + _buffer_bytes(workload, strategy, rank) + int(workload.table.reserve_bytes.value)


def peaks(strategy: Strategy) -> tuple[tuple[InFlight, ...], ...]:
    """By rank: the micro-batches in flight at the moments that may be its peak."""
    return in_flight(
        strategy.schedule, strategy.num_stages, strategy.num_micro_batches, virtual_stages=strategy.virtual_stages
    )


@lru_cache(maxsize=4096)
def held_at_peaks(
    schedule: ScheduleName, num_stages: int, num_micro_batches: int, virtual_stages: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """By stage, in the model's order: micro-batches forwarded and half done when its rank may be at its peak."""
    found = in_flight(schedule, num_stages, num_micro_batches, virtual_stages=virtual_stages)
    stages = [divmod(stage, num_stages) for stage in range(num_stages * virtual_stages)]
    return tuple(
        tuple(sorted({(moment.forwarded[virtual], moment.half_done[virtual]) for moment in found[rank]}))
        for virtual, rank in stages
    )


def _shard(count: int, ways: int) -> int:
    """Elements of the largest shard."""
    return -(-count // ways)


def _segments(plan: StagePlan) -> range:
    return range(plan.first_segment, plan.last_segment + 1)


def segment_parameters(workload: Workload, *plans: StagePlan) -> list[ParameterCount]:
    """Of each segment of a rank's stages; a parameter that several share counts once, where it is first used."""
    segments = [segment for plan in plans for segment in _segments(plan)]
    counts = [workload.parameters[segment] for segment in segments]
    for shared in workload.shared:
        users = [segment for segment in shared.segments if segment in segments]
        if users:
            index = segments.index(min(users))
            counts[index] = ParameterCount(
                trainable=counts[index].trainable + shared.count.trainable,
                frozen=counts[index].frozen + shared.count.frozen,
            )
    return counts


def _optimizer_bytes(workload: Workload, strategy: Strategy, plans: Sequence[StagePlan]) -> int:
    trainable = sum(count.trainable for count in segment_parameters(workload, *plans))
    return _shard(trainable, strategy.state_ways) * workload.precision.optimizer_state_bytes


def copy_bytes(workload: Workload, strategy: Strategy) -> tuple[int, int]:
    """Of each element of a rank's shard (masters), and of each element of its stages (compute copies, unless each
    segment is gathered when it runs).
    """
    precision = workload.precision
    copied = strategy.distribute_param < 3 if strategy.state_ways > 1 else precision.separate_compute_copy
    return precision.master_bytes, precision.compute_bytes if copied else 0


def _parameter_bytes(workload: Workload, strategy: Strategy, counts: Sequence[ParameterCount]) -> int:
    total = sum(count.trainable + count.frozen for count in counts)
    of_shard, of_all = copy_bytes(workload, strategy)
    return _shard(total, strategy.state_ways) * of_shard + total * of_all


class Moment(NamedTuple):
    """Bytes by part at one time."""

    parameters: int
    gradients: int
    workspace: int
    segment: int | None = None
    """Whose backward needs the workspace; None where there is none."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.workspace


def moments(workload: Workload, strategy: Strategy, plans: Sequence[StagePlan]) -> list[Moment]:
    """All that may be the largest of a rank's stages, beside the states of the optimizer and activations."""
    counts, precision = segment_parameters(workload, *plans), workload.precision
    ways, parameters = strategy.state_ways, _parameter_bytes(workload, strategy, counts)
    trainable, again = sum(count.trainable for count in counts), strategy.num_micro_batches > 1
    transients = {
        segment: _transient_bytes(workload, strategy, plan, segment) for plan in plans for segment in _segments(plan)
    }
    if ways == 1 or (strategy.distribute_param == 1 and again):
        whole = trainable * precision.gradient_bytes
        return [Moment(parameters, whole, size_bytes, segment) for segment, size_bytes in transients.items()]
    shards = _shard(trainable, ways) * precision.gradient_bytes
    found, start = [], 0
    for plan in plans:
        segments = _segments(plan)
        stage = _Sharded(precision, counts[start : start + len(segments)], gives_back=strategy.distribute_param == 3)
        for gathered, reduced, index in stage.moments(again=again):
            segment = None if index is None else segments[index]
            workspace = 0 if segment is None else transients[segment]
            found.append(Moment(parameters + gathered, shards + reduced, workspace, segment))
        start += len(segments)
    return found


@dataclass(frozen=True)
class _Sharded:
    """A stage whose gradients are reduced segment by segment, each copied into one buffer that lives until the next
    segment is reduced, and whose parameters may be gathered segment by segment, the one ahead prefetched.
    """

    precision: Precision
    counts: list[ParameterCount]
    gives_back: bool

    def moments(self, *, again: bool) -> Iterator[tuple[int, int, int | None]]:
        """Bytes gathered and reduced, beside the shards, and the place of the segment whose backward runs meanwhile;
        `again` where another micro-batch's last reduction, that of the first segment, went before.
        """
        gather = self.precision.compute_bytes if self.gives_back else 0
        reduce = self.precision.gradient_bytes
        totals = [count.trainable + count.frozen for count in self.counts]
        before = self.counts[0].trainable if again else 0
        later = [*(count.trainable for count in self.counts[1:]), before]
        for s, count in enumerate(self.counts):
            ahead = totals[s - 1] if s else 0
            yield gather * (totals[s] + ahead), reduce * later[s], s
            # The segment is done: its gradients, and the buffer that they are copied into.
            yield gather * ahead, reduce * 2 * count.trainable, None
            # Gathered into one buffer, copied from there into each parameter's own.
            yield gather * 2 * totals[s], reduce * before, None


def _kept_bytes(workload: Workload, strategy: Strategy, plan: StagePlan, segment: int) -> int:
    """Activations of a segment, its input left out, that stay from forward to backward of one micro-batch."""
    level = plan.recomputation_of(segment, num_segments=len(workload.segment_classes))
    return workload.cost(segment, strategy.batch_per_device).kept_bytes(level)


def _activation_bytes(workload: Workload, strategy: Strategy, rank: int) -> int:
    """What a rank's stages keep for every micro-batch in flight, at the worst moment, and buffers."""
    peak = max(size_bytes for _, size_bytes in in_flight_bytes(workload, strategy, rank))
    return peak + _buffer_bytes(workload, strategy, rank)


def _buffer_bytes(workload: Workload, strategy: Strategy, rank: int) -> int:
    """At the boundaries of a rank's stages: the next input, received ahead, and the gradient that comes back."""
    boundaries = [s for plan in strategy.stages_of(rank) for s in (plan.first_segment, plan.last_segment + 1)]
    return sum(_boundary_bytes(workload, strategy, segment) for segment in boundaries)


def in_flight_bytes(workload: Workload, strategy: Strategy, rank: int) -> list[tuple[InFlight, int]]:
    """What a rank's stages keep of micro-batches in flight, at each moment that may be its peak."""
    held = [_held_bytes(workload, strategy, plan) for plan in strategy.stages_of(rank)]
    found = []
    for moment in peaks(strategy)[rank]:
        counts = zip(moment.forwarded, moment.half_done, held, strict=True)
        found.append(
            (moment, sum(forwarded * kept + half_done * rest for forwarded, half_done, (kept, rest) in counts))
        )
    return found


def _held_bytes(workload: Workload, strategy: Strategy, plan: StagePlan) -> tuple[int, int]:
    """What a stage keeps of one micro-batch after its forward (inputs of its segments and its output among it), and
    after the first half of a split backward.
    """
    costs = [workload.cost(segment, strategy.batch_per_device) for segment in _segments(plan)]
    kept = sum(_kept_bytes(workload, strategy, plan, segment) for segment in _segments(plan))
    output_bytes = _boundary_bytes(workload, strategy, plan.last_segment + 1)
    forwarded_bytes = kept + sum(cost.input_bytes for cost in costs) + output_bytes
    return forwarded_bytes, sum(cost.deferred_bytes for cost in costs)


def _boundary_bytes(workload: Workload, strategy: Strategy, segment: int) -> int:
    """Activations that enter a segment from another rank; none where the model begins and ends."""
    if not 0 < segment < len(workload.segment_classes):
        return 0
    return workload.cost(segment, strategy.batch_per_device).input_bytes


def _transient_bytes(workload: Workload, strategy: Strategy, plan: StagePlan, segment: int) -> int:
    """Of a segment's backward: its workspace, and the activations that it rebuilds."""
    level = plan.recomputation_of(segment, num_segments=len(workload.segment_classes))
    return workload.cost(segment, strategy.batch_per_device).transient_bytes(level)
