"""Cost tables: one JSON file of `cost_models/` per device, read into figures that carry unit, kind and source.

In: a device name. Out: a `CostTable`. Values are in the unit that their field is named after.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from autoparallel.errors import ConfigError, CostTableError
from autoparallel.ir.schema import Schema
from autoparallel.settings import read_settings

FigureKind = Literal["datasheet", "measured", "fitted", "assumed"]

PLAUSIBLE: dict[str, tuple[float, float]] = {
    "bytes": (1e6, 1e14),
    "bytes/s": (1e6, 1e15),
    "FLOP/s": (1e8, 1e18),
    "s": (1e-9, 1.0),
    "fraction": (1e-3, 1.0),
    "devices": (1, 1024),
    "units": (1, 4096),
    "elements": (0, 1e5),
    "1/s": (1e6, 1e16),
}
"""Units, and the range outside which a value is a slip of the pen (a wrong power of ten, a percentage)."""


class Figure(Schema):
    """One number, with where it comes from."""

    value: float
    unit: str
    kind: FigureKind
    source: str = Field(min_length=1)


def _plausible(value: float, unit: str) -> None:
    low, high = PLAUSIBLE[unit]
    if not low <= value <= high:
        raise ValueError(f"{value:g} {unit} is not plausible (expected {low:g} to {high:g})")


def _in(unit: str) -> AfterValidator:
    def check(figure: Figure) -> Figure:
        if figure.unit != unit:
            raise ValueError(f"unit is {figure.unit!r}, expected {unit!r}")
        _plausible(figure.value, unit)
        return figure

    return AfterValidator(check)


Bytes = Annotated[Figure, _in("bytes")]
BytesPerSecond = Annotated[Figure, _in("bytes/s")]
FlopsPerSecond = Annotated[Figure, _in("FLOP/s")]
Seconds = Annotated[Figure, _in("s")]
Fraction = Annotated[Figure, _in("fraction")]
Devices = Annotated[Figure, _in("devices")]
Units = Annotated[Figure, _in("units")]
Elements = Annotated[Figure, _in("elements")]
PerSecond = Annotated[Figure, _in("1/s")]


class SizeCurve(Schema):
    """Share of a peak rate by the size of a call: (size, share) points; a larger call never takes less time."""

    points: tuple[tuple[float, float], ...] = Field(min_length=1)
    kind: FigureKind
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _sizes_rise(self) -> SizeCurve:
        for size, share in self.points:
            _plausible(share, "fraction")
            if size <= 0:
                raise ValueError(f"the size of a call must be positive, not {size:g}")
        for (size, share), (next_size, next_share) in pairwise(self.points):
            if next_size <= size:
                raise ValueError(f"points must rise, at {next_size:g}")
            if next_size / next_share < size / share:
                raise ValueError(f"a call of {next_size:g} would take less time than one of {size:g}")
        return self

    def at(self, size: float) -> float:
        """Share that a call reaches: power law between points (straight in log-log), constant beyond the ends."""
        index = bisect_right(self.points, size, key=lambda point: point[0])
        if index == 0:
            return self.points[0][1]
        if index == len(self.points):
            return self.points[-1][1]
        (low, low_share), (high, high_share) = self.points[index - 1], self.points[index]
        part = math.log(size / low) / math.log(high / low)
        return float(low_share * (high_share / low_share) ** part)


class EfficiencyCurve(SizeCurve):
    """Efficiency by FLOPs per call, which never falls."""

    @model_validator(mode="after")
    def _shares_rise(self) -> EfficiencyCurve:
        for (_, share), (next_flops, next_share) in pairwise(self.points):
            if next_share < share:
                raise ValueError(f"points must rise, at {next_flops:g} FLOPs")
        return self


class IntraHost(Schema):
    """Links between the devices of one host."""

    bandwidth_bytes_per_s: BytesPerSecond
    """Of one device to all others together, one direction."""
    pairwise_bandwidth_bytes_per_s: BytesPerSecond | None = None
    """Of one device to one other, where the fabric is a mesh; None where a switch gives any pair the full bandwidth."""
    latency_s: Seconds
    efficiency: Fraction
    """Share of the bandwidth that a large collective reaches."""


class Network(Schema):
    """Links between hosts."""

    bandwidth_bytes_per_s: BytesPerSecond
    """Share of one device in its host's ports, one direction."""
    latency_s: Seconds
    efficiency: Fraction


