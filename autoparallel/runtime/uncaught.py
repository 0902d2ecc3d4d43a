"""An uncaught error in a rank: ours become a message and an exit code, all are noted for the launcher."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from autoparallel.errors import AutoParallelError

ErrorHook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


_shown: list[int] = []
"""Exit codes of the errors that were shown."""


def install_error_hook() -> None:
    """Show uncaught errors of ours as messages."""
    if not (isinstance(sys.excepthook, functools.partial) and sys.excepthook.func is _show_error):
        sys.excepthook = functools.partial(_show_error, sys.excepthook)


def exit_code() -> int | None:
    """With which this process ends because of an uncaught error; None where there was none."""
    return _shown[0] if _shown else None


def _show_error(
    previous: ErrorHook,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """An AutoParallelError is its message and its exit code; every uncaught error is noted for the launcher."""
    message = ""
    if isinstance(error, AutoParallelError):
        message = f"{error}\n  at: {_users_line(trace)}"
    _shown.append(error.exit_code if isinstance(error, AutoParallelError) else 1)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if path:
        _note_error(path, error, message=message)
    if message and os.environ.get("AUTOPARALLEL_DEBUG", "0") == "0":
        print(message, file=sys.stderr, flush=True)
    else:
        previous(kind, error, trace)
    if isinstance(error, AutoParallelError):
        raise SystemExit(error.exit_code)


def _note_error(path: str, error: BaseException, *, message: str) -> None:
    """Write torch elastic's error file, and in it what elastic does not keep: the exact time and who is to blame."""
    text = "".join(traceback.format_exception(error))
    lost_peer = isinstance(error, dist.DistError) or any(s in str(error) for s in ("closed by peer", "reset by peer"))
    now_s = time.time()
    extra = {"py_callstack": text, "timestamp": str(int(now_s))}
    exit_code = error.exit_code if isinstance(error, AutoParallelError) else 1
    note = {"message": message, "exit_code": exit_code, "time_s": now_s, "lost_peer": lost_peer}
    content = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}, "autoparallel": note}
    with contextlib.suppress(OSError):
        Path(f"{path}.tmp").write_text(json.dumps(content))
        os.replace(f"{path}.tmp", path)


def _users_line(trace: TracebackType | None) -> str:
    """The innermost line that is not ours."""
    package = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith(package)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "autoparallel"
