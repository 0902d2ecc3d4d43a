"""A workload and constraints in; the cheapest candidate of the whole space out, and a proof of how near it is to the
cheapest that there is.

Best first, branch and bound: shapes (how devices and rows are divided) come with a bound on the step of all their
strategies, strategies with a sharper one, and whatever has the least bound is looked at next: a shape is taken apart, a
strategy is cut into stages under a limit that a cut must beat (Parallel Graph Compile). What cannot beat the best step
so far is pruned; no heuristic prunes. Near the best, stages are then moved by simulation
(SelectBestGraphFromCandidates). Rounds have fixed sizes: the number of workers changes no result.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from loguru import logger

from autoparallel.cost.workload import Workload
from autoparallel.errors import ConfigError
from autoparallel.plans.candidate import Candidate, Pruned
from autoparallel.plans.estimate import Rejection
from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.progress import Advance, progress
from autoparallel.search.pool import PATIENCE_S, Jobs, WorkerPool, default_num_workers
from autoparallel.search.price import solve
from autoparallel.search.problem import Problem
from autoparallel.search.remedy import no_feasible_plan
from autoparallel.space.candidates import Layout, Shape, Space, enumerate_space

FIRST_ROUND, LARGEST_ROUND = 8, 64
"""Strategies; each round has twice as many as the one before."""
REACH = (1.15, 1.5)
"""A strategy is cut under a limit of so many times its bound, under the next one when it comes up again, then under
that of the best step alone.
"""
TOO_LARGE = "no division of the blocks over their ranks fits into memory"
BY_WORK = "their work alone takes longer than the best step"
NO_TIME = "the time budget ended"
BEATS = 1 - 1e-9
"""A step that differs by less is no shorter."""

Order = tuple[int, ...]
"""Place of a shape in the space, of a layout in its shape, of a strategy in its layout."""
Part = Shape | Layout | Strategy
"""What may be looked at next: a shape is taken apart into layouts, a layout into strategies."""


@dataclass
class Searched:
    """What a search found."""

    candidates: list[Candidate]
    """All that were looked at one by one, in the order of the space."""
    pruned: list[Pruned]
    num_candidates: int
    bound_s: float
    """No step of the space is shorter; infinite where nothing is possible."""


def search(
    workload: Workload, constraints: Constraints, *, workers: int | None = None, budget_s: float | None = None
) -> Searched:
    """Look for the cheapest candidate.

    `workers` are processes, by default `default_num_workers()`; 0 stays in this one. The result does not depend on it.
    After `budget_s` seconds the search ends with what it has, and with the bound that it has proved until then.
    """
    if workers is not None and workers < 0:
        raise ConfigError(f"workers={workers} is not a number of processes", remedy="use 0 or more")
    deadline_s = math.inf if budget_s is None else time.perf_counter() + budget_s
    space = enumerate_space(
        num_devices=workload.flavor.num_devices,
        batch_size=workload.batch_size,
        num_blocks=workload.num_blocks,
        constraints=constraints,
        tensor_degrees=workload.tensor_degrees
        if constraints.tensor_parallel == "auto"
        else [constraints.tensor_parallel],
        seq_len=workload.seq_len,
        devices_per_host=workload.flavor.devices_per_host,
    )
    problem = Problem(workload)
    num_workers = default_num_workers() if workers is None else workers
    with WorkerPool(problem, num_workers, patience_s=PATIENCE_S) as pool:
        found = _Search(space, problem, pool, deadline_s)
        logger.info("The number of candidates is {}.", found.num_candidates)
        logger.info("Parallel Graph Compile start...")
        begin_s = time.perf_counter()
        found.compile()
        logger.info("Elapsed Time to compile all candidates = {} [ms]", _elapsed_ms(begin_s))
        logger.info("Parallel Graph Compile finished.")
        logger.info("The number of possible candidates is {}.", len(found.possible))
        logger.info("SelectBestGraphFromCandidates start...")
        begin_s = time.perf_counter()
        found.polish()
        logger.info("Elapsed Time to compute cost for survived candidates = {} [ms]", _elapsed_ms(begin_s))
    return found.result()


@dataclass
class _Search:
    space: Space
    problem: Problem
    pool: WorkerPool
    deadline_s: float
    done: dict[Order, Candidate] = field(default_factory=dict)
    """All that have a price or are impossible."""
    best_s: float = math.inf

    def __post_init__(self) -> None:
        self.num_candidates = sum(map(self.space.count, self.space.shapes)) + len(self.space.too_many_stages)
        self._waiting: list[tuple[float, Order, Part]] = []
        """Least bound first."""
        self._turns = Counter[Order]()
        self._too_large: list[tuple[Order, Strategy]] = []
        """Strategies that fit nowhere, one of each layout where that is already so."""
        self._pruned: dict[tuple[int, int, int, str], tuple[int, float]] = {}
        for place, shape in enumerate(self.space.shapes):
            if not self.space.count(shape):
                continue
            reason = self.problem.workload.impossible_degrees.get(shape.tensor_parallel)
            if reason is not None:
                self._reject((place, 0, 0), shape, Rejection(reason=reason, kind="split"))
                self._prune(shape, self.space.count(shape) - 1, 0.0, reason)
                continue
            orders = dict.fromkeys(layout.mesh_order for layout in self.space.layouts(shape))
            self._wait(self.problem.shape_bound_s(shape, orders), (place,), shape)
        for place, shape in enumerate(self.space.too_many_stages, start=len(self.space.shapes)):
            reason = f"{shape.num_stages} stages need a block each, and the model has {self.space.num_blocks}"
            self._reject((place, 0, 0), shape, Rejection(reason=reason, kind="layers"))

    def _reject(self, order: Order, shape: Shape, rejection: Rejection) -> None:
        strategy = self.space.strategies(shape, self.space.layouts(shape)[0])[0]
        self.done[order] = Candidate(strategy=strategy, rejection=rejection)

    def _wait(self, bound_s: float, order: Order, part: Part) -> None:
        heappush(self._waiting, (bound_s, order, part))

    @property
    def possible(self) -> list[Order]:
        """Candidates with a price."""
        return [order for order, candidate in sorted(self.done.items()) if candidate.estimate is not None]

    def compile(self) -> None:
        """Price strategies until none that is left can beat the best."""
        size = FIRST_ROUND
        with progress("Compile", total=None) as advance:
            while (asked := self._next_round(size)) and time.perf_counter() < self.deadline_s:
                self._solve(asked, advance)
                size = min(2 * size, LARGEST_ROUND)
        for bound_s, order, strategy in asked:
            self._wait(bound_s, order, strategy)
        if self.best_s == math.inf:
            self._find_nearest()
        for bound_s, order, part in self._waiting:
            self._prune(*self._size_of(order, part), bound_s, BY_WORK if bound_s >= BEATS * self.best_s else NO_TIME)

    def _size_of(self, order: Order, part: Part) -> tuple[Shape | Strategy, int]:
        """Something with the part's shape, and how many strategies it stands for."""
        if isinstance(part, Strategy):
            return part, 1
        shape = self.space.shapes[order[0]]
        return shape, self.space.per_layout(shape) if isinstance(part, Layout) else self.space.count(shape)

    def _next_round(self, size: int) -> list[tuple[float, Order, Strategy]]:
        """Strategies with the least bounds, as many as that or fewer."""
        found: list[tuple[float, Order, Strategy]] = []
        while self._waiting and len(found) < size and self._waiting[0][0] < BEATS * self.best_s:
            bound_s, order, part = heappop(self._waiting)
            if isinstance(part, Strategy):
                found.append((bound_s, order, part))
                continue
            shape = self.space.shapes[order[0]]
            if isinstance(part, Layout):
                for place, strategy in enumerate(self.space.strategies(shape, part)):
                    if self.problem.is_too_large(strategy):
                        self._leave((*order, place), strategy, 1, bound_s)
                    else:
                        self._wait(max(bound_s, self.problem.quick_bound_s(strategy)), (*order, place), strategy)
                continue
            layouts = self.space.layouts(shape)
            if self.problem.shape_is_too_large(shape):
                self._leave(
                    (*order, 0, 0), self.space.strategies(shape, layouts[0])[0], self.space.count(shape), bound_s
                )
                continue
            for place, layout in enumerate(layouts):
                self._take_apart(bound_s, (*order, place), shape, layout)
        return found

    def _take_apart(self, bound_s: float, order: Order, shape: Shape, layout: Layout) -> None:
        """One layout of a shape waits, unless it is too large."""
        first = self.space.strategies(shape, layout)[0]
        if self.problem.holds_states(first):
            self._wait(max(bound_s, self.problem.layout_bound_s(first)), order, layout)
        else:
            self._leave((*order, 0), first, self.space.per_layout(shape), bound_s)

    def _leave(self, order: Order, strategy: Strategy, count: int, bound_s: float) -> None:
        """One of some strategies that are too large."""
        self._prune(strategy, count, bound_s, TOO_LARGE)
        self._too_large.append((order, strategy))

    def _find_nearest(self) -> None:
        """Of what is too large, look at those that lack least, until none that is left can lack less."""
        short = [
            c.rejection.shortfall_bytes for c in self.done.values() if c.rejection and c.rejection.kind == "memory"
        ]
        lacking = [(self.problem.lacks_bytes(strategy), order, strategy) for order, strategy in self._too_large]
        for lacks_bytes, order, strategy in sorted(lacking, key=lambda entry: entry[:2]):
            if lacks_bytes >= min(short, default=math.inf):
                break
            candidate = solve(self.problem, strategy)
            self._keep(order, candidate)
            if candidate.rejection is not None:
                short.append(candidate.rejection.shortfall_bytes)

    def _solve(self, asked: list[tuple[float, Order, Strategy]], advance: Advance) -> None:
        limits = [self._limit_s(bound_s, order) for bound_s, order, _ in asked]
        jobs = Jobs([strategy for _, _, strategy in asked], limits)
        solved = dict(self.pool.map(jobs))
        for place, (bound_s, order, strategy) in enumerate(asked):
            candidate = solved[place].model_copy(update={"bound_s": max(bound_s, solved[place].bound_s)})
            if candidate.rejection is not None and candidate.rejection.kind == "time":
                self._wait(candidate.bound_s, order, strategy)
                continue
            if candidate.rejection is not None and not candidate.rejection.shortfall_bytes:
                self._leave(order, strategy, 1, bound_s)
                continue
            self._keep(order, candidate)
            advance(f"best: {self.best_s:.4g} s a step" if self.best_s < math.inf else "")

    def _limit_s(self, bound_s: float, order: Order) -> float:
        turn = self._turns[order]
        self._turns[order] += 1
        return min(self.best_s, REACH[turn] * bound_s) if turn < len(REACH) and bound_s > 0 else self.best_s

    def _keep(self, order: Order, candidate: Candidate) -> None:
        self.done[order] = candidate
        if candidate.estimate is not None:
            self.best_s = min(self.best_s, candidate.estimate.step_time_s)

    def polish(self) -> None:
        """Move the stages of those that might beat the best as the simulator prefers, and bound them again."""
        near = [order for order in self.possible if self.done[order].bound_s < BEATS * self.best_s]
        near.sort(key=lambda order: (self.done[order].bound_s, order))
        for first in range(0, len(near), FIRST_ROUND):
            round_ = [
                order for order in near[first : first + FIRST_ROUND] if self.done[order].bound_s < BEATS * self.best_s
            ]
            if not round_ or time.perf_counter() > self.deadline_s:
                break
            strategies = [self._strategy(order) for order in round_]
            solved = dict(self.pool.map(Jobs(strategies, [self.best_s / BEATS] * len(round_), polished=True)))
            for place, order in enumerate(round_):
                self._improve(order, solved[place])

    def _strategy(self, order: Order) -> Strategy:
        shape = self.space.shapes[order[0]]
        return self.space.strategies(shape, self.space.layouts(shape)[order[1]])[order[2]]

    def _improve(self, order: Order, candidate: Candidate) -> None:
        """Its price, if that is better; its bound in any case."""
        bound_s = max(candidate.bound_s, self.done[order].bound_s)
        better = min(self.done[order], candidate, key=_step_time_s)
        self._keep(order, better.model_copy(update={"bound_s": bound_s}))

    def _prune(self, what: Shape | Strategy, count: int, bound_s: float, reason: str) -> None:
        if not count:
            return
        key = (what.num_stages, what.tensor_parallel, what.data_parallel, reason)
        before, least_s = self._pruned.get(key, (0, math.inf))
        self._pruned[key] = (before + count, min(least_s, bound_s))

    def result(self) -> Searched:
        candidates = [self.done[order] for order in sorted(self.done)]
        pruned = [
            Pruned(num_stages=pp, tensor_parallel=tp, data_parallel=dp, count=count, bound_s=bound_s, reason=reason)
            for (pp, tp, dp, reason), (count, bound_s) in sorted(self._pruned.items())
        ]
        bounds = [c.bound_s for c in candidates if c.estimate is not None]
        left = [p.bound_s for p in pruned if p.reason == NO_TIME]
        return Searched(candidates, pruned, self.num_candidates, min([self.best_s, *bounds, *left]))


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


def _elapsed_ms(begin_s: float) -> int:
    return round((time.perf_counter() - begin_s) * 1000)
