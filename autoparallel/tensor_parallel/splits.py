"""Every legal way to split one segment over a tensor-parallel group, as lowered programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from autoparallel.errors import PlanMismatchError
from autoparallel.ir.graph import Graph, TensorSpec
from autoparallel.plans.strategy import Strategy
from autoparallel.tensor_parallel.analysis import Analysis, analyze
from autoparallel.tensor_parallel.layout import Atom, ParameterSplit, Sharding, leaves
from autoparallel.tensor_parallel.lower import lower
from autoparallel.tensor_parallel.values import Illegal, LoweredSegment

MOST_DIMS = 6
"""All their sets are tried, some milliseconds each; a block of the models we know has two to five."""
NUMBER = re.compile(r"(?<![^.])\d+(?=\.[^\W\d])")
"""Of a module in a list."""

Split = tuple[str, ...]
"""The dims to shard, by the names of `split_names`; a split means the same in every segment of a class."""


def split_names(analysis: Analysis) -> dict[str, Atom]:
    """Shardable atoms by the first parameter dim they are in: `q_proj.weight[0]`, `.k` for its k-th factor."""
    named: dict[str, Atom] = {}
    for atom, places in analysis.shardable().items():
        parameter, position = places[0]
        factors = list(leaves(analysis.parameters[parameter][position]))
        factor = f".{factors.index(atom)}" if len(factors) > 1 else ""
        named[f"{_short(parameter, analysis)}[{position}]{factor}"] = atom
    return named


def _short(parameter: str, analysis: Analysis) -> str:
    """The name without what all parameters of the segment share, the number of the block among it."""
    names = [name.split(".") for name in analysis.parameters]
    shared = 0
    while len(names) > 1 and all(len(n) > shared + 2 and n[shared] == names[0][shared] for n in names):
        shared += 1
    return ".".join(parameter.split(".")[shared:] if len(names) > 1 else parameter.split(".")[-2:])


def lower_split(
    graph: Graph, segment: int, analysis: Analysis, split: Split, *, degree: int, sequence_parallel: bool, rank: int = 0
) -> LoweredSegment:
    """The program of one rank under a split; raises `Illegal`."""
    named = split_names(analysis)
    unknown = [name for name in split if name not in named]
    if unknown:
        raise Illegal(f"segment {segment} has no dim {unknown[0]}; it has {', '.join(named) or 'none'}")
    sharding = Sharding([named[name] for name in split], degree)
    return lower(graph, segment, analysis, sharding, sequence_parallel=sequence_parallel, rank=rank)


def choices(analysis: Analysis, degree: int) -> list[list[str]]:
    """Dims that are sharded together or not at all: each by itself. Where these are more than `MOST_DIMS`, those of
    repeated modules are (blocks that are one segment, since they share parameters); where these still are, those of
    equal size and of one name in their module (the ranks of a block's adapters).
    """
    dims = {name: atom for name, atom in split_names(analysis).items() if atom.uneven or atom.size % degree == 0}
    alike: list[Callable[[str], object]] = [
        lambda name: name,
        lambda name: NUMBER.sub("*", name),
        lambda name: (dims[name].size, ".".join(re.split(r"\.(?=[^\W\d])", name)[-2:])),
    ]
    groups: dict[object, list[str]] = {}
    for key in alike:
        groups = {}
        for name in dims:
            groups.setdefault(key(name), []).append(name)
        if len(groups) <= MOST_DIMS:
            break
    return list(groups.values())


def legal_splits(
    graph: Graph, segment: int, analysis: Analysis, *, degree: int, sequence_parallel: bool
) -> Iterator[tuple[Split, LoweredSegment]]:
    """All sets of atoms that can be sharded together over `degree` ranks, the empty one first; where a segment has more
    than `MOST_DIMS`, those of repeated modules are sharded alike.
    """
    groups = choices(analysis, degree)
    for count in range(len(groups) + 1):
        for split in map(tuple, map(chain.from_iterable, combinations(groups, count))):
            try:
                lowered = lower_split(
                    graph, segment, analysis, split, degree=degree, sequence_parallel=sequence_parallel
                )
            except Illegal:
                continue
            yield split, lowered


@dataclass(eq=False)
class SplitGraph:
    """A graph under a plan's split of every segment; each lowered once."""

    graph: Graph
    degree: int = 1
    sequence_parallel: bool = False
    splits: tuple[Split, ...] = ()
    """By segment class; none where the degree is one."""
    _analyses: dict[int, Analysis] = field(default_factory=dict, repr=False)
    _lowered: dict[tuple[int, int], LoweredSegment] = field(default_factory=dict, repr=False)

    @classmethod
    def of_strategy(cls, graph: Graph, strategy: Strategy) -> SplitGraph:
        return cls(graph, strategy.tensor_parallel, strategy.sequence_parallel, strategy.splits or ())

    def split_of(self, segment: int) -> Split:
        """The dims of one segment that are sharded."""
        if self.degree == 1:
            return ()
        classes = set(self.graph.segment_classes)
        if len(self.splits) != len(classes):
            raise _mismatch(f"{len(self.splits)} splits are given for {len(classes)} kinds of segments")
        return self.splits[self.graph.segment_classes[segment]]

    def lowered(self, segment: int, *, rank: int = 0) -> LoweredSegment:
        """The segment's program of one rank of the group; raises PlanMismatchError where the split does not fit it."""
        if (segment, rank) not in self._lowered:
            try:
                self._lowered[segment, rank] = lower_split(
                    self.graph, segment, self._analysis(segment), self.split_of(segment),
                    degree=self.degree, sequence_parallel=self.sequence_parallel, rank=rank,
                )  # fmt: skip
            except Illegal as error:
                raise _mismatch(str(error)) from error
        return self._lowered[segment, rank]

    def entering(self, segment: int) -> tuple[TensorSpec, ...]:
        """What a rank receives where a stage begins with `segment`, with local shapes."""
        return self.lowered(segment).entering

    def shared_parameters(self, segments: Iterable[int]) -> frozenset[str]:
        """Parameters of these segments whose gradients are sums over the group, taken once a step."""
        return frozenset(name for segment in segments for name in self.lowered(segment).shared_parameters)

    def logits(self) -> list[NDArray[np.int64]]:
        """By rank, the part of the vocabulary that its logits are of; one entry where all have the same."""
        lowered = self.lowered(self.graph.num_segments - 1)
        vocabulary = lowered.results[self.graph.outputs[1]].layout[-1]
        ranks = self.degree if lowered.sharding.count(vocabulary) else 1
        return [lowered.sharding.global_indices(vocabulary, rank) for rank in range(ranks)]

    def parameters(self) -> dict[str, ParameterSplit]:
        """Every parameter that some segment uses; segments that share one split it alike."""
        found: dict[str, ParameterSplit] = {}
        for segment in range(self.graph.num_segments):
            analysis = self._analysis(segment)
            named = split_names(analysis)
            sharding = Sharding([named[name] for name in self.split_of(segment)], self.degree)
            for name, layout in analysis.parameters.items():
                split = ParameterSplit(layout, sharding)
                if name in found and not found[name].holds_like(split):
                    raise _mismatch(f"{name} is split in two ways by the segments that share it")
                found[name] = split
        return found

    def _analysis(self, segment: int) -> Analysis:
        if segment not in self._analyses:
            self._analyses[segment] = analyze(self.graph, segment)
        return self._analyses[segment]


def _mismatch(why: str) -> PlanMismatchError:
    return PlanMismatchError(
        "strategy.splits: they do not fit this model.", why=why, remedy="make the plan again with `autoparallel plan`"
    )
