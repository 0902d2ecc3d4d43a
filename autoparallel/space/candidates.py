"""Devices, batch, blocks and constraints in, every strategy that the search looks at out, in a fixed order (ties go to
the earlier one).

num_stages × tensor_parallel × data_parallel = devices, data_parallel × batch_per_device × num_micro_batches = batch:
every divisor is tried, not powers of two only, and tensor parallelism may cross hosts. Sharding spans all replicas or
groups of them, and the mesh's axes lie on devices in any order. Two names of one program are listed once; so are two
orders whose groups lie over hosts alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from math import prod
from typing import Literal, NamedTuple

from autoparallel.cost.collectives import worst_spread
from autoparallel.errors import ConfigError
from autoparallel.plans.grid import AXES, Axis, Grid
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


class Shape(NamedTuple):
    """How devices and rows are divided: many strategies have the same."""

    num_stages: int
    tensor_parallel: int
    sequence_parallel: bool
    data_parallel: int
    batch_per_device: int
    num_micro_batches: int


class Layout(NamedTuple):
    """Where the axes of a shape lie and what its replicas share: many schedules have the same."""

    mesh_order: tuple[Axis, ...] | None
    distribute_param: Level
    shard_group_size: int | None


@dataclass(frozen=True)
class Space:
    """Everything that the search looks at for one question."""

    num_devices: int
    devices_per_host: int
    num_blocks: int
    constraints: Constraints
    shapes: tuple[Shape, ...]
    """In order of stages, then of tensor parallelism."""
    too_many_stages: tuple[Shape, ...] = ()
    """One of each number of stages for which the model has too few blocks."""

    def layouts(self, shape: Shape) -> tuple[Layout, ...]:
        """All of one shape, the usual order of the axes first."""
        return _layouts_of(
            (shape.num_stages, shape.data_parallel, shape.tensor_parallel),
            self.devices_per_host,
            self.constraints,
            several=shape.num_micro_batches > 1,
        )

    def strategies(self, shape: Shape, layout: Layout) -> list[Strategy]:
        """All of one shape and layout."""
        return [
            Strategy(
                **shape._asdict(),
                **layout._asdict(),
                recomputation=recomputation,
                least_recomputation=least,
                schedule=schedule,
                virtual_stages=virtual_stages,
            )
            for recomputation, least in _recomputations(self.constraints)
            for schedule, virtual_stages in self._schedules(shape)
        ]

    def per_layout(self, shape: Shape) -> int:
        """How many strategies have a shape and any one of its layouts."""
        return len(_recomputations(self.constraints)) * len(self._schedules(shape))

    def count(self, shape: Shape) -> int:
        """How many strategies have a shape."""
        return len(self.layouts(shape)) * self.per_layout(shape)

    def listed(self) -> list[Strategy]:
        """All strategies; a number of stages beyond `num_blocks` once, at the end."""
        listed = [s for shape in self.shapes for layout in self.layouts(shape) for s in self.strategies(shape, layout)]
        return listed + [self.strategies(shape, self.layouts(shape)[0])[0] for shape in self.too_many_stages]

    def _schedules(self, shape: Shape) -> tuple[tuple[ScheduleName, int], ...]:
        return _schedules(shape.num_stages, shape.num_micro_batches, self.num_blocks, self.constraints)


@lru_cache(maxsize=4096)
def _layouts_of(
    sizes: tuple[int, int, int], devices_per_host: int, constraints: Constraints, *, several: bool
) -> tuple[Layout, ...]:
    """Two layouts that are the same program, or lie over hosts alike, are listed once, under the first name."""
    replicas = sizes[1]
    levels = _levels(constraints) if replicas > 1 else UNSHARDED
    if not several and 1 in levels:
        levels = tuple(level for level in levels if level != 2)  # one micro-batch reduces once, as level 1 does
    return tuple(
        Layout(order, level, size)
        for order in _orders(sizes, devices_per_host, constraints)
        for level in levels
        for size in (_shard_groups(replicas, constraints) if level > 0 else (None,))
    )


def _shard_groups(replicas: int, constraints: Constraints) -> list[int | None]:
    """All replicas, then groups of fewer and fewer."""
    wanted = constraints.shard_group_size
    groups = [None if size == replicas else size for size in reversed(divisors(replicas)) if size > 1]
    return [size for size in groups if wanted in ("auto", size or replicas)]


def _orders(
    sizes: tuple[int, int, int], devices_per_host: int, constraints: Constraints
) -> list[tuple[Axis, ...] | None]:
    """Of the mesh's axes: those whose groups lie over hosts differently."""
    if constraints.mesh_order != "auto":
        return [Grid(sizes, constraints.mesh_order).canonical_order]
    found: dict[object, tuple[Axis, ...] | None] = {}
    for order in permutations(AXES):
        grid = Grid(sizes, order)
        found.setdefault(_lies(grid, devices_per_host), grid.canonical_order)
    return list(found.values())


