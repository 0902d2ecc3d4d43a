"""Dims as products and sums of shared atoms: what a `view`, a `split` or a matmul says of how tensors hang together.

A dim is a list of *atoms*, outer to inner. An atom is a leaf of some size, or refined into a **product** (a view made
heads × head_dim of it) or a **sum** of segments (a split cut q, k and v out of it). Atoms merge as in union-find, so
what one op reveals is seen by every tensor that shares the atom: qkv of grouped queries becomes `KV·G·D + KV·D + KV·D`
without a name or a size being matched. To shard a tensor is to shard a leaf on each path; parameter shards, local sizes
and slice bounds follow by recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


class Misfit(Exception):
    """Two dims cannot be read as one product; the op that wanted it is computed on whole tensors."""


class Atom:
    """A factor of a dim. `pinned` atoms are batch and sequence: symbolic, so never refined."""

    __slots__ = ("blocked", "kind", "merged_into", "parts", "pinned", "size", "uneven")

    def __init__(self, size: int, *, blocked: bool = False, pinned: bool = False) -> None:
        self.size, self.blocked, self.pinned = size, blocked, pinned
        self.uneven = False
        """May be sharded into unequal chunks: the vocabulary."""
        self.kind: Literal["leaf", "product", "sum"] = "leaf"
        self.parts: list[Dim] = []
        """The one factorisation of a product, the segments of a sum."""
        self.merged_into: Atom | None = None

    def refine(self, kind: Literal["product", "sum"], parts: list[Dim]) -> None:
        if self.pinned:
            raise Misfit
        self.kind, self.parts = kind, parts


Dim = list[Atom]
Layout = list[Dim]
"""The dims of a tensor, outer to inner."""


def root(atom: Atom) -> Atom:
    while atom.merged_into is not None:
        atom = atom.merged_into
    return atom


def flat(dim: Dim) -> Dim:
    """The dim's factors as far as they are known: leaves and sums; size-1 atoms vanish."""
    factors: Dim = []
    for atom in map(root, dim):
        if atom.kind == "product":
            factors += flat(atom.parts[0])
        elif atom.size != 1:
            factors.append(atom)
    return factors


def size(dim: Dim) -> int:
    product = 1
    for atom in dim:
        product *= root(atom).size
    return product


def leaves(dim: Dim) -> Iterator[Atom]:
    for atom in flat(dim):
        if atom.kind == "sum":
            for segment in atom.parts:
                yield from leaves(segment)
        else:
            yield atom


def new(count: int, *, blocked: bool = False) -> Dim:
    return [] if count == 1 else [Atom(count, blocked=blocked)]


# ------------------------------------------------------------------------------------------------ refining


def take_inner(dim: Dim, inner: int) -> tuple[Dim, Dim]:
    """`dim` as (outer, inner) with `inner` elements in the second; refines an atom where the border falls inside it."""
    outer, taken, count = flat(dim), Dim(), 1
    while count < inner:
        if not outer or inner % count:
            raise Misfit
        last, missing = outer[-1], inner // count
        if missing % last.size == 0:
            taken.insert(0, outer.pop())
            count *= last.size
        elif missing < last.size:
            _factor(last, missing)
            outer = flat(outer)
        else:
            raise Misfit
    return outer, taken


