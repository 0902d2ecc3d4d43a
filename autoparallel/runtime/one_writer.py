"""What the script saves is written once: by rank 0, while the others wait for it.

Every rank runs the whole script, so `torch.save(model.state_dict(), path)` happens on each of them, with the same
content and the same path. Rank 0 waits for nobody, so code that only it runs may save as well.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

import safetensors.torch
import torch
from torch.distributed.distributed_c10d import _get_default_store

from autoparallel.errors import ContractError, WorkerError
from autoparallel.runtime.launch import distributed_timeout, is_main

APART = timedelta(minutes=10)
"""How much later than another rank rank 0 may come to a file: what it does alone in between is short."""

_saved: Counter[str] = Counter()


def write_once(path: str | os.PathLike[str], write: Callable[[], Any]) -> None:
    """`write()` on rank 0; everyone returns when it is done, or raises when it failed."""
    path = os.path.abspath(path)
    _saved[path] += 1
    key, store = f"autoparallel/saved/{_saved[path]}/{path}", _get_default_store()
    if is_main():
        failure = "the process ended"
        store.set(f"{key}/begun", "")
        try:
            write()
            failure = ""
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            store.set(f"{key}/done", failure)
        return
    try:
        store.wait([f"{key}/begun"], APART)
    except RuntimeError as error:
        raise ContractError(
            f"rank 0 does not save {path}, and another rank does",
            why="every rank runs the same script, and what it saves is written once, by rank 0",
            remedy="save on every rank; for a file of one rank's own, open it and pass the file object",
        ) from error
    store.wait([f"{key}/done"], distributed_timeout())
    if failure := store.get(f"{key}/done").decode():
        raise WorkerError(f"rank 0 could not save {path}", why=failure, remedy="free space or choose another folder")


def mend_saving() -> None:
    """`torch.save` and safetensors write a path once from now on. File objects are whose they are."""
    torch.save = torch.serialization.save = _once(torch.save, position=1, name="f")
    serialize = _once(safetensors.torch.serialize_file, position=1, name="filename")  # type: ignore[attr-defined]
    safetensors.torch.serialize_file = serialize  # type: ignore[attr-defined]


def _once(original: Callable[..., None], *, position: int, name: str) -> Callable[..., None]:
    rank_pid = os.getpid()

    @wraps(original)
    def save(*args: Any, **kwargs: Any) -> None:
        target = args[position] if len(args) > position else kwargs.get(name)
        is_rank = os.getpid() == rank_pid  # a forked worker, of a data loader say, meets nobody
        if not is_rank or not isinstance(target, (str, os.PathLike)):
            return original(*args, **kwargs)
        return write_once(target, lambda: original(*args, **kwargs))

    return save
