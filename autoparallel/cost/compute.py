"""Time of one kernel on one device: the roofline model (Williams, Waterman, Patterson 2009) with efficiencies.

time = max(flops / (peak × efficiency), moved_bytes / (memory bandwidth × memory efficiency)) + launch overhead
"""

from __future__ import annotations

from typing import Literal

from autoparallel.cost.tables import CostTable

KernelKind = Literal["matmul", "attention", "memory"]

FALLBACKS: dict[str, tuple[str, ...]] = {
    "float8": ("float8", "bfloat16", "float16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
    "float16": ("float16", "bfloat16", "float32"),
    "float32": ("float32",),
    "float64": ("float64",),
}
"""Which figure prices a dtype: the next wider one where the device has none of its own (V100 has no bfloat16 units, and
its libraries compute bfloat16 in float32). All other dtypes are priced as float32."""


def peak_figure(table: CostTable, dtype: str) -> tuple[str, float]:
    """The dtype whose figures price `dtype` on this device, and its dense peak in FLOP/s.

    A device without a float64 figure computes float64 at half of its float32 rate, which is an upper bound: consumer
    GPUs are slower still.
    """
    family = "float8" if dtype.startswith("float8") else dtype
    for name in FALLBACKS.get(family, ("float32",)):
        if name in table.peak_flops_per_s:
            return name, table.peak_flops_per_s[name].value
    assert family == "float64", "a table always has a float32 figure"
    return "float64", table.peak_flops_per_s["float32"].value / 2


def peak_flops_per_s(table: CostTable, dtype: str) -> float:
    """Dense peak for a dtype, the denominator of model FLOPs utilisation."""
    return peak_figure(table, dtype)[1]


def memory_s(table: CostTable, moved_bytes: float) -> float:
    """Time to move bytes to and from device memory."""
    return moved_bytes / (table.memory_bandwidth_bytes_per_s.value * table.memory_efficiency.value)


def kernel_s(table: CostTable, *, kind: KernelKind, flops: float, moved_bytes: float, dtype: str) -> float:
    """Time of one kernel. `flops` are those it really executes (a causal flash kernel skips half of the scores).

    A memory-bound kernel does its few operations in the shadow of its traffic, so only its bytes count.
    """
    assert flops >= 0, flops
    assert moved_bytes >= 0, moved_bytes
    arithmetic_s = 0.0
    if kind != "memory" and flops > 0:
        name, peak = peak_figure(table, dtype)
        curve = table.matmul_efficiency.get(name, table.matmul_efficiency["default"])
        efficiency = curve.at(flops) if kind == "matmul" else table.attention_efficiency.value
        arithmetic_s = flops / (peak * efficiency)
    return max(arithmetic_s, memory_s(table, moved_bytes)) + table.launch_overhead_s.value


def optimizer_s(table: CostTable, *, parameters: int, bytes_per_parameter: int) -> float:
    """Time of one optimizer step, memory-bound: `bytes_per_parameter` are all bytes it reads and writes for an element.

    AdamW on fp32 masters reads master, gradient and two moments and writes all but the gradient: 28 bytes.
    """
    if parameters == 0:
        return 0.0
    return memory_s(table, parameters * bytes_per_parameter) + table.launch_overhead_s.value
