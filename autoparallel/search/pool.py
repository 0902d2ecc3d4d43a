"""Strategies in, candidates out as they are done, computed by worker processes that speak over pipes.

Workers run `autoparallel.search.worker`, never the user's `__main__`, so that an unguarded script is safe. Which worker
does what depends on time; the results do not. A worker that dies is an event, not an error: its jobs run here instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

from loguru import logger

import autoparallel
from autoparallel.plans.candidate import Candidate
from autoparallel.plans.strategy import Strategy
from autoparallel.search.price import solve
from autoparallel.search.problem import Problem
from autoparallel.settings import read_settings

MAX_DEFAULT_WORKERS = 8
PATIENCE_S = 2.0
"""Jobs run in this process until so much time has gone: starting a worker and reading the workload there takes a second
of a core, and most searches end before (measured).
"""
CHUNKS_PER_WORKER = 4
MAX_CHUNK = 16
GRACE_S = 1.0
"""How long a worker may take to end before it is killed."""


def default_num_workers() -> int:
    """`AUTOPARALLEL_WORKERS`, or a worker for every core, at most eight; none on a single core."""
    wanted = read_settings().workers
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 else min(cores, MAX_DEFAULT_WORKERS)


@dataclass(frozen=True)
class Jobs:
    """Strategies to solve under one limit."""

    strategies: Sequence[Strategy]
    within_s: Sequence[float]
    """Of each."""
    polished: bool = False

    def run(self, problem: Problem, index: int) -> Candidate:
        """One of them, in this process."""
        return solve(problem, self.strategies[index], self.within_s[index], polished=self.polished)


@dataclass
class _Worker:
    """A process, and the indices of the jobs that it owes an answer."""

    process: subprocess.Popen[str]
    owed: set[int] = field(default_factory=set)
    alive: bool = True

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        # A worker that died is noticed at the end of its stdout.
        with suppress(OSError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()


class WorkerPool:
    """Workers for one problem; `num_workers=0` computes in this process. Workers start when that pays."""

    def __init__(self, problem: Problem, num_workers: int, *, patience_s: float = PATIENCE_S) -> None:
        self._problem, self._num_workers = problem, num_workers
        self._start_at_s = time.perf_counter() + patience_s
        self._workers: list[_Worker] = []
        self._readers: list[Thread] = []
        self._lines: SimpleQueue[tuple[_Worker, str | None]] = SimpleQueue()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(at_once=error is not None)

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [worker.process.pid for worker in self._workers if worker.alive]

    def map(self, jobs: Jobs) -> Iterator[tuple[int, Candidate]]:
        """(index, candidate) of every strategy, in the order in which they are done."""
        assert not any(worker.owed for worker in self._workers), "the last map was not read to its end"
        num_jobs = len(jobs.strategies)
        if not self._workers and self._num_workers > 0 and num_jobs > 1 and time.perf_counter() >= self._start_at_s:
            self._start()
        if not self.pids:
            for index in range(num_jobs):
                yield index, jobs.run(self._problem, index)
            return
        chunks = self._chunks(num_jobs)
        for worker in self._workers:
            self._give(worker, chunks, jobs)
        while any(worker.owed for worker in self._workers):
            worker, answers = self._receive()
            for index, candidate in answers.items():
                yield index, jobs.run(self._problem, index) if candidate is None else candidate
            self._give(worker, chunks, jobs)
        for index in chain.from_iterable(chunks):
            # Nobody is left to take them.
            yield index, jobs.run(self._problem, index)

    def _chunks(self, num_jobs: int) -> deque[range]:
        size = max(1, min(MAX_CHUNK, num_jobs // (CHUNKS_PER_WORKER * len(self.pids))))
        return deque(range(first, min(first + size, num_jobs)) for first in range(0, num_jobs, size))

    def _give(self, worker: _Worker, chunks: deque[range], jobs: Jobs) -> None:
        """The next chunk, to a worker that has nothing to do."""
        if not worker.alive or worker.owed or not chunks:
            return
        chunk = chunks.popleft()
        worker.owed.update(chunk)
        listed = [[index, jobs.within_s[index], jobs.strategies[index].model_dump_json()] for index in chunk]
        worker.send(json.dumps({"polished": jobs.polished, "jobs": listed}))

    def _receive(self) -> tuple[_Worker, dict[int, Candidate | None]]:
        """Wait for a worker: its answers, None where the job must be done again, here."""
        worker, line = self._lines.get()
        if line is None:
            return worker, dict.fromkeys(self._bury(worker))
        try:
            message = json.loads(line)
            index = message["index"]
        except (ValueError, KeyError, TypeError):
            # Its greeting, the half line of a worker that died, or a print of somebody's site hook.
            return worker, {}
        if index not in worker.owed:
            return worker, {}
        worker.owed.remove(index)
        if "candidate" in message:
            return worker, {index: Candidate.model_validate_json(message["candidate"])}
        logger.debug("Search worker {} failed at job {}:\n{}", worker.process.pid, index, message["error"])
        return worker, {index: None}

    def _bury(self, worker: _Worker) -> list[int]:
        """What a dead worker still owed, in order."""
        worker.alive = False
        owed, worker.owed = sorted(worker.owed), set()
        logger.warning(
            "Search worker {} died (exit code {}); {} of its jobs run in this process.",
            worker.process.pid,
            worker.process.wait(),
            len(owed),
        )
        return owed

    def _start(self) -> None:
        """Start all workers, then send each the workload."""
        for _ in range(self._num_workers):
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "autoparallel.search.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    encoding="utf-8",
                    env=_environment(),
                    start_new_session=True,  # a terminal's ctrl-C reaches the parent only, even while a worker starts
                )
            except OSError as error:
                logger.warning("A search worker cannot be started ({}); the search goes on without it.", error)
                break
            worker = _Worker(process)
            self._workers.append(worker)
            self._readers.append(Thread(target=self._read, args=(worker,), daemon=True))
            self._readers[-1].start()
        workload = self._problem.workload.model_dump_json()
        for worker in self._workers:
            worker.send(workload)

    def _read(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._lines.put((worker, line))
        self._lines.put((worker, None))

    def _stop(self, *, at_once: bool) -> None:
        """End the processes that this pool started: the end of stdin is enough for one that waits."""
        for worker in self._workers:
            assert worker.process.stdin is not None
            if at_once:
                worker.process.terminate()
            with suppress(OSError):
                worker.process.stdin.close()
        deadline_s = time.monotonic() + GRACE_S
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        for worker, reader in zip(self._workers, self._readers, strict=True):
            reader.join()
            assert worker.process.stdout is not None
            worker.process.stdout.close()
        self._workers, self._readers = [], []


def _environment() -> dict[str, str]:
    """This process's, with its import path: workers find the same modules, from a wheel or from a checkout."""
    root = str(Path(autoparallel.__file__).parents[1])
    paths = [path for path in sys.path if isinstance(path, str) and path]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*paths, root]))}
