"""`autoparallel profile`: this machine's device, measured into a cost table.

What a training step runs is what is timed: every operator of two small captured models, at several sizes, with all
activations alive; matmuls over a grid; a whole tiny program for what a launch costs; the optimizer; collectives where
there are several devices. Figures that no program can measure (links between hosts) come from the device's table where
there is one, and are assumed where there is none.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import log2
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from autoparallel.capture.program import Program, capture
from autoparallel.cost.flavors import device_of_model
from autoparallel.cost.kernels import Size, kernels
from autoparallel.cost.practice import OURS
from autoparallel.cost.tables import CostTable, EfficiencyCurve, Figure, SizeCurve, available_devices, load_table
from autoparallel.emit.stage import emit_stage, state_tensors
from autoparallel.errors import ConfigError
from autoparallel.measure.links import Links, measure_links
from autoparallel.measure.stopwatch import Stopwatch
from autoparallel.measure.timeline import Timed, timeline
from autoparallel.plans.strategy import StagePlan
from autoparallel.progress import progress

DTYPES = {"cpu": ("float32", "bfloat16", "float64"), "cuda": ("bfloat16", "float16", "float32")}
"""Those of matmuls; the first is that of the models."""
WIDTHS = {"cpu": (256, 1024, 4096), "cuda": (1024, 4096, 8192)}
TOKENS = {"cpu": (64, 256, 1024), "cuda": (1024, 4096, 16384)}
MODEL_SIZES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "cpu": ((128, 1024, 2, 64), (256, 4096, 2, 256), (768, 32768, 4, 128)),
    "cuda": ((1024, 8192, 2, 2048), (2048, 32768, 4, 2048), (4096, 128256, 4, 2048)),
}
"""Hidden size, vocabulary, rows and tokens a row."""
CUBES = (32, 64, 128, 512)
BIN = 4.0
"""Points of a curve are so far apart, as a factor of bytes or FLOPs."""
LARGE_FLOPS = 1e8
LEAST_BYTES = 1 << 16
"""Smaller kernels take as long as their launch."""
PARAMETERS = 1 << 23
"""Elements that the optimizer's step is timed on."""


@dataclass
class _Found:
    """What the jobs leave behind."""

    launch_s: float = 0.0
    dispatch_s: float | None = None
    """Of the host, where the device runs behind it."""
    timed: list[Timed] = field(default_factory=list)
    matmuls: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """By dtype, (FLOPs, seconds) of one product."""
    adamw_bytes_per_s: float = 0.0
    links: Links | None = None


@dataclass(frozen=True)
class _Job:
    name: str
    run: Callable[[float], None]
    """Takes the seconds that it may last."""
    share: float
    """Of the budget, relative to other jobs."""


