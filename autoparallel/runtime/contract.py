"""torch's own functions that look at all gradients at once, made to see the whole model instead of this rank's piece.

`clip_grad_norm_` would clip by the local norm and `GradScaler` would skip a step on one rank only: wrong numbers, no
error. Both are mended where they look their helper up at call time, so a function that the user imported early is
mended too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from autoparallel.errors import ContractError
from autoparallel.runtime.parameters import Parameters, Placed

_live: weakref.WeakSet[Parameters] = weakref.WeakSet()


def watch(parameters: Parameters) -> None:
    """Mend torch's functions for these parameters, whose gradients are spread over ranks, for as long as they live."""
    _mend_torch()
    _live.add(parameters)


@cache
def _mend_torch() -> None:
    clip_grad._get_total_norm = _global_norm(clip_grad._get_total_norm)
    clip_grad._clip_grads_with_norm_ = _clipping_what_is_held(clip_grad._clip_grads_with_norm_)
    public = torch.no_grad()(clip_grad._get_total_norm)
    for place in (clip_grad, torch.nn.utils):
        setattr(place, "get_total_norm", public)  # noqa: B010 torch's stubs lack the name
    torch.optim.Optimizer.state_dict = _whole_state(torch.optim.Optimizer.state_dict)  # type: ignore[method-assign]
    for wrapper in (DistributedDataParallel, DataParallel):
        wrapper.__init__ = _never_ours(wrapper.__init__)  # type: ignore[method-assign]
    GradScaler._unscale_grads_ = _agreed_overflow(GradScaler._unscale_grads_)  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(_check_optimizer)
    register_optimizer_step_pre_hook(_hide_what_is_not_held)
    register_optimizer_step_post_hook(_show_what_is_not_held)


def _counted_of_ours() -> dict[int, Tensor | None]:
    """For every gradient of ours, what of this rank's piece counts."""
    return {
        id(p.master.grad): parameters.counted(p, p.master.grad)
        for parameters in _live
        for p in parameters.placed
        if p.master.grad is not None
    }


