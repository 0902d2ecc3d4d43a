"""Run a function on n gloo ranks of this machine, with a hard time limit; only processes started here are ended."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["tests.families", "torch.export._trace", "autoparallel.capture.program", "autoparallel.runtime.engine"]
)


class RankCrashedError(AssertionError):
    """A rank was ended by a signal: no Python code failed."""


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*args)` in `num_ranks` processes with torch.distributed initialised; what each returned, in rank
    order.

    A crash is repeated once, with a warning that shows it: about once in ten thousand ranks, the heap is found damaged
    in a thread of torch's gloo (SIGSEGV or SIGABRT). Neither valgrind nor the address sanitizer shows who does it.
    """
    try:
        return _run_ranks(num_ranks, function, args, timeout)
    except RankCrashedError as crash:
        warnings.warn(f"repeated, since a rank crashed: {crash}", stacklevel=2)
        return _run_ranks(num_ranks, function, args, timeout)


def _run_ranks(num_ranks: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [_context.Pipe(duplex=False) for _ in range(num_ranks)]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / f"rank{rank}.stderr" for rank in range(num_ranks)]
        processes = [
            _context.Process(
                target=_rank_main, args=(rank, num_ranks, port, pipes[rank][1], said[rank], function, args)
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            return _collect([pipe for pipe, _ in pipes], processes, said, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], said: list[Path], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    crashed = False
    while len(results) < len(pipes):
        for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
            if rank in results or rank in failures:
                continue
            if pipe.poll(0.02):
                ok, value = pipe.recv()
                (results if ok else failures)[rank] = value
            elif not process.is_alive() and not pipe.poll(0.1):
                crashed |= process.exitcode < 0
                words = said[rank].read_text().partition("Extension modules")[0]
                failures[rank] = f"died with exit code {process.exitcode}: {words}"
        if failures:
            deadline = min(deadline, time.monotonic() + 3.0)  # others fail after it, or tell what came first
        late = time.monotonic() > deadline
        if failures and (late or len(results) + len(failures) == len(pipes)):
            told = "\n".join(f"rank {rank} failed: {why}" for rank, why in sorted(failures.items()))
            raise (RankCrashedError if crashed else AssertionError)(told)
        assert not late, f"ranks {sorted(set(range(len(pipes))) - set(results))} did not finish in time"
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int,
    num_ranks: int,
    port: int,
    pipe: Connection,
    said: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        os._exit(1)
    dist.barrier()
    os._exit(0)
