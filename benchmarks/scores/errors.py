"""Relative errors in, what is said of them out: mean, median, bias, and averages in which every source counts once."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Score:
    """Of relative errors; the first two of their absolute values."""

    rows: int
    mean: float
    median: float
    bias: float
    worst: float


def score(errors: Sequence[float]) -> Score:
    """At least one error."""
    absolute = [abs(error) for error in errors]
    return Score(
        rows=len(errors),
        mean=statistics.fmean(absolute),
        median=statistics.median(absolute),
        bias=statistics.fmean(errors),
        worst=max(absolute),
    )


@dataclass(frozen=True)
class Average:
    """Of scores, each counting once however many rows it stands for."""

    groups: int
    mean: float
    median: float
    bias: float
    worst: float
    """The largest mean of a group."""


def average(scores: Iterable[Score]) -> Average | None:
    """Over sources: a few of them hold most rows."""
    found = list(scores)
    if not found:
        return None
    return Average(
        groups=len(found),
        mean=statistics.fmean(one.mean for one in found),
        median=statistics.fmean(one.median for one in found),
        bias=statistics.fmean(one.bias for one in found),
        worst=max(one.mean for one in found),
    )


def mean_of(found: Score | Average | None) -> float | None:
    """None of none."""
    return None if found is None else found.mean


def grouped(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """In the order in which the keys first come."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def spread(times_s: Sequence[float]) -> float:
    """Mean distance of times from their mean, relative: what no model of these runs can be better than."""
    mean = statistics.fmean(times_s)
    return statistics.fmean(abs(time_s / mean - 1) for time_s in times_s)