def _global_norm(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(original)
    def total_norm(
        tensors: Tensor | Iterable[Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        ours = _counted_of_ours()
        if not any(id(t) in ours for t in tensors) or not any(parameters.spread for parameters in _live):
            return original(tensors, norm_type, error_if_nonfinite, foreach)
        # Tensors that are not ours are whole on every rank: rank 0's copy counts.
        counted = [ours.get(id(t), t if dist.get_rank() == 0 else None) for t in tensors]
        present = [t for t in counted if t is not None and t.numel() > 0]
        norm = _reduce_norm(present, float(norm_type), like=tensors[0])
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"The total norm of order {norm_type} for gradients is non-finite ({norm.item()})")
        return norm

    return total_norm


def _reduce_norm(tensors: list[Tensor], norm_type: float, *, like: Tensor) -> Tensor:
    """The norm over all ranks of their local tensors' concatenation."""
    dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
    total = torch.zeros((), dtype=dtype, device=like.device)
    if tensors:
        norms = torch.stack(torch._foreach_norm(tensors, norm_type))
        total = torch.linalg.vector_norm(norms, norm_type, dtype=dtype)
    if norm_type == float("inf"):
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
    else:
        total = total**norm_type
        dist.all_reduce(total)
        total = total ** (1.0 / norm_type)
    return total.to(like.dtype)


def _clipping_what_is_held(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def clip(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        original([p for p in given if p.grad is None or p.grad.numel() > 0], *args, **kwargs)

    return clip


def _agreed_overflow(original: Callable[..., dict[torch.device, Tensor]]) -> Callable[..., dict[torch.device, Tensor]]:
    @wraps(original)
    def unscale(self: GradScaler, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        found = original(self, *args, **kwargs)
        if _live:
            for flag in found.values():
                dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return found

    return unscale


# Steps each element by itself, so that a shard is stepped as it would be inside the whole tensor.
_ELEMENTWISE = {"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"}
# Mixes all parameters of the model in one decision, which no rank can take alone.
_GLOBAL = {"LBFGS"}


def _ours() -> dict[int, tuple[Parameters, Placed]]:
    return {id(p.master): (parameters, p) for parameters in _live for p in parameters.placed}


def _hide_what_is_not_held(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """An optimizer has nothing to do, and no state to keep, for parameters of other stages."""
    for p in _not_held():
        if p.master.grad is p.nothing:
            p.master.grad = None
            p.hidden = True


def _show_what_is_not_held(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for p in _not_held():
        if p.hidden:
            p.master.grad, p.hidden = p.nothing, False


def _not_held() -> Iterator[Placed]:
    return (p for parameters in _live for p in parameters.placed if p.leaf is None and p.stages)


def _whole_state(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`optimizer.state_dict()` holds whole moments, as on one device (collective: every rank's loop calls it)."""

    @wraps(original)
    def state_dict(self: torch.optim.Optimizer) -> dict[str, Any]:
        found, ours = original(self), _ours()
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in found["param_groups"] for index in group["params"]]
        mine = {i: p for i, p in zip(indices, parameters, strict=True) if id(p) in ours}
        if not mine:
            return found
        described: list[dict[int, dict[str, Any]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(described, {i: _described(found["state"].get(i, {}), p) for i, p in mine.items()})
        for index, parameter in mine.items():
            owner, placed = ours[id(parameter)]
            held = found["state"].get(index, {})
            state = described[owner.first_holder(placed)][index]
            for key, value in state.items():
                if isinstance(value, _Moment):
                    piece = held[key] if key in held else parameter.new_empty(parameter.shape, dtype=value.dtype)
                    state[key] = owner.whole(placed, piece)
            if state:
                found["state"][index] = state
        return found

    return state_dict


class _Moment(NamedTuple):
    """A tensor of an optimizer's state that is laid out as its parameter."""

    dtype: torch.dtype


def _described(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """An optimizer's state of one parameter with its moments left out: a rank keeps none of what it does not hold."""
    return {key: _Moment(value.dtype) if _is_moment(value, parameter) else value for key, value in state.items()}


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _fit_state(optimizer: torch.optim.Optimizer, ours: dict[int, tuple[Parameters, Placed]]) -> None:
    """Cut moments that are still whole (loaded, or made before the plan) to this rank's piece."""
    for parameter, state in optimizer.state.items():
        if id(parameter) not in ours:
            continue
        owner, placed = ours[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape == placed.shape != parameter.shape:
                state[key] = owner.piece(placed, value).clone()


def _never_ours(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def init(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if any(hasattr(part, "_parallel") for part in module.modules()):
            raise ContractError(
                f"{type(self).__name__} around a compiled model",
                why="the model is parallel already",
                remedy="leave the wrapper out; what wraps by itself must be set up after the one line",
            )
        original(self, module, *args, **kwargs)

    return init


def _check_optimizer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse an optimizer that would silently compute something else on this rank's piece of the parameters."""
    ours = _ours()
    touched = [ours[id(p)][0] for group in optimizer.param_groups for p in group["params"] if id(p) in ours]
    if not touched:
        return
    name = type(optimizer).__name__
    bases = {base.__name__ for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim")}
    if _GLOBAL & bases and dist.get_world_size() > 1:
        raise ContractError(
            f"{name} needs every gradient in one place", remedy="use a first-order optimizer such as AdamW"
        )
    if any(parameters.sharded or parameters.mesh.tensor_parallel > 1 for parameters in touched) and not (
        _ELEMENTWISE & bases
    ):
        raise ContractError(
            f"{name} may look at a whole matrix, but the plan shards parameters",
            why="its update of a shard would differ from its update of the whole tensor, silently",
            remedy="add distribute_parameter=False and tensor_parallel=1 to the constraints, or use one of "
            + ", ".join(sorted(_ELEMENTWISE)),
        )
    _fit_state(optimizer, ours)
