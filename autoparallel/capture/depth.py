"""A graph of a few equal blocks in, the graph of the same model with more of them out: capture takes seconds a block,
and equal blocks are priced once.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import networkx as nx

from autoparallel.errors import CaptureError
from autoparallel.ir.graph import Graph, Op, Parameter, SavedTensor, TensorSpec

CAPTURED_BLOCKS = 2


def grow(graph: Graph, num_blocks: int) -> Graph:
    """`graph` with its last block repeated until there are `num_blocks`."""
    present = graph.num_segments - 2
    if num_blocks == present:
        return graph
    if present < CAPTURED_BLOCKS or len(set(graph.segment_classes[1:-1])) != 1 or num_blocks < present:
        raise CaptureError(
            f"a graph of {present} blocks cannot be grown to {num_blocks}",
            why="growing repeats the last of at least two equal blocks",
            remedy="capture the model as it is",
        )
    return _Grown(graph, num_blocks - present).graph()


class _Grown:
    """The template is the last block; copies `1 .. more` follow it."""

    def __init__(self, graph: Graph, more: int) -> None:
        self.source, self.more = graph, more
        self.template = graph.num_segments - 2
        self.ops = graph.segment_ops(self.template)
        before = graph.segment_ops(self.template - 1)
        self.previous = {old.name: new.name for old, new in zip(before, self.ops, strict=True)}
        """From an op of the block before the template to the template's."""
        self.own = {op.name for op in self.ops}
        self.held = {p.name for p in graph.parameters if p.segments == (self.template,)}
        self.index_at, self.index = _index(sorted(self.held), [p.name for p in graph.parameters])

    def graph(self) -> Graph:
        source, last = self.source, self.source.num_segments - 1
        dag = nx.DiGraph()
        for op in source.ops():
            if op.segment == last:
                continue
            self._add(dag, op)
        for number in range(1, self.more + 1):
            for op in self.ops:
                self._add(dag, self._op(op, number))
        for op in source.segment_ops(last):
            self._add(dag, replace(self._rewired(op, self.more), segment=last + self.more))
        classes, boundaries = source.segment_classes, source.boundaries
        block = boundaries[self.template]
        copies = [tuple(self._entering(spec, number) for spec in block) for number in range(1, self.more + 1)]
        end = tuple(self._spec(spec, self.more) for spec in boundaries[last])
        return replace(
            source,
            dag=dag,
            parameters=tuple(self._parameters(last)),
            segment_classes=(*classes[:last], *[classes[self.template]] * self.more, classes[last]),
            boundaries=(*boundaries[:last], *copies, end),
            fingerprint=hashlib.sha256(f"{source.fingerprint} and {self.more} blocks".encode()).hexdigest(),
        )

    def _add(self, dag: nx.DiGraph, op: Op) -> None:
        dag.add_node(op.name, op=op)
        for spec in op.inputs:
            if spec.name in dag:
                dag.add_edge(spec.name, op.name, tensor=spec.name)

    def _op(self, op: Op, number: int) -> Op:
        """The template's op in a copy."""
        return replace(
            op,
            name=self._name(op.name, number),
            inputs=tuple(self._entering(spec, number) for spec in op.inputs),
            outputs=tuple(self._spec(spec, number) for spec in op.outputs),
            segment=self.template + number,
            saved=tuple(self._saved(kept, number) for kept in op.saved),
            kept=tuple(self._saved(kept, number) for kept in op.kept),
            module=self._module(op.module, number),
        )

    def _rewired(self, op: Op, number: int) -> Op:
        """An op after the blocks, which reads the last copy where it read the template."""
        return replace(
            op,
            inputs=tuple(self._spec(spec, number) for spec in op.inputs),
            saved=tuple(self._saved(kept, number) for kept in op.saved),
        )

    def _entering(self, spec: TensorSpec, number: int) -> TensorSpec:
        """An input of a copy: what the template took from the block before comes from the copy before."""
        if spec.name in self.previous:
            return replace(spec, name=self._name(self.previous[spec.name], number - 1))
        return self._spec(spec, number)

    def _spec(self, spec: TensorSpec, number: int) -> TensorSpec:
        return replace(spec, name=self._name(spec.name, number))

    def _saved(self, kept: SavedTensor, number: int) -> SavedTensor:
        maker, colon, key = kept.storage.partition(":")
        if maker in self.previous:
            return replace(kept, storage=self._name(self.previous[maker], number - 1) + colon + key)
        return replace(kept, storage=self._name(maker, number) + colon + key)

    def _name(self, name: str, number: int) -> str:
        """Of an op or a parameter of the template, in a copy; everything else is the same."""
        if number == 0:
            return name
        if name in self.own:
            return f"{name}@{number}"
        return self._module(name, number) if name in self.held else name

    def _module(self, name: str, number: int) -> str:
        parts = name.split(".")
        if len(parts) > self.index_at and parts[self.index_at] == str(self.index):
            parts[self.index_at] = str(self.index + number)
        return ".".join(parts)

    def _parameters(self, last: int) -> list[Parameter]:
        found = []
        for parameter in self.source.parameters:
            moved = tuple(s + self.more if s == last else s for s in parameter.segments)
            found.append(replace(parameter, segments=moved))
            if parameter.segments == (self.template,):
                for number in range(1, self.more + 1):
                    name = self._module(parameter.name, number)
                    found.append(replace(parameter, name=name, segments=(self.template + number,)))
        return found


def _index(names: list[str], everything: list[str]) -> tuple[int, int]:
    """Where in a block's parameter names its number stands, and the number."""
    first = names[0].split(".")
    for at, part in enumerate(first):
        if part.isdigit() and ".".join([*first[:at], str(int(part) - 1), *first[at + 1 :]]) in everything:
            return at, int(part)
    raise CaptureError(f"the parameter {names[0]!r} names no block", why="blocks are numbered in their names")
