"""Whole shapes and literals in, those of one rank out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoparallel.ir.dims import Dim as SymbolicDim
from autoparallel.ir.graph import Argument, Op, Ref, TensorSpec
from autoparallel.tensor_parallel.analysis import Analysis
from autoparallel.tensor_parallel.layout import Dim, Layout, Sharding, size
from autoparallel.tensor_parallel.rules import base_name, bounds
from autoparallel.tensor_parallel.values import Placement, Value


@dataclass(frozen=True)
class LocalSizes:
    """What a rank holds of every dim."""

    analysis: Analysis
    sharding: Sharding
    rank: int

    def spec(self, spec: TensorSpec, layout: Layout, placement: Placement) -> TensorSpec:
        shape = tuple(self.dim(n, dim, placement) for n, dim in zip(spec.shape, layout, strict=True))
        return replace(spec, shape=shape)

    def dim(self, symbolic: SymbolicDim, dim: Dim, placement: Placement) -> SymbolicDim:
        """Of a dim, as an expression: what the ranks of this placement hold of it."""
        by_tokens = placement is Placement.SEQUENCE and self.analysis.is_sequence(dim)
        if not by_tokens and not self.sharding.count(dim):
            return symbolic
        if isinstance(symbolic, int):
            return self.sharding.local_size(dim, self.rank)
        return f"({symbolic})//{self.sharding.degree}"

    def arguments(self, op: Op, inputs: list[Value], outputs: list[Value]) -> tuple[tuple[str, Argument], ...]:
        """Sizes, bounds and counts, as the rank's shapes want them."""
        arguments = dict(op.arguments)
        kind = base_name(op)
        for name in ("size", "shape"):
            sizes = arguments.get(name)
            if isinstance(sizes, tuple) and kind in ("view", "reshape", "_unsafe_view", "expand", "broadcast_to"):
                wholes, locals_ = op.outputs[0].shape, outputs[0].spec.shape
                sized = zip(sizes, wholes, locals_, strict=True)
                arguments[name] = tuple(given if given == -1 or whole == n else n for given, whole, n in sized)
        if kind in ("slice", "select") and self.sharding.is_sharded(inputs[0].layout):
            self._set_bounds(op, arguments, inputs[0])
        if kind == "repeat_interleave" and isinstance(arguments.get("dim"), int):
            k = arguments["dim"]
            assert isinstance(k, int)
            before = self.sharding.local_size(inputs[0].layout[k], self.rank)
            arguments["repeats"] = self.sharding.local_size(outputs[0].layout[k], self.rank) // before
        return tuple(arguments.items())

    def _set_bounds(self, op: Op, arguments: dict[str, Argument], source: Value) -> None:
        k = op.argument("dim", 0)
        assert isinstance(k, int)
        dim = source.layout[k]
        if not self.sharding.count(dim):
            return
        held = self.sharding.global_indices(dim, self.rank)
        if base_name(op) == "select":
            index = op.argument("index")
            assert isinstance(index, int)
            arguments["index"] = int((held < index % size(dim)).sum())
            return
        start, end = bounds(op, size(dim))
        if op.argument("step", 1) != 1:
            arguments["end"] = len(held)
            return
        arguments["start"], arguments["end"] = int((held < start).sum()), int((held < end).sum())


def as_split_with_sizes(op: Op) -> Op:
    k = op.argument("dim", 0)
    assert isinstance(k, int)
    sizes = tuple(spec.shape[k] for spec in op.outputs)
    arguments = (("self", Ref(0)), ("split_sizes", sizes), ("dim", k))
    return replace(op, target="aten.split_with_sizes.default", arguments=arguments)
