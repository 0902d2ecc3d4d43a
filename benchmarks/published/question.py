"""A row in, the question that `autoparallel.estimate` is asked out, with everything that had to be assumed; or the
reason why we cannot ask it. Only fields decide, never the row's id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import ValidationError

from autoparallel.ir.flavor import Flavor
from autoparallel.plans.strategy import Recomputation, ScheduleName, StagePlan, Strategy
from benchmarks.published.hardware import Unexpressed, flavor_of
from benchmarks.published.models import Structure, structure_of
from benchmarks.published.practices import Practice, practice_of
from benchmarks.published.rows import Run

DTYPES = (("fp4", "float4"), ("fp8", "float8"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16"),
          ("float16", "float16"), ("half", "float16"), ("fp32", "float32"), ("float32", "float32"))  # fmt: skip
TOKENS_A_MICRO_BATCH = 4096
"""Assumed where no micro-batch is stated: kernels of fewer tokens leave a GPU idle, so that nobody publishes them."""
MICRO_BATCHES_A_STEP = 8
"""Assumed, for each pipeline stage if that is more, where no global batch is stated."""


@dataclass(frozen=True)
class Options:
    """Arguments of `estimate` that say how the framework trains."""

    dtype: str
    attention: str
    fused: bool
    overlap: bool
    optimizer: str
    gradient_dtype: str | None
    master_dtype: str | None


@dataclass(frozen=True)
class Question:
    """One call of `estimate`."""

    structure: Structure
    flavor: Flavor
    strategy: Strategy
    batch_size: int
    seq_len: int
    options: Options
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The degrees of a row, all known."""

    data: int
    tensor: int
    pipeline: int
    context: int
    virtual: int
    micro_batch: int
    global_batch: int

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch // (self.data * self.micro_batch)


def question_of(run: Run) -> Question:
    """Raises Unexpressed."""
    practice = practice_of(run.framework)
    structure, assumptions = structure_of(run.model, dropout=practice.dropout)
    flavor, of_flavor = flavor_of(run)
    assumptions += of_flavor
    layout = _layout(run, flavor, assumptions)
    strategy = _strategy(run, structure, layout, practice, assumptions)
    return Question(
        structure=structure,
        flavor=flavor,
        strategy=strategy,
        batch_size=layout.global_batch,
        seq_len=run.model.seq_len,
        options=_options(run, practice, assumptions),
        assumptions=tuple(assumptions),
    )


def _layout(run: Run, flavor: Flavor, assumptions: list[str]) -> Layout:
    """Degrees and batch; what is missing follows from the rest where it can."""
    if run.ep is not None and run.ep > 1:
        raise Unexpressed("expert parallelism")
    for name in ("tp", "pp"):
        if getattr(run, name) is None:
            raise Unexpressed(f"{name} is not stated")
    assert run.tp and run.pp and run.model.seq_len
    tensor, pipeline, context = run.tp, run.pp, run.cp or 1
    data, rest = divmod(flavor.num_devices, tensor * pipeline * context)
    if rest or data == 0:
        degrees = f"tp {tensor} x pp {pipeline} x cp {context}"
        raise Unexpressed(f"{degrees} do not divide {flavor.num_devices} devices")
    if run.dp is not None and run.dp != data:
        assumptions.append(f"dp {run.dp} is stated, and {data} are left of {flavor.num_devices} devices")
    micro_batch, global_batch = _batch(run, data, pipeline, assumptions)
    virtual = run.virtual_stages or 1
    if pipeline == 1 or run.schedule.casefold().startswith(("zb", "zero")):
        virtual = 1
    if "interleaved" in run.schedule.casefold() and pipeline > 1 and run.virtual_stages is None:
        assumptions.append("virtual_stages is not stated: none")
    return Layout(data, tensor, pipeline, context, virtual, micro_batch, global_batch)


