"""Run a function on n gloo ranks of this machine, with a hard time limit; only processes started here are ended.

The ranks are forked from a nursery, one process for all tests of a pytest worker: what it has imported and captured
once, they all find.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

Function = Callable[..., Any]


class RankCrashedError(AssertionError):
    """A rank was ended by a signal: no Python code failed."""


@dataclass(frozen=True)
class _Job:
    num_ranks: int
    port: int
    folder: Path
    """Where rank i leaves its result, its exit code and what it said on stderr."""
    function: Function
    args: tuple[Any, ...]
    first: Function | None

    def file(self, rank: int, kind: str) -> Path:
        return self.folder / f"{rank}.{kind}"


def run_ranks(
    num_ranks: int, function: Function, *args: Any, timeout: float = 120.0, first: Function | None = None
) -> list[Any]:
    """`function(*args)` in `num_ranks` processes with torch.distributed initialised; what each returned, in rank
    order. `first()` runs before, in the process that they are forked from: what it caches, they find. It may not run a
    backward pass, after which autograd refuses to be forked.

    A crash is repeated once, with a warning that shows it: about once in ten thousand ranks, the heap is found damaged
    in a thread of torch's gloo (SIGSEGV or SIGABRT). Neither valgrind nor the address sanitizer shows who does it.
    """
    try:
        return _run_ranks(num_ranks, function, args, timeout, first)
    except RankCrashedError as crash:
        warnings.warn(f"repeated, since a rank crashed: {crash}", stacklevel=2)
        return _run_ranks(num_ranks, function, args, timeout, first)


def _run_ranks(
    num_ranks: int, function: Function, args: tuple[Any, ...], timeout: float, first: Function | None
) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(num_ranks, port, Path(folder), function, args, first)
        nursery = _nursery()
        nursery.send(job)
        try:
            return _collect(job, time.monotonic() + timeout)
        finally:
            nursery.send(None)
            nursery.recv()


def _collect(job: _Job, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    crashed = False
    while len(results) < job.num_ranks:
        time.sleep(0.02)
        for rank in set(range(job.num_ranks)) - results.keys() - failures.keys():
            exit_file, result_file = job.file(rank, "exit"), job.file(rank, "result")
            exited = exit_file.exists()  # looked at first: a result comes before it
            if result_file.exists():
                ok, value = pickle.loads(result_file.read_bytes())
                (results if ok else failures)[rank] = value
            elif exited:
                code = int(exit_file.read_text())
                crashed |= code < 0
                words = job.file(rank, "stderr").read_text().partition("Extension modules")[0]
                failures[rank] = f"died with exit code {code}: {words}"
        if failures:
            deadline = min(deadline, time.monotonic() + 3.0)  # others fail after it, or tell what came first
        late = time.monotonic() > deadline
        if failures and (late or len(results) + len(failures) == job.num_ranks):
            told = "\n".join(f"rank {rank} failed: {why}" for rank, why in sorted(failures.items()))
            raise (RankCrashedError if crashed else AssertionError)(told)
        assert not late, f"ranks {sorted(set(range(job.num_ranks)) - set(results))} did not finish in time"
    return [results[rank] for rank in range(job.num_ranks)]


# --- the nursery --------------------------------------------------------------------------------------------------

_started: list[Connection] = []


def _nursery() -> Connection:
    """The way to this process's nursery, which ends with it."""
    if not _started:
        ours, its = multiprocessing.get_context("spawn").Pipe()
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        multiprocessing.get_context("spawn").Process(target=_serve, args=(its, environment)).start()
        Finalize(None, ours.close, exitpriority=100)
        _started.append(ours)
    return _started[0]


def _serve(jobs: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch

    import tests.families  # noqa: F401

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):  # the tests are over
        while True:
            _raise_ranks(jobs.recv(), jobs)
            jobs.send(None)


def _raise_ranks(job: _Job, jobs: Connection) -> None:
    """Fork the job's ranks, note how each ends, and end those that are left when the tests say so."""
    try:
        if job.first is not None:
            job.first()
    except BaseException:
        _leave_result(job, 0, (False, traceback.format_exc()))
        jobs.recv()
        return
    ranks = {_fork(job, rank): rank for rank in range(job.num_ranks)}
    told = False
    while ranks and not told:
        told = jobs.poll(0.02)
        for process in list(ranks):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                job.file(ranks.pop(process), "exit").write_text(str(os.waitstatus_to_exitcode(status)))
    jobs.recv()
    for process in ranks:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _fork(job: _Job, rank: int) -> int:
    process = os.fork()
    if process == 0:
        try:
            _rank_main(job, rank)
        finally:
            os._exit(1)
    return process


def _rank_main(job: _Job, rank: int) -> None:
    with job.file(rank, "stderr").open("wb") as said:
        os.dup2(said.fileno(), 2)
    faulthandler.enable()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
    )
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=job.num_ranks)
    try:
        _leave_result(job, rank, (True, job.function(*job.args)))
    except BaseException:
        _leave_result(job, rank, (False, traceback.format_exc()))
        os._exit(1)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def _leave_result(job: _Job, rank: int, result: tuple[bool, Any]) -> None:
    half = job.file(rank, "half")
    half.write_bytes(pickle.dumps(result))
    half.replace(job.file(rank, "result"))
