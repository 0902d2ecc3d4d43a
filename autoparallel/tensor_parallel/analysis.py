"""One segment of the graph in, the layout of every tensor in it out: what tensor parallelism may shard there.

Each segment is read on its own, so equal blocks are read once. Its entering and leaving tensors are whole in every dim
but the sequence; parameters start as unknown leaves and get their structure from the ops that use them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from autoparallel.ir.dims import Dim as SymbolicDim
from autoparallel.ir.dims import evaluate
from autoparallel.ir.graph import Graph, Op, TensorSpec
from autoparallel.tensor_parallel.layout import (
    Atom,
    Dim,
    Layout,
    Misfit,
    block,
    leaves,
    new,
    root,
)
from autoparallel.tensor_parallel.rules import GETITEM, Reading, contains, read

# Stand-ins for the symbolic sizes: primes, so that no view takes heads or channels for rows or tokens.
BATCH, SEQ = 1_000_003, 1_000_033


@dataclass
class Analysis:
    """Layouts by tensor name; an op with several outputs has its layouts by `name`, in a list."""

    ops: list[Op]
    parameters: dict[str, Layout]
    batch: Atom
    seq: Atom
    layouts: dict[str, list[Layout]] = field(default_factory=dict)
    summed: dict[str, list[Dim]] = field(default_factory=dict)
    whole_sequence: set[str] = field(default_factory=set)
    """Ops that need the whole sequence."""
    unknown: list[str] = field(default_factory=list)
    """Ops without a rule that fits, computed on whole tensors."""

    def input_layout(self, op: Op, index: int) -> Layout:
        spec = op.inputs[index]
        if spec.name in self.parameters:
            return self.parameters[spec.name]
        if spec.name not in self.layouts:
            self.layouts[spec.name] = [[self.fresh(dim) for dim in spec.shape]]  # free, or from outside
        layouts = self.layouts[spec.name]
        return layouts[_item(op)] if op.target == GETITEM else layouts[0]

    def fresh(self, dim: SymbolicDim, *, blocked: bool = False) -> Dim:
        known: dict[SymbolicDim, Dim] = {"batch": [self.batch], "seq": [self.seq], "batch*seq": [self.batch, self.seq]}
        if dim in known:
            return known[dim]
        return new(evaluate(dim, batch=BATCH, seq=SEQ), blocked=blocked)

    def is_sequence(self, dim: Dim) -> bool:
        """Whether the dim is the sequence and nothing else."""
        return [root(atom) for atom in dim] == [self.seq]

    def shardable(self) -> dict[Atom, tuple[tuple[str, int], ...]]:
        """Leaves of matrices that no op needs whole, with the parameter dims they are in."""
        found: dict[Atom, list[tuple[str, int]]] = {}
        for name, layout in self.parameters.items():
            for position, dim in enumerate(layout if len(layout) > 1 else []):
                for leaf in leaves(dim):
                    if not leaf.blocked and not leaf.pinned:
                        found.setdefault(leaf, []).append((name, position))
        return {atom: tuple(places) for atom, places in found.items()}


def _item(op: Op) -> int:
    index = op.argument("index")
    assert isinstance(index, int)
    return index


def analyze(graph: Graph, segment: int) -> Analysis:
    """Read one segment; nothing is decided yet."""
    ops = graph.segment_ops(segment)
    shapes = {p.name: p.shape for p in graph.parameters}
    used = {spec.name for op in ops for spec in op.inputs if spec.name in shapes}
    found = Analysis(
        ops=ops,
        parameters={name: [new(n) for n in shapes[name]] for name in sorted(used)},
        batch=Atom(BATCH, pinned=True, blocked=True),
        seq=Atom(SEQ, pinned=True, blocked=True),
    )
    for spec in graph.boundaries[segment]:
        found.layouts[spec.name] = [[found.fresh(dim, blocked=True) for dim in spec.shape]]
    for op in ops:
        _read(found, op)
    for spec in leaving(graph, segment, {op.name for op in ops}):
        for dim in found.layouts[spec.name][0]:
            block(dim)
    return found


def leaving(graph: Graph, segment: int, made: set[str]) -> list[TensorSpec]:
    """What the segment, which makes the tensors `made`, hands to the next one; others only pass through."""
    following = graph.boundaries[segment + 1] if segment + 1 < graph.num_segments else ()
    return [spec for spec in following if spec.name in made]


def _read(found: Analysis, op: Op) -> None:
    reading = Reading(
        op=op,
        inputs=[found.input_layout(op, index) for index in range(len(op.inputs))],
        shapes=[tuple(evaluate(dim, batch=BATCH, seq=SEQ) for dim in spec.shape) for spec in op.outputs],
        fresh=lambda output, position: found.fresh(op.outputs[output].shape[position]),
    )
    try:
        outputs = reading.inputs if op.target == GETITEM else read(reading)
    except Misfit:
        found.unknown.append(op.name)
        reading.summed.clear()
        reading.whole += [dim for layout in reading.inputs for dim in layout]
        outputs = [[found.fresh(dim, blocked=True) for dim in spec.shape] for spec in op.outputs]
        reading.whole += [dim for layout in outputs for dim in layout]
    for dim in reading.whole:
        block(dim)
        if contains(dim, found.seq):
            found.whole_sequence.add(op.name)
    found.layouts[op.name] = outputs
    found.summed[op.name] = reading.summed
