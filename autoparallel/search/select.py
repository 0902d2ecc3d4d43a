"""A workload and constraints in, every candidate with its price or its reason out; then the cheapest of them.

Parallel Graph Compile cuts each candidate into stages that fit by a closed form; SelectBestGraphFromCandidates prices
the possible ones by simulation, and moves the stages of those near the best as the simulator prefers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from loguru import logger

from autoparallel.cost.workload import Workload
from autoparallel.errors import ConfigError
from autoparallel.plans.candidate import Candidate
from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.progress import progress
from autoparallel.search.pool import WorkerPool, default_num_workers
from autoparallel.search.remedy import no_feasible_plan
from autoparallel.search.worker import Kind
from autoparallel.space.candidates import enumerate_strategies

POLISH_WITHIN = 1.2
"""Of the cheapest step time."""


def search(workload: Workload, constraints: Constraints, *, workers: int | None = None) -> list[Candidate]:
    """All candidates in the enumerator's order, each with an estimate or a rejection.

    `workers` are processes, by default `default_num_workers()`; 0 stays in this one. The result does not depend on it.
    """
    if workers is not None and workers < 0:
        raise ConfigError(f"workers={workers} is not a number of processes", remedy="use 0 or more")
    strategies = enumerate_strategies(
        num_devices=workload.flavor.num_devices,
        batch_size=workload.batch_size,
        num_blocks=workload.num_blocks,
        constraints=constraints,
        tensor_degrees=workload.tensor_degrees
        if constraints.tensor_parallel == "auto"
        else [constraints.tensor_parallel],
        seq_len=workload.seq_len,
    )
    logger.info("The number of candidates is {}.", len(strategies))
    with WorkerPool(workload, default_num_workers() if workers is None else workers) as pool:
        logger.info("Parallel Graph Compile start...")
        begin_s = time.perf_counter()
        candidates = _run(pool, "compile", strategies)
        logger.info("Elapsed Time to compile all candidates = {} [ms]", _elapsed_ms(begin_s))
        logger.info("Parallel Graph Compile finished.")
        possible = [index for index, candidate in enumerate(candidates) if candidate.rejection is None]
        logger.info("The number of possible candidates is {}.", len(possible))
        logger.info("SelectBestGraphFromCandidates start...")
        begin_s = time.perf_counter()
        priced = _run(pool, "price", [candidates[index].strategy for index in possible])
        for index, candidate in zip(possible, priced, strict=True):
            candidates[index] = candidate
        near = _near_the_best(candidates)
        polished = _run(pool, "polish", [candidates[index].strategy for index in near])
        logger.info("Elapsed Time to compute cost for survived candidates = {} [ms]", _elapsed_ms(begin_s))
    for index, candidate in zip(near, polished, strict=True):
        candidates[index] = min(candidates[index], candidate, key=_step_time_s)
    return candidates


def _near_the_best(candidates: Sequence[Candidate]) -> list[int]:
    """Those whose stages are worth moving: the closed form that cut them is rough by a few per cent."""
    best_s = min(map(_step_time_s, candidates), default=math.inf)
    return [
        index
        for index, candidate in enumerate(candidates)
        if _step_time_s(candidate) <= POLISH_WITHIN * best_s < math.inf
    ]


def _step_time_s(candidate: Candidate) -> float:
    return candidate.estimate.step_time_s if candidate.estimate is not None else math.inf


def select_best_graph_from_candidates(
    candidates: Sequence[Candidate], *, workload: Workload | None = None, constraints: Constraints | None = None
) -> Candidate:
    """The candidate with the shortest step; of equals the first.

    Raises NoFeasiblePlanError where none is possible; given the workload and the constraints of the search, it says
    which change would help.
    """
    priced = [(candidate.estimate.step_time_s, candidate) for candidate in candidates if candidate.estimate is not None]
    if not priced:
        raise no_feasible_plan(candidates, workload=workload, constraints=constraints or Constraints())
    _, best = min(priced, key=lambda pair: pair[0])
    logger.info("SelectBestGraphFromCandidates finished.")
    logger.info("Configuration for parallelism is selected.")
    logger.info("{}", best.strategy.summary())
    return best


def _run(pool: WorkerPool, kind: Kind, strategies: list[Strategy]) -> list[Candidate]:
    """In the order of the strategies, whatever the order in which workers are done."""
    done: dict[int, Candidate] = {}
    best_s = math.inf
    title = {"compile": "Compile", "price": "Select", "polish": "Polish"}[kind]
    with progress(title, total=len(strategies)) as advance:
        for index, candidate in pool.map(kind, strategies):
            done[index] = candidate
            if candidate.estimate is not None:
                best_s = min(best_s, candidate.estimate.step_time_s)
            advance(f"best: {best_s:.4g} s a step" if best_s < math.inf else "")
    return [done[index] for index in range(len(strategies))]


def _elapsed_ms(begin_s: float) -> int:
    return round((time.perf_counter() - begin_s) * 1000)