def profile(device_type: str | None = None, *, budget_s: float = 90.0) -> CostTable:
    """Measure this machine's CPU (one thread) or GPU for about `budget_s` seconds, and half a minute of captures.

    Raises ConfigError for a device that is not here.
    """
    device = _device(device_type)
    name = "cpu" if device.type == "cpu" else device_of_model(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        torch.set_num_threads(1)
    found, watch = _Found(), Stopwatch(device)
    jobs = list(_jobs(watch, found))
    total = sum(job.share for job in jobs)
    with progress(f"Profile {name}", total=len(jobs)) as advance:
        for job in jobs:
            advance(job.name)
            job.run(budget_s * job.share / total)
    return _table(name, watch, found)


def _device(device_type: str | None) -> torch.device:
    chosen = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in DTYPES or (chosen == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"there is no device {chosen!r} to measure",
            why="torch sees " + ("a GPU and the CPU" if torch.cuda.is_available() else "the CPU only"),
            remedy="choose cpu, or cuda where torch sees a GPU (of AMD too)",
        )
    return torch.device(chosen, 0) if chosen == "cuda" else torch.device("cpu")


# --- jobs ---------------------------------------------------------------------------------------------------------


def _jobs(watch: Stopwatch, found: _Found) -> Iterator[_Job]:
    kind = watch.device.type
    yield _Job("launch", partial(_launch, watch, found), 1)
    for hidden, vocabulary, rows, seq in MODEL_SIZES[kind]:
        for config in _configs(hidden, vocabulary):
            yield _Job(f"{config.model_type} {hidden} wide", partial(_operators, watch, found, config, rows, seq), 6)
    for dtype in DTYPES[kind]:
        yield _Job(f"matmuls, {dtype}", partial(_matmuls, watch, found, dtype), 4)
    yield _Job("optimizer", partial(_optimizer, watch, found), 1)
    if num_ranks := _num_ranks(watch.device):
        yield _Job("links", partial(_links, watch, found, num_ranks), 3)


def _num_ranks(device: torch.device) -> int:
    """Devices of this host that talk to each other; 0 where there is one."""
    count = torch.cuda.device_count() if device.type == "cuda" else min(2, len(os.sched_getaffinity(0)))
    return count if count > 1 else 0


def _configs(hidden: int, vocabulary: int) -> list[transformers.PretrainedConfig]:
    """One block of each of two kinds: rotary positions, RMSNorm and SwiGLU; LayerNorm, GELU and biases."""
    heads = max(1, hidden // 64)
    llama = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=1,
        num_attention_heads=heads,
        vocab_size=vocabulary,
    )
    gpt2 = transformers.GPT2Config(
        n_embd=hidden,
        n_layer=1,
        n_head=heads,
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return [llama, gpt2]


def _launch(watch: Stopwatch, found: _Found, budget_s: float) -> None:
    """Forward and backward of an emitted program whose tensors are tiny, by its number of kernels."""
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=1, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config).train().to(watch.device)
    program = capture(model)
    tensors = state_tensors(model, program)
    whole = StagePlan(first_segment=0, last_segment=program.graph.num_segments - 1, recomputation="none")
    stage = emit_stage(program, whole, lambda name: tensors[name], device=watch.device)
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=watch.device)
    inputs = {"input_ids": tokens, "attention_mask": None, "labels": tokens, "padding": None}
    read = {node.name for node in stage.graph.nodes if node.op == "placeholder"}
    inputs = {key: value for key, value in inputs.items() if key in read}

    def step() -> None:
        stage(**inputs, num_items=torch.tensor(7, device=watch.device))[0].backward()
        for tensor in tensors.values():
            tensor.grad = None

    parts = kernels(list(program.graph.ops()), Size(1, 8), OURS)
    launched = sum(len(part.forward) + len(part.backward) + len(part.weight) for part in parts)
    found.launch_s = watch.typical_s(step, budget_s=budget_s) / launched
    if watch.device.type == "cuda":
        found.dispatch_s, found.launch_s = found.launch_s, _launch_behind_others(watch.device)


