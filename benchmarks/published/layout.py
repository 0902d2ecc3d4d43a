"""The parallel layout of a row in, its degrees, batch and stages out; what is missing follows where it can.

Whatever had to be assumed is appended to `assumptions`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoparallel.ir.flavor import Flavor
from autoparallel.plans.strategy import Recomputation, StagePlan
from benchmarks.published.rows import Run, Unexpressed, stated

TOKENS_A_MICRO_BATCH = 4096
"""Assumed where no micro-batch is stated: kernels of fewer tokens leave a GPU idle, so that nobody publishes them."""
LAYERS_A_VIRTUAL_STAGE = 4
"""At most, where a framework interleaves and the row does not say how."""
MICRO_BATCHES_A_STEP = 8
"""Assumed where no global batch is stated; four for each pipeline stage if that is more."""


@dataclass(frozen=True)
class Layout:
    """The degrees of a row, and the batch as attention sees it."""

    data: int
    tensor: int
    pipeline: int
    context: int
    virtual: int
    micro_batch: int
    global_batch: int
    seq_len: int

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch // (self.data * self.micro_batch)


def layout_of(run: Run, flavor: Flavor, *, interleaves: bool, assumptions: list[str]) -> Layout:
    """`interleaves` where a pipeline of the framework does unless told otherwise. Raises Unexpressed."""
    if run.ep is not None and run.ep > 1:
        raise Unexpressed("expert parallelism")
    tensor, pipeline, context = stated(run.tp, "tp"), stated(run.pp, "pp"), run.cp or 1
    data, rest = divmod(flavor.num_devices, tensor * pipeline * context)
    if rest or data == 0:
        raise Unexpressed(f"tp {tensor} x pp {pipeline} x cp {context} do not divide {flavor.num_devices} devices")
    if run.dp is not None and run.dp != data:
        assumptions.append(f"dp {run.dp} is stated, and {data} are left of {flavor.num_devices} devices")
    seq_len = stated(run.model.seq_len, "model.seq_len")
    micro_batch, global_batch = _batch(run, data, pipeline, seq_len, assumptions)
    if "packed into one" in run.said:
        assumptions.append(f"attention stays inside each of the {micro_batch} packed samples")
    layout = Layout(
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        virtual=1,
        micro_batch=micro_batch,
        global_batch=global_batch,
        seq_len=seq_len,
    )
    return replace(layout, virtual=_virtual_stages(run, layout, interleaves, assumptions))


def _batch(run: Run, data: int, pipeline: int, seq_len: int, assumptions: list[str]) -> tuple[int, int]:
    """Micro-batch and global batch."""
    micro_batch, global_batch = run.micro_batch, run.global_batch
    if micro_batch is None:
        micro_batch = max(1, TOKENS_A_MICRO_BATCH // seq_len)
        while global_batch is not None and micro_batch > 1 and global_batch % (data * micro_batch):
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


def _virtual_stages(run: Run, layout: Layout, interleaves: bool, assumptions: list[str]) -> int:
    schedule = run.schedule.casefold()
    if layout.pipeline == 1 or schedule.startswith(("zb", "zero")):
        return 1
    if run.virtual_stages is not None:
        return run.virtual_stages
    layers, rest = divmod(stated(run.model.layers, "model.layers"), layout.pipeline)
    if interleaves and rest == 0 and layout.num_micro_batches % layout.pipeline == 0:
        virtual = min(n for n in range(1, layers + 1) if layers % n == 0 and layers // n <= LAYERS_A_VIRTUAL_STAGE)
        assumptions.append(f"virtual_stages is not stated: {virtual}")
        return virtual
    if "interleaved" in schedule:
        assumptions.append("virtual_stages is not stated: none")
    return 1


def layers_by_stage(num_layers: int, num_stages: int, *, fewer_at_ends: bool, fills: bool) -> list[int] | None:
    """As frameworks place them; None where they would leave a stage without anything.

    Equal numbers where they divide. Where they do with embedding and head counted as a layer each, those
    (Megatron-LM's account_for_embedding_in_pipeline_split, DeepSpeed's partition by type). Otherwise all but the last
    stage hold as many as the fullest (`fills`, DeepSpeed), or the numbers differ by one.
    """
    if num_layers % num_stages == 0 and not fewer_at_ends:
        return [num_layers // num_stages] * num_stages
    if num_stages == 1:
        return [num_layers]
    each, rest = divmod(num_layers + 2, num_stages)
    most = -(-num_layers // num_stages)
    if fills and rest and num_layers > most * (num_stages - 1):
        return [most] * (num_stages - 1) + [num_layers - most * (num_stages - 1)]
    counts = [each + (stage < rest) for stage in range(num_stages)]
    counts[0] -= 1
    counts[-1] -= 1
    return counts if min(counts) >= 0 else None


def stages_of(counts: list[int], level: Recomputation, share: float) -> tuple[StagePlan, ...]:
    """Embedding before the first layers, head after the last. With a share below one, blocks evenly spread have it."""
    stages, first, done = [], 0, 0
    for stage, count in enumerate(counts):
        last = first + count - 1 + (stage == 0) + (stage == len(counts) - 1)
        levels: Recomputation | tuple[Recomputation, ...] = level
        if 0 < share < 1 and count:
            marks = [int((done + i + 1) * share) > int((done + i) * share) for i in range(count)]
            levels = tuple(level if mark else "none" for mark in marks)
        stages.append(StagePlan(first_segment=first, last_segment=last, recomputation=levels))
        first, done = last + 1, done + count
    return tuple(stages)
