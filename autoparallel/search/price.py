"""One strategy in; its stages, then its price out.

Compile finds the stage cuts, or says why none fits. Price simulates the schedule and adds what happens once a step:

    step = max over stages (gather + pipeline with its waits + reduction + tied gradients + optimizer)
    and, on a CPU host, at least (busy seconds of its processes) / (its cores)

Data-parallel collectives are not overlapped with compute, since the runtime does not promise it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from autoparallel.cost.compute import peak_flops_per_s
from autoparallel.cost.memory import capacity_bytes, stage_memory
from autoparallel.cost.workload import Workload
from autoparallel.errors import ConfigError
from autoparallel.plan.candidate import Candidate
from autoparallel.plan.estimate import Breakdown, Estimate, Rejection, StageEstimate
from autoparallel.plan.strategy import ScheduleName, StagePlan, Strategy
from autoparallel.schedule.actions import Action, actions
from autoparallel.schedule.simulate import Timeline, simulate
from autoparallel.search.cuts import Shortfall, find_cuts
from autoparallel.search.stage_times import Overheads, StageSeconds, stage_seconds

GIB = 2**30


def compile_candidate(workload: Workload, strategy: Strategy) -> Candidate:
    """The strategy with its stages, or with the reason why it is impossible. Stages that are given are kept."""
    check_strategy(workload, strategy)
    if strategy.num_stages > max(1, workload.num_blocks):
        reason = f"{strategy.num_stages} stages need a block each, and the model has {workload.num_blocks}"
        return Candidate(strategy=strategy, rejection=Rejection(reason=reason, kind="layers"))
    if strategy.stages is not None:
        found: tuple[StagePlan, ...] | Shortfall = _given_stages(workload, strategy)
    else:
        found = find_cuts(workload, strategy)
    if isinstance(found, Shortfall):
        return Candidate(strategy=strategy, rejection=_memory_rejection(workload, strategy, found))
    return Candidate(strategy=strategy.model_copy(update={"stages": found}))


def check_strategy(workload: Workload, strategy: Strategy) -> None:
    """Raise ConfigError for a strategy that is not one of this workload's."""
    if strategy.tensor_parallel != 1 or strategy.sequence_parallel or strategy.virtual_stages != 1:
        raise ConfigError(
            f"the strategy ({strategy.summary()}) cannot be priced yet",
            why="tensor_parallel, sequence_parallel and virtual_stages are not emitted",
            remedy="leave them at their defaults",
        )
    have = {"devices": workload.flavor.num_devices, "rows a step": workload.batch_size}
    for what, asked in (("devices", strategy.num_devices), ("rows a step", strategy.batch_size)):
        if asked != have[what]:
            raise ConfigError(
                f"the strategy ({strategy.summary()}) is for {asked} {what}, not {have[what]}",
                why="devices = num_stages × data_parallel; rows = data_parallel × batch_per_device × num_micro_batches",
                remedy="change these four so that both products match the flavor and the batch size",
            )
    assert strategy.batch_per_device in workload.costs, f"no costs for batch_per_device {strategy.batch_per_device}"


def _given_stages(workload: Workload, strategy: Strategy) -> tuple[StagePlan, ...] | Shortfall:
    assert strategy.stages is not None
    bounds = [(plan.first_segment, plan.last_segment) for plan in strategy.stages]
    expected = [0, *(last + 1 for _, last in bounds)]
    whole = [first for first, _ in bounds] == expected[:-1] and expected[-1] == len(workload.segment_classes)
    if not whole or any(first > last for first, last in bounds) or len(bounds) != strategy.num_stages:
        raise ConfigError(
            f"the stages {bounds} are not a cut of the model into {strategy.num_stages}",
            why=f"stages are runs of segments that follow each other from 0 to {len(workload.segment_classes) - 1}",
            remedy="leave stages out: the search cuts the model itself",
        )
    needed = [sum(stage_memory(workload, strategy, stage=i).values()) for i in range(strategy.num_stages)]
    excess_bytes = max(needed) - capacity_bytes(workload)
    if excess_bytes <= 0:
        return strategy.stages
    return Shortfall(stage=needed.index(max(needed)), stages=strategy.stages, excess_bytes=excess_bytes)


