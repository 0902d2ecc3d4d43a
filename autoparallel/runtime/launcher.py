"""What a plain `python train.py` turns into: torch's elastic agent, one rank a device, and a report of failures."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NoReturn

LAUNCHER_PID, OUTPUT_SOCKET = "AUTOPARALLEL_LAUNCHER_PID", "AUTOPARALLEL_OUTPUT_SOCKET"
OURS = "AUTOPARALLEL_"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What libraries take for the sign of a distributed run. A rank gets them under names of ours: its script is that of
one process, before the line and after it.
"""
START_RANK = f"""
import os, sys
for name in {RANK_VARIABLES}:
    os.environ["{OURS}" + name] = os.environ.pop(name)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
TAIL_LINES = 40


def run_ranks() -> NoReturn:
    """Run `sys.argv[1]` ranks of the command that follows it, and exit as they do."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # what elastic says of a failure is said below, in fewer lines
    num_ranks, arguments = (
        int(sys.argv[1]),
        [word.replace("$", "$$") for word in sys.argv[2:]],
    )  # elastic expands ${...}
    folder = tempfile.mkdtemp(prefix="autoparallel-", dir=None if len(tempfile.gettempdir()) < 60 else "/tmp")
    output = _OutputServer(os.path.join(folder, "output"))  # a socket's path has at most 104 bytes
    os.environ[LAUNCHER_PID], os.environ[OUTPUT_SOCKET] = str(os.getpid()), output.path
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id="autoparallel",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.path.join(folder, "logs"), redirects=Std.ALL),
    )
    exit_code, is_failed = 0, False
    try:
        elastic_launch(config, sys.executable)("-ISc", START_RANK, "-u", *arguments)
    except ChildFailedError as error:
        is_failed, index = True, _root_cause(error.failures)
        code = _ending(error.failures[index])
        exit_code = code if code > 0 else 128 - code  # as a shell shows it
        _report(index, error.failures[index], folder=folder, seen=index == 0 and output.is_handed_over)
    except SignalException as error:
        exit_code = 128 + error.sigval
    except KeyboardInterrupt:
        exit_code = 128 + signal.SIGINT
    if not is_failed:  # else its logs are worth reading
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(exit_code)


class _OutputServer:
    """Gives this process's stdout and stderr to rank 0 when it asks."""

    def __init__(self, path: str) -> None:
        self.path, self.is_handed_over = path, False
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(1)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            socket.send_fds(connection, [b"1"], [1, 2])
        self.is_handed_over = True


def _note(failure: Any) -> dict[str, Any]:
    """What the rank wrote about its uncaught error, if there was one."""
    return failure.error_file_data.get("autoparallel", {})


def _ending(failure: Any) -> int:
    """Exit code, or minus a signal; after an uncaught error, that error's code, whatever happened during shutdown."""
    return _note(failure).get("exit_code", failure.exitcode)


def _root_cause(failures: dict[int, Any]) -> int:
    """The first rank that failed by itself: neither ended by the launcher, nor by the loss of its peer."""

    def order(index: int) -> tuple[int, float, int]:
        note = _note(failures[index])
        is_ended = failures[index].exitcode == -signal.SIGTERM
        return 2 if is_ended else int(note.get("lost_peer", False)), note.get("time_s", 0.0), index

    return min(failures, key=order)


def _report(index: int, failure: Any, *, folder: str, seen: bool) -> None:
    """Say which rank failed and how, then the last lines of its stderr unless they were `seen` already."""
    message, code = _note(failure).get("message", ""), _ending(failure)
    if message and seen:
        return
    how = f"exited with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    hint = " (often the host ran out of memory)" if code == -signal.SIGKILL else ""
    print(f"autoparallel: rank {index} {how}{hint}; output of the ranks: {folder}/logs", file=sys.stderr)
    log = next(Path(folder, "logs").glob(f"*/attempt_0/{index}/stderr.log"), None)
    if message:
        print(message, file=sys.stderr)
    elif log is not None and not seen:
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]), file=sys.stderr)