def _lies(grid: Grid, devices_per_host: int) -> object:
    """What of an order any price depends on: how the groups of each axis, and parts of them, spread over hosts."""
    num_devices = prod(grid.sizes)
    if num_devices <= devices_per_host:
        return None

    def spread(size: int, stride: int) -> object:
        return worst_spread(num_devices, devices_per_host, size, stride) if size > 1 else None

    stages, replicas, tensor = grid.sizes
    stride = grid.stride("dp")
    groups = [(spread(size, stride), spread(replicas // size, stride * size)) for size in divisors(replicas)]
    return (
        min(grid.stride("pp"), devices_per_host) if stages > 1 else None,
        tuple(groups),
        spread(tensor, grid.stride("tp")),
    )


def enumerate_space(
    *,
    num_devices: int,
    batch_size: int,
    num_blocks: int,
    constraints: Constraints,
    tensor_degrees: Sequence[int] = (1,),
    seq_len: int = 0,
    devices_per_host: int | None = None,
) -> Space:
    """All strategies within the constraints, of the given degrees of tensor parallelism; sequence parallelism where a
    degree divides `seq_len`. All devices are in one host unless `devices_per_host` says otherwise. Raises ConfigError
    for constraints that leave nothing.
    """
    divisions = _divisions(num_devices, tensor_degrees, seq_len, constraints)
    usable = [division for division in divisions if division.num_stages <= max(1, num_blocks)]
    shapes = [shape for division in usable for shape in _shapes(division, batch_size, constraints)]
    space = Space(num_devices, devices_per_host or num_devices, num_blocks, constraints, tuple(shapes))
    if not any(map(space.count, shapes)):
        raise _nothing(num_devices, batch_size, num_blocks, usable, constraints)
    too_many = {division.num_stages: division for division in reversed(divisions) if division not in usable}
    examples = [_shapes(too_many[count], batch_size, constraints)[:1] for count in sorted(too_many)]
    return replace(space, too_many_stages=tuple(shape for found in examples for shape in found))


def tensor_degrees(num_devices: int, constraints: Constraints) -> list[int]:
    """Sizes of tensor-parallel groups within the constraints, whatever the model."""
    wanted = constraints.tensor_parallel
    if wanted == "auto":
        return divisors(num_devices)
    if wanted < 1 or num_devices % wanted:
        raise ConfigError(
            f"tensor_parallel={wanted} is not possible on {num_devices} devices",
            why=f"{num_devices} devices do not divide into groups of {wanted}",
            remedy=f"choose tensor_parallel among {_listed(divisors(num_devices))}",
        )
    return [wanted]


@dataclass(frozen=True)
class Division:
    """How the devices are divided."""

    num_stages: int
    tensor_parallel: int
    data_parallel: int
    sequence_parallel: bool


def _divisions(num_devices: int, degrees: Sequence[int], seq_len: int, constraints: Constraints) -> list[Division]:
    """By number of stages, then by degree of tensor parallelism."""
    counts = {degree: _stage_counts(num_devices // degree, constraints) for degree in degrees}
    if not any(counts.values()) and constraints.data_parallel != "auto":
        raise _wrong_replicas(num_devices, degrees, constraints.data_parallel, constraints)
    found = [
        Division(stages, degree, num_devices // degree // stages, sequence_parallel)
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
    return sorted(found, key=lambda division: (division.num_stages, division.tensor_parallel))


def _sequence_parallel(degree: int, seq_len: int, constraints: Constraints) -> list[bool]:
    able = [False] if degree == 1 or seq_len % degree else [False, True]
    return [value for value in able if constraints.sequence_parallel in ("auto", value)]


def _shapes(division: Division, batch_size: int, constraints: Constraints) -> list[Shape]:
    return [
        Shape(
            division.num_stages,
            division.tensor_parallel,
            division.sequence_parallel,
            division.data_parallel,
            batch_per_device,
            num_micro_batches,
        )
        for batch_per_device, num_micro_batches in _micro_batches(batch_size, division.data_parallel, constraints)
    ]


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
    """(highest, least) level; None where every block has the highest. Stages choose between the two, block by block."""
    wanted = constraints.activation_recomputation
    if wanted is False:
        return [("none", None)]
    if wanted is True or wanted == "auto":
        return [(EMITTED.recomputations[-1], EMITTED.recomputations[0 if wanted == "auto" else 1])]
    return [(wanted, None)]


def _levels(constraints: Constraints) -> tuple[Level, ...]:
    """Levels of distribute_param with more than one replica; with one, all are the same program."""
    wanted = constraints.distribute_parameter
    if wanted == "auto":
        return (0, 1, 2, 3)
    if isinstance(wanted, bool):  # before int: True is not level 1
        return (1, 2, 3) if wanted else UNSHARDED
    return (wanted,)


@lru_cache(maxsize=4096)
def _schedules(
    num_stages: int, num_micro_batches: int, num_blocks: int, constraints: Constraints
) -> tuple[tuple[ScheduleName, int], ...]:
    """(name, virtual stages) of every distinct program, with every recomputation and level: tests prove each of them.

    With one stage or one micro-batch nothing is to be scheduled, which goes by the name of 1f1b.
    """
    if num_stages == 1 or num_micro_batches == 1:
        return (("1f1b", 1),)
    return tuple(
        (name, virtual_stages)
        for name in EMITTED.schedules
        if constraints.schedule in ("auto", name) and runs_as_named(name, num_stages, num_micro_batches)
        for virtual_stages in (_virtual_stages(num_stages, num_blocks) if name == "interleaved" else (1,))
    )


def _virtual_stages(num_stages: int, num_blocks: int) -> list[int]:
    """As many as there are blocks for; an odd number only where it cuts them evenly."""
    return [
        v
        for v in EMITTED.virtual_stages
        if num_stages * v <= num_blocks and (v % 2 == 0 or num_blocks % (num_stages * v) == 0)
    ]


def _nothing(
    num_devices: int, batch_size: int, num_blocks: int, divisions: list[Division], constraints: Constraints
) -> ConfigError:
    """The arithmetic that left nothing, and the nearest batch sizes that work."""
    units = {division.data_parallel * _fixed_factor(constraints) for division in divisions}
    exact = constraints.batch_per_device != "auto" and constraints.num_micro_batches != "auto"
    fitting = [unit for unit in units if batch_size == unit or (batch_size % unit == 0 and not exact)]
    if not divisions or fitting:
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
    replicas = _listed(sorted({division.data_parallel for division in divisions}))
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
