"""Families of runs that differ only in their parallel layout: what choosing among them by a price costs.

Regret is the measured time of the chosen run over that of the best one, less one.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from benchmarks.scores.answers import Timed

FAR_APART = 0.05
"""Measured times closer than this count as equal."""


@dataclass(frozen=True)
class Member:
    """A layout: published runs that differ in nothing are one, with their mean time."""

    ids: tuple[str, ...]
    measured_s: float
    predicted_s: float
    tensor_times_stages: int
    micro_batch: int


@dataclass(frozen=True)
class Family:
    """Layouts of one problem on one cluster."""

    name: str
    members: tuple[Member, ...]

    @property
    def best_s(self) -> float:
        return min(member.measured_s for member in self.members)

    def regret(self, chosen: Sequence[Member]) -> float:
        """Of any of the chosen ones, on average: ties are open."""
        return statistics.fmean(member.measured_s for member in chosen) / self.best_s - 1

    @property
    def ours(self) -> float:
        """By the lowest predicted time."""
        cheapest = min(member.predicted_s for member in self.members)
        return self.regret([member for member in self.members if member.predicted_s == cheapest])

    @property
    def random(self) -> float:
        return self.regret(self.members)

    @property
    def rule(self) -> float:
        """Least tensor parallelism times stages, then the largest micro-batch."""
        least = min((member.tensor_times_stages, -member.micro_batch) for member in self.members)
        return self.regret([m for m in self.members if (m.tensor_times_stages, -m.micro_batch) == least])

    def pairs(self) -> tuple[int, int]:
        """How many pairs are far apart, and how many of them we put in order."""
        far = [(a, b) for a, b in combinations(self.members, 2) if _far_apart(a, b)]
        return len(far), sum((a.measured_s < b.measured_s) == (a.predicted_s < b.predicted_s) for a, b in far)


def _far_apart(one: Member, other: Member) -> bool:
    slow, fast = max(one.measured_s, other.measured_s), min(one.measured_s, other.measured_s)
    return slow / fast - 1 > FAR_APART


def families(rows: Sequence[Timed]) -> list[Family]:
    """Those of two layouts and more, in the order of the rows."""
    problems: dict[tuple[object, ...], dict[tuple[object, ...], list[Timed]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        problems[_problem(row)][_layout(row)].append(row)
    found = []
    for layouts in problems.values():
        if len(layouts) > 1:
            run = next(iter(layouts.values()))[0].run
            name = f"{run.source.name}: {run.model.name} on {run.n_gpus} x {run.gpu.name}, {run.global_batch} rows"
            found.append(Family(name=name, members=tuple(_member(same) for same in layouts.values())))
    return found


def _problem(row: Timed) -> tuple[object, ...]:
    # Packing makes another problem of the same tokens: attention reaches further.
    question, run = row.question, row.run
    return (run.source.name, question.structure, question.flavor, run.global_batch, question.seq_len, question.options)


def _layout(row: Timed) -> tuple[object, ...]:
    return (row.question.strategy, row.run.zero, row.run.schedule, row.run.virtual_stages)


def _member(same: Sequence[Timed]) -> Member:
    strategy = same[0].question.strategy
    return Member(
        ids=tuple(row.run.id for row in same),
        measured_s=statistics.fmean(row.measured_s for row in same),
        predicted_s=same[0].estimate.step_time_s,
        tensor_times_stages=strategy.tensor_parallel * strategy.num_stages,
        micro_batch=strategy.batch_per_device,
    )


@dataclass(frozen=True)
class Choice:
    """Of all families of at least some size."""

    families: int
    runs: int
    ours: float
    ours_worst: float
    random: float
    random_worst: float
    rule: float
    rule_worst: float
    pairs: int
    ordered: int


def choice(found: Sequence[Family], *, at_least: int) -> Choice | None:
    """None where no family is that large."""
    large = [family for family in found if len(family.members) >= at_least]
    if not large:
        return None
    pairs = [family.pairs() for family in large]
    return Choice(
        families=len(large),
        runs=sum(len(family.members) for family in large),
        ours=statistics.fmean(family.ours for family in large),
        ours_worst=max(family.ours for family in large),
        random=statistics.fmean(family.random for family in large),
        random_worst=max(family.random for family in large),
        rule=statistics.fmean(family.rule for family in large),
        rule_worst=max(family.rule for family in large),
        pairs=sum(far for far, _ in pairs),
        ordered=sum(right for _, right in pairs),
    )


def repeated(rows: Sequence[Timed]) -> list[list[float]]:
    """Times of runs that are the same in every field: identical rows, and the repeats that a row lists."""
    same: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for row in rows:
        same[_problem(row) + _layout(row)].append(row.measured_s)
    listed = [[row.measured_s, *_repeats_s(row)] for row in rows]
    return [times_s for times_s in (*same.values(), *listed) if len(times_s) > 1]


def _repeats_s(row: Timed) -> list[float]:
    tokens, found = row.question.batch_size * row.question.seq_len, []
    for repeat in row.run.repeats:
        if repeat.iter_s is not None:
            found.append(repeat.iter_s)
        elif repeat.tokens_per_s_per_gpu is not None:
            found.append(tokens / (repeat.tokens_per_s_per_gpu * (row.run.n_gpus or 1)))
    return found
