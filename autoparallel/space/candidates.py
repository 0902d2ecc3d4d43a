"""Devices, batch, blocks and constraints in, every strategy that the search looks at out, in a fixed order (ties go to
the earlier one).

num_stages × tensor_parallel × data_parallel = devices and data_parallel × batch_per_device × num_micro_batches = batch:
every divisor is tried, not powers of two only; tensor parallelism stays inside a host. Two names of one program are
listed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from autoparallel.errors import ConfigError
from autoparallel.plans.strategy import Constraints, Recomputation, ScheduleName, Strategy
from autoparallel.schedule.actions import runs_as_named

Level = Literal[0, 1, 2, 3]
UNSHARDED: tuple[Level, ...] = (0,)
MAX_ODD_BATCH_PER_DEVICE = 64
"""Larger micro-batches are tried in powers of two, and as the whole share of a replica, only."""


@dataclass(frozen=True)
class Emitted:
    """What the emitter can run; nothing else is enumerated."""

    recomputations: tuple[Recomputation, ...] = ("none", "selective", "full")
    schedules: tuple[ScheduleName, ...] = ("1f1b", "gpipe", "interleaved", "zero_bubble")
    virtual_stages: tuple[int, ...] = (2, 3, 4)
    """Of interleaved; more of them cut ever smaller stages for ever smaller gains."""


EMITTED = Emitted()


def enumerate_strategies(
    *,
    num_devices: int,
    batch_size: int,
    num_blocks: int,
    constraints: Constraints,
    tensor_degrees: Sequence[int] = (1,),
    seq_len: int = 0,
) -> list[Strategy]:
    """All strategies within the constraints, of the given degrees of tensor parallelism; sequence parallelism where a
    degree divides `seq_len`.

    A number of stages beyond `num_blocks` is listed once, so that the search can say why it is impossible.
    Raises ConfigError for constraints that leave nothing.
    """
    layouts = _layouts(num_devices, tensor_degrees, seq_len, constraints)
    usable = [layout for layout in layouts if layout.num_stages <= max(1, num_blocks)]
    strategies = [s for layout in usable for s in _of_layout(layout, batch_size, num_blocks, constraints)]
    if not strategies:
        raise _no_layout(num_devices, batch_size, num_blocks, usable, constraints)
    too_many = {layout.num_stages: layout for layout in reversed(layouts) if layout not in usable}
    return strategies + [
        s
        for num_stages in sorted(too_many)
        for s in _of_layout(too_many[num_stages], batch_size, num_blocks, constraints)[:1]
    ]


def tensor_degrees(num_devices: int, devices_per_host: int, constraints: Constraints) -> list[int]:
    """Sizes of tensor-parallel groups within the constraints, whatever the model: those that tile a host."""
    wanted = constraints.tensor_parallel
    if wanted == "auto":
        return [d for d in divisors(devices_per_host) if num_devices % d == 0]
    if wanted < 1 or num_devices % wanted:
        raise ConfigError(
            f"tensor_parallel={wanted} is not possible on {num_devices} devices",
            why=f"{num_devices} devices do not divide into groups of {wanted}",
            remedy=f"choose tensor_parallel among {_listed(divisors(num_devices))}",
        )
    return [wanted]


@dataclass(frozen=True)
class Layout:
    """How the devices are divided."""

    num_stages: int
    tensor_parallel: int
    data_parallel: int
    sequence_parallel: bool


def _layouts(num_devices: int, degrees: Sequence[int], seq_len: int, constraints: Constraints) -> list[Layout]:
    """By number of stages, then by degree of tensor parallelism."""
    counts = {degree: _stage_counts(num_devices // degree, constraints) for degree in degrees}
    if not any(counts.values()) and constraints.data_parallel != "auto":
        raise _wrong_replicas(num_devices, degrees, constraints.data_parallel, constraints)
    found = [
        Layout(stages, degree, num_devices // degree // stages, sequence_parallel)
        for degree, stage_counts in counts.items()
        for stages in stage_counts
        for sequence_parallel in _sequence_parallel(degree, seq_len, constraints)
    ]
    if not found and constraints.sequence_parallel is True:
        raise ConfigError(
            "sequence_parallel=True is not possible here",
            why=f"tensor_parallel may be {_listed(list(degrees))}, and a degree above 1 must divide {seq_len} tokens",
            remedy='leave sequence_parallel at "auto", or raise tensor_parallel',
        )
    return sorted(found, key=lambda layout: (layout.num_stages, layout.tensor_parallel))


def _sequence_parallel(degree: int, seq_len: int, constraints: Constraints) -> list[bool]:
    able = [False] if degree == 1 or seq_len % degree else [False, True]
    return [value for value in able if constraints.sequence_parallel in ("auto", value)]


def _of_layout(layout: Layout, batch_size: int, num_blocks: int, constraints: Constraints) -> list[Strategy]:
    """Each distinct program once, under its first name."""
    programs: dict[tuple[object, ...], Strategy] = {}
    for batch_per_device, num_micro_batches in _micro_batches(batch_size, layout.data_parallel, constraints):
        for (recomputation, least), level, (schedule, virtual_stages) in product(
            _recomputations(constraints),
            _levels(constraints) if layout.data_parallel > 1 else UNSHARDED,
            _schedules(layout.num_stages, num_micro_batches, num_blocks, constraints),
        ):
            # A single micro-batch reduces its gradients once, at level 1 as at level 2.
            program_level = 1 if level == 2 and num_micro_batches == 1 else level
            strategy = Strategy(
                num_stages=layout.num_stages,
                tensor_parallel=layout.tensor_parallel,
                data_parallel=layout.data_parallel,
                batch_per_device=batch_per_device,
                num_micro_batches=num_micro_batches,
                recomputation=recomputation,
                least_recomputation=least,
                distribute_param=level,
                sequence_parallel=layout.sequence_parallel,
                schedule=schedule,
                virtual_stages=virtual_stages,
            )
            programs.setdefault((batch_per_device, recomputation, program_level, schedule, virtual_stages), strategy)
    return list(programs.values())


def divisors(number: int) -> list[int]:
    """All of them, rising."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _stage_counts(num_devices: int, constraints: Constraints) -> list[int]:
    """Numbers of stages within the constraints, whatever the model."""
    most = 1 if not constraints.pipeline_parallel else num_devices
    if constraints.num_stages != "auto":
        most = min(most, constraints.num_stages)
    counts = [stages for stages in divisors(num_devices) if stages <= most]
    replicas = constraints.data_parallel
    return [stages for stages in counts if replicas in ("auto", num_devices // stages)]


def _wrong_replicas(num_devices: int, degrees: Sequence[int], replicas: int, constraints: Constraints) -> ConfigError:
    """Why no layout has so many replicas."""
    groups = [num_devices // degree for degree in degrees]
    if replicas < 1 or all(count % replicas for count in groups):
        return ConfigError(
            f"data_parallel={replicas} is not possible on {num_devices} devices",
            why=f"{_listed(groups)} groups of devices do not divide into {replicas} equal pipelines",
            remedy=f"choose data_parallel among {_listed(sorted({d for count in groups for d in divisors(count)}))}",
        )
    stages = [count // replicas for count in groups if count % replicas == 0]
    most = 1 if not constraints.pipeline_parallel else constraints.num_stages
    return ConfigError(
        f"data_parallel={replicas} is not possible with at most {most} pipeline stages",
        why=f"{num_devices} devices / {replicas} = {_listed(stages)} stages",
        remedy="raise num_stages and leave pipeline_parallel on, or choose another data_parallel",
    )


def _micro_batches(batch_size: int, data_parallel: int, constraints: Constraints) -> Iterator[tuple[int, int]]:
    """(batch_per_device, num_micro_batches), small micro-batches first."""
    share, rest = divmod(batch_size, data_parallel)
    if rest:
        return
    for size in divisors(share):
        if _is_tried(size, share, constraints) and constraints.num_micro_batches in ("auto", share // size):
            yield size, share // size


def _is_tried(batch_per_device: int, share: int, constraints: Constraints) -> bool:
    if constraints.batch_per_device != "auto":
        return batch_per_device == constraints.batch_per_device
    if constraints.num_micro_batches != "auto" or batch_per_device <= MAX_ODD_BATCH_PER_DEVICE:
        return True
    return batch_per_device == share or batch_per_device & (batch_per_device - 1) == 0


def _recomputations(constraints: Constraints) -> list[tuple[Recomputation, Recomputation | None]]:
    """(highest, least) level; None where every block has the highest."""
    wanted = constraints.activation_recomputation
    if wanted is False:
        return [("none", None)]
    if wanted is not True and wanted != "auto":
        return [(wanted, None)]
    least: Recomputation = "selective" if wanted is True else "none"
    allowed = [name for name in EMITTED.recomputations if wanted == "auto" or name != "none"]
    return [(name, least if name != least else None) for name in allowed]


def _levels(constraints: Constraints) -> tuple[Level, ...]:
    """Levels of distribute_param with more than one replica; with one, all are the same program."""
    wanted = constraints.distribute_parameter
    if wanted == "auto":
        return (0, 1, 2, 3)
    if isinstance(wanted, bool):  # before int: True is not level 1
        return (1, 2, 3) if wanted else UNSHARDED
    return (wanted,)


def _schedules(
    num_stages: int, num_micro_batches: int, num_blocks: int, constraints: Constraints
) -> list[tuple[ScheduleName, int]]:
    """(name, virtual stages) of every distinct program, with every recomputation and level: tests prove each of them.

    With one stage or one micro-batch nothing is to be scheduled, which goes by the name of 1f1b.
    """
    if num_stages == 1 or num_micro_batches == 1:
        return [("1f1b", 1)]
    return [
        (name, virtual_stages)
        for name in EMITTED.schedules
        if constraints.schedule in ("auto", name) and runs_as_named(name, num_stages, num_micro_batches)
        for virtual_stages in (_virtual_stages(num_stages, num_blocks) if name == "interleaved" else (1,))
    ]


def _virtual_stages(num_stages: int, num_blocks: int) -> list[int]:
    """As many as there are blocks for; an odd number only where it cuts them evenly."""
    return [
        v
        for v in EMITTED.virtual_stages
        if num_stages * v <= num_blocks and (v % 2 == 0 or num_blocks % (num_stages * v) == 0)
    ]


def _no_layout(
    num_devices: int, batch_size: int, num_blocks: int, layouts: list[Layout], constraints: Constraints
) -> ConfigError:
    """The arithmetic that left nothing, and the nearest batch sizes that work."""
    units = {layout.data_parallel * _fixed_factor(constraints) for layout in layouts}
    exact = constraints.batch_per_device != "auto" and constraints.num_micro_batches != "auto"
    fitting = [unit for unit in units if batch_size == unit or (batch_size % unit == 0 and not exact)]
    if not layouts or fitting:
        return ConfigError(
            f"the constraints leave no way to train a batch of {batch_size} on {num_devices} devices",
            why=f"{num_blocks} blocks allow at most {num_blocks} stages, and interleaved needs two of them a rank and "
            "num_micro_batches that num_stages divides",
            remedy='leave num_stages, data_parallel, num_micro_batches or schedule at "auto"',
        )
    near = (
        sorted(units) if exact else sorted({m for u in units for m in (batch_size // u * u, (batch_size // u + 1) * u)})
    )
    below = [size for size in near if 0 < size < batch_size][-1:]
    above = [size for size in near if size > batch_size][:1]
    fixed = {name: getattr(constraints, name) for name in ("batch_per_device", "num_micro_batches")}
    given = "".join(f" × {name} {value}" for name, value in fixed.items() if value != "auto")
    replicas = _listed(sorted({layout.data_parallel for layout in layouts}))
    return ConfigError(
        f"a batch of {batch_size} cannot be divided over {num_devices} devices",
        why=f"it must {'equal' if exact else 'be a multiple of'} data_parallel{given}; data_parallel may be {replicas}",
        remedy=f"the nearest batch sizes that work: {_listed(below + above)}",
    )


def _fixed_factor(constraints: Constraints) -> int:
    factor = 1
    for value in (constraints.batch_per_device, constraints.num_micro_batches):
        factor *= 1 if value == "auto" else max(1, value)
    return factor


def _listed(values: list[int] | tuple[str, ...]) -> str:
    return ", ".join(map(str, values))
