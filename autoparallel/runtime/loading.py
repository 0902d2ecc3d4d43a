"""`from_pretrained` without reading: our only contact with how transformers loads.

transformers resolves the files, renames, converts, ties, initialises what is missing and rebuilds buffers, all by its
own code; in place of tensors it gets deferred ones, so that parameters come out lazy (`runtime/lazy.py`). What cannot
be deferred is loaded as always, with a line that says why and what it costs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from loguru import logger
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype

from autoparallel.errors import CheckpointError, ConfigError
from autoparallel.runtime.deferred import Deferred, Held, sources, take, whole
from autoparallel.runtime.lazy import LazyParameter

BLOCK_BYTES = 32 << 20
"""What is mapped of a file at a time: pages of a mapping count as the process's memory until it is closed."""
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class File:
    """One safetensors file, as it was when the model was loaded."""

    path: str
    state: tuple[int, int, int]

    @classmethod
    def at(cls, path: str) -> File:
        return cls(path, cls._state(path))

    @staticmethod
    def _state(path: str) -> tuple[int, int, int]:
        try:
            found = os.stat(path)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        return found.st_ino, found.st_size, found.st_mtime_ns

    @property
    def size_bytes(self) -> int:
        return self.state[1]

    def open(self) -> Any:
        """The file, mapped; a context manager."""
        if self._state(self.path) != self.state:
            raise CheckpointError(
                f"{self.path} is not the file that from_pretrained saw",
                why="weights are read at the first training step, and it was replaced or written to before that",
                remedy="save elsewhere, or run a training step before you save over it",
            )
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, str(error)) from error

    @cached_property
    def fingerprint(self) -> bytes:
        """Of the size and of samples of the content: training moves every tensor, so other weights show in samples."""
        digest = hashlib.sha256(str(self.size_bytes).encode())
        with open(self.path, "rb") as file:
            for offset in np.linspace(0, max(self.size_bytes - _SAMPLE_BYTES, 0), _SAMPLES, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.digest()


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file."""

    file: File
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, held: Held) -> Tensor:
        """The held part, block by block of the first dim."""
        sizes = [n if indices is None else len(indices) for n, indices in zip(self.shape, held, strict=True)]
        result = torch.empty(sizes, dtype=self.dtype)
        if result.dim() == 0 or result.numel() == 0:
            return self._scalar() if result.dim() == 0 else result
        rows = np.arange(self.shape[0]) if held[0] is None else held[0]
        step = max(1, BLOCK_BYTES * self.shape[0] // (self.dtype.itemsize * int(np.prod(self.shape))))
        first = int(rows[0])
        while first <= rows[-1]:
            start, stop = np.searchsorted(rows, [first, first + step])
            with self.file.open() as file:
                block = file.get_slice(self.key)[first : min(first + step, self.shape[0])]
                result[start:stop] = take(block, (rows[start:stop] - first, *held[1:]))
                del block
            first = int(rows[stop]) if stop < len(rows) else self.shape[0]
        return result

    def _scalar(self) -> Tensor:
        with self.file.open() as file:
            value: Tensor = file.get_tensor(self.key).clone()
            return value


def load_lazily() -> None:
    """From here on `from_pretrained` reads no weights."""
    if not _is_lazy():
        plain = PreTrainedModel._load_pretrained_model
        PreTrainedModel._load_pretrained_model = staticmethod(_deferring(plain))  # type: ignore[method-assign]


def _is_lazy() -> bool:
    """The same on every rank: `load_lazily` follows a launch, which all of them take part in."""
    return hasattr(PreTrainedModel._load_pretrained_model, "_autoparallel")


def _deferring(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None) -> Any:
        reason = _why_not(state_dict, checkpoint_files, load_config)
        if not reason:
            files = [File.at(path) for path in checkpoint_files]
            tensors = {name: tensor for file in files for name, tensor in _tensors(file).items()}
            on_meta = dataclasses.replace(load_config, device_map={"": "meta"})
            found = plain(model, tensors, None, on_meta, expected_keys)
            failures = found[0].conversion_errors
            if not failures:
                _make_lazy(model, files, _device(load_config))
                return found
            reason = f"its weights are converted in a way that needs their values ({next(iter(failures))})"
        if checkpoint_files:
            size = sum(os.path.getsize(path) for path in checkpoint_files)
            logger.info(
                "{} is loaded whole by every rank, {:.2f} GiB of host memory each: {}.",
                load_config.pretrained_model_name_or_path,
                size / 2**30,
                reason,
            )
        return plain(model, state_dict, checkpoint_files, load_config, expected_keys)

    load._autoparallel = True  # type: ignore[attr-defined]
    return load


def _why_not(state_dict: Any, checkpoint_files: Any, load_config: Any) -> str:
    """Why the weights cannot be deferred, or ""."""
    if load_config.is_quantized:
        return "it is quantized or GGUF"
    if state_dict is not None or not checkpoint_files:
        return "its weights were given as a state dict"
    if not all(str(path).endswith(".safetensors") for path in checkpoint_files):
        return "its weights are not safetensors"
    if load_config.device_mesh is not None:
        return "transformers distributes it"
    if load_config.disable_mmap:
        return "disable_mmap is set"
    places = set((load_config.device_map or {}).values())
    return "device_map spreads it over devices" if len(places) > 1 or "disk" in places else ""


def _device(load_config: Any) -> torch.device:
    places = list((load_config.device_map or {"": "cpu"}).values())
    return torch.device("cuda", places[0]) if isinstance(places[0], int) else torch.device(places[0])


def _tensors(file: File) -> dict[str, Deferred]:
    """Every tensor of a file, deferred."""
    found = {}
    with file.open() as opened:
        for key in opened.keys():  # noqa: SIM118 not a mapping
            part = opened.get_slice(key)
            shape, dtype = tuple(part.get_shape()), str_to_torch_dtype[part.get_dtype()]
            found[key] = Deferred.of(FileTensor(file, key, shape, dtype), shape, dtype)
    return found


def _make_lazy(model: nn.Module, files: list[File], device: torch.device) -> None:
    """Deferred parameters become lazy ones; buffers, which no placement cuts, are read."""
    use = _FirstUse(type(model).__name__, sum(file.size_bytes for file in files))
    made: dict[int, LazyParameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if isinstance(value, Deferred):
                if id(value) not in made:
                    made[id(value)] = LazyParameter.of(
                        _without_autograd(value), requires_grad=value.requires_grad, on_use=use.note, device=device
                    )
                    made[id(value)]._is_hf_initialized = True
                module._parameters[name] = made[id(value)]
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Deferred):
                module._buffers[name] = whole(buffer).to(device)
                module._buffers[name]._is_hf_initialized = True  # type: ignore[union-attr]


def _without_autograd(value: Any) -> Deferred:
    """The tensor that a parameter was made of."""
    return Deferred(value.meta, value.origin)


@dataclass
class _FirstUse:
    """Says once that a model's values are needed before there is a plan."""

    model: str
    size_bytes: int
    noted: bool = field(default=False)

    def note(self) -> None:
        if not self.noted:
            self.noted = True
            logger.info(
                "Weights of {} are used before its first training step: each rank reads them whole, {:.2f} GiB.",
                self.model,
                self.size_bytes / 2**30,
            )


def check_values(model: nn.Module) -> None:
    """Refuse a parameter that has a shape and nothing else."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"{name} is on the meta device, and no file is known to hold its value",
                why="training starts from the model's own weights",
                remedy="load the model with from_pretrained after enable_advanced_parallelization(), "
                "or give it values: model.to_empty(device=...) and model.init_weights()",
            )


def agree_on_lazy(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that every rank can read from the same files; the others are made real (collective)."""
    if not _is_lazy():
        return frozenset()
    lazy = {name: p.deferred for name, p in model.named_parameters() if isinstance(p, LazyParameter)}
    files = {source.file for d in lazy.values() for source in sources(d) if isinstance(source, FileTensor)}
    prints = {(Path(file.path).name, file.fingerprint) for file in files}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (set(lazy), prints))
    agreed = frozenset(lazy).intersection(*(names for names, _ in found))
    if agreed:
        _check_same([prints for _, prints in found])
    return agreed


def _check_same(prints: list[set[tuple[str, bytes]]]) -> None:
    """A rank may lack a file whose parameters it has read already."""
    for name, expected in sorted(prints[0]):
        others = [r for r, found in enumerate(prints) if (name, expected) not in found and name in dict(found)]
        if others:
            raise CheckpointError(
                f"ranks {others} have another {name} than rank 0",
                why="each rank reads its part of the weights from its own host's files, and theirs differ",
                remedy="copy the same checkpoint to every host",
            )


def _damaged(path: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read", why=why, remedy="copy or download the checkpoint again; a shard may be cut short"
    )
