"""Tensors of one rank's program, where they stand over the group, and the program itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import prod

from autoparallel.ir.dims import Dim as SymbolicDim
from autoparallel.ir.dims import Shape, evaluate
from autoparallel.ir.graph import Op, TensorSpec
from autoparallel.tensor_parallel.analysis import BATCH, SEQ
from autoparallel.tensor_parallel.layout import Layout, ParameterSplit, Sharding


class Illegal(Exception):
    """These atoms cannot be sharded together."""


class Placement(Enum):
    """Of a tensor over the group; `lower` says what each means."""

    WHOLE = "whole"
    SHARED = "shared"
    SHARDED = "sharded"
    SEQUENCE = "sequence"
    PARTIAL = "partial"


@dataclass(frozen=True)
class Addend:
    """An addition put off until the partial sum it waits for is reduced."""

    op: Op
    other: Value
    other_index: int


@dataclass(frozen=True)
class Value:
    """A tensor of the lowered program."""

    spec: TensorSpec
    """Local shape."""
    layout: Layout
    placement: Placement
    owner: str
    """The value whose storage it shares."""
    pending: tuple[Addend, ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True, eq=False)
class LoweredSegment:
    """One segment as one rank runs it; compared by identity."""

    ops: tuple[Op, ...]
    """With local shapes; conversions have targets of `ir.ops.CONVERSIONS`."""
    results: dict[str, Value]
    """What holds each tensor that later segments read, or the program returns."""
    entering: tuple[TensorSpec, ...]
    parameters: dict[str, Layout]
    shared_parameters: frozenset[str]
    """Whole on every rank, their gradients partial sums: to be summed over the group once a step."""
    sharding: Sharding
    replicated: frozenset[str]
    """Ops that every rank runs on the same whole tensors."""
    without_rule: frozenset[str]
    """Targets of the ops that no rule fits."""

    def split_of(self, parameter: str) -> ParameterSplit:
        return ParameterSplit(self.parameters[parameter], self.sharding)


def numel(spec: TensorSpec) -> int:
    """At the stand-in sizes, made divisible."""
    return prod(evaluate(dim, batch=BATCH, seq=SEQ * 27720) for dim in spec.shape)


def numel_text(shape: Shape) -> SymbolicDim:
    if all(isinstance(n, int) for n in shape):
        return prod(n for n in shape if isinstance(n, int))
    return "*".join(f"({n})" for n in shape)


def scaled(numel: SymbolicDim, factor: Fraction) -> SymbolicDim:
    if factor == 1:
        return numel
    return f"({numel})*{factor.numerator}//{factor.denominator}"
