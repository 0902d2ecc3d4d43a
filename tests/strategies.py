"""Plans around a given strategy, for tests that run programs rather than choose them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from autoparallel.capture.program import Program
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.precision import Precision
from autoparallel.plans.estimate import Breakdown, Estimate, StageEstimate
from autoparallel.plans.plan import ModelSummary, Plan
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, Constraints, Recomputation, StagePlan, Strategy
from autoparallel.tensor_parallel.analysis import analyze
from autoparallel.tensor_parallel.splits import legal_splits


def even_stages(num_segments: int, strategy: Strategy) -> Strategy:
    """The strategy with its blocks spread over the stages; where they do not divide, earlier stages get fewer. Where
    stages choose their recomputation, blocks take the allowed levels in turn.
    """
    blocks, stages = num_segments - 2, strategy.total_stages
    starts = [1 + index * blocks // stages for index in range(stages)] + [num_segments]
    starts[0] = 0
    levels = allowed_levels(strategy)
    cuts = tuple(
        StagePlan(
            first_segment=first,
            last_segment=end - 1,
            recomputation=tuple(levels[i % len(levels)] for i in range(max(first, 1), min(end, num_segments - 1))),
        )
        for first, end in pairwise(starts)
    )
    return strategy.model_copy(update={"stages": cuts})


def allowed_levels(strategy: Strategy) -> list[Recomputation]:
    """The highest first."""
    highest, least = strategy.recomputation, strategy.least_recomputation or strategy.recomputation
    allowed = range(RECOMPUTATION_LEVELS[least], RECOMPUTATION_LEVELS[highest] + 1)
    return [level for level, rank in reversed(RECOMPUTATION_LEVELS.items()) if rank in allowed]


def all_splits(program: Program, degree: int, *, sequence_parallel: bool) -> list[tuple[tuple[str, ...], ...]]:
    """Splits by segment class, such that every legal split of every class is in one of them; the widest come first."""
    graph = program.graph
    options = [
        [
            split
            for split, _ in legal_splits(
                graph, segment, analyze(graph, segment), degree=degree, sequence_parallel=sequence_parallel
            )
        ][::-1]
        for _, segment in sorted(graph.representatives().items())
    ]
    rows = [tuple(found[turn % len(found)] for found in options) for turn in range(max(map(len, options)))]
    # Segments that share a parameter split it alike: the last one follows the first.
    tied = any(len(p.segments) > 1 for p in graph.parameters)
    return [(*row[:-1], tuple(n for n in options[-1][0] if n in row[0])) for row in rows] if tied else rows


def with_splits(program: Program, strategy: Strategy) -> Strategy:
    """The strategy under the split that shards most, unless it names one."""
    if strategy.tensor_parallel == 1 or strategy.splits is not None:
        return strategy
    splits = all_splits(program, strategy.tensor_parallel, sequence_parallel=strategy.sequence_parallel)
    return strategy.model_copy(update={"splits": splits[0]})


def plan_for(program: Program, strategy: Strategy, *, seq_len: int, master_dtype: str = "") -> Plan:
    """A plan with no prices worth reading; masters are in the program's dtype unless another one is named."""
    graph = program.graph
    dtype = graph.parameters[0].dtype
    strategy = with_splits(program, strategy)
    strategy = strategy if strategy.stages else even_stages(graph.num_segments, strategy)
    nothing = StageEstimate(forward_s=0.0, backward_s=0.0, parameters=0, peak_memory_bytes=0, memory_parts_bytes={})
    parts = dict.fromkeys(Breakdown.model_fields, 0.0)
    estimate = Estimate(
        step_time_s=0.0,
        tokens_per_second=0.0,
        mfu=0.0,
        breakdown_s=Breakdown(**parts),
        stages=(nothing,) * strategy.num_stages,
    )
    devices = strategy.num_devices
    return Plan(
        autoparallel_version="0",
        torch_version="0",
        model=ModelSummary(
            name=graph.model_name,
            architecture=graph.architecture,
            fingerprint=graph.fingerprint,
            num_parameters=0,
            trainable_parameters=0,
            parameter_bytes=0,
            num_blocks=graph.num_segments - 2,
            block_classes=graph.segment_classes[1:-1],
        ),
        flavor=Flavor(
            name=f"cpu:{devices}",
            device="cpu",
            num_devices=devices,
            devices_per_host=devices,
            memory_bytes=1 << 30,
            cores_per_host=2,
        ),
        constraints=Constraints(),
        batch_size=strategy.batch_size,
        seq_len=seq_len,
        precision=Precision.of(dtype, master_dtype or dtype),
        strategy=strategy,
        estimate=estimate,
        candidates=(),
    )


def in_turn(some: Sequence[Any], others: Sequence[Any], *, period: int | None = None) -> list[Any]:
    """Pairs for a test: CI runs each of `some` and each of `others` with one of the other kind at least, or with every
    `period`-th; `make exhaustive` runs the rest.
    """
    period = period or min(len(some), len(others))
    marks = [pytest.mark.slow, *[pytest.mark.exhaustive] * (period - 1)]
    return [
        pytest.param(one, other, marks=marks[(i - j) % period])
        for i, one in enumerate(some)
        for j, other in enumerate(others)
    ]
