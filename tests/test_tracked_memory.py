"""Peak memory of a rank as torch's MemTracker sees it, against the memory model: AdamW's moments included, the reserve
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from autoparallel.capture.program import Program, capture
from autoparallel.cost.memory import rank_memory
from autoparallel.plans.grid import Place
from autoparallel.plans.strategy import Strategy
from tests.fake_cluster import Memory, adapted, fake_rank, llama_70b, qwen_7b, with_widest_splits
from tests.lowered import lowered_workload
from tests.strategies import even_stages
from tests.workloads import MIXED

TOLERANCE = 0.05


def small() -> PretrainedConfig:
    """Large enough that tensors weigh more than scalars."""
    return LlamaConfig(
        num_hidden_layers=4, hidden_size=256, num_attention_heads=8, num_key_value_heads=4, intermediate_size=688,
        vocab_size=4096, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip


def small_adapted() -> nn.Module:
    return adapted(small(), dtype=torch.bfloat16)


CONFIGS: dict[str, tuple[Callable[[], Any], int]] = {
    "small": (small, 512),
    "adapted": (small_adapted, 512),
    "qwen-7b": (qwen_7b, 4096),
    "llama-70b": (llama_70b, 4096),
}


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


def check(name: str, fields: dict[str, Any], programs: dict[str, Program], tolerance: float = TOLERANCE) -> None:
    """The first rank of every pipeline stage."""
    make, seq_len = CONFIGS[name]
    config = make()
    if name not in programs:
        programs[name] = capture(config, dtype=torch.bfloat16)
    program, strategy = programs[name], Strategy(**fields)
    strategy = even_stages(program.graph.num_segments, with_widest_splits(program, strategy))
    workload = lowered_workload(program.graph, strategy, seq_len=seq_len, tensor_index=0, precision=MIXED)
    found = []
    for stage in range(strategy.num_stages):
        parts = rank_memory(workload, strategy, rank=stage)
        predicted = sum(parts.values()) - parts["reserve"]
        rank = strategy.rank_of(Place(stage, 0, 0))
        found.append((predicted, tracked_bytes(program, config, strategy, rank=rank, seq_len=seq_len)))
    for stage, (predicted, tracked) in enumerate(found):
        assert abs(predicted / tracked - 1) < tolerance, f"stage {stage}: {predicted=:,} {tracked=:,} in {found}"


def tracked_bytes(program: Program, config: PretrainedConfig, strategy: Strategy, *, rank: int, seq_len: int) -> int:
    """Of a whole second step, the optimizer's among it."""
    memory = Memory()
    with fake_rank(
        program, config, strategy, rank=rank, seq_len=seq_len, master_dtype="float32", watched_by=memory
    ) as alone:
        alone.step()
        memory.forget_peak()
        alone.step()
    return memory.peak_bytes


SIZE: dict[str, Any] = {"num_stages": 2, "data_parallel": 4, "num_micro_batches": 4}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"recomputation": "none"}, marks=pytest.mark.slow),
        pytest.param({"recomputation": "full", "tensor_parallel": 2}, marks=pytest.mark.slow),
        {"recomputation": "selective", "tensor_parallel": 2, "sequence_parallel": True, "data_parallel": 1},
        pytest.param({"recomputation": "selective", "distribute_param": 1}, marks=pytest.mark.slow),
        pytest.param({"recomputation": "none", "distribute_param": 3}, marks=pytest.mark.slow),
        pytest.param({"distribute_param": 1, "shard_group_size": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"distribute_param": 3, "shard_group_size": 2, "mesh_order": ("dp", "pp", "tp")}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_small_model(fields: dict[str, Any], programs: dict[str, Program]) -> None:
    check("small", SIZE | fields, programs)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1, 3])
def test_frozen_parameters_hold_no_gradients_and_no_moments(level: int, programs: dict[str, Program]) -> None:
    """They would be half of the peak. Activations are off by as many bytes as in the unfrozen model."""
    check("adapted", SIZE | {"distribute_param": level}, programs, tolerance=2 * TOLERANCE)


QWEN: dict[str, Any] = {"num_stages": 4, "num_micro_batches": 5}
LLAMA: dict[str, Any] = {"num_stages": 4, "tensor_parallel": 8, "data_parallel": 2, "num_micro_batches": 5}
SEQUENCE: dict[str, Any] = {"sequence_parallel": True}


def more(name: str, fields: dict[str, Any]) -> Any:
    """Minutes a case: `make exhaustive` runs them."""
    return pytest.param(name, fields, marks=pytest.mark.exhaustive)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        more("qwen-7b", QWEN | {"data_parallel": 8, "recomputation": "full", "distribute_param": 1}),
        ("qwen-7b", QWEN | SEQUENCE | {"tensor_parallel": 8}),
        more("llama-70b", LLAMA | SEQUENCE | {"recomputation": "full", "distribute_param": 3}),
        more("qwen-7b", QWEN | {"data_parallel": 8, "recomputation": "full"}),
        more("qwen-7b", QWEN | {"data_parallel": 8, "recomputation": "full", "distribute_param": 3}),
        more("qwen-7b", QWEN | {"data_parallel": 2, "tensor_parallel": 4, "recomputation": "selective"}),
        more("llama-70b", LLAMA | SEQUENCE | {"recomputation": "full"}),
        more("llama-70b", LLAMA | SEQUENCE | {"recomputation": "selective", "distribute_param": 1}),
        more("llama-70b", LLAMA | {"recomputation": "selective", "distribute_param": 3}),
    ],
)
def test_full_size_models(name: str, fields: dict[str, Any], programs: dict[str, Program]) -> None:
    check(name, fields, programs)
