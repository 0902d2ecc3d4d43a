"""Collectives follow the ring's closed form, and get slower where the links do."""

from __future__ import annotations

import time
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.cost.collectives import Spread, Topology, distinct_strides, worst_spread
from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.tables import load_table

GIB = 2**30


def _topology(name: str) -> Topology:
    flavor = resolve_flavor(name)
    return Topology(flavor, load_table(flavor.device))


class Links(NamedTuple):
    """Bytes per second as far as collectives reach them, and latencies."""

    inside: float
    inside_s: float
    between: float
    between_s: float


def _links(topology: Topology) -> Links:
    links, network = topology.table.intra_host, topology.table.network
    return Links(
        links.efficiency.value * links.bandwidth_bytes_per_s.value,
        links.latency_s.value,
        network.efficiency.value * network.bandwidth_bytes_per_s.value,
        network.latency_s.value,
    )


def test_closed_form_inside_a_host() -> None:
    topology = _topology("8xH100-SXM5-80GB")
    links = _links(topology)
    lap_s = 7 / 8 * GIB / links.inside + 7 * links.inside_s
    assert topology.all_gather_s(GIB, group_size=8) == pytest.approx(lap_s)
    assert topology.reduce_scatter_s(GIB, group_size=8) == pytest.approx(lap_s)
    assert topology.all_reduce_s(GIB, group_size=8) == pytest.approx(2 * lap_s)
    assert topology.send_recv_s(GIB, (0, 1), group_size=8) == pytest.approx(GIB / 450e9 + links.inside_s)


def test_closed_form_between_hosts() -> None:
    topology = _topology("4x8xH100-SXM5-80GB")
    links = _links(topology)
    one_each = 3 / 4 * GIB / links.between + 3 * links.between_s
    assert topology.all_gather_s(GIB, group_size=4, stride=8) == pytest.approx(one_each)
    moving_s = 31 / 32 * GIB / (8 * links.between)
    ring_s = 4 * 7 * links.inside_s + 3 * links.between_s
    assert topology.all_gather_s(GIB, group_size=32) == pytest.approx(moving_s + ring_s)
    tree_s = 7 * links.inside_s + 2 * links.between_s
    assert topology.all_reduce_s(GIB, group_size=32) == pytest.approx(2 * (moving_s + tree_s))
    sent_s = topology.send_recv_s(GIB, (0, 1), group_size=4, stride=8)
    assert sent_s == pytest.approx(GIB / links.between + links.between_s)


def test_a_cluster_may_have_another_network() -> None:
    topology = _topology("4x8xH100-SXM5-80GB")
    slow = topology.flavor.model_copy(update={"network_bandwidth_bytes_per_s": 12.5e9})
    times = [Topology(f, topology.table).all_gather_s(100 * GIB, group_size=32) for f in (topology.flavor, slow)]
    assert times[1] == pytest.approx(4 * times[0], rel=0.01)


@pytest.mark.parametrize(
    ("devices", "per_host", "size", "stride", "spread"),
    [
        (8, 8, 4, 2, Spread(1, 4)),
        (32, 8, 32, 1, Spread(4, 8)),
        (32, 8, 4, 8, Spread(4, 1)),
        (16, 8, 4, 4, Spread(2, 2)),
        (12, 8, 12, 1, Spread(2, 4)),
        (12, 8, 3, 1, Spread(2, 1)),  # ranks 6, 7, 8: the third group is torn, the first is not
        (16, 8, 1, 3, Spread(1, 1)),
    ],
)
def test_spread(devices: int, per_host: int, size: int, stride: int, spread: Spread) -> None:
    assert worst_spread(devices, per_host, size, stride) == spread


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, int, int, int, tuple[int, ...] | None]:
    """Devices, of which the last host may lack some; the size and stride of a group, and who of it takes part."""
    per_host, size, stride = (draw(st.integers(1, most)) for most in (9, 6, 12))
    devices = size * stride * draw(st.integers(1, 6))
    some = st.sets(st.integers(0, size - 1), min_size=1).map(sorted).map(tuple)
    return devices, per_host, size, stride, draw(st.none() | some)