def _launch_behind_others(device: torch.device, count: int = 200) -> float:
    """Seconds of a kernel with nothing to do, launched while the device is still busy."""
    large, one = torch.zeros(8192, 8192, device=device), torch.zeros(1, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(4):
        large @ large
    begin.record()
    for _ in range(count):
        one.add_(1)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / count


def _operators(
    watch: Stopwatch, found: _Found, config: transformers.PretrainedConfig, rows: int, seq: int, budget_s: float
) -> None:
    end_s = time.perf_counter() + budget_s
    program: Program = capture(config, dtype=getattr(torch, DTYPES[watch.device.type][0]))
    assert program.graph.parameters
    left_s = end_s - time.perf_counter()
    found.timed += timeline(program, batch=rows, seq=seq, budget_s=left_s, watch=watch)


def _matmuls(watch: Stopwatch, found: _Found, dtype: str, budget_s: float) -> None:
    """Linear layers: the product and its two gradients, whose results are new tensors as in a step; small cubes."""
    kind = watch.device.type
    sizes = [(n, n, n) for n in CUBES]
    sizes += [(t, a, b) for t in TOKENS[kind] for a in WIDTHS[kind] for b in WIDTHS[kind]]
    sizes.sort(key=lambda size: size[0] * size[1] * size[2])
    end_s = time.perf_counter() + budget_s
    for index, (rows, depth, columns) in enumerate(sizes):
        left_s = end_s - time.perf_counter()
        if left_s <= 0:
            break
        x, weight, dy = (
            torch.randn(*shape, device=watch.device).to(getattr(torch, dtype))
            for shape in ((rows, depth), (columns, depth), (rows, columns))
        )

        def products(x: Any = x, weight: Any = weight, dy: Any = dy) -> Any:
            return F.linear(x, weight), dy @ weight, dy.T @ x

        seconds = watch.typical_s(products, budget_s=left_s / (len(sizes) - index))
        found.matmuls[dtype].append((2.0 * rows * depth * columns, seconds / 3))


def _optimizer(watch: Stopwatch, found: _Found, budget_s: float) -> None:
    """AdamW in one kernel, in place: reads parameter, gradient and two moments, writes all but the gradient."""
    parameters = [torch.zeros(PARAMETERS // 8, device=watch.device, requires_grad=True) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    found.adamw_bytes_per_s = 28 * PARAMETERS / watch.typical_s(optimizer.step, budget_s=budget_s)


def _links(watch: Stopwatch, found: _Found, num_ranks: int, budget_s: float) -> None:
    found.links = measure_links(watch.device.type, num_ranks, budget_s=budget_s)


# --- figures ------------------------------------------------------------------------------------------------------


def _table(name: str, watch: Stopwatch, found: _Found) -> CostTable:
    known = load_table(name) if name in available_devices() else None
    source = _source(watch.device)

    def measured(value: float, unit: str, what: str) -> Figure:
        return Figure(value=float(f"{value:.4g}"), unit=unit, kind="measured", source=f"{what}; {source}")

    def peak(known: Figure | None, value: float, unit: str, what: str) -> Figure:
        """Of the data sheet where there is one: what utilisation is a share of."""
        if known is not None and known.kind == "datasheet" and known.value >= value:
            return known
        return measured(value, unit, what)

    launch_s = found.launch_s
    curve = _memory_curve(found.timed, launch_s, found.adamw_bytes_per_s)
    bandwidth = peak(
        known.memory_bandwidth_bytes_per_s if known else None,
        max(found.adamw_bytes_per_s, *(rate for _, rate in curve)),
        "bytes/s",
        "the fastest size of memory-bound operators, AdamW among them",
    )
    special_s = _special_s(found.timed, launch_s, curve)
    rates = {dtype: _matmul_rates(timed, launch_s) for dtype, timed in found.matmuls.items()}
    peaks = {
        dtype: peak(
            known.peak_flops_per_s.get(dtype) if known else None,
            points[-1][1],
            "FLOP/s",
            "the fastest of a grid of linear layers",
        )
        for dtype, points in rates.items()
    }
    attention = _attention_flops_per_s(found.timed, launch_s, special_s)
    main = DTYPES[watch.device.type][0]
    fields: dict[str, Any] = {} if known is None else known.model_dump()
    fields |= {
        "name": name,
        "vendor": fields.get("vendor", "any" if watch.device.type == "cpu" else "unknown"),
        "description": fields.get("description", name)
        if watch.device.type == "cuda"
        else f"One core of {_cpu_model()}, eager PyTorch with gloo",
        "memory_bytes": measured(_memory_bytes(watch.device), "bytes", "half of the host's memory on CPU"),
        "memory_bandwidth_bytes_per_s": bandwidth,
        "memory_efficiency": measured(
            found.adamw_bytes_per_s / bandwidth.value, "fraction", "one-kernel AdamW, 28 bytes an element, in place"
        ),
        "memory_curve": SizeCurve(
            points=tuple((size, float(f"{rate / bandwidth.value:.3g}")) for size, rate in curve),
            kind="measured",
            source=f"memory-bound operators of Llama and GPT-2 blocks, forward and backward; {source}",
        ),
        "peak_flops_per_s": fields.get("peak_flops_per_s", {}) | peaks,
        "matmul_efficiency": fields.get("matmul_efficiency", {})
        | {
            ("default" if dtype == main else dtype): EfficiencyCurve(
                points=tuple((flops, float(f"{rate / peaks[dtype].value:.3g}")) for flops, rate in points),
                kind="measured",
                source=f"linear layers, forward and both gradients; {source}",
            )
            for dtype, points in rates.items()
        },
        "compute_units": None,
        "matmul_fill_depth": None,
        "attention_efficiency": measured(
            min(1.0, attention / peaks[main].value), "fraction", "scaled_dot_product_attention, forward and backward"
        ),
        "vendor_attention_efficiency": None,
        "special_functions_per_s": measured(1 / special_s, "1/s", "cross entropy, SiLU, GELU, beyond the bytes moved"),
        "launch_overhead_s": measured(launch_s, "s", "tiny tensors: an emitted program, or kernels behind others"),
        "dispatch_s": None
        if found.dispatch_s is None
        else measured(found.dispatch_s, "s", "an emitted program of tiny tensors, by its number of kernels"),
        "reserve_bytes": fields.get("reserve_bytes") or _assumed(1 << 30, "bytes", "a process with its context"),
        "network": fields.get("network") or _slow_network(),
        "intra_host": fields.get("intra_host") or _slow_network(),
        "devices_per_host": fields.get("devices_per_host")
        or _assumed(max(1, torch.cuda.device_count()), "devices", "those that torch sees"),
    }
    if watch.device.type == "cpu":
        told = "steps are within 10 % in one process, 10 to 16 % longer than predicted in two and four that share cores"
        fields["step_time_spread"] = _assumed(0.2, "fraction", told)
    if found.links is not None:
        what = "gloo between processes" if watch.device.type == "cpu" else "collectives between the GPUs of this host"
        fields["intra_host"] = {
            "bandwidth_bytes_per_s": measured(found.links.bandwidth_bytes_per_s, "bytes/s", f"{what}: 64 MiB message"),
            "latency_s": measured(found.links.latency_s, "s", f"{what}: a step of a 4 KiB all_reduce"),
            "efficiency": measured(found.links.efficiency, "fraction", f"{what}: bus bandwidth of 64 MiB"),
        }
    return CostTable.model_validate(fields)


def _assumed(value: float, unit: str, source: str) -> Figure:
    return Figure(value=value, unit=unit, kind="assumed", source=source)


def _slow_network() -> dict[str, Figure]:
    return {
        "bandwidth_bytes_per_s": _assumed(1.25e9, "bytes/s", "10 Gb/s Ethernet"),
        "latency_s": _assumed(1e-4, "s", "TCP between two hosts"),
        "efficiency": _assumed(0.7, "fraction", "TCP"),
    }


def _source(device: torch.device) -> str:
    if device.type == "cuda":
        return f"autoparallel profile, torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"autoparallel profile, torch {torch.__version__}, one thread of {_cpu_model()}"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    told = dict(re.findall(r"^(.+?)\s*:\s*(.+)$", path.read_text(), re.M)) if path.exists() else {}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    return f"{told['model name']} (family {told.get('cpu family', '?')}, model {told.get('model', '?')})"


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _bins(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """(size, rate) of calls of about the same size, from (size, work, seconds) of each: all work over all seconds. A
    larger call never takes less time.
    """
    binned: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for point in points:
        binned[round(log2(point[0]) / log2(BIN))].append(point)
    found: list[tuple[float, float]] = []
    for _, members in sorted(binned.items()):
        size = sum(member[0] for member in members) / len(members)
        rate = sum(work for _, work, _ in members) / sum(seconds for _, _, seconds in members)
        if found:
            rate = min(rate, 0.98 * size / found[-1][0] * found[-1][1])
        found.append((float(f"{size:.4g}"), rate))
    return found


def _memory_curve(timed: list[Timed], launch_s: float, floor_bytes_per_s: float) -> list[tuple[float, float]]:
    """(bytes, bytes/s) of kernels that only move bytes."""
    points = [
        (kernel.moved_bytes, kernel.moved_bytes, max(part.seconds - launch_s, part.seconds / 10))
        for part in timed
        for kernel in part.kernels[:1]
        if kernel.kind == "memory" and not kernel.special and kernel.moved_bytes > LEAST_BYTES
    ]
    return _bins(points) if points else [(1e6, floor_bytes_per_s)]


def _special_s(timed: list[Timed], launch_s: float, curve: list[tuple[float, float]]) -> float:
    """Seconds of an exponential: what is left of the time of operators that have some."""
    peak = max(rate for _, rate in curve)
    shares = SizeCurve(
        points=tuple((size, rate / peak) for size, rate in curve), kind="measured", source="these samples"
    )
    left_s = counted = 0.0
    for part in timed:
        kernel = part.kernels[0]
        if kernel.kind == "memory" and kernel.special:
            moved_s = kernel.moved_bytes / (peak * shares.at(kernel.moved_bytes))
            left_s += part.seconds - launch_s - moved_s
            counted += kernel.special
    return max(1e-15, left_s / counted) if counted else 1e-15


def _attention_flops_per_s(timed: list[Timed], launch_s: float, special_s: float) -> float:
    kernels_of = [(part.kernels[0], part.seconds) for part in timed if part.kernels[0].kind == "attention"]
    flops = sum(kernel.flops for kernel, _ in kernels_of)
    busy_s = sum(max(seconds / 4, seconds - launch_s - kernel.special * special_s) for kernel, seconds in kernels_of)
    return flops / busy_s


def _matmul_rates(timed: list[tuple[float, float]], launch_s: float) -> list[tuple[float, float]]:
    """(FLOPs of a call, FLOP/s), rising to that of the fastest large one; of small ones, little beside the launch is
    left to measure.
    """
    points = [(flops, flops, max(seconds - launch_s, seconds / 2)) for flops, seconds in timed]
    found = _bins(points)
    peak = max([rate for flops, rate in found if flops >= LARGE_FLOPS] or [rate for _, rate in found])
    rising: list[tuple[float, float]] = []
    for flops, rate in found:
        rising.append((flops, min(peak, max(rate, rising[-1][1]) if rising else rate)))
    return rising
