"""Where stages may begin: windows of first segments, narrowed by limits, and dynamic programs within them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoparallel.search.runs import Floats, Mask

UNLIMITED_S = math.inf
NUDGE = 1 + 1e-9
"""Sums in another order differ by less."""

Firsts = tuple[int, ...]
"""First segment of every stage."""
Window = tuple[int, int]
"""Least and largest first segment of a stage; behind those of all stages comes the model's end."""


def legal_windows(num_segments: int, num_stages: int) -> list[Window]:
    """With a block in every stage; a single stage needs none."""
    inner = [(1 + stage, num_segments - 1 - (num_stages - stage)) for stage in range(1, num_stages)]
    return [(0, 0), *inner, (num_segments, num_segments)]


def windows_below(
    limit_s: float, *, each_s: Floats, count: int, passage_s: Floats, legal: list[Window]
) -> list[Window] | None:
    """Where stages may begin, if none may have `passage + count × its segments` beyond a limit; None where no cut is.

    `each_s[segment]` adds up to a stage's time, `passage_s[first]` comes on top. It grows with `first` by no more than
    `count` times as much, so that a stage that begins later ends later.
    """
    if limit_s == UNLIMITED_S:
        return legal
    through = [0.0, *np.cumsum(each_s).tolist()]
    passage, rising = passage_s.tolist(), (count * np.array(through[:-1]) - passage_s).tolist()
    highest, lowest = [0], [len(each_s)]
    for least, most in legal[1:]:
        first = highest[-1]
        reach_s = through[first] + (limit_s - passage[first]) / count
        after = bisect_right(through, reach_s * NUDGE) - 1
        if after < least:
            return None
        highest.append(min(after, most))
    for least, _ in reversed(legal[1:-1]):
        lowest.append(max(bisect_left(rising, count * through[lowest[-1]] - limit_s * NUDGE), least))
    windows = list(zip([0, *reversed(lowest)], highest, strict=True))
    return windows if all(low <= high for low, high in windows) else None


def least_limit_s(each_s: Floats, *, count: int, passage_s: Floats, legal: list[Window]) -> float:
    """The least limit that leaves windows, or a little more."""
    low = count * float(each_s.sum()) / (len(legal) - 1)
    high = float(passage_s[-1]) + count * float(each_s.sum()) + 1e-12
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        found = windows_below(middle, each_s=each_s, count=count, passage_s=passage_s, legal=legal)
        low, high = (low, middle) if found else (middle, high)
    return high


def at(values: Any, windows: list[Window], stage: int) -> Any:
    """[first, last] in the windows of a stage, of values by [first, last]. Legal windows leave a block between the two,
    or `last` before `first`.
    """
    (low, high), (next_low, next_high) = windows[stage], windows[stage + 1]
    return values[low : high + 1, next_low - 1 : next_high]


def reachable(windows: list[Window], allowed: list[Mask]) -> list[Window] | None:
    """The windows without bounds that no whole cut has."""
    forward: list[Mask] = [np.ones(1, dtype=np.bool_)]
    for mask in allowed:
        after: Mask = np.any(forward[-1][:, None] & mask, axis=0)
        forward.append(after)
    reached = [forward[-1]]
    for mask, before in zip(reversed(allowed), reversed(forward[:-1]), strict=True):
        reached.insert(0, before & (mask & reached[0][None, :]).any(axis=1))
    found = []
    for (low, _), mask in zip(windows, reached, strict=True):
        places = np.flatnonzero(mask)
        if len(places) == 0:
            return None
        found.append((low + int(places[0]), low + int(places[-1])))
    return found


def least_from(values: Sequence[Floats], combine: Any) -> list[Floats]:
    """[stage][first]: the least combined value of the stages from that bound to the end."""
    found = [np.full(1, 0.0 if combine is np.add else -math.inf)]
    for of_stage in reversed(values):
        found.insert(0, combine(of_stage, found[0][None, :]).min(axis=1))
    return found


def least_sum(windows: list[Window], values: Sequence[Floats]) -> Firsts:
    """The cut whose values add up to least."""
    rest, firsts, place = least_from(values, np.add), [windows[0][0]], 0
    for stage, of_stage in enumerate(values[:-1]):
        place = int((of_stage[place] + rest[stage + 1]).argmin())
        firsts.append(windows[stage + 1][0] + place)
    return tuple(firsts)
