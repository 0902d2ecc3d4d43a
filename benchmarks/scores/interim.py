"""`autoparallel.estimate` as it will be, on what there is today: options that are not priced yet are ignored.

Two blocks are captured, and the workload is stretched to the model's depth.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from autoparallel.capture.program import capture
from autoparallel.cost.segments import build_workload
from autoparallel.cost.tables import CostTable, load_table
from autoparallel.cost.workload import SharedParameters, Workload
from autoparallel.ir.graph import Graph
from autoparallel.ir.precision import Precision
from autoparallel.plans.estimate import Estimate
from autoparallel.search.price import cut_and_price
from benchmarks.published.models import Structure
from benchmarks.published.question import Question

BLOCKS = 2


@cache
def two_blocks(structure: Structure) -> Graph:
    """Classes (0, 1, 1, 2)."""
    graph = capture(structure.config(), dtype=torch.bfloat16).graph
    assert graph.segment_classes == (0, 1, 1, 2), graph.segment_classes
    return graph


def estimate(question: Question, *, table: CostTable | None = None) -> Estimate:
    """Price one question."""
    structure, strategy = question.structure, question.strategy
    workload = build_workload(
        two_blocks(replace(structure, layers=BLOCKS)),
        question.flavor,
        table or load_table(question.flavor.device),
        batch_size=question.batch_size,
        seq_len=question.seq_len,
        micro_batch_sizes=[strategy.batch_per_device],
        memory_ratio=1.0,
        precision=Precision.of("bfloat16", "float32"),
        tensor_degrees=[strategy.tensor_parallel] if strategy.tensor_parallel > 1 else [],
    )
    return cut_and_price(_deep(workload, structure.layers), strategy)


def _deep(workload: Workload, layers: int) -> Workload:
    def stretched(values: tuple[Any, ...], /) -> tuple[Any, ...]:
        return (values[0], *[values[1]] * layers, values[-1]) if values else values

    def moved(shared: tuple[SharedParameters, ...]) -> tuple[SharedParameters, ...]:
        return tuple(
            s.model_copy(update={"segments": tuple(0 if i == 0 else layers + 1 for i in s.segments)}) for s in shared
        )

    variants = tuple(
        v.model_copy(
            update={"parameters": stretched(v.parameters), "addends": stretched(v.addends), "shared": moved(v.shared)}
        )
        for v in workload.variants
    )
    return workload.model_copy(
        update={
            "segment_classes": (0, *[1] * layers, 2),
            "parameters": stretched(workload.parameters),
            "addends": stretched(workload.addends),
            "shared": moved(workload.shared),
            "variants": variants,
        }
    )
