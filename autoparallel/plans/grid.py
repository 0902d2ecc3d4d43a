"""Where the ranks of a step stand: sizes and order of the mesh's axes in; strides, and coordinates of a rank, out.

The axes are pipeline stages, replicas and the ranks of a tensor-parallel group. The last of the order is the innermost:
its ranks are neighbours. An axis has the stride that is the product of the sizes of those after it, and

    rank = stage × stride of pp + data index × stride of dp + tensor index × stride of tp
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Literal, NamedTuple

Axis = Literal["pp", "dp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "tp")
"""In the order that is used where none is named: tensor-parallel ranks are neighbours."""


class Place(NamedTuple):
    """A rank's coordinates."""

    stage: int
    data_index: int
    tensor_index: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The mesh of one strategy over the ranks `0 .. num_stages × replicas × tensor_parallel - 1`."""

    sizes: tuple[int, int, int]
    """Of pp, dp and tp."""
    order: tuple[Axis, ...] = AXES
    """Outermost first."""

    def size(self, axis: Axis) -> int:
        return self.sizes[AXES.index(axis)]

    def stride(self, axis: Axis) -> int:
        """Ranks between neighbours along the axis."""
        return prod(self.size(inner) for inner in self.order[self.order.index(axis) + 1 :])

    def place(self, rank: int) -> Place:
        return Place(*(rank // self.stride(axis) % self.size(axis) for axis in AXES))

    def rank(self, place: Place) -> int:
        return sum(index * self.stride(axis) for axis, index in zip(AXES, place, strict=True))

    @property
    def canonical_order(self) -> tuple[Axis, ...] | None:
        """One name for all orders that lay out the same ranks, since an axis of one rank may stand anywhere; None where
        the order of `AXES` does too.
        """
        wide = [axis for axis in self.order if self.size(axis) > 1]
        first = next(order for order in permutations(AXES) if [axis for axis in order if axis in wide] == wide)
        return None if first == AXES else first