def _memory_rejection(workload: Workload, strategy: Strategy, shortfall: Shortfall) -> Rejection:
    plan = shortfall.stages[shortfall.stage]
    cut = strategy.model_copy(update={"stages": shortfall.stages})
    parts = stage_memory(workload, cut, stage=shortfall.stage)
    assert sum(parts.values()) == capacity_bytes(workload) + shortfall.excess_bytes
    largest = sorted(parts, key=lambda part: -parts[part])[:3]
    reason = (
        f"stage {shortfall.stage} of {strategy.num_stages} (segments {plan.first_segment} to {plan.last_segment}) "
        f"needs {sum(parts.values()) / GIB:.2f} of {capacity_bytes(workload) / GIB:.2f} GiB per device in the best cut"
        ": " + ", ".join(f"{part} {parts[part] / GIB:.2f}" for part in largest)
    )
    return Rejection(reason=reason, kind="memory", shortfall_bytes=shortfall.excess_bytes)


def price(workload: Workload, strategy: Strategy) -> Estimate:
    """Predict the step time and memory of a strategy with stages."""
    assert strategy.stages is not None, "only compiled strategies have a price"
    seconds = [stage_seconds(workload, strategy, plan) for plan in strategy.stages]
    timeline = _timeline(workload, strategy, seconds)
    ties = _ties(workload, strategy, [f + s.reduce_s for f, s in zip(timeline.finish_s, seconds, strict=True)])
    ends = [ready + stage.optimizer_s for ready, stage in zip(ties.ready_s, seconds, strict=True)]
    critical = ends.index(max(ends))
    busy = [_busy_s(strategy, stage, tie_s) for stage, tie_s in zip(seconds, ties.tie_s, strict=True)]
    sharing_s = max(0.0, _core_bound_s(workload, strategy, busy) - ends[critical])
    stage, num_micro_batches = seconds[critical], strategy.num_micro_batches
    breakdown = Breakdown(
        compute=num_micro_batches * (stage.forward_s + stage.backward_s),
        recompute=num_micro_batches * stage.recompute_s,
        tp_comm=0.0,
        dp_comm=num_micro_batches * (stage.forward_comm_s + stage.backward_comm_s) + stage.start_s + stage.reduce_s,
        pp_comm=timeline.transfer_s[critical] + ties.tie_s[critical],
        bubble=timeline.idle_s[critical] - timeline.transfer_s[critical] + ties.wait_s[critical],
        optimizer=stage.optimizer_s,
        core_sharing=sharing_s,
    )
    step_time_s = ends[critical] + sharing_s
    return Estimate(
        step_time_s=step_time_s,
        tokens_per_second=workload.batch_size * workload.seq_len / step_time_s if step_time_s > 0 else 0.0,
        mfu=_mfu(workload, strategy, step_time_s),
        breakdown_s=breakdown,
        stages=tuple(_stage_estimate(workload, strategy, i, stage) for i, stage in enumerate(seconds)),
    )


@lru_cache(maxsize=4)
def _actions(schedule: ScheduleName, num_stages: int, num_micro_batches: int) -> list[list[Action]]:
    """Candidates that differ in other things come one after the other."""
    return actions(schedule, num_stages, num_micro_batches)


