"""A row in, the question that `autoparallel.estimate` is asked out, with everything that had to be assumed; or the
reason why we cannot ask it. Fields and words of the row decide, never its id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from pydantic import ValidationError

from autoparallel.cost.practice import Attention
from autoparallel.ir.flavor import Flavor
from autoparallel.plans.strategy import Recomputation, Strategy
from benchmarks.published.hardware import flavor_of
from benchmarks.published.layout import Layout, layers_by_stage, layout_of, stages_of
from benchmarks.published.models import Structure, structure_of
from benchmarks.published.practices import Practice, practice_of
from benchmarks.published.rows import Run, Unexpressed

UNSTATED = ("", "unknown", "not stated")
DTYPES = (
    ("fp4", "float4"), ("fp8", "float8"), ("float8", "float8"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16"),
    ("fp16", "float16"), ("float16", "float16"), ("half", "float16"), ("fp32", "float32"), ("float32", "float32"),
)  # fmt: skip
"""By a word of the row's precision; of two that are named, the first of this list."""


BLOCKS_IN_TURN = 4
"""At most, where selective checkpointing recomputes some of so many blocks and not the others, as fms-fsdp does."""
ROOM_FOR_ACTIVATIONS = 0.1
"""Of the memory, at least."""


@dataclass(frozen=True)
class Options:
    """Arguments of `estimate` that say how the framework trains."""

    dtype: str
    attention: Attention
    fused: bool
    merged_norms: bool
    merged_loss: bool
    overlap: bool
    gathers_ahead: bool
    gathers_each_parameter: bool
    shards_most: bool
    keeps_gathered: bool
    blocking_sends: bool
    scatters_sends: bool
    tensor_overlap: bool
    accumulates_in_matmul: bool
    dispatch_s: float | None
    optimizer: str
    optimizer_workspace_bytes: int | None
    gradient_dtype: str | None
    master_dtype: str | None


@dataclass(frozen=True)
class Question:
    """One call of `estimate`."""

    structure: Structure
    flavor: Flavor
    strategy: Strategy
    if_too_large: Strategy | None
    """Another strategy, where the run ran and this one does not fit: with what recomputation it takes."""
    batch_size: int
    seq_len: int
    options: Options
    assumptions: tuple[str, ...]


def question_of(run: Run) -> Question:
    """Raises Unexpressed."""
    _check_kind(run)
    practice = practice_of(run.framework)
    structure, assumptions = structure_of(run.model, dropout=practice.dropout, said=run.said)
    flavor, of_flavor = flavor_of(run)
    assumptions += of_flavor
    layout = layout_of(run, flavor, interleaves=practice.interleaves, assumptions=assumptions)
    options = _options(run, practice, layout, assumptions)
    level = _sharded(run, structure, flavor, layout, options, assumptions)
    fields = {
        "num_stages": layout.pipeline,
        "tensor_parallel": layout.tensor,
        "data_parallel": layout.data,
        "batch_per_device": layout.micro_batch,
        "num_micro_batches": layout.num_micro_batches,
        "distribute_param": level,
        "sequence_parallel": _sequence_parallel(run, layout, practice, assumptions),
        "schedule": _schedule(run, layout),
        "virtual_stages": layout.virtual,
        "shard_group_size": _shard_group_size(run, layout) if level > 0 else None,
        "context_parallel": layout.context,
        **_recomputed_stages(run, structure, layout, practice, assumptions),
    }
    try:
        strategy = Strategy.model_validate(fields)
    except ValidationError as error:
        raise Unexpressed(f"no such strategy: {error.errors(include_url=False)[0]['msg']}") from error
    may_recompute = strategy.recomputation == "none" and run.recompute.casefold() in UNSTATED
    return Question(
        structure=structure,
        flavor=flavor,
        strategy=strategy,
        if_too_large=_recomputing(strategy) if may_recompute and not run.out_of_memory else None,
        batch_size=layout.global_batch,
        seq_len=layout.seq_len,
        options=options,
        assumptions=tuple(assumptions),
    )


def _recomputing(strategy: Strategy) -> Strategy:
    """As much as it takes to fit."""
    return strategy.model_copy(update={"recomputation": "full", "least_recomputation": "none", "stages": None})


