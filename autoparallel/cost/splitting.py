"""Graph -> which split tensor parallelism uses, by cost: every legal split of every distinct segment is priced.

Equal blocks share a split; segments that share a parameter (tied embeddings) hold it alike and are chosen together.
For each degree, with and without sequence parallelism, and each micro-batch size, two are kept: the fastest, and
the leanest in memory for plans in which the fastest does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from math import prod

from autoparallel.cost.workload import ParameterCount, SegmentCost, SharedParameters, Variant
from autoparallel.ir.graph import Graph
from autoparallel.tensor_parallel.analysis import Analysis, analyze
from autoparallel.tensor_parallel.layout import ParameterSplit
from autoparallel.tensor_parallel.splits import Split, legal_splits, split_names
from autoparallel.tensor_parallel.values import LoweredSegment

STATE_BYTES = 16
"""Of a trained element: fp32 master, gradient and AdamW's two moments; weighs parameters against activations."""

Price = Callable[[LoweredSegment, int], SegmentCost]
"""A lowered segment at a number of rows."""


@dataclass(frozen=True)
class Option:
    """One legal split of one segment class."""

    split: Split
    lowered: LoweredSegment
    elements: int
    """Parameters that a rank holds."""


@dataclass(frozen=True)
class Priced:
    """An option at one micro-batch size."""

    option: Option
    cost: SegmentCost

    @property
    def speed(self) -> tuple[float, int]:
        cost = self.cost
        time_s = cost.forward_s + cost.backward_s + cost.forward_comm_s + cost.backward_comm_s
        return time_s, self.option.elements

    @property
    def size(self) -> tuple[float, float]:
        return self.option.elements * STATE_BYTES + self.cost.saved_bytes, self.speed[0]


def variants(
    graph: Graph,
    degrees: Iterable[int],
    *,
    micro_batch_sizes: Sequence[int],
    seq_len: int,
    price: Price,
    sequence_parallel: bool | None = None,
) -> tuple[tuple[Variant, ...], dict[int, str]]:
    """The variants of every degree, and why some degrees have none; with `sequence_parallel`, or without it, or both
    where it is None.
    """
    legal = _legal(graph)
    found: list[Variant] = []
    impossible: dict[int, str] = {}
    for degree in degrees:
        reason = legal.why_not(degree)
        if reason:
            impossible[degree] = reason
            continue
        for divided in (False, True) if seq_len % degree == 0 else (False,):
            if sequence_parallel not in (None, divided):
                continue
            options = legal.options(degree, divided)
            for size in micro_batch_sizes:
                found += _of_size(graph, options, degree, divided, size, price)
    return tuple(found), impossible


@dataclass
class _Legal:
    """The legal splits of one graph: found once, however many batches and devices are asked about."""

    graph: Graph
    _options: dict[tuple[int, bool], dict[int, list[Option]]] = field(default_factory=dict)

    @cached_property
    def analyses(self) -> dict[int, Analysis]:
        return {cls: analyze(self.graph, segment) for cls, segment in self.graph.representatives().items()}

    def why_not(self, degree: int) -> str:
        """The arithmetic, where no dim of any block can be divided."""
        blocks = set(self.graph.segment_classes[1:-1]) or set(self.graph.segment_classes)
        dims = {name: atom.size for cls in blocks for name, atom in split_names(self.analyses[cls]).items()}
        if any(size % degree == 0 for size in dims.values()):
            return ""
        listed = ", ".join(f"{name} = {size}" for name, size in list(dims.items())[:6]) or "none that an op can divide"
        return f"no dim of the blocks divides by {degree}: {listed}"

    def options(self, degree: int, sequence_parallel: bool) -> dict[int, list[Option]]:
        """By segment class."""
        if (degree, sequence_parallel) not in self._options:
            self._options[degree, sequence_parallel] = self._found(degree, sequence_parallel)
        return self._options[degree, sequence_parallel]

    def _found(self, degree: int, sequence_parallel: bool) -> dict[int, list[Option]]:
        graph, blocks = self.graph, set(self.graph.segment_classes[1:-1])
        found = {
            cls: [
                Option(split, lowered, sum(prod(lowered.split_of(name).local_shape()) for name in lowered.parameters))
                for split, lowered in legal_splits(
                    graph, segment, self.analyses[cls], degree=degree, sequence_parallel=sequence_parallel
                )
            ]
            for cls, segment in graph.representatives().items()
        }
        if sequence_parallel:
            return found
        # A block that every rank runs whole gains nothing; with its tokens divided it does.
        return {cls: [o for o in options if o.split or cls not in blocks] or options for cls, options in found.items()}


@lru_cache(maxsize=256)
def _legal(graph: Graph) -> _Legal:
    return _Legal(graph)


