"""Time of kernels on one device: the roofline model (Williams, Waterman, Patterson 2009) with what keeps kernels below
it.

    matmul      flops of whole tiles and whole waves / (peak × efficiency)      or its bytes, whichever takes longer
    attention   flops / (peak × efficiency) × (1 + fill / keys) + exponentials / their rate         or its bytes
    memory      bytes / (memory bandwidth × efficiency, which may depend on the bytes) + exponentials / their rate
    each        + launch overhead

A matmul is cut into tiles, of which each unit of the device computes one at a time: units are idle in the last wave,
and a tile takes some depth to begin and to end (NVIDIA, Matrix Multiplication Background). Kernels of a phase run one
after the other; where a host launches them ahead, a phase takes at least as long as launching them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from autoparallel.cost.kernels import Kernel
from autoparallel.cost.tables import CostTable, Figure
from autoparallel.ir.graph import DTYPE_BYTES

FALLBACKS: dict[str, tuple[str, ...]] = {
    "float4": ("float4", "float8", "bfloat16", "float16", "float32"),
    "float8": ("float8", "bfloat16", "float16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
    "float16": ("float16", "bfloat16", "float32"),
    "float32": ("float32",),
    "float64": ("float64",),
}
"""Which figure prices a dtype: the next wider one where the device has none of its own (V100 has no bfloat16 units, and
its libraries compute bfloat16 in float32). All other dtypes are priced as float32."""

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
"""Rows, columns, and the share of the largest tile's rate: a smaller one reads its operands more often. Sizes of the
tensor core kernels that NVIDIA's guide lists; a library takes the one that ends first."""
DEPTH_PARTS = (1, 2, 4)
"""Into so many parts a library may cut the depth of a product, where tiles are few; they are added up in float32
(split-k, as NVIDIA's guide describes it).
"""
ALIGNMENT_BYTES = 16
"""Rows of operands that are no multiple of it are read in pieces."""
ATTENTION_FILL = 450.0
"""Keys whose time a GPU's fused attention loses at the ends of a row and in the tiles on the diagonal: of the rate for
long rows it reaches about half at 512 keys and two thirds at 1,024 (figures 4 and 5 of arXiv 2307.08691)."""
FIRST_FLASH = 0.55
"""Rate of the first FlashAttention kernel over that of the second, which its authors measure to be 1.7 to 3 times as
fast (arXiv 2307.08691, section 4.1)."""
UNALIGNED = 0.6
"""Share of the rate that is left then (assumed; NVIDIA's guide names the requirement, not its price)."""
UNALIGNED_PRODUCTS = 0.07
"""The same of batched products: in BLOOM-176B's tuning log, a step with heads of 108 elements takes 38 to 40 % longer
than one with heads of 144."""
COLLECTIVE_LAUNCHES = 2
"""Kernels that take the host as long to launch as one collective (assumed)."""


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