@settings(max_examples=300, deadline=None)
@given(group=groups())
def test_spread_is_that_of_the_worst_of_all_groups(group: tuple[int, int, int, int, tuple[int, ...] | None]) -> None:
    devices, per_host, size, stride, members = group
    found = []
    for block in range(0, devices, size * stride):
        for first in range(block, block + stride):
            ranks = range(first, first + size * stride, stride)
            hosts = Counter(ranks[i] // per_host for i in (range(size) if members is None else members))
            found.append(Spread(len(hosts), min(hosts.values())))
    worst = max(found, key=lambda spread: (spread.num_hosts, -spread.ranks_per_host))
    assert worst_spread(devices, per_host, size, stride, members) == worst


def test_spreads_of_a_large_cluster_are_found_at_once() -> None:
    begin_s = time.perf_counter()
    groups = [(2**size, 2**stride) for size in range(15) for stride in range(15 - size)]
    found = [worst_spread(16384, 8, size, stride) for size, stride in groups]
    assert time.perf_counter() - begin_s < 2
    assert dict(zip(groups, found, strict=True))[16, 2] == Spread(4, 4)


def test_strides_that_spread_a_group_alike_count_once() -> None:
    cluster = resolve_flavor("8x8xH100-SXM5-80GB")
    assert distinct_strides(cluster, 8) == [1, 2, 4, 8]
    assert distinct_strides(cluster, 4) == [1, 4, 8]
    assert distinct_strides(cluster, 16) == [1, 2, 4]
    assert distinct_strides(resolve_flavor("8xH100-SXM5-80GB"), 4) == [1]


def test_pairs_inside_a_host_do_not_use_the_network() -> None:
    """Pipelines of four inside hosts of eight, and of sixteen over two hosts, whose eighth boundary alone crosses."""
    topology = _topology("4x8xH100-SXM5-80GB")
    links = _links(topology)
    inside, across = GIB / 450e9 + links.inside_s, GIB / links.between + links.between_s
    assert topology.send_recv_s(GIB, (0, 1), group_size=4) == pytest.approx(inside)
    assert topology.send_recv_s(GIB, (0, 3), group_size=4, stride=2) == pytest.approx(inside)
    crossing = [topology.send_recv_s(GIB, (i, i + 1), group_size=16) for i in range(15)]
    assert crossing == pytest.approx([inside] * 7 + [across] + [inside] * 7)
    tied = [topology.all_reduce_s(GIB, (0, last), group_size=16) for last in (3, 7, 8)]
    assert tied[0] == tied[1] < tied[2] / 2


def test_a_pair_in_a_mesh_has_one_link() -> None:
    mesh, switch = _topology("8xMI300X"), _topology("8xH200")
    per_byte = {n: mesh.all_reduce_s(GIB, group_size=n) * n / (2 * (n - 1)) for n in (2, 4, 8)}
    assert per_byte[2] > 2.9 * per_byte[4] > per_byte[8]
    assert per_byte[2] / per_byte[8] == pytest.approx(7, rel=0.05)
    even = {n: switch.all_reduce_s(GIB, group_size=n) * n / (2 * (n - 1)) for n in (2, 8)}
    assert even[2] == pytest.approx(even[8], rel=0.02)


@pytest.mark.parametrize("device", ["V100-SXM2-32GB", "A100-SXM4-80GB", "H100-SXM5-80GB", "B200", "MI250", "MI300X"])
def test_crossing_hosts_is_slower(device: str) -> None:
    inside, across = _topology(f"8x{device}"), _topology(f"2x8x{device}")
    assert across.all_reduce_s(GIB, group_size=2, stride=8) > inside.all_reduce_s(GIB, group_size=2, stride=4)
    assert across.all_gather_s(GIB, group_size=16) > inside.all_gather_s(GIB, group_size=8)
    neighbours = {"group_size": 2, "stride": 4}
    assert across.send_recv_s(GIB, (0, 1), group_size=2, stride=8) > inside.send_recv_s(GIB, (0, 1), **neighbours)


def test_alone_costs_nothing() -> None:
    topology = _topology("H200")
    assert topology.all_reduce_s(GIB, group_size=1) == 0
    assert topology.all_reduce_s(GIB, (2,), group_size=1) == 0


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["4xLarge.2048GB", "1.5xLarge.768GB", "2x8xH100-SXM5-80GB", "8xMI300X", "8xRTX4090", "cpu:4"]),
    data=st.data(),
    small=st.integers(0, 2**34),
    more=st.integers(1, 2**34),
)
def test_more_bytes_take_longer(name: str, data: st.DataObject, small: int, more: int) -> None:
    topology = _topology(name)
    size = data.draw(st.integers(2, topology.flavor.num_devices))
    stride = data.draw(st.integers(1, topology.flavor.num_devices // size))
    for collective in (topology.all_gather_s, topology.reduce_scatter_s, topology.all_reduce_s):
        fast, slow = (collective(n, group_size=size, stride=stride) for n in (small, small + more))
        assert 0 < fast <= slow
    sent = [topology.send_recv_s(n, (0, size - 1), group_size=size, stride=stride) for n in (small, small + more)]
    assert 0 < sent[0] <= sent[1]
