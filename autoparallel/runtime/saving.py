"""`save_pretrained` that streams. transformers' own code decides names, ties, conversions, shards and index; it gets
deferred tensors, and where it would write a shard file, each of them is gathered, written and dropped.

Rank 0 writes and says which parameter it needs next; the others send their pieces of it. Files appear in a folder of
their own and are renamed when all are complete, so that a crash or a full disk leaves the checkpoint before intact.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from huggingface_hub import (
    StateDictSplit,
    get_torch_storage_id,
    get_torch_storage_size,
    split_state_dict_into_shards_factory,
)
from torch import Tensor, nn
from transformers import modeling_utils

from autoparallel import errors
from autoparallel.errors import AutoParallelError, StorageError, WorkerError
from autoparallel.runtime.deferred import Deferred, Held, take, whole
from autoparallel.runtime.lazy import LazyParameter
from autoparallel.runtime.parameters import Parameters
from autoparallel.runtime.placement import on_first_rank

INCOMPLETE = ".incomplete"
"""Folder inside the target that holds files until all of them are complete."""
_DTYPES = {dtype: name for name, dtype in modeling_utils.str_to_torch_dtype.items()}


@dataclass(frozen=True)
class _Gathered:
    """A parameter whose pieces are spread over ranks; read by rank 0 only, while the others `_follow`."""

    parameters: Parameters
    index: int

    def read(self, held: Held) -> Tensor:
        dist.broadcast(torch.tensor(self.index), src=0)
        value = on_first_rank(self.parameters, self.parameters.placed[self.index])
        assert value is not None
        return take(value, held)


def save(
    write: Callable[..., None],
    folder: str | os.PathLike[str],
    state: Mapping[str, Any],
    parameters: Parameters | None,
    **options: Any,
) -> None:
    """Write a checkpoint of `state` with transformers' own `save_pretrained`, given as `write` (collective)."""
    failure: AutoParallelError | None = None
    if dist.get_rank() == 0:
        try:
            _write(write, Path(folder), state, options)
        except Exception as error:
            failure = _explained(error, folder)
        if parameters is not None:
            dist.broadcast(torch.tensor(-1), src=0)
    elif parameters is not None:
        _follow(parameters)
    _agree(failure)


def deferred_state(model: nn.Module, names: Mapping[str, Any], parameters: Parameters | None) -> dict[str, Any]:
    """A state dict with these names, in which parameters are deferred: spread over ranks, or still in files."""
    index = {id(p.master): i for i, p in enumerate(parameters.placed)} if parameters is not None else {}
    state: dict[str, Any] = dict(names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in state:
            continue
        if isinstance(parameter, LazyParameter):
            state[name] = parameter.deferred
        elif parameters is None:
            state[name] = parameter.detach()
        else:
            source = _Gathered(parameters, index[id(parameter)])
            state[name] = Deferred.of(source, tuple(parameters.placed[source.index].shape), parameter.dtype)
    return state


def _follow(parameters: Parameters) -> None:
    """Send this rank's pieces of whatever rank 0 asks for."""
    wanted = torch.zeros((), dtype=torch.int64)
    while True:
        dist.broadcast(wanted, src=0)
        if int(wanted) < 0:
            return
        on_first_rank(parameters, parameters.placed[int(wanted)])


def _write(write: Callable[..., None], folder: Path, state: Mapping[str, Any], options: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / INCOMPLETE
    shutil.rmtree(fresh, ignore_errors=True)
    if options.get("push_to_hub"):
        options.setdefault("repo_id", folder.resolve().name)
    streamed = {
        "safe_save_file": write_safetensors,
        "split_torch_state_dict_into_shards": partial(_split_into_shards, folder),
    }
    try:
        with mock.patch.dict(vars(modeling_utils), streamed):
            write(fresh, state_dict=state, **options)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _commit(fresh, folder, variant=options.get("variant"))
    shutil.rmtree(fresh)


def _split_into_shards(folder: Path, state: dict[str, Tensor], **options: Any) -> StateDictSplit:
    """The shards that real tensors would get: views of one storage, as split experts are, stay together. Refuse before
    the first byte what the disk cannot take.
    """
    split = split_state_dict_into_shards_factory(
        state,
        get_storage_id=lambda tensor: get_torch_storage_id(_real(tensor)) or _real(tensor).untyped_storage()._cdata,
        get_storage_size=lambda tensor: get_torch_storage_size(_real(tensor)),
        **options,
    )
    needed, free = split.metadata["total_size"], shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free")
    return split


def _real(tensor: Tensor) -> Tensor:
    """What has the storage that the tensor itself would have."""
    return tensor.meta if isinstance(tensor, Deferred) else tensor


def _commit(fresh: Path, folder: Path, *, variant: str | None) -> None:
    """Move complete files into place; renames need no space. The file that a loader looks for comes last. An index goes
    first where shards of the same names are replaced: no moment shows shards of two checkpoints under one index.
    """
    suffix = re.escape(f".{variant}" if variant else "")
    entry = re.compile(rf"model{suffix}\.safetensors|model\.safetensors\.index{suffix}\.json")
    shard = re.compile(rf"model{suffix}-\d{{5}}-of-\d{{5}}\.safetensors")
    files = [path for path in fresh.rglob("*") if path.is_file()]
    for path in files:
        _to_disk(path)
    new = {path.name for path in files}
    entries = [path for path in folder.iterdir() if entry.fullmatch(path.name)]
    shards = [path for path in folder.iterdir() if shard.fullmatch(path.name)]
    if any(path.name in new for path in shards):
        for path in entries:
            path.unlink()
    for path in sorted(files, key=lambda path: bool(entry.fullmatch(path.name))):
        target = folder / path.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    if any(entry.fullmatch(name) for name in new):
        for path in [*entries, *shards]:
            if path.name not in new:
                path.unlink(missing_ok=True)
    _to_disk(folder)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file (huggingface.co/docs/safetensors, format), one tensor in memory at a time; the bytes are
    those of `safetensors.torch.save_file`, which needs all of them at once.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(whole(tensors[name])))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _explained(error: Exception, folder: str | os.PathLike[str]) -> AutoParallelError:
    if isinstance(error, AutoParallelError):
        return error
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        remedy = "free space or choose another folder; what was saved there before is as it was"
        return StorageError(f"rank 0 could not save to {os.fspath(folder)}", why=why, remedy=remedy)
    return WorkerError(f"rank 0 could not save to {os.fspath(folder)}", why=why)


def _agree(failure: AutoParallelError | None) -> None:
    """Raise rank 0's failure on every rank."""
    message: list[Any] = [None]
    if failure is not None:
        message = [(type(failure).__name__, failure.what, failure.why, failure.remedy)]
    dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        kind, what, why, remedy = message[0]
        raise getattr(errors, kind)(what, why=why, remedy=remedy)
