"""Peak memory of a stage: a workload and a strategy with stages in, bytes per device by part out.

States follow ZeRO (Rajbhandari et al., arXiv 1910.02054), activations Korthikanti et al. (arXiv 2205.05198). With `N`
trainable and `F` frozen elements in the stage, `n` trainable in its largest segment, `d` = data_parallel, and `x/d` the
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


def capacity_bytes(workload: Workload) -> int:
    """Memory of one device that a plan may use."""
    return int(workload.flavor.memory_bytes * workload.memory_ratio)


def stage_memory(workload: Workload, strategy: Strategy, *, stage: int) -> dict[str, int]:
    """Bytes per device at the peak of a training step, by part; the strategy's `stages` must be filled."""
    assert strategy.stages is not None, "stage_memory needs a strategy with stages"
    return {
        **_state_bytes(workload, strategy, strategy.stages[stage]),
        "activations": _activation_bytes(workload, strategy, stage),
        "workspace": _workspace_bytes(workload, strategy, strategy.stages[stage]),
        "reserve": int(workload.table.reserve_bytes.value),
    }


def num_in_flight(strategy: Strategy, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once.

    Without a pipeline each micro-batch runs backward before the next one starts. GPipe runs all forwards first; 1F1B
    holds as many as there are stages from here to the end.
    """
    if strategy.num_stages == 1:
        return 1
    if strategy.schedule == "gpipe":
        return strategy.num_micro_batches
    return min(strategy.num_micro_batches, strategy.num_stages - stage)


def _shard(count: int, ways: int) -> int:
    """Elements of the largest shard."""
    return -(-count // ways)


def _segments(plan: StagePlan) -> range:
    return range(plan.first_segment, plan.last_segment + 1)


def segment_parameters(workload: Workload, plan: StagePlan) -> list[ParameterCount]:
    """Of each segment of a stage; a parameter shared inside the stage counts once, where it is first used."""
    counts = [workload.parameters[segment] for segment in _segments(plan)]
    for shared in workload.shared:
        users = [segment for segment in shared.segments if segment in _segments(plan)]
        if users:
            index = min(users) - plan.first_segment
            counts[index] = ParameterCount(
                trainable=counts[index].trainable + shared.count.trainable,
                frozen=counts[index].frozen + shared.count.frozen,
            )
    return counts


def _state_bytes(workload: Workload, strategy: Strategy, plan: StagePlan) -> dict[str, int]:
    """Parameters, gradients and optimizer states, as the module's table."""
    precision = workload.precision
    stage = workload.stage_parameters(plan.first_segment, plan.last_segment)
    trainable, total = stage.trainable, stage.trainable + stage.frozen
    ways, level = strategy.data_parallel, strategy.distribute_param
    if ways == 1 or level == 0:
        copies = precision.master_bytes + (precision.compute_bytes if precision.separate_compute_copy else 0)
        return {
            "parameters": total * copies,
            "gradients": trainable * precision.gradient_bytes,
            "optimizer": trainable * precision.optimizer_state_bytes,
        }
    segments = segment_parameters(workload, plan)
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


def _activation_bytes(workload: Workload, strategy: Strategy, stage: int) -> int:
    """What forward keeps for backward, for every micro-batch in flight, and the buffers of stage boundaries.

    The boundary to the next stage holds one output for each micro-batch in flight (kept until its backward) and the
    gradient that comes back. The boundary to the stage before holds the next input, received ahead; inputs of the
    micro-batches in flight are those of the first segment.
    """
    assert strategy.stages is not None
    plan, in_flight = strategy.stages[stage], num_in_flight(strategy, stage)
    total = 0
    for segment in _segments(plan):
        input_bytes = workload.cost(segment, strategy.batch_per_device).input_bytes
        total += in_flight * (_kept_bytes(workload, strategy, plan, segment) + input_bytes)
    if stage > 0:
        total += workload.cost(plan.first_segment, strategy.batch_per_device).input_bytes
    if stage < strategy.num_stages - 1:
        total += (in_flight + 1) * workload.cost(plan.last_segment + 1, strategy.batch_per_device).input_bytes
    return total


def _workspace_bytes(workload: Workload, strategy: Strategy, plan: StagePlan) -> int:
    """The largest transient of one segment: its workspace, and the activations that its backward rebuilds."""
    transients = []
    for segment in _segments(plan):
        level = plan.recomputation_of(segment, num_segments=len(workload.segment_classes))
        transients.append(workload.cost(segment, strategy.batch_per_device).transient_bytes(level))
    return max(transients)