def _batch(run: Run, data: int, pipeline: int, assumptions: list[str]) -> tuple[int, int]:
    """Micro-batch and global batch."""
    assert run.model.seq_len is not None
    micro_batch, global_batch = run.micro_batch, run.global_batch
    if micro_batch is None:
        micro_batch = max(1, TOKENS_A_MICRO_BATCH // run.model.seq_len)
        if global_batch is not None:
            while micro_batch > 1 and (global_batch % (data * micro_batch) or global_batch < data * micro_batch):
                micro_batch -= 1
        if global_batch is None or global_batch != data * micro_batch:
            assumptions.append(f"micro_batch is not stated: {micro_batch}")
    if global_batch is None:
        count = max(MICRO_BATCHES_A_STEP, 4 * pipeline if pipeline > 1 else 0)
        global_batch = data * micro_batch * count
        assumptions.append(f"global_batch is not stated: {count} micro-batches")
    if global_batch % (data * micro_batch):
        raise Unexpressed(f"global_batch {global_batch} is no multiple of dp {data} x micro_batch {micro_batch}")
    return micro_batch, global_batch


def _strategy(run: Run, structure: Structure, layout: Layout, practice: Practice, assumptions: list[str]) -> Strategy:
    if run.zero is None:
        assumptions.append(f"zero is not stated: {practice.distribute_param}")
    level, share = _recomputation(run, assumptions)
    fields: dict[str, object] = {
        "num_stages": layout.pipeline,
        "tensor_parallel": layout.tensor,
        "data_parallel": layout.data,
        "batch_per_device": layout.micro_batch,
        "num_micro_batches": layout.num_micro_batches,
        "recomputation": level,
        "distribute_param": practice.distribute_param if run.zero is None else run.zero,
        "sequence_parallel": _sequence_parallel(run, layout, practice, assumptions),
        "schedule": _schedule(run, layout),
        "virtual_stages": layout.virtual,
        "shard_group_size": _shard_group_size(run, layout),
    }
    if layout.context > 1:
        if "context_parallel" not in Strategy.model_fields:
            raise Unexpressed("context parallelism")
        fields["context_parallel"] = layout.context
    stages = _stages(run, structure.layers, layout.pipeline * layout.virtual, level, share)
    if 0 < share < 1 and level == "full":
        fields["least_recomputation"] = "none"
    try:
        return Strategy(**fields, stages=stages)  # type: ignore[arg-type]
    except ValidationError as error:
        raise Unexpressed(f"no such strategy: {error.errors(include_url=False)[0]['msg']}") from error


def _sequence_parallel(run: Run, layout: Layout, practice: Practice, assumptions: list[str]) -> bool:
    if layout.tensor == 1:
        return False
    if run.sequence_parallel is None:
        assumptions.append(f"sequence_parallel is not stated: {practice.sequence_parallel}")
        return practice.sequence_parallel
    return run.sequence_parallel


def _schedule(run: Run, layout: Layout) -> ScheduleName:
    name = run.schedule.casefold()
    if layout.pipeline == 1:
        return "1f1b"
    if layout.virtual > 1:
        return "interleaved"
    if name.startswith(("zb", "zero")):
        double = re.search(r"2p|zbv|zb-v", name) is not None
        return "zb-2p" if double and "zb-2p" in ScheduleName.__args__ else "zero_bubble"  # type: ignore[attr-defined]
    return "gpipe" if "gpipe" in name or "fill-drain" in name else "1f1b"


def _recomputation(run: Run, assumptions: list[str]) -> tuple[Recomputation, float]:
    """The level, and the share of blocks that have it.

    A row that states both utilisations states how much of the forward ran twice: their ratio is 1 + share / 3. That
    tells selective checkpointing by blocks (every n-th in full) from selective recomputation inside each of them.
    """
    name, measured = run.recompute.casefold(), run.measured
    if measured.mfu and measured.hfu:
        share = 3 * (measured.hfu / measured.mfu - 1)
        if share < 0.05:
            return "none", 0.0
        if share < 0.9 or "selective" in name:
            assumptions.append(f"{min(share, 1.0):.0%} of the blocks are recomputed, by the ratio of hfu and mfu")
        return "full", min(share, 1.0) if share < 0.9 else 1.0
    if not name or name == "unknown":
        assumptions.append("recompute is not stated: none")
        return "none", 0.0
    if name in ("none", "false", "no", "off"):
        return "none", 0.0
    if "selective" in name or "minimal" in name or "attention" in name:
        return "selective", 1.0
    return "full", 1.0


def _shard_group_size(run: Run, layout: Layout) -> int | None:
    """Hybrid sharding, which rows state in words: over some GPUs, replicated across the others."""
    stated = re.search(r"shard\w* over (\d+) (?:gpu|rank|device)", run.said)
    size = int(stated[1]) if stated else 0
    if not size and re.search(r"\bhsdp\b|hybrid shard", run.said):
        size = run.gpus_per_node or 8
    return size if 0 < size < layout.data and layout.data % size == 0 else None


def _stages(
    run: Run, num_layers: int, num_stages: int, level: Recomputation, share: float
) -> tuple[StagePlan, ...] | None:
    """Layers by stage as frameworks place them; None where a stage would be without a segment."""
    counts = layers_by_stage(num_layers, num_stages, fewer_at_ends="fewer" in run.said)
    if counts is None:
        return None
    stages, first, done = [], 0, 0
    for stage, count in enumerate(counts):
        last = first + count - 1 + (stage == 0) + (stage == num_stages - 1)
        if last < first:
            return None
        levels: Recomputation | tuple[Recomputation, ...] = level
        if 0 < share < 1 and count:
            # Every n-th block, spread evenly.
            marks = [int((done + i + 1) * share) > int((done + i) * share) for i in range(count)]
            levels = tuple(level if mark else "none" for mark in marks)
        stages.append(StagePlan(first_segment=first, last_segment=last, recomputation=levels))
        first, done = last + 1, done + count
    return tuple(stages)


def layers_by_stage(num_layers: int, num_stages: int, *, fewer_at_ends: bool) -> list[int] | None:
    """Equal numbers where they divide. Otherwise the embedding and the head count as a layer each, as in Megatron's
    account_for_embedding_in_pipeline_split and DeepSpeed's partition by type, and the rest goes to the first stages.
    """
    if num_layers % num_stages == 0 and not fewer_at_ends:
        return [num_layers // num_stages] * num_stages
    if num_stages == 1:
        return [num_layers]
    each, rest = divmod(num_layers + 2, num_stages)
    counts = [each + (stage < rest) for stage in range(num_stages)]
    counts[0] -= 1
    counts[-1] -= 1
    return counts if min(counts) >= 0 else None


def _options(run: Run, practice: Practice, assumptions: list[str]) -> Options:
    dtype = _dtype(run.precision, assumptions)
    kernel = run.attention_kernel.casefold()
    if not kernel:
        assumptions.append(f"attention_kernel is not stated: {practice.attention}")
    unfused = any(word in kernel for word in ("unfused", "no flash", "eager", "math", "naive"))
    attention = practice.attention if not kernel else ("unfused" if unfused else "flash")
    gradient_dtype = practice.gradient_dtype
    if "llm-foundry" in run.framework.casefold() and not run.precision.casefold().startswith("amp"):
        gradient_dtype = None  # PURE: see the practice
    return Options(
        dtype=dtype,
        attention=attention,
        fused=practice.fused if run.compile is None else run.compile,
        overlap=practice.overlap,
        optimizer=practice.optimizer,
        gradient_dtype=gradient_dtype,
        master_dtype=practice.master_dtype,
    )


def _dtype(precision: str, assumptions: list[str]) -> str:
    name = precision.casefold()
    if "tf32" in name:
        raise Unexpressed("precision tf32")
    if not name:
        assumptions.append("precision is not stated: bf16")
        return "bfloat16"
    for word, dtype in DTYPES:
        if word in name:
            return dtype
    raise Unexpressed(f"precision {precision}")
