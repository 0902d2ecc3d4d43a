"""Workloads made by hand or drawn at random: a step as numbers, without a model."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from autoparallel.cost.tables import load_table
from autoparallel.cost.workload import ParameterCount, SegmentCost, SharedParameters, Workload
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.precision import Precision
from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.space.candidates import divisors, enumerate_space

GIB = 2**30
MIXED = Precision.of("bfloat16", "float32")
CPU_CORES = 2


def gpus(num_devices: int, *, per_host: int = 8, memory_bytes: int = 80 * GIB) -> Flavor:
    return Flavor(
        name=f"{num_devices}xA100-SXM4-80GB",
        device="A100-SXM4-80GB",
        num_devices=num_devices,
        devices_per_host=min(per_host, num_devices),
        memory_bytes=memory_bytes,
    )


def cpus(num_devices: int, *, memory_bytes: int = 80 * GIB) -> Flavor:
    return Flavor(
        name=f"cpu:{num_devices}",
        device="cpu",
        num_devices=num_devices,
        devices_per_host=num_devices,
        memory_bytes=memory_bytes,
        cores_per_host=CPU_CORES,
    )


def segment(*, forward_s: float, **changes: Any) -> SegmentCost:
    """A segment for a micro-batch of one row; backward takes twice the forward unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "forward_s": forward_s,
        "backward_s": 2 * forward_s,
        "weight_gradient_s": changes.get("backward_s", 2 * forward_s) / 2,
        "recompute_selective_s": forward_s / 4,
        "recompute_full_s": forward_s,
        "saved_bytes": 4_000_000,
        "saved_selective_bytes": 2_000_000,
        "deferred_bytes": 3_000_000,
        "input_bytes": 100_000,
        "workspace_bytes": 1_000_000,
    }
    return SegmentCost(**fields | changes)


def scaled(cost: SegmentCost, rows: int) -> SegmentCost:
    """The same segment for a micro-batch of more rows."""
    return SegmentCost(**{name: value * rows for name, value in cost.model_dump().items()})


def workload(
    flavor: Flavor,
    *,
    costs: tuple[SegmentCost, ...] | None = None,
    classes: tuple[int, ...] | None = None,
    num_blocks: int = 6,
    batch_size: int = 16,
    parameters: tuple[int, ...] | None = None,
    frozen: int = 0,
    tied: int = 0,
    memory_ratio: float = 0.8,
    precision: Precision = MIXED,
) -> Workload:
    """An embedding, equal blocks and a head, priced for every micro-batch size that divides the batch."""
    classes = classes or (0, *[1] * num_blocks, 2)
    costs = costs or (segment(forward_s=1e-4), segment(forward_s=1e-3), segment(forward_s=5e-4))
    own = parameters or (2_000_000, *[1_000_000] * (len(classes) - 2), 2_000_000)
    shared = SharedParameters(segments=(0, len(classes) - 1), count=ParameterCount(trainable=tied))
    return Workload(
        model_name="toy",
        fingerprint="0" * 64,
        flavor=flavor,
        table=load_table(flavor.device),
        batch_size=batch_size,
        seq_len=128,
        memory_ratio=memory_ratio,
        precision=precision,
        segment_classes=classes,
        costs={rows: tuple(scaled(cost, rows) for cost in costs) for rows in divisors(batch_size)},
        parameters=tuple(ParameterCount(trainable=count, frozen=frozen) for count in own),
        shared=(shared,) if tied else (),
        step_flops=1_000_000_000_000,
    )


@st.composite
def random_workloads(draw: st.DrawFn, *, max_blocks: int = 6, max_devices: int = 4, batch_size: int = 12) -> Workload:
    """Uneven segments, possibly tied, on memory that some cuts fit and others do not."""
    num_blocks = draw(st.integers(1, max_blocks))
    num_classes = draw(st.integers(3, 4))
    classes = (0, *draw(st.lists(st.integers(2, num_classes - 1), min_size=num_blocks, max_size=num_blocks)), 1)
    milliseconds = st.integers(0, 20).map(lambda n: n / 1000)
    costs = tuple(
        segment(
            forward_s=(forward_s := draw(milliseconds)),
            backward_s=draw(milliseconds),
            recompute_selective_s=forward_s * draw(st.sampled_from([0.0, 0.25])),
            recompute_full_s=forward_s * draw(st.sampled_from([0.75, 1.0])),
            saved_bytes=(saved_bytes := draw(st.integers(0, 8_000_000))),
            saved_selective_bytes=draw(st.integers(0, saved_bytes)),
            input_bytes=draw(st.integers(0, 400_000)),
            workspace_bytes=draw(st.integers(0, 3_000_000)),
        )
        for _ in range(num_classes)
    )
    counts = st.integers(0, 1_000_000)
    devices = draw(st.integers(1, max_devices))
    reserve_bytes = int(load_table("A100-SXM4-80GB").reserve_bytes.value)
    return workload(
        gpus(devices, per_host=2, memory_bytes=reserve_bytes + draw(st.integers(4_000_000, 150_000_000))),
        costs=costs,
        classes=classes,
        batch_size=batch_size,
        parameters=tuple(draw(counts) for _ in classes),
        frozen=draw(st.sampled_from([0, 50_000])),
        tied=draw(st.sampled_from([0, 500_000])),
        memory_ratio=1.0,
    )


def strategies(drawn: Workload) -> list[Strategy]:
    """All of its space, without tensor parallelism and in one host."""
    space = enumerate_space(
        num_devices=drawn.flavor.num_devices,
        batch_size=drawn.batch_size,
        num_blocks=drawn.num_blocks,
        constraints=Constraints(),
    )
    return space.listed()
