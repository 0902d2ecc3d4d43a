"""Annotated ops -> Graph: edges, who uses a parameter, what crosses from segment to segment, which segments are equal.

All of it is read from the ops, and no name of an op is: however the ops of a model were found, its graph is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import networkx as nx

from autoparallel.ir.graph import Graph, Op, Parameter, TensorSpec


def assemble(
    ops: Sequence[Op],
    parameters: Sequence[Parameter],
    *,
    inputs: Sequence[str],
    outputs: tuple[str, str],
    model_name: str,
    architecture: str,
    notes: tuple[str, ...],
) -> Graph:
    """The graph of `ops` in program order; `inputs` are the names of the program's inputs."""
    parameters = _with_segments(parameters, ops)
    classes, fingerprint = _classes(ops, parameters, inputs)
    return Graph(
        dag=_dag(ops),
        parameters=parameters,
        segment_classes=classes,
        boundaries=_boundaries(ops, len(classes)),
        outputs=outputs,
        model_name=model_name,
        architecture=architecture,
        fingerprint=fingerprint,
        notes=notes,
    )


def _dag(ops: Sequence[Op]) -> nx.DiGraph:
    dag = nx.DiGraph()
    for op in ops:
        dag.add_node(op.name, op=op)
        dag.add_edges_from((spec.name, op.name, {"tensor": spec.name}) for spec in op.inputs if spec.name in dag)
    return dag


def _with_segments(parameters: Sequence[Parameter], ops: Sequence[Op]) -> tuple[Parameter, ...]:
    users: dict[str, set[int]] = {p.name: set() for p in parameters}
    for op in ops:
        for spec in op.inputs:
            if op.segment is not None and spec.name in users:
                users[spec.name].add(op.segment)
    return tuple(replace(p, segments=tuple(sorted(users[p.name]))) for p in parameters)


def _boundaries(ops: Sequence[Op], num_segments: int) -> tuple[tuple[TensorSpec, ...], ...]:
    last_use: dict[str, int] = {}
    for op in ops:
        if op.segment is not None:
            last_use |= {s.name: max(op.segment, last_use.get(s.name, 0)) for s in op.inputs}
    entering: list[list[TensorSpec]] = [[] for _ in range(num_segments)]
    for op in ops:
        if op.segment is not None:
            for later in range(op.segment + 1, last_use.get(op.name, 0) + 1):
                entering[later].append(op.outputs[0])
    return tuple(tuple(specs) for specs in entering)


def _classes(ops: Sequence[Op], parameters: Sequence[Parameter], inputs: Sequence[str]) -> tuple[tuple[int, ...], str]:
    """A class per segment, equal ones sharing it, and the fingerprint of the whole program."""
    num_segments = max(op.segment for op in ops if op.segment is not None) + 1
    lines: list[list[str]] = [[] for _ in range(num_segments)]
    home = {op.name: op.segment for op in ops}
    position: dict[str, int] = {}
    free_keys = {name: name for name in inputs}

    def origin(name: str, segment: int | None) -> str:
        if name in free_keys:
            return free_keys[name]
        if name not in home:
            return "parameter"
        return f"op{position[name]}" if home[name] == segment else "outside"

    for op in ops:
        # A node by what it computes: operator, shapes, scalars, and where its inputs come from.
        read = [f"{origin(s.name, op.segment)}:{s.shape}:{s.dtype}:{s.requires_grad}" for s in op.inputs]
        line = f"{op.target}({', '.join(read)}) {op.arguments}"
        if op.segment is None and _is_same(op):
            free_keys[op.name] = origin(op.inputs[0].name, None)
        elif op.segment is None:
            free_keys[op.name] = hashlib.sha256(line.encode()).hexdigest()[:16]
        else:
            position[op.name] = len(lines[op.segment])
            lines[op.segment].append(line)
    keys = ["\n".join(segment) for segment in lines]
    # The ends hold embedding and loss: they are classes of their own even if they should look alike.
    keys[0], keys[-1] = "first\n" + keys[0], "last\n" + keys[-1]
    order: dict[str, int] = {}
    classes = tuple(order.setdefault(key, len(order)) for key in keys)
    described = [f"{p.name} {p.shape} {p.dtype} {p.trainable} {p.segments}" for p in parameters]
    text = "\n".join([*order, *map(str, classes), *sorted(set(free_keys.values())), *described])
    return classes, hashlib.sha256(text.encode()).hexdigest()


def _is_same(op: Op) -> bool:
    """A cast to what its input is already. The next block reads it in place of the input, and so on in a chain."""
    return op.is_view and op.target.startswith("aten.to.") and replace(op.inputs[0], name=op.name) == op.outputs[0]
