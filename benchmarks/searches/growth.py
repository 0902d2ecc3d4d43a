"""How search time grows with layers, devices and workers, of a Llama with 8B's width; with fitted exponents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log

from benchmarks.searches.measure import Measured
from benchmarks.searches.problems import Problem

LAYERS = (2, 8, 32, 64, 128)
HOSTS = (1, 8, 64, 512, 2048)
"""Of eight devices."""
WORKERS = (1, 2)
"""Beside none, which all other points have."""
DEEPER = Problem("Llama-3-8B", "8x8xH100-SXM5-80GB", 512, 4096, workers=0)
WIDER = Problem("Llama-3-8B", "64x8xH100-SXM5-80GB", 2048, 4096, workers=0)


@dataclass(frozen=True)
class Point:
    """One search of a series; `size` is what grows."""

    series: str
    size: int
    measured: Measured


def points(ask: Callable[[Problem], Measured]) -> Iterator[Point]:
    """All series, smallest first."""
    for layers in LAYERS:
        yield Point("layers", layers, ask(replace(DEEPER, layers=layers)))
    for hosts in HOSTS:
        problem = replace(WIDER, flavor=f"{hosts}x8xH100-SXM5-80GB")
        measured = ask(problem)
        yield Point("devices", 8 * hosts, measured)
        if problem == WIDER:
            yield Point("workers", 0, measured)
    for workers in WORKERS:
        yield Point("workers", workers, ask(replace(WIDER, workers=workers)))


def exponents(found: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """Of pricing and of searching, by series: the slope of log seconds over log size, by least squares. Of searching in
    CPU seconds, which other work on the machine changes less.
    """
    series = {name: [point for point in found if point.series == name] for name in ("layers", "devices")}
    return {
        name: (
            slope([(p.size, p.measured.price_s) for p in some]),
            slope([(p.size, p.measured.search_cpu_s) for p in some]),
        )
        for name, some in series.items()
    }


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Of log y over log x."""
    xs, ys = [log(x) for x, _ in pairs], [log(y) for _, y in pairs]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return across / sum((x - x_mean) ** 2 for x in xs)