def _check_kind(run: Run) -> None:
    """What we do not price at all."""
    said = f"{run.said} {run.framework} {run.model.name}".casefold()
    if re.search(r"\b(q?lora|peft|adapters?)\b", said):
        raise Unexpressed("only adapters are trained")
    if re.search(r"\boffload", said) and not re.search(r"\b(no|without) (\w+ )?offload", said):
        raise Unexpressed("tensors are offloaded to the host")


def _distribute_param(run: Run) -> int:
    return practice_of(run.framework).distribute_param if run.zero is None else run.zero


def _sharded(
    run: Run, structure: Structure, flavor: Flavor, layout: Layout, options: Options, assumptions: list[str]
) -> int:
    """As stated. A run whose parameters and gradients alone exceed the memory has sharded them whatever it states."""
    level = _distribute_param(run)
    if run.zero is None and layout.data > 1:
        assumptions.append(f"zero is not stated: {level}")
    gradient_bytes = 2 if options.gradient_dtype in ("bfloat16", "float16") else 4
    held_bytes = structure.num_parameters / (layout.tensor * layout.pipeline) * (2 + gradient_bytes)
    limit_bytes = (1 - ROOM_FOR_ACTIVATIONS) * flavor.memory_bytes
    if level < 3 and layout.data > 1 and held_bytes > limit_bytes and not run.out_of_memory:
        assumptions.append(f"{held_bytes / 2**30:.0f} GiB of parameters and gradients do not fit: zero 3")
        return 3
    return level


def _sequence_parallel(run: Run, layout: Layout, practice: Practice, assumptions: list[str]) -> bool:
    if layout.tensor == 1:
        return False
    if run.sequence_parallel is None:
        assumptions.append(f"sequence_parallel is not stated: {practice.sequence_parallel}")
        return practice.sequence_parallel
    return run.sequence_parallel


def _schedule(run: Run, layout: Layout) -> str:
    name = run.schedule.casefold()
    if layout.pipeline == 1:
        return "1f1b"
    if layout.virtual > 1:
        return "interleaved"
    if name.startswith(("zb", "zero")):
        if re.search(r"2p|zbv|zb-v", name):
            raise Unexpressed(f"schedule {run.schedule}: of the zero-bubble ones, ours is ZB-H1")
        return "zero_bubble"
    return "gpipe" if "gpipe" in name or "fill-drain" in name else "1f1b"


def _recomputed_stages(
    run: Run, structure: Structure, layout: Layout, practice: Practice, assumptions: list[str]
) -> dict[str, object]:
    level, share = _recomputation(run, practice, assumptions)
    counts = layers_by_stage(
        structure.layers,
        layout.pipeline * layout.virtual,
        fewer_at_ends="fewer" in run.said,
        fills=practice.fills_stages,
    )
    fields: dict[str, object] = {"recomputation": level, "stages": counts and stages_of(counts, level, share)}
    return fields | ({"least_recomputation": "none"} if 0 < share < 1 else {})


def _recomputation(run: Run, practice: Practice, assumptions: list[str]) -> tuple[Recomputation, float]:
    """The level, and the share of blocks that have it.

    A row that states both utilisations states how much of the forward ran twice: their ratio is 1 + share / 3. That
    tells selective checkpointing by blocks (some of them in full) from selective recomputation inside each of them.
    """
    name, measured = run.recompute.casefold(), run.measured
    if measured.mfu and measured.hfu:
        share = min(1.0, 3 * (measured.hfu / measured.mfu - 1))
        if share < 0.05:
            return "none", 0.0
        if share < 0.9:
            part = max(Fraction(share).limit_denominator(BLOCKS_IN_TURN), Fraction(1, BLOCKS_IN_TURN))
            assumptions.append(f"{part} of the blocks are recomputed, by the ratio of hfu and mfu")
            return "full", float(part)
        return "full", 1.0
    if name in UNSTATED:
        assumptions.append("recompute is not stated: as little as fits")
        return "none", 0.0
    if name in ("none", "false", "no", "off"):
        return "none", 0.0
    if any(word in name for word in ("selective", "minimal", "attention", "attn")):
        if practice.selective_share is not None:
            assumptions.append(f"selective recomputation is priced as that of {practice.selective_share} of the blocks")
            return "full", practice.selective_share
        return "selective", 1.0
    return "full", 1.0


