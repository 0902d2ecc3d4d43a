"""The times of all stages in, one training step out:

    end of a stage = gather + pipeline with its waits + reduction + gradients of tied parameters + optimizer
    step time      = the last end; on a CPU host at least (busy seconds of its processes) / (its cores)

Data-parallel collectives are not overlapped with compute, since the runtime does not promise it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import ScheduleName, StagePlan, Strategy
from autoparallel.schedule.actions import Action, actions
from autoparallel.schedule.simulate import Timeline, simulate
from autoparallel.search.stage_times import Overheads, StageSeconds


@dataclass(frozen=True)
class Ties:
    """By stage: when the gradients of shared parameters are summed too, what that took, and the wait for the others."""

    ready_s: list[float]
    tie_s: list[float]
    wait_s: list[float]


@dataclass(frozen=True)
class Step:
    """One training step; `critical` is the stage that ends it."""

    timeline: Timeline
    ties: Ties
    critical: int
    core_sharing_s: float
    step_time_s: float


def run_step(workload: Workload, strategy: Strategy, seconds: Sequence[StageSeconds]) -> Step:
    """Simulate a strategy with stages; `seconds` are theirs."""
    assert strategy.stages is not None
    timeline = _timeline(workload, strategy, seconds)
    ready_s = [finish_s + stage.reduce_s for finish_s, stage in zip(timeline.finish_s, seconds, strict=True)]
    ties = _tie(workload, strategy, strategy.stages, ready_s)
    ends_s = [end_s + stage.optimizer_s for end_s, stage in zip(ties.ready_s, seconds, strict=True)]
    busy_s = [
        stage_busy_s + stage.start_s + stage.reduce_s + tie_s + stage.optimizer_s
        for stage_busy_s, stage, tie_s in zip(timeline.busy_s, seconds, ties.tie_s, strict=True)
    ]
    core_sharing_s = max(0.0, _core_bound_s(workload, strategy, busy_s) - max(ends_s))
    return Step(
        timeline=timeline,
        ties=ties,
        critical=ends_s.index(max(ends_s)),
        core_sharing_s=core_sharing_s,
        step_time_s=max(ends_s) + core_sharing_s,
    )


@lru_cache(maxsize=4)
def _actions(schedule: ScheduleName, num_stages: int, num_micro_batches: int) -> list[list[Action]]:
    """Candidates that differ in other things come one after the other."""
    return actions(schedule, num_stages, num_micro_batches)


def _timeline(workload: Workload, strategy: Strategy, seconds: Sequence[StageSeconds]) -> Timeline:
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


def _tie(workload: Workload, strategy: Strategy, stages: tuple[StagePlan, ...], ready_s: list[float]) -> Ties:
    """Stages that hold one parameter meet after their own reductions, in the order of `workload.shared`."""
    ties = Ties(list(ready_s), [0.0] * len(ready_s), [0.0] * len(ready_s))
    for shared in workload.shared:
        holders = [
            stage
            for stage, plan in enumerate(stages)
            if any(plan.first_segment <= segment <= plan.last_segment for segment in shared.segments)
        ]
        distance = holders[-1] - holders[0]
        tie_s = Overheads(workload, strategy).tie_s(shared, num_holders=len(holders), distance=distance)
        if tie_s == 0:
            continue
        meet_s = max(ties.ready_s[stage] for stage in holders)
        for stage in holders:
            ties.wait_s[stage] += meet_s - ties.ready_s[stage]
            ties.tie_s[stage] += tie_s
            ties.ready_s[stage] = meet_s + tie_s
    return ties


def _core_bound_s(workload: Workload, strategy: Strategy, busy_s: list[float]) -> float:
    """No host does its processes' work in less than their busy seconds over its cores, however it shares them."""
    flavor = workload.flavor
    if flavor.cores_per_host is None:
        return 0.0
    hosts = [0.0] * flavor.num_hosts
    for rank in range(flavor.num_devices):
        hosts[rank // flavor.devices_per_host] += busy_s[rank // strategy.data_parallel]
    return max(hosts) / flavor.cores_per_host
