"""Ops made from other ops, and what a rewriting must know of one op alone."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.ir.graph import DTYPE_BYTES, Op, Ref, TensorSpec
from autoparallel.ir.ops import ATTENTION
from autoparallel.tensor_parallel.rules import base_name
from autoparallel.tensor_parallel.values import Placement, Value

_LINEAR = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t",
    "expand", "slice", "select", "index", "alias", "contiguous", "clone", "detach", "neg", "sum", "mul", "div",
}  # fmt: skip


def is_plain_addition(op: Op) -> bool:
    return base_name(op) == "add" and op.argument("alpha", 1) == 1 and len(op.inputs) == 2


def keeps_last_dim(op: Op) -> bool:
    """A view that regroups other dims than the last one, so that a bias may be added before or after it."""
    regroups = base_name(op) in ("view", "reshape", "_unsafe_view", "alias", "contiguous", "clone")
    return regroups and len(op.inputs) == 1 and op.inputs[0].shape[-1] == op.outputs[0].shape[-1]


def is_linear(op: Op) -> bool:
    """In its first input, all others fixed."""
    if base_name(op) == "dropout":
        return op.argument("p") == 0.0
    if base_name(op) == "to":
        return DTYPE_BYTES[op.outputs[0].dtype] <= DTYPE_BYTES[op.inputs[0].dtype]
    return base_name(op) in _LINEAR


def drawing_apart(op: Op, placement: Placement) -> Op:
    """Ranks that hold different parts draw different random numbers; ranks that hold the same draw the same."""
    probability = op.argument("p" if base_name(op) == "dropout" else "dropout", 0.0)
    draws = (base_name(op) == "dropout" or op.target == ATTENTION) and probability != 0.0
    if not draws or placement not in (Placement.SHARDED, Placement.SEQUENCE):
        return op
    return replace(op, arguments=(*op.arguments, ("apart", True)))


def addition(name: str, like: Op) -> Op:
    """`like`'s output plus something of its own, as an op."""
    spec = replace(like.outputs[0], name=name)
    return replace(
        like, name=name, target="aten.add.Tensor", inputs=(like.outputs[0], like.outputs[0]), outputs=(spec,),
        arguments=(("self", Ref(0)), ("other", Ref(1))), is_view=False, is_pointwise=True, saved=(), kept=(),
    )  # fmt: skip


def scaling(name: str, spec: TensorSpec, divisor: int, like: Op) -> Op:
    return replace(
        like, name=name, target="aten.div.Tensor", inputs=(spec,), outputs=(replace(like.outputs[0], name=name),),
        arguments=(("self", Ref(0)), ("other", divisor)), is_view=False, is_pointwise=True, saved=(), kept=(),
    )  # fmt: skip


def without(op: Op, inputs: list[Value], bias: int) -> tuple[Op, list[Value]]:
    """The contraction alone: linear without bias, mm for addmm."""
    kept = [value for index, value in enumerate(inputs) if index != bias]
    specs = tuple(spec for index, spec in enumerate(op.inputs) if index != bias)
    if base_name(op) == "linear":
        arguments = tuple((n, v) for n, v in op.arguments if n != "bias")
        return replace(op, inputs=specs, arguments=arguments), kept
    arguments = (("self", Ref(0)), ("mat2", Ref(1)))
    return replace(op, target="aten.mm.default", inputs=specs, arguments=arguments), kept
