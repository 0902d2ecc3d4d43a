"""The collectives of tensor parallelism as autograd-aware functions: what the nodes of an emitted program call.

Named and paired as `ir.ops.CONVERSIONS` says (f and g of Megatron-LM, arXiv 1909.08053, and their sequence-parallel
counterparts, arXiv 2205.05198). `group` is the name of a process group. Built on torch's functional collectives, so a
stage can be compiled, run on fake tensors, and intercepted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


def _all_reduce(value: Tensor, group: str, op: str = "sum") -> Tensor:
    result: Tensor = _ops.wait_tensor(_ops.all_reduce(value.contiguous(), op, group))
    return result


def _all_gather(value: Tensor, dim: int, degree: int, group: str) -> Tensor:
    gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(value.contiguous(), degree, group))
    return gathered if dim == 0 else torch.cat(gathered.chunk(degree), dim)


def _reduce_scatter(value: Tensor, dim: int, degree: int, group: str) -> Tensor:
    blocks = value if dim == 0 else torch.cat(value.chunk(degree, dim))
    result: Tensor = _ops.wait_tensor(_ops.reduce_scatter_tensor(blocks.contiguous(), "sum", degree, group))
    return result


def _own_part(value: Tensor, dim: int, rank: int, degree: int) -> Tensor:
    return value.chunk(degree, dim)[rank]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        return _all_reduce(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, degree: int, group: str) -> Tensor:
        ctx.arguments = (dim, degree, group)
        return _reduce_scatter(value, dim, degree, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(gradient, *ctx.arguments), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, degree: int, group: str) -> Tensor:
        ctx.arguments = (dim, degree, group)
        return _all_gather(value, dim, degree, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter(gradient, *ctx.arguments), None, None, None


class _AllGatherWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, rank: int, degree: int, group: str) -> Tensor:
        ctx.arguments = (dim, rank, degree)
        return _all_gather(value, dim, degree, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _own_part(gradient, *ctx.arguments), None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, rank: int, degree: int, group: str) -> Tensor:
        ctx.arguments = (dim, degree, group)
        return _own_part(value, dim, rank, degree).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(gradient, *ctx.arguments), None, None, None, None


def all_reduce(input: Tensor, *, group: str, rank: int, degree: int) -> Tensor:
    """Sum of all ranks' addends; the gradient passes as it is."""
    result: Tensor = _AllReduce.apply(input, group)
    return result


def copy(input: Tensor, *, group: str, rank: int, degree: int) -> Tensor:
    """The same tensor; its gradients from all ranks are summed."""
    result: Tensor = _Copy.apply(input, group)
    return result


def reduce_scatter(input: Tensor, *, dim: int, group: str, rank: int, degree: int) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' addends; gradients are gathered."""
    result: Tensor = _ReduceScatter.apply(input, dim, degree, group)
    return result


def all_gather(input: Tensor, *, dim: int, group: str, rank: int, degree: int) -> Tensor:
    """All ranks' parts along `dim`; each rank gets its part of the sum of the gradients."""
    result: Tensor = _AllGather.apply(input, dim, degree, group)
    return result


def all_gather_whole(input: Tensor, *, dim: int, group: str, rank: int, degree: int) -> Tensor:
    """All ranks' parts along `dim`, for work that every rank does alike: its gradient is cut, not summed."""
    result: Tensor = _AllGatherWhole.apply(input, dim, rank, degree, group)
    return result


def scatter(input: Tensor, *, dim: int, group: str, rank: int, degree: int) -> Tensor:
    """This rank's part along `dim` of a tensor that all have; gradients are gathered."""
    result: Tensor = _Scatter.apply(input, dim, rank, degree, group)
    return result


def narrow(input: Tensor, *, dim: int, length: int | None, inner: int, group: str, rank: int, degree: int) -> Tensor:
    """This rank's part of a dim read as (outer, length, inner), cut along `length`; None for the whole dim."""
    if length is None:
        return _own_part(input, dim, rank, degree)
    parts = input.unflatten(dim, (-1, length, inner))
    return _own_part(parts, dim + 1, rank, degree).flatten(dim, dim + 2)


def embedding(
    weight: Tensor,  # [rows of this rank, hidden]
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    first: int,
    group: str,
    rank: int,
    degree: int,
) -> Tensor:
    """A lookup in the rows `first ..` of a table, zeros for the other ranks' rows: the ranks' results add up."""
    local = indices - first
    ours = (local >= 0) & (local < weight.shape[0])
    padding = padding_idx - first
    found = torch.nn.functional.embedding(
        torch.where(ours, local, 0), weight, padding if padding_idx >= 0 and 0 <= padding < weight.shape[0] else None
    )
    return torch.where(ours[..., None], found, torch.zeros((), dtype=found.dtype, device=found.device))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, first: int, ignored: int, group: str) -> Tensor:
        counted = target != ignored
        local = torch.where(counted, target - first, -1)
        ours = (local >= 0) & (local < logits.shape[1])
        column = torch.where(ours, local, 0)[:, None]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = _all_reduce(wide.amax(1), group, "max")
        exponentials = (wide - largest[:, None]).exp_()
        found = torch.where(ours, wide.gather(1, column)[:, 0], 0.0)
        total, at_target = _all_reduce(torch.stack([exponentials.sum(1), found]), group)
        ctx.save_for_backward(exponentials.div_(total[:, None]), column, ours, counted)
        ctx.dtype = logits.dtype
        losses = torch.where(counted, total.log() + largest - at_target, 0.0)
        return losses.sum().to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, column, ours, counted = ctx.saved_tensors
        result = probabilities.scatter_add(1, column, -ours[:, None].to(probabilities.dtype))
        result.mul_((counted * gradient)[:, None])
        return result.to(ctx.dtype), None, None, None, None


def cross_entropy(
    logits: Tensor,  # [tokens, classes of this rank]
    target: Tensor,  # [tokens], of all classes
    *,
    first: int,
    ignore_index: int,
    group: str,
    rank: int,
    degree: int,
) -> Tensor:
    """Summed cross entropy over classes that are sharded: no rank ever holds all logits (arXiv 1909.08053)."""
    result: Tensor = _CrossEntropy.apply(logits, target, first, ignore_index, group)
    return result


FUNCTIONS = {
    f"tensor_parallel.{function.__name__}": function
    for function in (
        all_reduce, copy, reduce_scatter, all_gather, all_gather_whole, scatter, narrow, embedding, cross_entropy,
    )
}  # fmt: skip
"""By the targets of `ir.ops`."""
