"""An analysed segment and a set of atoms in, what runs how out: which ops are sharded, which work on this rank's tokens
alone, and whose gradients are left partial sums.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from autoparallel.ir.graph import Graph, Op, Ref
from autoparallel.tensor_parallel.analysis import Analysis, leaving
from autoparallel.tensor_parallel.edits import keeps_last_dim
from autoparallel.tensor_parallel.layout import Layout, Sharding, leaves
from autoparallel.tensor_parallel.rules import base_name
from autoparallel.tensor_parallel.values import Illegal, Placement, Value, numel


@dataclass
class Regions:
    """Found when it is made; raises `Illegal`."""

    graph: Graph
    segment: int
    analysis: Analysis
    sharding: Sharding
    sequence_parallel: bool

    def __post_init__(self) -> None:
        self.made = {op.name for op in self.analysis.ops}
        self.entering = {spec.name for spec in self.graph.boundaries[self.segment]}
        self.leaving = [spec.name for spec in leaving(self.graph, self.segment, self.made)]
        self.uses = Counter(spec.name for op in self.analysis.ops for spec in op.inputs)
        self.uses.update([*self.leaving, *self.graph.outputs])
        self.users: dict[str, list[Op]] = {}
        for op in self.analysis.ops:
            for name in {spec.name for spec in op.inputs}:
                self.users.setdefault(name, []).append(op)
        self.weights = set(self.analysis.parameters)
        """Parameters, and what is computed from nothing else."""
        for op in self.analysis.ops:
            if all(spec.name in self.weights for spec in op.inputs if spec.requires_grad):
                self.weights.add(op.name)
        self.split = {op.name for op in self.analysis.ops if self.is_split(op)}
        self.by_sequence = {op.name for op in self.analysis.ops if self.is_by_sequence(op)}
        self.wanted = self.find_wanted()

    def is_split(self, op: Op) -> bool:
        """Whether some output is sharded or a partial sum."""
        outputs = self.analysis.layouts[op.name]
        for layout in outputs:
            if sum(map(self.sharding.count, layout)) > 1:
                raise Illegal(f"{op.name} would be sharded twice")
        sharded = any(map(self.sharding.is_sharded, outputs))
        summed = [dim for dim in self.analysis.summed[op.name] if self.sharding.count(dim)]
        if any(self.sharding.is_mixed(dim) for dim in summed):
            raise Illegal(f"{op.name} would add up replicated parts of {op.name} more than once")
        if sharded and summed:
            raise Illegal(f"{op.name} would be sharded and a partial sum")
        return sharded or bool(summed)

    def is_by_sequence(self, op: Op) -> bool:
        """Whether the op can work on this rank's tokens alone."""
        if not self.sequence_parallel or op.name in self.split or op.name in self.analysis.whole_sequence:
            return False
        outputs = self.analysis.layouts[op.name]
        inputs = [
            self.analysis.input_layout(op, i)
            for i, spec in enumerate(op.inputs)
            if spec.name in self.made or spec.name in self.entering
        ]
        summed = [[dim] for dim in self.analysis.summed[op.name]]
        clean = all(self.sequence_position(layout) is not None or not self.has_sequence(layout) for layout in inputs)
        return (
            clean
            and all(self.sequence_position(layout) is not None for layout in outputs)
            and not any(map(self.has_sequence, summed))
        )

    def has_sequence(self, layout: Layout) -> bool:
        return any(leaf is self.analysis.seq for dim in layout for leaf in leaves(dim))

    def sequence_position(self, layout: Layout) -> int | None:
        """The dim that is the sequence, if exactly one dim holds it and nothing else."""
        found = [k for k, dim in enumerate(layout) if any(leaf is self.analysis.seq for leaf in leaves(dim))]
        return found[0] if len(found) == 1 and self.analysis.is_sequence(layout[found[0]]) else None

    def find_wanted(self) -> set[str]:
        """Parameters, and ops with a single differentiable input, that only work with partial gradients reads: their
        gradient is left a partial sum, so that one reduction at their source serves all readers.
        """
        wanted: set[str] = set()
        for op in reversed(self.analysis.ops):
            if op.name in self.split or op.name in self.by_sequence:
                continue
            differentiable = [spec for spec in op.inputs if spec.requires_grad]
            kept = op.name in self.leaving or op.name in self.graph.outputs
            if len(differentiable) != 1 or kept or op.name not in self.users:
                continue
            cheap = numel(differentiable[0]) <= numel(op.outputs[0]) or differentiable[0].name in wanted
            if cheap and all(self.reads_in_part(user, op.name, wanted) for user in self.users[op.name]):
                wanted.add(op.name)
        tied = {p.name for p in self.graph.parameters if len(p.segments) > 1}
        for name in self.analysis.parameters.keys() - tied:  # elsewhere a tied one may be read whole
            if all(self.reads_in_part(user, name, wanted) for user in self.users[name]):
                wanted.add(name)
        return wanted

    def reads_in_part(self, user: Op, name: str, wanted: set[str]) -> bool:
        """Whether the gradient that `user` returns for `name` is a partial sum."""
        if user.name in self.split:
            bias = self.deferred_bias(user)
            return bias is None or user.inputs[bias].name != name or self.adds_by_sequence(user)
        return user.name in self.by_sequence or user.name in wanted

    def deferred_bias(self, op: Op) -> int | None:
        """The input that is added once the partial sum is reduced, not by every rank."""
        if not any(self.sharding.count(dim) for dim in self.analysis.summed[op.name]):
            return None
        bias = op.argument("bias") if base_name(op) == "linear" else op.argument("self")
        return bias.index if base_name(op) in ("linear", "addmm") and isinstance(bias, Ref) else None

    def adds_by_sequence(self, op: Op) -> bool:
        """Whether the bias of a partial sum is added to sequence shards, views between them passed over."""
        while self.uses[op.name] == 1 and self.users.get(op.name) and keeps_last_dim(self.users[op.name][0]):
            op = self.users[op.name][0]
        return self.sequence_parallel and self.sequence_position(self.analysis.layouts[op.name][0]) is not None

    def placement_of(self, op: Op, inputs: list[Value]) -> Placement:
        if op.name in self.split:
            sharded = any(map(self.sharding.is_sharded, self.analysis.layouts[op.name]))
            return Placement.SHARDED if sharded else Placement.PARTIAL
        activations = [v for v in inputs if v.name not in self.weights]
        if any(v.placement is Placement.SHARDED for v in activations):
            return Placement.SHARED  # a whole segment cut out of a mixed tensor
        if any(v.placement is Placement.SHARED and v.spec.requires_grad for v in activations):
            return Placement.SHARED
        if op.name in self.by_sequence:
            return Placement.SEQUENCE
        shared = any(v.placement is Placement.SHARED and v.spec.requires_grad for v in inputs)
        return Placement.SHARED if shared or op.name in self.wanted else Placement.WHOLE
