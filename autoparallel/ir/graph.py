"""The graph of one training step: a networkx DAG whose nodes are ops with symbolic shapes, grouped into segments.

Segment 0 holds what comes before the first repeated block (embeddings), the last what comes after the last block
(norm, head, loss). Equal blocks share a class. `free` ops depend on no parameter and draw no random number (masks,
positions, rotary tables, sizes): they belong to no segment and are computed again wherever they are needed, so that
only hidden states cross a stage cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autoparallel.ir.dims import Dim, Shape, numel

if TYPE_CHECKING:
    import networkx as nx

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex64": 8, "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that flows along an edge, by the name of the op, input or parameter that makes it."""

    name: str
    shape: Shape
    dtype: str
    requires_grad: bool = False

    def numel(self, *, batch: int, seq: int) -> int:
        return numel(self.shape, batch=batch, seq=seq)

    def size_bytes(self, *, batch: int, seq: int) -> int:
        return self.numel(batch=batch, seq=seq) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A storage that autograd keeps from forward to backward; tensors that share one are kept once."""

    storage: str
    """The op, input or parameter whose output owns the storage; `op:k` where only the kernel of `op` sees it."""
    numel: Dim
    dtype: str

    def size_bytes(self, *, batch: int, seq: int) -> int:
        return numel((self.numel,), batch=batch, seq=seq) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is a tensor: the op's input at this index."""

    index: int


Argument = int | float | bool | str | None | Ref | tuple["Argument", ...]
"""An argument of an op. Sizes are ints or expressions of `batch` and `seq`; whatever else torch takes is its text."""


@dataclass(frozen=True, slots=True)
class Op:
    """One node: an ATen op or our attention."""

    name: str
    target: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    arguments: tuple[tuple[str, Argument], ...]
    """By schema name, in the order of the schema; those left at their defaults are absent."""
    segment: int | None
    """None for free ops."""
    is_view: bool
    """The output aliases the first input: no bytes are moved."""
    is_pointwise: bool
    """Each output element depends on one element of each input, up to broadcasting."""
    saved: tuple[SavedTensor, ...]
    kept: tuple[SavedTensor, ...]
    """What selective recomputation keeps of it: the outputs of its contractions; empty where it runs again."""
    module: str
    """The module that ran it, as in `named_modules()`."""
    source: str
    """The line of the model's code that called it."""

    def argument(self, name: str, default: Argument = None) -> Argument:
        return dict(self.arguments).get(name, default)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter by its canonical name (tied parameters have one)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    segments: tuple[int, ...]
    """Segments that use it; more than one when tied."""

    @property
    def numel(self) -> int:
        return numel(self.shape, batch=1, seq=1)

    @property
    def size_bytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, eq=False)
class Graph:
    """The cost-annotated DAG; compared by identity."""

    dag: nx.DiGraph
    """Nodes are op names with attribute `op`; an edge carries the tensor's name as `tensor`."""
    parameters: tuple[Parameter, ...]
    segment_classes: tuple[int, ...]
    boundaries: tuple[tuple[TensorSpec, ...], ...]
    """For each segment, the tensors that enter it from earlier segments (free ones left out)."""
    outputs: tuple[str, str]
    """The loss and the logits."""
    model_name: str
    architecture: str
    fingerprint: str
    """sha256 of the structure: ops, shapes, attributes, parameters."""
    notes: tuple[str, ...] = field(default=())
    """What capture had to do differently, for `explain`."""

    def ops(self) -> Iterator[Op]:
        """In program order."""
        return (op for _, op in self.dag.nodes(data="op"))

    def spec_of(self, name: str) -> TensorSpec:
        """The (first) output of the op called `name`."""
        op: Op = self.dag.nodes[name]["op"]
        return op.outputs[0]

    def segment_ops(self, segment: int) -> list[Op]:
        return [op for op in self.ops() if op.segment == segment]

    def runs_backward(self, segment: int) -> bool:
        """Whether a gradient passes through the segment: not below the first trained parameter."""
        return any(spec.requires_grad for op in self.segment_ops(segment) for spec in op.outputs)

    @property
    def num_segments(self) -> int:
        return len(self.segment_classes)

    def representatives(self) -> dict[int, int]:
        """The first segment of each class."""
        first: dict[int, int] = {}
        for segment, cls in enumerate(self.segment_classes):
            first.setdefault(cls, segment)
        return first
