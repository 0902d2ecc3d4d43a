"""Candidates that are all impossible in, the error that says by how much and what would help out.

Every change that it proposes was tried on the same workload: a constraint less, a larger memory_ratio, more devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from autoparallel.cost.memory import capacity_bytes
from autoparallel.cost.workload import Workload
from autoparallel.errors import ConfigError, NoFeasiblePlanError
from autoparallel.plans.candidate import Candidate
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, Constraints, Strategy
from autoparallel.search.cuts import Found, find_cuts
from autoparallel.space.candidates import enumerate_space

GIB = 2**30
MAX_MEMORY_RATIO = 0.95
"""Beyond it, fragmentation alone makes a plan fail."""
DEVICE_FACTORS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_PROPOSALS = 3
RELAXABLE = (
    "activation_recomputation",
    "distribute_parameter",
    "schedule",
    "batch_per_device",
    "num_micro_batches",
    "num_stages",
    "pipeline_parallel",
    "tensor_parallel",
    "sequence_parallel",
    "data_parallel",
)
"""Constraints in the order in which giving them up is proposed: what costs least speed comes first."""


def no_feasible_plan(
    candidates: Sequence[Candidate], *, workload: Workload | None, constraints: Constraints
) -> NoFeasiblePlanError:
    """The smallest shortfall, and the cheapest changes that fit."""
    rejected = [(c.rejection, c.strategy) for c in candidates if c.rejection is not None]
    short = [(r, s) for r, s in rejected if r.kind == "memory"]
    if not short:
        why = rejected[0][0].reason if rejected else "there is no candidate"
        return NoFeasiblePlanError("no candidate is possible", why=why, remedy="allow fewer pipeline stages")
    rejection, strategy = min(short, key=lambda pair: pair[0].shortfall_bytes)
    proposals = ["more or larger devices, or fewer constraints"]
    if workload is not None:
        needed_bytes = capacity_bytes(workload) + rejection.shortfall_bytes
        proposals = list(islice(_proposals(workload, constraints, needed_bytes), MAX_PROPOSALS))
    return NoFeasiblePlanError(
        f"none of {len(candidates)} candidates fits into memory; the nearest lacks "
        f"{rejection.shortfall_bytes / GIB:.2f} GiB per device",
        why=f"{strategy.summary()}: {rejection.reason}",
        remedy="; or ".join(proposals),
    )


def _proposals(workload: Workload, constraints: Constraints, needed_bytes: int) -> Iterator[str]:
    """Cheapest first; the last one always holds."""
    yield from chain(
        _fewer_constraints(workload, constraints),
        _more_memory(workload, constraints, needed_bytes),
        _more_devices(workload, constraints),
    )
    if constraints.memory_gib != "auto":
        yield f"memory_gib={math.ceil(needed_bytes / GIB)}, on devices that have as much"
        return
    memory_bytes = math.ceil(needed_bytes / workload.memory_ratio)
    yield f"devices with at least {math.ceil(memory_bytes / GIB)} GiB each, at memory_ratio {workload.memory_ratio:g}"


def _fewer_constraints(workload: Workload, constraints: Constraints) -> Iterator[str]:
    """Single constraints that are in the way; all together where no single one is."""
    free = Constraints(memory_ratio=constraints.memory_ratio)
    given = [name for name in RELAXABLE if getattr(constraints, name) != getattr(free, name)]
    helped = False
    for name in given:
        fitting = first_fit(workload, constraints.model_copy(update={name: getattr(free, name)}))
        if fitting is not None:
            helped = True
            yield f"leave {name} open ({fitting.summary()} fits)"
    if not helped and len(given) > 1 and (fitting := first_fit(workload, free)) is not None:
        yield f"leave {', '.join(given)} open ({fitting.summary()} fits)"


def _more_memory(workload: Workload, constraints: Constraints, needed_bytes: int) -> Iterator[str]:
    ratio = math.ceil(100 * needed_bytes / workload.flavor.memory_bytes) / 100
    if ratio > MAX_MEMORY_RATIO:
        return
    fitting = first_fit(workload.model_copy(update={"memory_ratio": ratio}), constraints)
    if fitting is None:
        return
    if constraints.memory_gib != "auto":
        wanted = math.ceil(needed_bytes / GIB)
        yield f"memory_gib={wanted} instead of {constraints.memory_gib:g} ({fitting.summary()} fits)"
    if ratio > constraints.memory_ratio:
        yield f"memory_ratio={ratio:g} instead of {constraints.memory_ratio:g} ({fitting.summary()} fits)"


def _more_devices(workload: Workload, constraints: Constraints) -> Iterator[str]:
    """CPU processes share the memory of their host: more of them have less each."""
    flavor = workload.flavor
    if flavor.is_cpu:
        return
    host = flavor.devices_per_host if flavor.num_hosts > 1 else int(workload.table.devices_per_host.value)
    for factor in DEVICE_FACTORS:
        count = factor * flavor.num_devices
        larger = flavor.model_copy(update={"num_devices": count, "devices_per_host": min(count, host)})
        fitting = first_fit(workload.model_copy(update={"flavor": larger}), constraints)
        if fitting is not None:
            yield f"{count} devices of this kind instead of {flavor.num_devices} ({fitting.summary()} fits)"
            return


def first_fit(workload: Workload, constraints: Constraints) -> Strategy | None:
    """A strategy that fits, if any: of each number of stages and sharding level, the one that needs least is tried."""
    try:
        strategies = enumerate_space(
            num_devices=workload.flavor.num_devices,
            batch_size=workload.batch_size,
            num_blocks=workload.num_blocks,
            constraints=constraints,
            tensor_degrees=workload.tensor_degrees,
            seq_len=workload.seq_len,
        ).listed()
    except ConfigError:
        return None
    leanest: dict[tuple[int, int, bool, int], Strategy] = {}
    for strategy in sorted(strategies, key=_appetite):
        if strategy.batch_per_device in workload.costs and strategy.total_stages <= max(1, workload.num_blocks):
            layout = (strategy.num_stages, strategy.tensor_parallel, strategy.sequence_parallel)
            leanest.setdefault((*layout, strategy.distribute_param), strategy)
    for strategy in leanest.values():
        for local, split in workload.under(strategy):
            if isinstance(find_cuts(local, split, polished=False), Found):
                return strategy
    return None


def _appetite(strategy: Strategy) -> tuple[int, int, bool]:
    return (strategy.batch_per_device, -RECOMPUTATION_LEVELS[strategy.recomputation], strategy.schedule != "1f1b")
