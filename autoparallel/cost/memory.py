"""Peak memory of a pipeline rank: a workload and a strategy with stages in, bytes per device by part out.

States follow ZeRO (Rajbhandari et al., arXiv 1910.02054), activations Korthikanti et al. (arXiv 2205.05198). With `N`
trainable and `F` frozen elements on the rank, `n` trainable in its largest segment, `d` = data_parallel, and `x/d` the
largest shard:

    level        parameters                                              gradients                 optimizer
    0, or d = 1  (N+F)·master + (N+F)·compute where separate             N·gradient                N·state
    1            (N+F)/d·master + (N+F)·compute, gathered once a step    (N + N/d)·gradient        N/d·state
    2            as 1                                                    (n + N/d)·gradient        N/d·state
    3            (N+F)/d·master + two largest segments·compute           as 2                      N/d·state

Parts and who computes them: parameters, gradients, optimizer (`_state_bytes`), activations (`_activation_bytes`),
workspace (`_workspace_bytes`), reserve (the cost table).
"""

from __future__ import annotations

from collections.abc import Sequence

from autoparallel.cost.workload import ParameterCount, Workload
from autoparallel.plans.strategy import StagePlan, Strategy
from autoparallel.schedule.actions import InFlight, in_flight


def capacity_bytes(workload: Workload) -> int:
    """Memory of one device that a plan may use."""
    return int(workload.flavor.memory_bytes * workload.memory_ratio)


def rank_memory(workload: Workload, strategy: Strategy, *, rank: int) -> dict[str, int]:
    """Bytes per device at the peak of a training step, by part; the strategy's `stages` must be filled."""
    plans = strategy.stages_of(rank)
    return {
        **_state_bytes(workload, strategy, plans),
        "activations": _activation_bytes(workload, strategy, rank),
        "workspace": max(_workspace_bytes(workload, strategy, plan) for plan in plans),
        "reserve": int(workload.table.reserve_bytes.value),
    }


def peaks(strategy: Strategy) -> tuple[tuple[InFlight, ...], ...]:
    """By rank: the micro-batches in flight at the moments that may be its peak."""
    return in_flight(
        strategy.schedule, strategy.num_stages, strategy.num_micro_batches, virtual_stages=strategy.virtual_stages
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


def _state_bytes(workload: Workload, strategy: Strategy, plans: Sequence[StagePlan]) -> dict[str, int]:
    """Parameters, gradients and optimizer states, as the module's table."""
    precision = workload.precision
    segments = segment_parameters(workload, *plans)
    trainable = sum(count.trainable for count in segments)
    total = trainable + sum(count.frozen for count in segments)
    ways, level = strategy.data_parallel, strategy.distribute_param
    if ways == 1 or level == 0:
        copies = precision.master_bytes + (precision.compute_bytes if precision.separate_compute_copy else 0)
        return {
            "parameters": total * copies,
            "gradients": trainable * precision.gradient_bytes,
            "optimizer": trainable * precision.optimizer_state_bytes,
        }
    gathered = _largest_sum([c.trainable + c.frozen for c in segments], 2) if level == 3 else total
    # With one micro-batch, level 1 too reduces each block's gradients as soon as they are made.
    keeps_whole = level == 1 and strategy.num_micro_batches > 1
    whole_gradients = trainable if keeps_whole else max(c.trainable for c in segments)
    shard = _shard(trainable, ways)
    return {
        "parameters": _shard(total, ways) * precision.master_bytes + gathered * precision.compute_bytes,
        "gradients": (whole_gradients + shard) * precision.gradient_bytes,
        "optimizer": shard * precision.optimizer_state_bytes,
    }


def _largest_sum(values: Sequence[int], count: int) -> int:
    return sum(sorted(values)[-count:])


def _kept_bytes(workload: Workload, strategy: Strategy, plan: StagePlan, segment: int) -> int:
    """Activations of a segment, its input left out, that stay from forward to backward of one micro-batch."""
    level = plan.recomputation_of(segment, num_segments=len(workload.segment_classes))
    return workload.cost(segment, strategy.batch_per_device).kept_bytes(level)


def _activation_bytes(workload: Workload, strategy: Strategy, rank: int) -> int:
    """What a rank's stages keep for every micro-batch in flight, at the worst moment, and buffers of their boundaries:
    the next input, received ahead, and the gradient that comes back.
    """
    plans = strategy.stages_of(rank)
    peak = max(size_bytes for _, size_bytes in in_flight_bytes(workload, strategy, rank))
    boundaries = [segment for plan in plans for segment in (plan.first_segment, plan.last_segment + 1)]
    return peak + sum(_boundary_bytes(workload, strategy, segment) for segment in boundaries)


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


def _workspace_bytes(workload: Workload, strategy: Strategy, plan: StagePlan) -> int:
    """The largest transient of one segment: its workspace, and the activations that its backward rebuilds."""
    transients = []
    for segment in _segments(plan):
        level = plan.recomputation_of(segment, num_segments=len(workload.segment_classes))
        transients.append(workload.cost(segment, strategy.batch_per_device).transient_bytes(level))
    return max(transients)
