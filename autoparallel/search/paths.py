"""A strategy with one stage a rank in; the cut that minimises a closed form of its step out, and that form's value,
which no cut of the strategy undercuts.

The form is the longest of some paths through the schedule, so that no simulated step is shorter. Let a stage take `f`,
`d` and `w` for one micro-batch's forward, gradient of its input (recomputation included) and gradients of its weights,
each with its collectives. A path through a stage

    enters  with its first forward, behind those of the stages before it         sum f + sends
            or its first backward, behind all forwards and the chain back to it  sum f + sum d of those after it + sends
    stays   for all that it runs up to its last backward, or up to its end; or goes around as often as there are
            micro-batches through the stages after it, whose sends nothing hides (1f1b, zero_bubble)
    leaves  with its last backward, before those of the stages before it         sum d + sends, and the end of stage 0
            or with its own end: reductions and the optimizer

What lies before and after a stage depends on nothing but the stage's bounds, so that a dynamic program over bounds
finds the least longest path. It looks only at bounds that a given limit on the step leaves possible. What other stages
recompute counts with the least that their possible bounds need.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from autoparallel.schedule.actions import splits_backward
from autoparallel.search.runs import Floats, Mask
from autoparallel.search.stage_costs import StageCosts
from autoparallel.search.windows import (
    NUDGE,
    UNLIMITED_S,
    Firsts,
    Window,
    at,
    least_from,
    least_limit_s,
    least_sum,
    legal_windows,
    reachable,
    windows_below,
)

WIDENING = (1.1, 1.5, 3.0)
"""Times a lower bound: limits to look for cuts within, one after the other, where no limit is given."""


class Cut(NamedTuple):
    """First segments of the stages, and what no cut of the strategy undercuts."""

    firsts: Firsts
    bound_s: float


class Paths:
    """Of one strategy."""

    def __init__(self, stages: StageCosts) -> None:
        self.stages, self.runs, self.strategy = stages, stages.runs, stages.strategy
        self.num_stages, self.num_micro_batches = self.strategy.num_stages, self.strategy.num_micro_batches
        costs, self.splits = stages.costs, splits_backward(self.strategy.schedule, self.strategy.num_stages)
        self.sends_before_s = stages.sends_before_s
        self.forward_s, self.end_s, self.start_s = costs.forward_s, costs.end_s, costs.start_s
        self.back_s, self.later_s = costs.input_gradient_s, costs.weight_gradient_s
        if not self.splits:
            self.back_s, self.later_s = self.back_s + self.later_s, np.zeros_like(self.later_s)
        self.total_s = self.forward_s + self.back_s + self.later_s
        ids = self.runs.ids
        before, after = ids[0, :-1], ids[1:, -1]
        self.forward_before_s, self.back_before_s = (
            np.concatenate([[0.0], of_run[before]]) for of_run in (self.forward_s, self.back_s)
        )
        """[first]: of the segments before."""
        self.forward_after_s, self.back_after_s = (
            np.concatenate([of_run[after], [0.0]]) for of_run in (self.forward_s, self.back_s)
        )
        """[last]: of the segments after."""

    def best(self, within_s: float = UNLIMITED_S) -> Cut | None:
        """The cut with the shortest longest path of those within a limit; None where none is."""
        limits = [within_s]
        if within_s == UNLIMITED_S:
            limits = [*(factor * self._simple_bound_s for factor in WIDENING), UNLIMITED_S]
        return next((cut for limit_s in limits if (cut := self._within(limit_s)) is not None), None)

    def leanest(self) -> Firsts:
        """The cut whose neediest stage needs least memory."""
        windows = legal_windows(self.runs.num_segments, self.num_stages)
        needed = []
        for stage in range(self.num_stages):
            ids = at(self.runs.ids, windows, stage)
            needed.append(np.where(ids >= 0, self.stages.bytes_at(stage)[ids], UNLIMITED_S))
        most = float(least_from(needed, np.maximum)[0][0])
        return least_sum(windows, [np.where(of_stage <= most, of_stage**2, UNLIMITED_S) for of_stage in needed])

    @cached_property
    def _sums(self) -> dict[str, object]:
        """The longest path but for what is recomputed, reduced and sent."""
        through_s = self.total_s[self.runs.ids[0]]
        return {
            "each_s": np.diff(through_s, prepend=0.0),
            "count": self.num_micro_batches,
            # Gradients of weights may wait until the backwards of the stages before have begun.
            "passage_s": self.forward_before_s + (0.0 if self.splits else self.back_before_s),
            "legal": legal_windows(self.runs.num_segments, self.num_stages),
        }

    @cached_property
    def _simple_bound_s(self) -> float:
        return least_limit_s(**self._sums)  # type: ignore[arg-type]

    def _fitting(self, windows: list[Window]) -> list[Window] | None:
        """The windows without bounds at which memory is short in every cut."""
        fits = [
            (at(self.runs.ids, windows, stage) >= 0) & self.stages.fits(stage)[at(self.runs.ids, windows, stage)]
            for stage in range(self.num_stages)
        ]
        return reachable(windows, fits)

    def _within(self, limit_s: float) -> Cut | None:
        windows = windows_below(limit_s, **self._sums)  # type: ignore[arg-type]
        while windows is not None and (windows := self._fitting(windows)) is not None:
            found = _Within(self, windows)
            allowed = [found.longest_s(stage) <= limit_s * NUDGE for stage in range(self.num_stages)]
            narrowed = reachable(windows, allowed)
            if narrowed == windows:
                cut = found.cut()
                # Where stages recompute more than was known, another cut may be better.
                if cut is None or not self._learn(cut.firsts):
                    return cut
            windows = narrowed
        return None

    def _learn(self, firsts: Firsts) -> bool:
        ends = (*firsts[1:], self.runs.num_segments)
        runs = [int(self.runs.ids[first, end - 1]) for first, end in zip(firsts, ends, strict=True)]
        return sum(self.stages.learn(stage, run) for stage, run in enumerate(runs)) > 0


class _Within:
    """The paths of all stages, where these begin within windows."""

    def __init__(self, paths: Paths, windows: list[Window]) -> None:
        self.paths, self.windows = paths, windows
        stages, every = paths.stages, range(paths.num_stages)
        self.ids = [at(paths.runs.ids, windows, stage) for stage in every]
        self.allowed = [(self.ids[stage] >= 0) & stages.fits(stage)[self.ids[stage]] for stage in every]
        self.again_s = [stages.recompute_s(s)[self.ids[s]] for s in every]
        fewest_s = [self._smallest(again_s, stage) for stage, again_s in enumerate(self.again_s)]
        self.again_before_s = np.concatenate([[0.0], np.cumsum(fewest_s)])
        """[stage]: the least that the stages before it recompute for one micro-batch."""
        self.start_s = self._smallest(paths.start_s[self.ids[0]], 0)
        self.first_ends_s = paths.end_s[self.ids[0]] + paths.later_s[self.ids[0]]
        """What stage 0 has left after its last backward."""
        self.first_end_s = self._smallest(self.first_ends_s, 0)
        self._found = [self._of_stage(stage) for stage in every]

    def _smallest(self, values: Floats, stage: int) -> float:
        return float(np.min(values, where=self.allowed[stage], initial=UNLIMITED_S))

    def longest_s(self, stage: int) -> Floats:
        """[first, last]: a step is at least so long, whatever the other stages are."""
        leaving_s, own_s = self._found[stage]
        found: Floats = np.maximum(leaving_s + (self.first_ends_s if stage == 0 else self.first_end_s), own_s)
        return found

    def _of_stage(self, stage: int) -> tuple[Floats, Floats]:
        """[first, last]: up to the last backward of stage 0, and up to the stage's own end; infinite where the stage is
        impossible.
        """
        paths, n, count = self.paths, self.paths.num_stages, self.paths.num_micro_batches
        ids, (low, high), (next_low, next_high) = self.ids[stage], *self.windows[stage : stage + 2]
        forward_s, later_s = paths.forward_s[ids], paths.later_s[ids]
        back_s = paths.back_s[ids] + self.again_s[stage]
        all_first = paths.strategy.schedule == "gpipe"  # every forward, before the last stage begins to go back
        ahead = count if all_first else min(count, n - stage)
        made = max(0, count - 1 - stage) if paths.splits else 0  # gradients of weights before the last backward
        sends_s, all_sends_s = float(paths.sends_before_s[stage]), float(paths.sends_before_s[-1])
        enter_s = (self.start_s + paths.forward_before_s[low : high + 1] + sends_s)[:, None]
        chain_s = (paths.forward_after_s + paths.back_after_s)[None, next_low - 1 : next_high] + 2 * (
            all_sends_s - sends_s
        )
        chain_s = chain_s + (self.again_before_s[n] - self.again_before_s[stage + 1])
        back_at_s = enter_s + (count if all_first else 1) * forward_s + chain_s
        turn_s = np.maximum(enter_s + ahead * forward_s, back_at_s) + (count - ahead) * forward_s + count * back_s
        around_s = back_at_s + self._around_s(stage, forward_s, back_s, later_s, chain_s)
        leave_s = (paths.back_before_s[low : high + 1] + self.again_before_s[stage] + sends_s)[:, None]
        leaving_s = np.maximum(turn_s + made * later_s, around_s) + leave_s
        alone_s = paths.start_s[ids] + count * (forward_s + back_s + later_s)
        own_s = np.maximum(turn_s + count * later_s, alone_s) + paths.end_s[ids]
        allowed = self.allowed[stage]
        return np.where(allowed, leaving_s, UNLIMITED_S), np.where(allowed, own_s, UNLIMITED_S)

    def _around_s(self, stage: int, forward_s: Floats, back_s: Floats, later_s: Floats, chain_s: Floats) -> Floats:
        """From the first backward to the last: turns on the stage alone, then turns through all stages after it."""
        n, count = self.paths.num_stages, self.paths.num_micro_batches
        turns, alone = divmod(count - 1, n - stage)
        if self.paths.strategy.schedule == "gpipe" or turns == 0:
            return back_s
        # Gradients of weights lag `stage` micro-batches behind: as many turns have none.
        with_weights = max(0, turns + alone - stage) if self.paths.splits else 0
        return back_s + turns * (forward_s + chain_s + back_s) + alone * (forward_s + back_s) + with_weights * later_s

    def cut(self) -> Cut | None:
        """The least longest path, and of the cuts that have it the most even one."""
        leaving, own = (least_from([found[kind] for found in self._found[1:]], np.maximum)[0] for kind in (0, 1))
        (first_leaving_s, first_own_s), ends_s = self._found[0], self.first_ends_s[0]
        totals_s = np.maximum(np.maximum(first_leaving_s[0], leaving) + ends_s, np.maximum(first_own_s[0], own))
        place = int(totals_s.argmin())
        if not totals_s[place] < UNLIMITED_S:
            return None
        longest = [np.maximum(leaving_s + ends_s[place], own_s) for leaving_s, own_s in self._found]
        slowest_s = float(least_from(longest, np.maximum)[0][0])
        uneven = [self._unevenness(stage, of_stage <= slowest_s * NUDGE) for stage, of_stage in enumerate(longest)]
        return Cut(least_sum(self.windows, uneven), max(float(totals_s[place]), self._shared_cores_s()))

    def _unevenness(self, stage: int, allowed: Mask) -> Floats:
        time_s = self.paths.total_s[self.ids[stage]] + self.again_s[stage]
        found: Floats = np.where(allowed, time_s**2, UNLIMITED_S)
        return found

    def _shared_cores_s(self) -> float:
        """Processes that share the cores of their host end no sooner than their work over the cores."""
        paths, flavor = self.paths, self.paths.stages.workload.flavor
        if flavor.cores_per_host is None:
            return 0.0
        busy_s = []
        for ids, again_s, allowed in zip(self.ids, self.again_s, self.allowed, strict=True):
            of_stage = paths.start_s[ids] + paths.end_s[ids]
            of_stage = of_stage + paths.num_micro_batches * (paths.total_s[ids] + again_s)
            busy_s.append(np.where(allowed, of_stage, UNLIMITED_S))
        ranks_of_a_stage = paths.strategy.num_replicas * paths.strategy.tensor_parallel
        total_s = float(least_from(busy_s, np.add)[0][0]) * ranks_of_a_stage
        return total_s / (flavor.num_hosts * flavor.cores_per_host)
