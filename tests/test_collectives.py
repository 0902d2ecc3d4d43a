"""Collectives follow the ring's closed form, and get slower where the links do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.cost.collectives import Spread, Topology, worst_spread
from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.tables import load_table

GIB = 2**30


def _topology(name: str) -> Topology:
    flavor = resolve_flavor(name)
    return Topology(flavor, load_table(flavor.device))


def test_closed_form_inside_a_host() -> None:
    topology = _topology("8xH100-SXM5-80GB")
    lap_s = 7 / 8 * GIB / (0.82 * 450e9) + 7 * 2e-6
    assert topology.all_gather_s(GIB, group_size=8) == pytest.approx(lap_s)
    assert topology.reduce_scatter_s(GIB, group_size=8) == pytest.approx(lap_s)
    assert topology.all_reduce_s(GIB, group_size=8) == pytest.approx(2 * lap_s)
    assert topology.send_recv_s(GIB, distance=1) == pytest.approx(GIB / 450e9 + 2e-6)


def test_closed_form_between_hosts() -> None:
    topology = _topology("4x8xH100-SXM5-80GB")
    one_each = 3 / 4 * GIB / (0.85 * 50e9) + 3 * 8e-6
    assert topology.all_gather_s(GIB, group_size=4, stride=8) == pytest.approx(one_each)
    all_ports = 31 / 32 * GIB / (0.85 * 8 * 50e9) + 7 * 2e-6 + 3 * 8e-6
    assert topology.all_gather_s(GIB, group_size=32) == pytest.approx(all_ports)
    assert topology.send_recv_s(GIB, distance=8) == pytest.approx(GIB / 50e9 + 8e-6)


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
    assert across.send_recv_s(GIB, distance=8) > inside.send_recv_s(GIB, distance=1)


def test_alone_costs_nothing() -> None:
    topology = _topology("H200")
    assert topology.all_reduce_s(GIB, group_size=1) == 0
    assert topology.send_recv_s(GIB, distance=0) == 0


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
    assert 0 < topology.send_recv_s(small, distance=stride) <= topology.send_recv_s(small + more, distance=stride)