def _of_size(
    graph: Graph, options: dict[int, list[Option]], degree: int, sequence_parallel: bool, size: int, price: Price
) -> list[Variant]:
    """The fastest and the leanest choice at one micro-batch size; one where they are the same."""
    priced = {cls: [Priced(option, price(option.lowered, size)) for option in found] for cls, found in options.items()}
    chosen: list[Variant] = []
    for better in (lambda p: p.speed, lambda p: p.size):
        best = _choose(graph, priced, better)
        variant = _variant(graph, best, degree, sequence_parallel, size)
        if variant not in chosen:
            chosen.append(variant)
    return chosen


def _choose(
    graph: Graph, priced: dict[int, list[Priced]], better: Callable[[Priced], tuple[float, float]]
) -> list[Priced]:
    """The best option of every class, by class; classes that share parameters agree on how they hold them."""
    chosen: dict[int, Priced] = {}
    for classes in _sharing(graph):
        together = [
            options for options in product(*(priced[cls] for cls in classes)) if _agree([o.option for o in options])
        ]
        best = min(together, key=lambda options: tuple(map(sum, zip(*map(better, options), strict=True))))
        chosen.update(zip(classes, best, strict=True))
    return [chosen[cls] for cls in sorted(chosen)]


def _sharing(graph: Graph) -> list[list[int]]:
    """Segment classes in groups of which no two share a parameter."""
    groups = [{cls} for cls in graph.representatives()]
    for parameter in graph.parameters:
        joined = {graph.segment_classes[segment] for segment in parameter.segments}
        touched = [group for group in groups if group & joined]
        if len(touched) > 1:
            groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    return [sorted(group) for group in groups]


def _agree(options: list[Option]) -> bool:
    held: dict[str, ParameterSplit] = {}
    return all(
        held.setdefault(name, option.lowered.split_of(name)).holds_like(option.lowered.split_of(name))
        for option in options
        for name in option.lowered.parameters
    )


def _variant(graph: Graph, best: list[Priced], degree: int, sequence_parallel: bool, size: int) -> Variant:
    lowered = [priced.option.lowered for priced in best]
    parameters, shared = local_parameters(graph, lowered)
    return Variant(
        tensor_parallel=degree,
        sequence_parallel=sequence_parallel,
        batch_per_device=size,
        splits=tuple(priced.option.split for priced in best),
        costs=tuple(priced.cost for priced in best),
        parameters=parameters,
        shared=shared,
        addends=tuple(_addends(graph, lowered[cls]) for cls in graph.segment_classes),
        without_rule=tuple(sorted({target for part in lowered for target in part.without_rule})),
    )


def local_parameters(
    graph: Graph, lowered: Sequence[LoweredSegment]
) -> tuple[tuple[ParameterCount, ...], tuple[SharedParameters, ...]]:
    """What a rank holds, by segment, given the lowered representative of every class; tied parameters apart; those the
    loss does not depend on are held by the first stage.
    """
    counts = [{"trainable": 0, "frozen": 0} for _ in range(graph.num_segments)]
    tied: dict[tuple[int, ...], dict[str, int]] = {}
    local = _local_numels(graph, lowered)
    for parameter in graph.parameters:
        segments = parameter.segments or (0,)
        target = counts[segments[0]] if len(segments) == 1 else tied.setdefault(segments, {"trainable": 0, "frozen": 0})
        kind = "trainable" if parameter.trainable and parameter.segments else "frozen"
        target[kind] += local.get(parameter.name, parameter.numel)
    shared = tuple(SharedParameters(segments=s, count=ParameterCount(**c)) for s, c in sorted(tied.items()))
    return tuple(ParameterCount(**c) for c in counts), shared


def _local_numels(graph: Graph, lowered: Sequence[LoweredSegment]) -> dict[str, int]:
    """Elements that a rank holds of each parameter that is used; blocks of a class list theirs in the same order."""
    used: list[list[str]] = [[] for _ in range(graph.num_segments)]
    for parameter in sorted(graph.parameters, key=lambda p: p.name):
        for segment in parameter.segments:
            used[segment].append(parameter.name)
    numels = {}
    for names, cls in zip(used, graph.segment_classes, strict=True):
        part = lowered[cls]
        for name, like in zip(names, sorted(part.parameters), strict=True):
            numels[name] = prod(part.split_of(like).local_shape())
    return numels


def _addends(graph: Graph, lowered: LoweredSegment) -> int:
    """Elements of which every rank has an addend of the gradient, summed once a step."""
    trained = {p.name: p.numel for p in graph.parameters if p.trainable}
    whole = sum(trained.get(name, 0) for name in lowered.shared_parameters)
    return whole + sum(_held_by_all(lowered.split_of(name)) for name in lowered.parameters.keys() & trained.keys())


def _held_by_all(split: ParameterSplit) -> int:
    found, shape = split.held_by_all(), split.local_shape()
    return 0 if found is None else prod(shape) // shape[found[0]] * len(found[1])
