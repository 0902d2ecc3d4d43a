"""A stage's modules in, the same modules with a backward in two halves out: a contraction with a weight passes the
gradient of its input on at once, and makes the weight's own gradient when it is asked to (the I and W of Qi et al.,
arXiv 2401.10241).

Gradients of everything else (norms, biases, embeddings) cost little and are made in the first half.
"""

from __future__ import annotations

from collections import deque
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from autoparallel.ir.ops import DEFERRABLE, Operands


class _Pending(NamedTuple):
    """What one micro-batch left for a weight's gradient."""

    weight: nn.Parameter
    value: Tensor
    output_gradient: Tensor


class DeferredContraction(nn.Module):
    """value · weight + bias; holds what its backwards left, the oldest micro-batch first."""

    def __init__(self, operands: Operands) -> None:
        super().__init__()
        self.operands = operands
        self.pending: deque[_Pending] = deque()

    def forward(self, *args: Any) -> Tensor:
        at = self.operands
        bias = args[at.bias] if at.bias < len(args) else None
        if torch.is_grad_enabled():
            value, weight = args[at.value], args[at.weight]
            output_gradients: list[Tensor] = []
            kept = _Kept.apply(self, output_gradients, value, weight)
            result: Tensor = _Contraction.apply(self, output_gradients, value.requires_grad, kept, weight, bias)
            return result
        return functional.linear(args[at.value], self.matrix(args[at.weight]), bias)

    def matrix(self, weight: Tensor) -> Tensor:
        """[out, in]."""
        return weight.t() if self.operands.weight_is_in_out else weight

    @torch.no_grad()
    def make_weight_gradient(self) -> None:
        """Add the oldest micro-batch's gradient to the weight's."""
        if not self.pending:
            return  # the loss does not depend on this contraction
        weight, value, output_gradient = self.pending.popleft()
        left, right = output_gradient.flatten(0, -2), value.flatten(0, -2)
        if self.operands.weight_is_in_out:
            left, right = right, left
        if weight.dtype.itemsize < 4:  # sums in a wider dtype are made by whoever hooks the gradient
            torch.autograd.backward(weight, left.t() @ right)
        elif weight.grad is None:
            weight.grad = left.t() @ right
        else:
            weight.grad.addmm_(left.t(), right)


class _Kept(torch.autograd.Function):
    """The value, kept for the weight's gradient. It is saved before the contraction runs, so that recomputation, which
    ends with the last tensor that is saved, does not run the last contraction of a block again.
    """

    @staticmethod
    def forward(
        ctx: Any, owner: DeferredContraction, output_gradients: list[Tensor], value: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.owner, ctx.output_gradients, ctx.weight = owner, output_gradients, weight
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, value_gradient: Tensor | None) -> tuple[None, None, Tensor | None, None]:
        (value,) = ctx.saved_tensors
        ctx.owner.pending.append(_Pending(ctx.weight, value, ctx.output_gradients.pop()))
        return None, None, value_gradient, None


class _Contraction(torch.autograd.Function):
    """Leaves the gradient of its output to `_Kept`, whose backward runs next."""

    @staticmethod
    def forward(
        ctx: Any,
        owner: DeferredContraction,
        output_gradients: list[Tensor],
        needs_value: bool,
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.owner, ctx.output_gradients, ctx.needs_value, ctx.weight = owner, output_gradients, needs_value, weight
        return functional.linear(value, owner.matrix(weight), bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[None, None, None, Tensor | None, None, Tensor | None]:
        ctx.output_gradients.append(output_gradient)
        value_gradient = output_gradient @ ctx.owner.matrix(ctx.weight) if ctx.needs_value else None
        bias_gradient = output_gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
        return None, None, None, value_gradient, None, bias_gradient


def defer_weight_gradients(stage: nn.Module) -> None:
    """Replace every contraction with a trained weight, in place."""
    for module in list(stage.modules()):
        if isinstance(module, fx.GraphModule):
            _defer_in(module)


def _defer_in(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        operands = DEFERRABLE.get(str(node.target)) if node.op == "call_function" else None
        if operands is not None and not node.kwargs and _is_trained(module, node.args[operands.weight]):
            module.add_submodule(node.name, DeferredContraction(operands))
            with module.graph.inserting_before(node):
                deferred = module.graph.call_module(node.name, node.args)
            deferred.meta = dict(node.meta)
            node.replace_all_uses_with(deferred)
            module.graph.erase_node(node)
    module.recompile()


def _is_trained(module: fx.GraphModule, weight: Any) -> bool:
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    return bool(attrgetter(str(weight.target))(module).requires_grad)
