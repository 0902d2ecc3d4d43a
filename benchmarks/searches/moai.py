"""MoAI's published runs in; what it chose, the best of the space that it enumerates and our own best out, all priced by
us, as our runtime would run them.

Its space is inferred from the public logs of MoAI Platform 24.2 to 24.5 (docs.moreh.io, 2024), whose candidate counts
it reproduces: a power of two of stages from 2 up to the number of nodes, 1, 2, 4 or 8 rows a device, two micro-batches
or more; in 24.5 one candidate without a pipeline too; even cuts, 1F1B, no tensor parallelism, sharding always on.

Sharding spreads parameters, gradients and fp32 masters; whether the bf16 copy is spread too became an option of its own
in 24.5. So 24.2 is read as level 2, 24.5 as levels 2 and 3; recomputation that is on in 24.2 as full. The widest
reading has every level from 1 to 3 and all three of recomputation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

from autoparallel.cost.memory import capacity_bytes
from autoparallel.cost.tables import load_table
from autoparallel.cost.workload import Workload
from autoparallel.ir.graph import Graph
from autoparallel.ir.precision import Precision
from autoparallel.plans.estimate import Estimate
from autoparallel.plans.strategy import Constraints, Recomputation, StagePlan, Strategy
from autoparallel.search.price import price
from autoparallel.search.select import search, select_best_graph_from_candidates
from benchmarks.published.models import Structure
from benchmarks.searches.problems import Problem

Version = Literal["24.2", "24.5"]
Level = Literal[1, 2, 3]
ROWS_A_DEVICE = (1, 2, 4, 8)
PRECISION = Precision.of("bfloat16", "float32")
"""bf16 compute with fp32 masters, as in both planners."""


class Options(NamedTuple):
    """What its space varies beside the division of devices and rows."""

    recomputations: tuple[Recomputation, ...]
    levels: tuple[Level, ...]


AS_READ: dict[Version, Options] = {
    "24.2": Options(("none", "full"), (2,)),
    "24.5": Options(("none", "selective", "full"), (2, 3)),
}
WIDEST = Options(("none", "selective", "full"), (1, 2, 3))


@dataclass(frozen=True)
class Published:
    """One run of the logs."""

    problem: Problem
    version: Version
    candidates: int
    possible: int
    compile_s: float
    select_s: float
    num_stages: int
    num_micro_batches: int
    batch_per_device: int
    recomputation: Recomputation


SMALL, LARGE = "4xLarge.2048GB", "8xLarge.4096GB"
PUBLISHED = (
    Published(Problem("Qwen1.5-7B", SMALL, 256, 2048), "24.2", 16, 4, 46.137, 1.271, 2, 16, 1, "none"),
    Published(Problem("Qwen1.5-7B", LARGE, 256, 2048), "24.2", 22, 4, 28.411, 0.661, 2, 8, 1, "none"),
    Published(Problem("Mistral-7B", SMALL, 256, 2048), "24.2", 16, 3, 49.233, 1.909, 2, 16, 1, "none"),
    Published(Problem("Mistral-7B", LARGE, 256, 2048), "24.2", 22, 4, 28.502, 0.990, 2, 8, 1, "none"),
    Published(Problem("Llama-2-13B", LARGE, 512, 2048), "24.2", 24, 3, 57.920, 2.120, 2, 16, 1, "full"),
    Published(Problem("Cerebras-GPT-13B", SMALL, 32, 2048), "24.2", 6, 2, 4.401, 0.502, 4, 4, 1, "full"),
    Published(Problem("Cerebras-GPT-13B", LARGE, 64, 2048), "24.2", 12, 3, 10.919, 0.484, 4, 4, 1, "full"),
    Published(Problem("Qwen1.5-7B", SMALL, 256, 1024), "24.5", 54, 44, 69.259, 33.406, 1, 1, 8, "selective"),
    Published(Problem("Mistral-7B", LARGE, 1024, 1024), "24.5", 78, 66, 353.868, 167.657, 1, 1, 16, "selective"),
    Published(Problem("Llama-3-70B", LARGE, 512, 1024), "24.5", 78, 13, 383.967, 77.913, 8, 64, 1, "full"),
)


@dataclass(frozen=True)
class Priced:
    """A strategy and our price of it."""

    plan: str
    step_time_s: float
    peak_memory_gib: float
    fits: bool
    """Into the share of memory that both planners leave to a plan, 80 %."""


@dataclass(frozen=True)
class Comparison:
    """One published run. Ratios are step times over that of our best."""

    name: str
    version: Version
    candidates: int
    """Of its space as enumerated here."""
    published_candidates: int
    possible: int
    """Of its space, by our memory model."""
    published_possible: int
    chosen: Priced
    best_of_theirs: Priced | None
    """Of what fits, as its space is read."""
    best_of_widest: Priced | None
    ours: Priced
    gap: float
    search_s: float
    published_search_s: float

    def ratio(self, other: Priced | None) -> float | None:
        return other.step_time_s / self.ours.step_time_s if other is not None else None


def comparisons() -> Iterator[Comparison]:
    """Of all published runs."""
    for run in PUBLISHED:
        yield _compared(run)


def _compared(run: Published) -> Comparison:
    workload = _workload(run.problem)
    theirs = space(run, AS_READ[run.version], num_blocks=workload.num_blocks)
    found = [_priced(workload, strategy) for strategy in theirs]
    widest = [_priced(workload, s) for s in space(run, WIDEST, num_blocks=workload.num_blocks)]
    chosen = [_priced(workload, strategy) for strategy in theirs if _is_chosen(run, strategy)]
    begin_s = time.perf_counter()
    searched = search(workload, Constraints())
    best = select_best_graph_from_candidates(searched.candidates, workload=workload)
    search_s = time.perf_counter() - begin_s
    assert best.estimate is not None
    return Comparison(
        name=run.problem.name,
        version=run.version,
        candidates=len(theirs),
        published_candidates=run.candidates,
        possible=sum(one.fits for one in found),
        published_possible=run.possible,
        chosen=min(chosen, key=lambda one: (not one.fits, one.step_time_s if one.fits else one.peak_memory_gib)),
        best_of_theirs=_fastest(found),
        best_of_widest=_fastest(widest),
        ours=_of(workload, best.strategy, best.estimate),
        gap=best.estimate.step_time_s / searched.bound_s - 1,
        search_s=search_s,
        published_search_s=run.compile_s + run.select_s,
    )


def space(run: Published, options: Options, *, num_blocks: int) -> list[Strategy]:
    """What its planner enumerates for a run."""
    cluster, batch_size = run.problem.cluster, run.problem.batch_size
    shapes: list[tuple[int, int, int]] = []
    num_stages = 2
    while num_stages <= cluster.num_hosts:
        share, rest = divmod(batch_size, cluster.num_devices // num_stages)
        counts = [(rows, share // rows) for rows in ROWS_A_DEVICE if share % rows == 0 and not rest]
        shapes += [(num_stages, rows, count) for rows, count in counts if count >= 2]
        num_stages *= 2
    if run.version != "24.2" and batch_size >= cluster.num_devices:
        shapes.append((1, batch_size // cluster.num_devices, 1))
    return [
        Strategy(
            num_stages=stages,
            data_parallel=cluster.num_devices // stages,
            batch_per_device=rows,
            num_micro_batches=count,
            recomputation=recomputation,
            distribute_param=level,
            stages=even_stages(num_blocks, stages, recomputation),
        )
        for stages, rows, count in shapes
        for recomputation in options.recomputations
        for level in options.levels
    ]


def even_stages(num_blocks: int, num_stages: int, recomputation: Recomputation) -> tuple[StagePlan, ...]:
    """As many blocks in each stage; the first has the embedding too, the last the head."""
    ends = [1 + num_blocks * stage // num_stages for stage in range(num_stages + 1)]
    ends[0], ends[-1] = 0, num_blocks + 2
    return tuple(
        StagePlan(first_segment=first, last_segment=end - 1, recomputation=recomputation)
        for first, end in pairwise(ends)
    )


def _is_chosen(run: Published, strategy: Strategy) -> bool:
    asked = (run.num_stages, run.num_micro_batches, run.batch_per_device, run.recomputation)
    return asked == (
        strategy.num_stages,
        strategy.num_micro_batches,
        strategy.batch_per_device,
        strategy.recomputation,
    )


def _fastest(found: list[Priced]) -> Priced | None:
    return min((one for one in found if one.fits), key=lambda one: one.step_time_s, default=None)


def _priced(workload: Workload, strategy: Strategy) -> Priced:
    return _of(workload, strategy, price(workload, strategy))


def _of(workload: Workload, strategy: Strategy, estimate: Estimate) -> Priced:
    return Priced(
        plan=strategy.summary(),
        step_time_s=estimate.step_time_s,
        peak_memory_gib=estimate.peak_memory_bytes / 2**30,
        fits=estimate.peak_memory_bytes <= capacity_bytes(workload),
    )


@cache
def _graph_of(structure: Structure) -> Graph:
    from autoparallel import api

    return api._capture(structure.config(), PRECISION).graph


def _workload(problem: Problem) -> Workload:
    """Of our whole space: theirs is in it."""
    from autoparallel import api

    return api._workload(
        _graph_of(problem.structure),
        problem.cluster,
        load_table(problem.cluster.device),
        batch_size=problem.batch_size,
        seq_len=problem.seq_len,
        precision=PRECISION,
        constraints=Constraints(),
    )