class CostTable(Schema):
    """What one device, and the links around it, can do."""

    name: str
    vendor: str
    description: str
    memory_bytes: Bytes
    memory_bandwidth_bytes_per_s: BytesPerSecond
    memory_efficiency: Fraction
    """Share of the memory bandwidth that a memory-bound kernel reaches."""
    memory_curve: SizeCurve | None = None
    """The same by the bytes that a kernel moves into new tensors, where that decides: caches and new pages of a CPU."""
    peak_flops_per_s: dict[str, FlopsPerSecond]
    """Dense, by dtype: `float64`, `float32` (no TF32, as PyTorch by default), `bfloat16`, `float16`, `float8`,
    `float4`.
    """
    matmul_efficiency: dict[str, EfficiencyCurve]
    """By dtype, `default` for all others."""
    compute_units: Units | None = None
    """Streaming multiprocessors or compute units, each of which computes one tile of a matmul at a time."""
    matmul_fill_depth: Elements | None = None
    """Depth that a tile could have done while it begins and ends."""
    attention_efficiency: Fraction
    """Of the fused attention kernel, over the FLOPs it really executes, exponentials apart."""
    vendor_attention_efficiency: Fraction | None = None
    """The same of the vendor's own kernel, where that is another one."""
    special_functions_per_s: PerSecond | None = None
    """Exponentials, logarithms and the like, of the whole device."""
    launch_overhead_s: Seconds
    """Time of a kernel that has nothing to do."""
    dispatch_s: Seconds | None = None
    """Host time to launch a kernel ahead of the device; None where the device itself runs the program."""
    intra_host: IntraHost
    network: Network
    devices_per_host: Devices
    """Where the links of `intra_host` end."""
    step_time_spread: Fraction | None = None
    """Four of five step times lie within this factor, less one, of what is predicted: the interval of an estimate."""
    reserve_bytes: Bytes
    """Memory that is not the program's: driver context, communication buffers, allocator slack."""

    @model_validator(mode="after")
    def _has_fallbacks(self) -> CostTable:
        if "float32" not in self.peak_flops_per_s:
            raise ValueError("peak_flops_per_s needs a float32 figure: other dtypes fall back on it")
        if "default" not in self.matmul_efficiency:
            raise ValueError("matmul_efficiency needs a default curve")
        return self

    def assumed(self) -> list[tuple[str, Figure]]:
        """The figures nobody measured or published, with their field paths; of a curve, its highest point."""
        return [(path, figure) for path, figure in _figures(self, "") if figure.kind == "assumed"]


def _figures(value: object, path: str) -> Iterator[tuple[str, Figure]]:
    """Every figure below `value`, in field order."""
    if isinstance(value, Figure):
        yield path, value
    elif isinstance(value, SizeCurve):
        yield path, Figure(value=value.points[-1][1], unit="fraction", kind=value.kind, source=value.source)
    elif isinstance(value, Schema):
        for name in type(value).model_fields:
            yield from _figures(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _figures(item, f"{path}.{key}")


def first_problem(error: ValidationError) -> str:
    """The first validation problem as `field path: message`, and how many more there are."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    field = ".".join(str(part) for part in problems[0]["loc"]) or "the whole file"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{field}: {problems[0]['msg']}{more}"


def parse_table(text: str | bytes, *, file_name: str) -> CostTable:
    """Read the text of one table; the table must be named like its file."""
    try:
        table = CostTable.model_validate_json(text)
    except ValidationError as error:
        raise CostTableError(
            f"the cost table {file_name} cannot be used",
            why=first_problem(error),
            remedy="compare the field with another file of cost_models/; cost_models/README.md lists fields and units",
        ) from error
    if f"{table.name}.json" != file_name:
        raise CostTableError(
            f"the cost table {file_name} cannot be used",
            why=f"name: it is {table.name!r}, but the file name says {file_name.removesuffix('.json')!r}",
            remedy=f"rename the file to {table.name}.json, or change the name",
        )
    return table


def available_devices() -> tuple[str, ...]:
    """Names of all devices that have a cost table, sorted."""
    return tuple(sorted(_texts(read_settings().cost_models)))


@lru_cache(maxsize=8)
def _texts(folder: str | None) -> dict[str, bytes]:
    """Tables by device: ours, and before them those of `folder`."""
    folders = [resources.files("autoparallel.cost_models")]
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError(
                f"there is no folder {folder!r} of cost tables",
                why="AUTOPARALLEL_COST_MODELS names it",
                remedy="make it with `autoparallel profile -o FOLDER`, or unset the variable",
            )
        folders.append(Path(folder))
    return {
        file.name.removesuffix(".json"): file.read_bytes()
        for place in folders
        for file in place.iterdir()
        if file.name.endswith(".json")
    }


def nearest(name: str, names: tuple[str, ...]) -> list[str]:
    """Up to three names that look like `name`, best first, case ignored; names that contain it come before others."""
    if not name:
        return []
    containing = [known for known in names if name.casefold() in known.casefold()]
    by_folded = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.5)
    return list(dict.fromkeys(containing + [by_folded[match] for match in close]))[:3]


def load_table(device: str) -> CostTable:
    """The cost table of a device: of the folder AUTOPARALLEL_COST_MODELS where it has one, else ours.

    Raises ConfigError for a device without a table, CostTableError for a table that cannot be used.
    """
    if device not in available_devices():
        close = nearest(device, available_devices())
        raise ConfigError(
            f"there is no cost table for the device {device!r}",
            why="known devices: " + ", ".join(available_devices()),
            remedy=(f"did you mean {' or '.join(close)}? " if close else "") + "A new GPU is one file in cost_models/",
        )
    return _parsed(device, read_settings().cost_models)


@lru_cache(maxsize=64)
def _parsed(device: str, folder: str | None) -> CostTable:
    return parse_table(_texts(folder)[device], file_name=f"{device}.json")