def _timeline(workload: Workload, strategy: Strategy, seconds: list[StageSeconds]) -> Timeline:
    """The pipeline, from the start of the step to the last backward."""
    if strategy.num_stages == 1:
        (stage,) = seconds
        busy_s = strategy.num_micro_batches * (stage.forward_action_s + stage.backward_action_s)
        return Timeline([[stage.start_s]], [busy_s], [0.0], [0.0], [stage.start_s + busy_s])
    assert strategy.stages is not None
    entering = [workload.cost(p.first_segment, strategy.batch_per_device).input_bytes for p in strategy.stages[1:]]
    topology = Overheads(workload, strategy).topology
    return simulate(
        _actions(strategy.schedule, strategy.num_stages, strategy.num_micro_batches),
        forward_s=[stage.forward_action_s for stage in seconds],
        backward_s=[stage.backward_action_s for stage in seconds],
        send_s=[topology.send_recv_s(size_bytes, distance=strategy.data_parallel) for size_bytes in entering],
        start_s=[stage.start_s for stage in seconds],
    )


@dataclass(frozen=True)
class _Ties:
    """By stage: when the gradients of shared parameters are summed too, what that took, and the wait for the others."""

    ready_s: list[float]
    tie_s: list[float]
    wait_s: list[float]


def _ties(workload: Workload, strategy: Strategy, ready_s: list[float]) -> _Ties:
    """Stages that hold one parameter meet after their own reductions, in the order of `workload.shared`."""
    assert strategy.stages is not None
    ties = _Ties(list(ready_s), [0.0] * len(ready_s), [0.0] * len(ready_s))
    for shared in workload.shared:
        holders = [
            stage
            for stage, plan in enumerate(strategy.stages)
            if any(plan.first_segment <= segment <= plan.last_segment for segment in shared.segments)
        ]
        tie_s = Overheads(workload, strategy).tie_s(shared, num_holders=len(holders), distance=holders[-1] - holders[0])
        if tie_s == 0:
            continue
        meet_s = max(ties.ready_s[stage] for stage in holders)
        for stage in holders:
            ties.wait_s[stage] += meet_s - ties.ready_s[stage]
            ties.tie_s[stage] += tie_s
            ties.ready_s[stage] = meet_s + tie_s
    return ties


def _busy_s(strategy: Strategy, stage: StageSeconds, tie_s: float) -> float:
    """Seconds that a process of this stage computes or communicates in a step."""
    pipeline_s = strategy.num_micro_batches * (stage.forward_action_s + stage.backward_action_s)
    return pipeline_s + stage.start_s + stage.reduce_s + tie_s + stage.optimizer_s


def _core_bound_s(workload: Workload, strategy: Strategy, busy_s: list[float]) -> float:
    """No host does its processes' work in less than their busy seconds over its cores, however it shares them."""
    flavor = workload.flavor
    if flavor.cores_per_host is None:
        return 0.0
    hosts = [0.0] * flavor.num_hosts
    for rank in range(flavor.num_devices):
        hosts[rank // flavor.devices_per_host] += busy_s[rank // strategy.data_parallel]
    return max(hosts) / flavor.cores_per_host


def _mfu(workload: Workload, strategy: Strategy, step_time_s: float) -> float:
    costs = [workload.cost(i, strategy.batch_per_device) for i in range(len(workload.segment_classes))]
    micro_batches = strategy.data_parallel * strategy.num_micro_batches
    flops = micro_batches * sum(cost.forward_flops + cost.backward_flops for cost in costs)
    peak = peak_flops_per_s(workload.table, workload.precision.compute_dtype) * strategy.num_devices
    return flops / (peak * step_time_s) if peak * step_time_s > 0 else 0.0


def _stage_estimate(workload: Workload, strategy: Strategy, index: int, stage: StageSeconds) -> StageEstimate:
    assert strategy.stages is not None
    plan = strategy.stages[index]
    parameters = workload.stage_parameters(plan.first_segment, plan.last_segment)
    parts = stage_memory(workload, strategy, stage=index)
    return StageEstimate(
        forward_s=stage.forward_s,
        backward_s=stage.backward_s + stage.recompute_s,
        parameters=parameters.trainable + parameters.frozen,
        peak_memory_bytes=sum(parts.values()),
        memory_parts_bytes=parts,
    )
