"""Where ranks stand: coordinates and rank are one another's inverse, and equal layouts have one name."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import pytest
from pydantic import ValidationError

from autoparallel.plans.grid import AXES, Grid, Place
from autoparallel.plans.strategy import Strategy

ORDERS = list(permutations(AXES))
SIZES: dict[str, Any] = {"num_stages": 2, "data_parallel": 4, "tensor_parallel": 3}


def test_without_an_order_tensor_parallel_ranks_are_neighbours() -> None:
    strategy = Strategy(**SIZES)
    assert [strategy.stride_of(axis) for axis in AXES] == [12, 3, 1]
    assert strategy.place_of(17) == Place(stage=1, data_index=1, tensor_index=2)


def test_an_order_names_the_outermost_axis_first() -> None:
    strategy = Strategy(**SIZES, mesh_order=("dp", "pp", "tp"))
    assert [strategy.stride_of(axis) for axis in AXES] == [3, 6, 1]
    assert strategy.rank_of(Place(stage=1, data_index=2, tensor_index=2)) == 17


@pytest.mark.parametrize("order", ORDERS)
def test_every_rank_has_a_place_of_its_own(order: Any) -> None:
    grid = Grid((2, 4, 3), order)
    places = [grid.place(rank) for rank in range(24)]
    assert set(places) == {Place(*indices) for indices in product(range(2), range(4), range(3))}
    assert [grid.rank(place) for place in places] == list(range(24))


@pytest.mark.parametrize("sizes", list(product((1, 2, 3), repeat=3)))
def test_orders_have_one_name_where_they_lay_out_the_same_ranks(sizes: Any) -> None:
    stages, replicas, tensor = sizes
    layouts: dict[Any, set[Any]] = {}
    for order in ORDERS:
        strategy = Strategy(num_stages=stages, data_parallel=replicas, tensor_parallel=tensor, mesh_order=order)
        places = tuple(map(strategy.place_of, range(strategy.num_devices)))
        layouts.setdefault(places, set()).add(strategy.mesh_order)
        assert places == tuple(map(Grid(sizes, order).place, range(strategy.num_devices)))
    assert all(len(names) == 1 for names in layouts.values())
    assert len({name for (name,) in layouts.values()}) == len(layouts)
    assert layouts[tuple(map(Grid(sizes).place, range(stages * replicas * tensor)))] == {None}


def test_a_group_of_all_replicas_is_none() -> None:
    assert Strategy(data_parallel=8, distribute_param=2, shard_group_size=8).shard_group_size is None
    grouped = Strategy(data_parallel=8, distribute_param=2, shard_group_size=2)
    assert (grouped.shard_ways, grouped.state_ways, grouped.shard_groups) == (2, 2, 4)
    shared = Strategy(data_parallel=2, context_parallel=4, distribute_param=1, shard_group_size=4)
    assert (shared.shard_ways, shared.shard_groups) == (4, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shard_group_size": 4}, "nothing to shard: distribute_param is 0"),
        ({"shard_group_size": 3, "distribute_param": 1}, "does not divide 8 replicas"),
        ({"shard_group_size": 1, "distribute_param": 1}, "into groups of two or more"),
        ({"shard_group_size": 16, "distribute_param": 3}, "does not divide 8 replicas"),
        ({"mesh_order": ("dp", "tp")}, "each of pp, dp, tp once"),
        ({"mesh_order": ("dp", "tp", "tp")}, "each of pp, dp, tp once"),
        ({"mesh_order": ("dp", "cp", "tp")}, "mesh_order"),
    ],
)
def test_what_is_no_layout_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Strategy(data_parallel=8, **fields)


def test_a_summary_names_what_is_not_usual() -> None:
    plain = Strategy(**SIZES, distribute_param=3)
    assert "shard_group_size" not in plain.summary()
    assert "mesh_order" not in plain.summary()
    other = Strategy(**SIZES, distribute_param=3, shard_group_size=2, mesh_order=("dp", "pp", "tp"))
    assert "distribute_param : 3, shard_group_size : 2, " in other.summary()
    assert other.summary().endswith(", mesh_order : dp pp tp")
    assert Strategy.model_validate_json(other.model_dump_json()) == other
