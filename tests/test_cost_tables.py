"""Cost tables load, are plausible and sourced; kernels priced with them follow the roofline."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.cost import compute
from autoparallel.cost.compute import (
    ATTENTION_FILL,
    COLLECTIVE_LAUNCHES,
    UNALIGNED,
    UNALIGNED_PRODUCTS,
    Device,
    peak_flops_per_s,
)
from autoparallel.cost.kernels import Kernel
from autoparallel.cost.tables import EfficiencyCurve, available_devices, load_table, parse_table
from autoparallel.errors import ConfigError, CostTableError

REQUIRED = {
    "V100-SXM2-32GB", "A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIe-80GB", "A6000", "L4", "L40S", "RTX4090",
    "H100-SXM5-80GB", "H100-PCIe", "H200", "B200", "GB200", "GB300", "MI210", "MI250", "MI250X", "MI300X", "MI325X",
    "cpu",
}  # fmt: skip


def _raw(device: str) -> dict[str, Any]:
    return json.loads((resources.files("autoparallel.cost_models") / f"{device}.json").read_text())


def test_every_required_device_has_a_table() -> None:
    assert set(available_devices()) >= REQUIRED


@pytest.mark.parametrize("device", available_devices())
def test_table_is_ordered_as_physics_demands(device: str) -> None:
    table = load_table(device)
    peaks = {dtype: figure.value for dtype, figure in table.peak_flops_per_s.items()}
    assert peaks.get("float64", 0) <= peaks["float32"]
    assert peaks["float32"] <= peaks.get("bfloat16", peaks["float32"]) <= peaks.get("float8", 1e18)
    assert table.intra_host.bandwidth_bytes_per_s.value < table.memory_bandwidth_bytes_per_s.value
    pairwise = table.intra_host.pairwise_bandwidth_bytes_per_s
    assert pairwise is None or pairwise.value <= table.intra_host.bandwidth_bytes_per_s.value
    assert table.reserve_bytes.value < table.memory_bytes.value / 4


@pytest.mark.parametrize("device", available_devices())
def test_recalled_figures_are_tagged_assumed(device: str) -> None:
    text = json.dumps(_raw(device))
    assumed = load_table(device).assumed()
    assert text.count('"recalled from') == sum(figure.source.startswith("recalled from") for _, figure in assumed)
    assert len({path for path, _ in assumed}) == len(assumed)


def test_facts() -> None:
    assert load_table("MI250").memory_bytes.value == 65_520 * 2**20
    assert load_table("H100-SXM5-80GB").peak_flops_per_s["bfloat16"].value == 989e12
    assert dict(load_table("A100-SXM4-80GB").assumed())["launch_overhead_s"].unit == "s"


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="H100-SXM5-80GB"):
        load_table("H100-SXM-80GB")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("memory_bytes", "value"), "80", "memory_bytes.value"),
        (("memory_bytes", "unit"), "GB", "memory_bytes"),
        (("memory_bytes", "value"), 80, "not plausible"),
        (("memory_efficiency", "value"), 85, "not plausible"),
        (("launch_overhead_s", "value"), 1e9, "launch_overhead_s"),
        (("network", "latency_s", "source"), "", "network.latency_s.source"),
        (("network", "latency_s", "kind"), "guessed", "network.latency_s.kind"),
        (("memory_bandwith",), 1, "memory_bandwith"),
        (("name",), "H100", "name"),
        (("peak_flops_per_s",), {}, "float32"),
        (("matmul_efficiency", "default", "points"), [[1e9, 0.6], [1e8, 0.7]], "points must rise"),
        (("matmul_efficiency", "default", "points"), [[1e9, 0.1], [2e9, 0.9]], "less time"),
    ],
)
def test_mistake_names_file_and_field(path: tuple[str, ...], value: object, message: str) -> None:
    raw = _raw("A100-SXM4-80GB")
    target = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(CostTableError, match=r"A100-SXM4-80GB\.json") as caught:
        parse_table(json.dumps(raw), file_name="A100-SXM4-80GB.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "NaN", '{"name": NaN}', "[" * 5000, "\ufeff{}"])
def test_broken_file_is_a_cost_table_error(text: str) -> None:
    with pytest.raises(CostTableError, match=r"X\.json"):
        parse_table(text, file_name="X.json")


def test_curve_meets_its_points_and_is_geometric_between() -> None:
    curve = EfficiencyCurve(points=((1e6, 0.1), (1e8, 0.4)), kind="assumed", source="test")
    assert [curve.at(flops) for flops in (1.0, 1e6, 1e8, 1e12)] == pytest.approx([0.1, 0.1, 0.4, 0.4])
    assert curve.at(1e7) == pytest.approx(0.2)


def test_kernel_time_by_hand() -> None:
    """Tiles of 256 by 128 on 108 units; one more makes a wave that is nearly idle, and half of that is lost: least with
    tiles of half the size, of which it takes two waves and two tiles, at 0.95 of the rate.
    """
    table = load_table("A100-SXM4-80GB")
    device, launch_s = Device(table), table.launch_overhead_s.value
    assert table.matmul_fill_depth is not None
    rate = 312e12 * table.matmul_efficiency["default"].at(1e12)
    depth = 4096 + table.matmul_fill_depth.value

    def matmul(products: int, rows: int, columns: int) -> Kernel:
        return Kernel("matmul", "bfloat16", 1e6, products, rows, columns, 4096)

    full = matmul(108, 256, 128)
    assert device.kernel_s(full) == pytest.approx(108 * 2 * 256 * 128 * depth / rate + launch_s)
    one_more = matmul(109, 256, 128)
    waves = (3 + 218 / 108) / 2
    assert device.kernel_s(one_more) - launch_s == pytest.approx(waves / 2 / 0.95 * (device.kernel_s(full) - launch_s))
    whole, unaligned = (Kernel("matmul", "bfloat16", 1e6, 1, 108 * 256, columns, 4096) for columns in (128, 127))
    assert device.kernel_s(unaligned) - launch_s == pytest.approx((device.kernel_s(whole) - launch_s) / UNALIGNED)
    heads, odd = (Kernel("matmul", "bfloat16", 1e6, 108, 256, 128, depth) for depth in (128, 127))
    filled = (127 + table.matmul_fill_depth.value) / (128 + table.matmul_fill_depth.value)
    slower = (device.kernel_s(odd) - launch_s) / (device.kernel_s(heads) - launch_s)
    assert slower == pytest.approx(filled / UNALIGNED_PRODUCTS)
    moved_s = 1e9 / (2.039e12 * table.memory_efficiency.value)
    assert device.kernel_s(Kernel("memory", "float32", 1e9)) == pytest.approx(moved_s + launch_s)
    assert table.special_functions_per_s is not None
    exponentials = Kernel("memory", "float32", 1e9, special=1e9)
    assert device.kernel_s(exponentials) == pytest.approx(
        moved_s + 1e9 / table.special_functions_per_s.value + launch_s
    )
    assert device.optimizer_s(parameters=10**9, bytes_per_parameter=28) == pytest.approx(28 * moved_s + launch_s)
    assert device.optimizer_s(parameters=0, bytes_per_parameter=28) == 0


def test_the_depth_of_few_tiles_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a deep product has fewer tiles than the device has units, and not where tiles fill whole waves."""
    few, many = (Kernel("matmul", "bfloat16", 1e6, 1, rows, 512, 65536) for rows in (512, 108 * 256))

    def times() -> tuple[float, ...]:
        return tuple(map(Device(load_table("A100-SXM4-80GB")).kernel_s, (few, many)))

    cut, uncut = times(), (monkeypatch.setattr(compute, "DEPTH_PARTS", (1,)), times())[1]
    assert cut[0] < 0.8 * uncut[0]
    assert cut[1] == uncut[1]