def _factor(atom: Atom, inner: int) -> None:
    """Make the atom a product (size / inner, inner)."""
    if atom.size % inner:
        raise Misfit
    if atom.kind == "leaf":
        halves = [Atom(atom.size // inner, blocked=atom.blocked), Atom(inner, blocked=atom.blocked)]
        atom.refine("product", [halves])
        return
    outers, shared = [], Dim()
    for index, segment in enumerate(atom.parts):
        outer, own = take_inner(segment, inner)
        outers.append(outer)
        if index:
            unify(shared, own)
        else:
            shared = own
    total = Atom(atom.size // inner)
    total.refine("sum", outers)
    atom.refine("product", [[total, *shared]])


def cut(dim: Dim, first: int) -> tuple[Dim, Dim]:
    """The first `first` indices of a dim, and the rest; the outermost factor becomes a sum."""
    factors = flat(dim)
    if len(factors) > 1:
        inner = size(factors[1:])
        if first % inner:
            raise Misfit
        head, tail = cut(factors[:1], first // inner)
        return head + factors[1:], tail + factors[1:]
    atom = factors[0]
    if atom.kind == "leaf":
        segments = [new(first, blocked=atom.blocked), new(atom.size - first, blocked=atom.blocked)]
        atom.refine("sum", segments)
        return segments[0], segments[1]
    before: list[Dim] = []
    after, position = list(atom.parts), 0
    while position < first:
        segment = after.pop(0)
        if position + size(segment) > first:
            segment, rest = cut(segment, first - position)
            after.insert(0, rest)
        before.append(segment)
        position += size(segment)
    return concatenated(before), concatenated(after)


def concatenated(segments: list[Dim]) -> Dim:
    """The dim that holds the segments one after the other."""
    kept = [segment for segment in segments if size(segment)]
    if len(kept) == 1:
        return kept[0]
    parts = [part for segment in kept for part in _segments(segment)]
    total = Atom(sum(size(part) for part in parts))
    total.refine("sum", parts)
    return [total]


def _segments(dim: Dim) -> list[Dim]:
    factors = flat(dim)
    if len(factors) == 1 and factors[0].kind == "sum":
        return [part for segment in factors[0].parts for part in _segments(segment)]
    return [factors]


def indices(dim: Dim, start: int, end: int) -> Dim:
    """The dim of `[start:end]`."""
    if end <= start:
        return [Atom(0, blocked=True)]
    if start > 0:
        dim = cut(dim, start)[1]
    return cut(dim, end - start)[0] if end - start < size(dim) else dim


def unify(one: Dim, other: Dim) -> None:
    """Make two dims of equal size one, from the inside out."""
    one, other = flat(one), flat(other)
    while one or other:
        if not one or not other:
            raise Misfit
        a, b = one[-1], other[-1]
        if a is b:
            one.pop()
            other.pop()
        elif a.size == b.size:
            one.pop()
            other.pop()
            _merge(a, b)
        else:
            large, small = (a, b) if a.size > b.size else (b, a)
            _factor(large, small.size)
        one, other = flat(one), flat(other)


def _merge(a: Atom, b: Atom) -> None:
    if a.kind == b.kind == "sum":
        _align(a, b)
        return
    gone, kept = (a, b) if a.kind == "leaf" and not a.pinned else (b, a)
    if gone.pinned or gone.kind != "leaf":
        raise Misfit
    if gone.blocked:
        block([kept])
    kept.uneven = kept.uneven or gone.uneven
    gone.merged_into = kept


def _align(a: Atom, b: Atom) -> None:
    """Cut two sums at each other's borders and unify the pieces."""
    ours, theirs = _segments([a]), _segments([b])
    while ours:
        x, y = ours.pop(0), theirs.pop(0)
        if size(x) > size(y):
            x, rest = cut(x, size(y))
            ours.insert(0, rest)
        elif size(y) > size(x):
            y, rest = cut(y, size(x))
            theirs.insert(0, rest)
        unify(x, y)


def block(dim: Dim) -> None:
    """No part of the dim may be sharded by tensor parallelism."""
    for leaf in leaves(dim):
        leaf.blocked = True


# ------------------------------------------------------------------------------------------------ sharded layouts


class Sharding:
    """A set of leaf atoms, each cut evenly into `degree` parts (unevenly where the atom allows it)."""

    def __init__(self, atoms: Iterable[Atom], degree: int) -> None:
        self.atoms, self.degree = frozenset(map(root, atoms)), degree

    def count(self, dim: Dim) -> int:
        """Sharded atoms on one path through the dim; more than one is illegal."""
        return sum(
            max(map(self.count, atom.parts)) if atom.kind == "sum" else int(atom in self.atoms) for atom in flat(dim)
        )

    def is_sharded(self, layout: Layout) -> bool:
        return any(self.count(dim) for dim in layout)

    def is_mixed(self, dim: Dim) -> bool:
        """Whether some segments of the dim are sharded and others are whole."""
        return any(
            atom.kind == "sum" and (len({self.count(p) for p in atom.parts}) > 1 or any(map(self.is_mixed, atom.parts)))
            for atom in flat(dim)
        )

    def chunk(self, atom: Atom, rank: int) -> range:
        """The rank's part of a leaf: equal chunks, the last ones shorter, as torch.chunk cuts."""
        if atom not in self.atoms:
            return range(atom.size)
        length = -(-atom.size // self.degree)
        return range(min(rank * length, atom.size), min((rank + 1) * length, atom.size))

    def local_size(self, dim: Dim, rank: int = 0) -> int:
        product = 1
        for atom in flat(dim):
            if atom.kind == "sum":
                product *= sum(self.local_size(part, rank) for part in atom.parts)
            else:
                product *= len(self.chunk(atom, rank))
        return product

    def global_indices(self, dim: Dim, rank: int) -> NDArray[np.int64]:
        """Which indices of the whole dim the rank holds, in the order in which it holds them."""
        return self._outer(dim, rank, lambda atom: np.asarray(self.chunk(atom, rank), dtype=np.int64))

    def _outer(self, dim: Dim, rank: int, of_leaf: Callable[[Atom], NDArray[np.int64]]) -> NDArray[np.int64]:
        total = np.zeros(1, dtype=np.int64)
        for atom in flat(dim):
            if atom.kind == "sum":
                offsets = np.cumsum([0, *(size(part) for part in atom.parts)])
                held = np.concatenate(
                    [
                        self._outer(part, rank, of_leaf) + offset
                        for part, offset in zip(atom.parts, offsets, strict=False)
                    ]
                )
            else:
                held = of_leaf(atom)
            total = (total[:, None] * atom.size + held[None, :]).reshape(-1)
        return total

    def whole_everywhere(self, dim: Dim, rank: int = 0) -> NDArray[np.bool_]:
        """For each local index, whether every rank holds it: the replicated segments of a mixed dim."""
        counts = np.zeros(size(dim), dtype=np.int64)
        for other in range(self.degree):
            counts[self.global_indices(dim, other)] += 1
        held: NDArray[np.bool_] = counts[self.global_indices(dim, rank)] == self.degree
        return held


@dataclass(frozen=True)
class ParameterSplit:
    """Which part of a parameter each rank of a tensor-parallel group holds."""

    layout: Layout
    sharding: Sharding

    @property
    def is_sharded(self) -> bool:
        return self.sharding.is_sharded(self.layout)

    @property
    def is_mixed(self) -> bool:
        """Whether some segments of a dim are sharded while every rank holds the others."""
        return any(map(self.sharding.is_mixed, self.layout))

    def indices(self, rank: int) -> list[NDArray[np.int64] | None]:
        """By dim, the indices that the rank holds in its order; None for all. Fused projections are not contiguous."""
        count = self.sharding.count
        return [self.sharding.global_indices(dim, rank) if count(dim) else None for dim in self.layout]

    def local_shape(self, rank: int = 0) -> tuple[int, ...]:
        return tuple(self.sharding.local_size(dim, rank) for dim in self.layout)

    def held_by_all(self, rank: int = 0) -> tuple[int, NDArray[np.int64]] | None:
        """The divided dim and the local indices along it that every rank holds, the unsharded segments of a fused
        projection; None where there are none.
        """
        for dim, layout in enumerate(self.layout):
            if self.sharding.is_mixed(layout):
                return dim, np.flatnonzero(self.sharding.whole_everywhere(layout, rank))
        return None

    def holds_like(self, other: ParameterSplit) -> bool:
        """Whether both give the first rank the same part."""
        return all(
            (a is None) == (b is None) and (a is None or b is None or np.array_equal(a, b))
            for a, b in zip(self.indices(0), other.indices(0), strict=True)
        )