def _shard_group_size(run: Run, layout: Layout) -> int | None:
    """Hybrid sharding, which rows state in words: over some GPUs, replicated across the others."""
    words = re.search(r"shard\w* over (\d+) (?:gpu|rank|device)", run.said)
    size = int(words[1]) if words else 0
    if not size and re.search(r"\bhsdp\b|hybrid shard", run.said):
        size = run.gpus_per_node or 8
    return size if 0 < size < layout.data and layout.data % size == 0 else None


def _options(run: Run, practice: Practice, layout: Layout, assumptions: list[str]) -> Options:
    kernel = run.attention_kernel.casefold()
    if not kernel:
        assumptions.append(f"attention_kernel is not stated: {practice.attention}")
    unfused = any(word in kernel for word in ("unfused", "no flash", "eager", "math", "naive"))
    said = re.sub(r"\b(no|not|without) [^;,.]*(merged|fused)[^;,.]*|(merged|fused) (adam|optimi)\w*", "", run.said)
    merged = re.search(r"\b(merged|fused)\b", said) is not None
    of_norms = re.search(r"norm\w*( is| are)? (merged|fused)|(merged|fused) (\w+ )?\w*norm", said)
    of_loss = re.search(r"(merged|fused)[^.;]*cross.?entropy|liger", run.said)
    dtype = _dtype(run.precision, assumptions)
    return Options(
        dtype=dtype,
        attention=practice.attention if not kernel else ("unfused" if unfused else _flash(kernel, practice)),
        fused=practice.fused or (merged and not of_norms) if run.compile is None else run.compile,
        merged_norms=practice.merged_norms or of_norms is not None,
        merged_loss=practice.merged_loss or bool(run.compile) or of_loss is not None,
        overlap=_distribute_param(run) >= practice.overlaps_from or "communication overlapped" in run.said,
        gathers_ahead=practice.gathers_ahead,
        gathers_each_parameter=practice.gathers_each_parameter,
        shards_most=True,  # nobody publishes a layout that leaves a matrix whole
        keeps_gathered=practice.keeps_gathered,
        blocking_sends=practice.blocking_sends == "always"
        or (practice.blocking_sends == "one" and layout.virtual == 1),
        scatters_sends=practice.scatters_sends,
        tensor_overlap=practice.tensor_overlap and re.search(r"no (tp|tensor)[\w -]* overlap", run.said) is None,
        accumulates_in_matmul=practice.accumulates_in_matmul,
        dispatch_s=practice.dispatch_s,
        optimizer=practice.optimizer,
        optimizer_workspace_bytes=practice.optimizer_workspace_bytes,
        gradient_dtype=_gradient_dtype(run, practice, dtype),
        master_dtype=_master_dtype(run, practice),
    )


def _flash(kernel: str, practice: Practice) -> Attention:
    """Whose: as the row says, or as the framework has it."""
    if re.search(r"transformer.?engine|\bte\b|cudnn|flash.?(attn|attention)?.?[34]", kernel):
        return "vendor"
    if re.search(r"2|sdpa", kernel):
        return "flash"
    return practice.flash


def _gradient_dtype(run: Run, practice: Practice, dtype: str) -> str | None:
    """As the row says, or as the framework does. Composer's FSDP calls all-bf16 PURE."""
    if re.search(r"\bpure\b", run.said):
        return "bfloat16"
    if re.search(r"gradients? (\w+ )?in bf16", run.said):
        return "bfloat16"
    if re.search(r"gradients? (\w+ )?in fp32|fp32 gradients?", run.said):
        return "float32"
    if practice.sums_half and dtype == "float16":
        return dtype
    return practice.gradient_dtype


def _master_dtype(run: Run, practice: Practice) -> str:
    """Halves where the row says that its optimizer keeps nothing wider."""
    if re.search(
        r"(moments|states)[^.;]* in bf16|pure bf16 \([^)]*moments|no fp32 copy|optimizer states too|bf16-true", run.said
    ):
        return "bfloat16"
    return practice.master_dtype


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