class Device:
    """The rates of a cost table, and what kernels take under them."""

    def __init__(self, table: CostTable, *, dispatch_s: float | None = None) -> None:
        def value(figure: Figure | None) -> float:
            return 0.0 if figure is None else figure.value

        self.table = table
        self.peak_bytes_per_s = table.memory_bandwidth_bytes_per_s.value
        self.stream_bytes_per_s = self.peak_bytes_per_s * table.memory_efficiency.value
        attention = table.attention_efficiency.value
        self.attention_efficiency = {
            "flash": attention,
            "flash-1": attention * FIRST_FLASH,
            "vendor": value(table.vendor_attention_efficiency) or attention,
        }
        self.special_s = 0.0 if table.special_functions_per_s is None else 1 / table.special_functions_per_s.value
        self.launch_s = table.launch_overhead_s.value
        self.dispatch_s = value(table.dispatch_s) if dispatch_s is None else dispatch_s
        self.units, self.fill = value(table.compute_units), value(table.matmul_fill_depth)
        self._matmuls: dict[tuple[str, int, int, int, int], float] = {}

    def stream_s(self, moved_bytes: float) -> float:
        """Time to move bytes of tensors that stay where they are."""
        return moved_bytes / self.stream_bytes_per_s

    def memory_s(self, moved_bytes: float) -> float:
        """Time of one kernel to move bytes, its results into new tensors."""
        curve = self.table.memory_curve
        if curve is None or moved_bytes <= 0:
            return self.stream_s(moved_bytes)
        return moved_bytes / (self.peak_bytes_per_s * curve.at(moved_bytes))

    def kernel_s(self, kernel: Kernel) -> float:
        """Time of one kernel."""
        moved_s, special_s = self.memory_s(kernel.moved_bytes), kernel.special * self.special_s
        if kernel.kind == "memory":
            return moved_s + special_s + self.launch_s
        if kernel.kind == "matmul":
            busy_s = self._matmul_s(kernel.dtype, kernel.products, kernel.rows, kernel.columns, kernel.depth)
        else:
            rate = peak_flops_per_s(self.table, kernel.dtype) * self.attention_efficiency[kernel.variant]
            fill = ATTENTION_FILL / kernel.depth if self.units and kernel.depth else 0.0
            busy_s = kernel.flops / rate * (1 + fill) + special_s
        return max(moved_s, busy_s) + self.launch_s

    def kernels_s(self, kernels: Sequence[Kernel], *, collectives: int = 0, waits_s: float = 0.0) -> float:
        """Time of kernels that run one after the other. That of `collectives` among them, `waits_s`, is left out;
        meanwhile the host goes on.
        """
        launches = len(kernels) + COLLECTIVE_LAUNCHES * collectives
        return max(sum(map(self.kernel_s, kernels)), launches * self.dispatch_s - waits_s)

    def optimizer_s(self, *, parameters: int, bytes_per_parameter: int) -> float:
        """Time of one optimizer step, memory-bound: `bytes_per_parameter` are all bytes it reads and writes for an
        element. AdamW on fp32 masters reads master, gradient and two moments and writes all but the gradient: 28 bytes.
        """
        return self.stream_s(parameters * bytes_per_parameter) + self.launch_s if parameters else 0.0

    def _matmul_s(self, dtype: str, count: int, rows: int, columns: int, depth: int) -> float:
        """Arithmetic alone."""
        key = (dtype, count, rows, columns, depth)
        if key not in self._matmuls:
            self._matmuls[key] = self._new_matmul_s(*key)
        return self._matmuls[key]

    def _new_matmul_s(self, dtype: str, count: int, rows: int, columns: int, depth: int) -> float:
        name, peak = peak_figure(self.table, dtype)
        curve = self.table.matmul_efficiency.get(name, self.table.matmul_efficiency["default"])
        flops = 2.0 * count * rows * columns * depth
        if flops == 0:
            return 0.0
        rate = peak * curve.at(flops)
        if not self.units:
            return flops / rate
        aligned = all(size * 2 % ALIGNMENT_BYTES == 0 for size in (columns, depth))
        share = 1.0 if aligned else UNALIGNED if count == 1 else UNALIGNED_PRODUCTS
        sum_s = self.stream_s(2 * count * rows * columns * DTYPE_BYTES["float32"])
        return min(
            2.0 * self._area(count * parts, rows, columns) * (depth / parts + self.fill) / (rate * share)
            + (parts * sum_s if parts > 1 else 0.0)
            for parts in DEPTH_PARTS
        )

    def _area(self, products: int, rows: int, columns: int) -> float:
        """Elements of output that all units together have the time for, until the last tile is done."""
        return min(
            _waves(products * ceil(rows / m) * ceil(columns / n) / self.units) * self.units * m * n / share
            for m, n, share in TILES
        )


def _waves(tiles_per_unit: float) -> float:
    """Time of so many tiles for each unit, over that of one. Whoever is busy in the last of several waves has more of
    the memory and of the clock: half of what is idle is lost (assumed).
    """
    whole = ceil(tiles_per_unit)
    return (whole + tiles_per_unit) / 2 if whole > 1 else whole