def test_small_kernels_wait_for_the_host() -> None:
    device = Device(load_table("H100-SXM5-80GB"), dispatch_s=2e-5)
    small, large = Kernel("memory", "bfloat16", 1e3), Kernel("memory", "bfloat16", 1e9)
    assert device.kernels_s([small] * 10) == pytest.approx(10 * 2e-5)
    launches = 10 + 3 * COLLECTIVE_LAUNCHES
    assert device.kernels_s([small] * 10, collectives=3, waits_s=1e-4) == pytest.approx(launches * 2e-5 - 1e-4)
    assert device.kernels_s([large] * 10) == pytest.approx(10 * device.kernel_s(large))


def test_dtype_fallbacks() -> None:
    v100, l4 = load_table("V100-SXM2-32GB"), load_table("L4")
    assert peak_flops_per_s(v100, "bfloat16") == peak_flops_per_s(v100, "float32")
    assert peak_flops_per_s(v100, "float8_e4m3fn") == peak_flops_per_s(v100, "float16")
    assert peak_flops_per_s(l4, "float64") == peak_flops_per_s(l4, "float32") / 2
    assert peak_flops_per_s(l4, "int64") == peak_flops_per_s(l4, "float32")


@settings(max_examples=60, deadline=None)
@given(
    device=st.sampled_from(available_devices()),
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16", "float8", "float4"]),
    sizes=st.tuples(*[st.integers(1, 1 << 12)] * 4),
    moved_bytes=st.floats(0, 1e12),
    factor=st.integers(1, 10),
)
def test_more_work_never_takes_less_time(
    device: str, dtype: str, sizes: tuple[int, int, int, int], moved_bytes: float, factor: int
) -> None:
    priced = Device(load_table(device))
    products, rows, columns, depth = sizes
    matmul = Kernel("matmul", dtype, moved_bytes, products, rows, 8 * columns, 8 * depth)
    attention = Kernel("attention", dtype, moved_bytes, flops=1e6 * rows, special=rows, variant="flash")
    for kernel in (matmul, attention, Kernel("memory", dtype, moved_bytes, special=rows)):
        more = [kernel._replace(moved_bytes=moved_bytes * factor), kernel._replace(special=kernel.special * factor)]
        more += [kernel._replace(flops=kernel.flops * factor)]
        more += [kernel._replace(**{n: getattr(kernel, n) * factor}) for n in ("products", "rows", "columns", "depth")]
        assert min(map(priced.kernel_s, more)) >= priced.kernel_s(kernel) * (1 - 1e-9) > 0


def test_attention_reaches_half_of_its_rate_at_as_many_keys_as_its_ends_take() -> None:
    table = load_table("A100-SXM4-80GB")
    device, launch_s = Device(table), table.launch_overhead_s.value
    long_s, short_s = (
        device.kernel_s(Kernel("attention", "bfloat16", 0.0, depth=keys, flops=1e12, variant="flash")) - launch_s
        for keys in (10**9, int(ATTENTION_FILL))
    )
    assert long_s == pytest.approx(1e12 / (312e12 * table.attention_efficiency.value))
    assert short_s == pytest.approx(2 * long_s)
