"""A parameter whose value is still in its file. It has the shape, dtype and device that it will have, so optimizers,
`.to()` and adapters take it as it is; placement reads only a rank's piece of it. Whatever else looks at its values
makes it an ordinary parameter first, whole: the same object, the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoparallel.runtime.deferred import Deferred, Held, part, whole

_set_data = Tensor.data.__set__  # type: ignore[attr-defined]


class LazyParameter(nn.Parameter):
    """Made by `LazyParameter.of`; an ordinary Parameter from the moment its values are needed."""

    deferred: Deferred
    on_use: Callable[[], None]

    @classmethod
    def of(
        cls, deferred: Deferred, *, requires_grad: bool, on_use: Callable[[], None], device: torch.device
    ) -> LazyParameter:
        """`on_use` is called before the whole value is read because something looked at it."""
        made: LazyParameter = cls(_placeholder(deferred, device), requires_grad)
        made.deferred, made.on_use = deferred, on_use
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _CONVERSIONS and isinstance(args[0], LazyParameter):
            return args[0]._converted(func, *args[1:], **kwargs)
        if func == _set_data and isinstance(args[0], LazyParameter):
            return args[0]._set_data(args[1])
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, LazyParameter):
                value.materialize()
        return func(*args, **kwargs)

    def materialize(self) -> None:
        """Read the whole value."""
        self.on_use()
        self.settle(whole(self.deferred).to(self.device))

    def piece(self, held: Held) -> Tensor:
        """Read a part of the value, into memory of its own."""
        return part(self.deferred, held)

    def settle(self, value: Tensor) -> None:
        """Become an ordinary parameter that holds `value`."""
        with torch._C.DisableTorchFunctionSubclass():
            self.data = value
        del self.deferred, self.on_use
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def _converted(self, convert: Any, *args: Any, **kwargs: Any) -> LazyParameter:
        """`.to()`, `.cuda()`, `.half()` and the like: a note of the dtype, and a placeholder on the device."""
        probe = convert(torch.empty(0, dtype=self.dtype, device=self.device), *args, **kwargs)
        if probe.dtype == self.dtype and probe.device == self.device:
            return self
        deferred: Any = self.deferred.to(probe.dtype)
        return LazyParameter.of(deferred, requires_grad=self.requires_grad, on_use=self.on_use, device=probe.device)

    def _set_data(self, value: Tensor) -> None:
        if not isinstance(value, LazyParameter):
            self.settle(value)
        elif value is not self:
            self.deferred = value.deferred
            with torch._C.DisableTorchFunctionSubclass():
                self.data = _placeholder(value.deferred, value.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyParameter:
        made = LazyParameter.of(self.deferred, requires_grad=self.requires_grad, on_use=self.on_use, device=self.device)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.materialize()
        return self.__reduce_ex__(protocol)


def _placeholder(deferred: Deferred, device: torch.device) -> Tensor:
    """One element, seen as the whole shape: what slips past us computes NaN, and what writes into it fails."""
    fill: Any = float("nan") if deferred.dtype.is_floating_point else 0
    return torch.full((1,), fill, dtype=deferred.dtype, device=device).expand(deferred.shape)


def _accessors(*names: str) -> set[Any]:
    """Getters and setters of a tensor's properties, as `__torch_function__` is told of them."""
    found = [getattr(Tensor, name) for name in names]
    return {p.__get__ for p in found} | {p.__set__ for p in found}


_WITHOUT_VALUES: set[Any] = {
    *_accessors(
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "itemsize",
        "nbytes", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "retains_grad", "_backward_hooks",
        "_post_accumulate_grad_hooks",
    ),
    *(getattr(Tensor, name) for name in (
        "size", "dim", "numel", "nelement", "element_size", "get_device", "is_floating_point", "is_complex",
        "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "__len__",
    )),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    torch._has_compatible_shallow_copy_type,
}  # fmt: skip
_CONVERSIONS: set[Any] = {
    getattr(Tensor, name) for name in ("to", "cuda", "cpu", "half", "bfloat16", "float", "double")
}
