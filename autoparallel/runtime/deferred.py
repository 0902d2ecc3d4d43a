"""Tensors whose values come later: a `Deferred` has a shape and a dtype, and notes how it is made from what it was made
of, down to tensors in files or spread over ranks.

transformers renames, casts, merges and splits weights when it loads and when it saves. Handed deferred tensors, its own
code does that to notes instead of values; each parameter can then be made by itself, where its values are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Held = tuple[NDArray[np.int64] | None, ...]
"""By dim, the indices that are held, ascending; None for all of them."""


class Source(Protocol):
    """Where the values of a deferred tensor lie."""

    def read(self, held: Held) -> Tensor:
        """The held part of the tensor, in memory of its own on the CPU."""


@dataclass(frozen=True)
class _Call:
    """An operator and what it was called with; `output` picks one of several results."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int


class Deferred(Tensor):
    """A tensor on meta that knows how to get its values; operators on it make further ones."""

    meta: Tensor
    origin: Source | _Call

    @staticmethod
    def __new__(cls, meta: Tensor, origin: Source | _Call) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=meta.device
        )
        made.meta, made.origin = meta, origin
        return made

    @classmethod
    def of(cls, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred:
        return cls(torch.empty(shape, dtype=dtype, device="meta"), source)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} writes into a tensor whose values are not there")
        kwargs = {name: value for name, value in (kwargs or {}).items() if name not in ("device", "non_blocking")}
        results, spec = tree_flatten(func(*tree_map(_meta, args), **tree_map(_meta, kwargs)))
        made = [
            cls(result, _Call(func, args, kwargs, output)) if isinstance(result, Tensor) else result
            for output, result in enumerate(results)
        ]
        return tree_unflatten(made, spec)

    def data_ptr(self) -> int:
        """As of a tensor on meta."""
        return 0


def whole(tensor: Tensor) -> Tensor:
    """The value of a deferred tensor; any other as it is."""
    return part(tensor, (None,) * tensor.dim())


def part(tensor: Tensor, held: Held) -> Tensor:
    """The held part of a tensor. Only that part is read where the value is a source's but for its dtype; what is merged
    or split from sources is made whole first.
    """
    if not isinstance(tensor, Deferred):
        return take(tensor, held)
    origin = tensor.origin
    if not isinstance(origin, _Call):
        return origin.read(held)
    if origin.operator in _KEEPS_PLACES:
        return _evaluate(origin, part(origin.args[0], held))
    args, kwargs = tree_map(_value, (origin.args, origin.kwargs))
    results = tree_flatten(origin.operator(*args, **kwargs))[0]
    return take(results[origin.output], held)


def take(tensor: Tensor, held: Held) -> Tensor:
    """The held part of a tensor that is there: a view where the indices are contiguous."""
    for dim, indices in enumerate(held):
        if indices is None:
            continue
        if _is_run(indices):
            tensor = tensor.narrow(dim, int(indices[0]), len(indices))
        else:
            tensor = tensor.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    return tensor


def put(whole: Tensor, part: Tensor, held: Held) -> None:
    """Write the held part into its places; the indices of at most one dim may be apart."""
    apart = []
    for dim, indices in enumerate(held):
        if indices is not None and _is_run(indices):
            whole = whole.narrow(dim, int(indices[0]), len(indices))
        elif indices is not None:
            apart.append((dim, torch.from_numpy(indices).to(whole.device)))
    if not apart:
        whole.copy_(part)
        return
    ((dim, places),) = apart
    whole.index_copy_(dim, places, part)


def _is_run(indices: NDArray[np.int64]) -> bool:
    return len(indices) > 0 and int(indices[-1] - indices[0]) == len(indices) - 1


def sources(tensor: Tensor) -> list[Source]:
    """Everything that a deferred tensor's value is read from."""
    if not isinstance(tensor, Deferred):
        return []
    if not isinstance(tensor.origin, _Call):
        return [tensor.origin]
    leaves = tree_flatten((tensor.origin.args, tensor.origin.kwargs))[0]
    return [source for leaf in leaves if isinstance(leaf, Tensor) for source in sources(leaf)]


_aten = torch.ops.aten
_KEEPS_PLACES = {
    _aten._to_copy.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.detach.default,
}
"""Operators whose every output element is made of the input's element at the same place."""


def _evaluate(call: _Call, value: Tensor) -> Tensor:
    result: Tensor = call.operator(value, *call.args[1:], **call.kwargs)
    return result


def _meta(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.meta
    return value.to("meta") if isinstance(value, Tensor) else value


def _value(value: Any) -> Any:
    return whole(value) if isinstance(value, Tensor) else value
