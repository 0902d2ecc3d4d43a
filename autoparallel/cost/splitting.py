"""Graph -> which split tensor parallelism uses, by cost: every legal split of every distinct segment is priced.

Equal blocks share a split; segments that share a parameter (tied embeddings) hold it alike and are chosen together.
For each degree, stride, with and without sequence parallelism, and each micro-batch size, two are kept: the fastest,
and the leanest in memory for plans in which the fastest does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from autoparallel.cost.workload import ParameterCount, SegmentCost, SharedParameters, Variant
from autoparallel.ir.graph import Graph
from autoparallel.tensor_parallel.analysis import Analysis, analyze
from autoparallel.tensor_parallel.layout import ParameterSplit
from autoparallel.tensor_parallel.splits import MOST_DIMS, Split, choices, legal_splits, split_names
from autoparallel.tensor_parallel.values import LoweredSegment

STATE_BYTES = 16
"""Of a trained element: fp32 master, gradient and AdamW's two moments; weighs parameters against activations."""

Price = Callable[[LoweredSegment, int, int], SegmentCost]
"""A lowered segment at a number of rows, the ranks of its group a stride apart."""


class Held(NamedTuple):
    """What a rank holds under one choice of options, as `Variant` has it."""

    parameters: tuple[ParameterCount, ...]
    shared: tuple[SharedParameters, ...]
    addends: tuple[int, ...]
    without_rule: tuple[str, ...]


@dataclass(frozen=True, eq=False)
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
    strides: Mapping[int, Sequence[int]],
    *,
    micro_batch_sizes: Sequence[int],
    seq_len: int,
    price: Price,
    sequence_parallel: bool | None = None,
    shards_most: bool = False,
) -> tuple[tuple[Variant, ...], dict[int, str]]:
    """The variants of every degree at each of its strides, and why some degrees have none; with `sequence_parallel`, or
    without it, or both where it is None; with `shards_most`, only those that divide most parameters.
    """
    legal = _legal(graph)
    found: list[Variant] = []
    impossible: dict[int, str] = {}
    for degree, apart in strides.items():
        reason = legal.why_not(degree)
        if reason:
            impossible[degree] = reason
            continue
        for divided in (False, True) if seq_len % degree == 0 else (False,):
            if sequence_parallel not in (None, divided):
                continue
            for stride, size in product(apart, micro_batch_sizes):
                found += _of_size(legal, degree, stride, divided, size, price, shards_most=shards_most)
    return tuple(found), impossible


@dataclass
class _Legal:
    """The legal splits of one graph: found once, however many batches and devices are asked about."""

    graph: Graph
    _options: dict[tuple[int, bool], dict[int, list[Option]]] = field(default_factory=dict)
    _together: dict[tuple[int, bool], list[list[dict[int, Option]]]] = field(default_factory=dict)
    _held: dict[tuple[Option, ...], Held] = field(default_factory=dict)

    @cached_property
    def analyses(self) -> dict[int, Analysis]:
        return {cls: analyze(self.graph, segment) for cls, segment in self.graph.representatives().items()}

    def why_not(self, degree: int) -> str:
        """The arithmetic, where no dim of any block can be divided, or too many can."""
        count = max(len(choices(analysis, degree)) for analysis in self.analyses.values())
        if count > MOST_DIMS:
            return f"{count} dims of one segment can be divided: more sets of them than can be tried"
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

    def together(self, degree: int, sequence_parallel: bool) -> list[list[dict[int, Option]]]:
        """Classes that share parameters agree on how they hold them: for each group of classes, its choices."""
        if (degree, sequence_parallel) not in self._together:
            options = self.options(degree, sequence_parallel)
            self._together[degree, sequence_parallel] = [
                [
                    dict(zip(classes, choice, strict=True))
                    for choice in product(*(options[cls] for cls in classes))
                    if _agree(choice)
                ]
                for classes in _sharing(self.graph)
            ]
        return self._together[degree, sequence_parallel]

    def held(self, best: tuple[Option, ...]) -> Held:
        """By class, one option each."""
        if best not in self._held:
            lowered = [option.lowered for option in best]
            addends = [_addends(self.graph, part) for part in lowered]
            self._held[best] = Held(
                *local_parameters(self.graph, lowered),
                tuple(addends[cls] for cls in self.graph.segment_classes),
                tuple(sorted({target for part in lowered for target in part.without_rule})),
            )
        return self._held[best]

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
    legal: _Legal, degree: int, stride: int, sequence_parallel: bool, size: int, price: Price, *, shards_most: bool
) -> list[Variant]:
    """The fastest and the leanest choice at one micro-batch size, or the one that shards most; one where they are the
    same.
    """
    options = legal.options(degree, sequence_parallel)
    priced = {o: Priced(o, price(o.lowered, size, stride)) for found in options.values() for o in found}
    chosen: list[Variant] = []
    orders: list[Callable[[Priced], tuple[float, float]]] = [lambda p: p.speed, lambda p: p.size]
    if shards_most:
        orders = [lambda p: (p.option.elements, p.speed[0])]
    for better in orders:
        best = [priced[option] for option in _choose(legal.together(degree, sequence_parallel), priced, better)]
        held = legal.held(tuple(p.option for p in best))
        variant = Variant(
            tensor_parallel=degree,
            sequence_parallel=sequence_parallel,
            batch_per_device=size,
            tensor_stride=stride,
            splits=tuple(p.option.split for p in best),
            costs=tuple(p.cost for p in best),
            **held._asdict(),
        )
        if variant not in chosen:
            chosen.append(variant)
    return chosen


def _choose(
    together: list[list[dict[int, Option]]],
    priced: dict[Option, Priced],
    better: Callable[[Priced], tuple[float, float]],
) -> list[Option]:
    """The best option of every class, by class."""

    def worth(choice: dict[int, Option]) -> tuple[float, ...]:
        return tuple(map(sum, zip(*(better(priced[option]) for option in choice.values()), strict=True)))

    chosen: dict[int, Option] = {}
    for group in together:
        best: dict[int, Option] = min(group, key=worth)
        chosen |= best
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


def _agree(options: Iterable[Option]) -> bool:
    held: dict[str, ParameterSplit] = {}
    return all(
        held.setdefault(name, option.lowered.split_of(name)).holds_like(option.lowered.split_of(name))
        for option in options
        for name in option.lowered.parameters
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
