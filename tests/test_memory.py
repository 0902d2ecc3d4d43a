"""Memory of a stage: hand-computed small numbers, and orders that hold for every strategy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.memory import capacity_bytes, peaks, rank_memory, update_workspace_bytes
from autoparallel.cost.practice import Practice
from autoparallel.cost.tables import load_table
from autoparallel.cost.workload import ParameterCount, SegmentCost, SharedParameters, Workload
from autoparallel.ir.precision import Precision
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, StagePlan, Strategy
from tests.workloads import MIXED

NUM_BLOCKS = 4
LAST = NUM_BLOCKS + 1


def _cost(saved: int, selective: int, entering: int, workspace: int, deferred: int = 0) -> SegmentCost:
    return SegmentCost(
        forward_s=1.0,
        backward_s=2.0,
        weight_gradient_s=1.0,
        recompute_selective_s=0.5,
        recompute_full_s=1.0,
        saved_bytes=saved,
        saved_selective_bytes=selective,
        deferred_bytes=deferred,
        input_bytes=entering,
        workspace_bytes=workspace,
    )


def _workload(
    *, tied: int = 0, frozen: int = 0, precision: Precision = MIXED, update_bytes: int | None = 0
) -> Workload:
    """Embedding (1,000 parameters), four blocks (100 each), head (2,000)."""
    flavor = resolve_flavor("8xA100-SXM4-80GB")
    counts = [1000, *[100] * NUM_BLOCKS, 2000]
    shared = (SharedParameters(segments=(0, LAST), count=ParameterCount(trainable=tied)),) if tied else ()
    return Workload(
        model_name="toy",
        fingerprint="0",
        flavor=flavor,
        table=load_table(flavor.device),
        batch_size=8,
        seq_len=16,
        memory_ratio=0.8,
        precision=precision,
        segment_classes=(0, *[1] * NUM_BLOCKS, 2),
        costs={1: (_cost(5, 5, 3, 11, 4), _cost(70, 40, 10, 20, 55), _cost(30, 30, 10, 60, 25))},
        parameters=tuple(ParameterCount(trainable=count, frozen=frozen) for count in counts),
        shared=shared,
        step_flops=1,
        practice=Practice(optimizer_workspace_bytes=update_bytes),
    )


def _one_stage(**fields: Any) -> Strategy:
    recomputation = fields.setdefault("recomputation", "none")
    plan = StagePlan(first_segment=0, last_segment=LAST, recomputation=recomputation)
    return Strategy(stages=(plan,), **fields)


def _two_stages(**fields: Any) -> Strategy:
    recomputation = fields.setdefault("recomputation", "none")
    cuts = ((0, 2), (3, LAST))
    plans = tuple(StagePlan(first_segment=a, last_segment=b, recomputation=recomputation) for a, b in cuts)
    return Strategy(num_stages=2, stages=plans, **fields)


def test_capacity() -> None:
    assert capacity_bytes(_workload()) == int(80 * 2**30 * 0.8)


def test_one_device_by_hand() -> None:
    assert rank_memory(_workload(), _one_stage(num_micro_batches=8), rank=0) == {
        "parameters": 3400 * (4 + 2),
        "gradients": 3400 * 4,
        "optimizer": 3400 * 8,
        "activations": (5 + 3) + 4 * (70 + 10) + (30 + 10),
        "workspace": 60,
        "reserve": 2**30,
    }


def test_level_1_holds_no_whole_gradients_when_one_micro_batch_is_the_last() -> None:
    one, more = (_one_stage(data_parallel=4, distribute_param=1, num_micro_batches=m) for m in (1, 2))
    gradients = [rank_memory(_workload(), strategy, rank=0)["gradients"] for strategy in (one, more)]
    assert gradients == [(2 * 2000 + 850) * 4, 3400 * 4]


@pytest.mark.parametrize(
    ("level", "parameters", "gradients", "optimizer"),
    [
        (0, 3400 * 6, 3400 * 4, 3400 * 8),
        (1, 850 * 4 + 3400 * 2, 3400 * 4, 850 * 8),
        # When the head is reduced: its gradients twice, and the block before it gathered ahead.
        (2, 850 * 4 + 3400 * 2, (2 * 2000 + 850) * 4, 850 * 8),
        (3, 850 * 4 + 100 * 2, (2 * 2000 + 850) * 4, 850 * 8),
    ],
)
def test_sharding_levels_by_hand(level: int, parameters: int, gradients: int, optimizer: int) -> None:
    strategy = _one_stage(data_parallel=4, distribute_param=level, num_micro_batches=2)
    memory = rank_memory(_workload(), strategy, rank=0)
    assert (memory["parameters"], memory["gradients"], memory["optimizer"]) == (parameters, gradients, optimizer)


@pytest.mark.parametrize(
    ("level", "parameters", "updated"),
    [(0, 3400 * 6, 3400), (1, 850 * 4 + 3400 * 2, 850), (2, 850 * 4 + 3400 * 2, 850), (3, 850 * 4, 850)],
)
def test_the_optimizer_may_need_more_than_backward(level: int, parameters: int, updated: int) -> None:
    """AdamW on a GPU makes the square roots of all second moments at once; on 80 bytes each, far more than backward."""
    strategy = _one_stage(data_parallel=4, distribute_param=level, num_micro_batches=2)
    assert rank_memory(_workload(update_bytes=80), strategy, rank=0) == {
        "parameters": parameters,
        "gradients": updated * 4,
        "optimizer": updated * 8,
        "activations": 0,
        "workspace": updated * 80,
        "reserve": 2**30,
    }
    assert update_workspace_bytes(_workload(update_bytes=None)) == 4


@pytest.mark.parametrize(
    ("recomputation", "activations", "workspace"),
    [
        ("none", 4 * 70, 60),
        ("selective", 4 * 40, 60),  # the head's 60 exceeds a block's 20 + (70 - 40) rebuilt
        ("full", 0, 20 + 70),
    ],
)
def test_recomputation_by_hand(recomputation: str, activations: int, workspace: int) -> None:
    memory = rank_memory(_workload(), _one_stage(recomputation=recomputation), rank=0)
    kept_by_all = (5 + 3) + 4 * 10 + (30 + 10)
    assert memory["activations"] == kept_by_all + activations
    assert memory["workspace"] == workspace


def test_pipeline_by_hand() -> None:
    strategy = _two_stages(num_micro_batches=8)
    first, last = (rank_memory(_workload(), strategy, rank=stage) for stage in (0, 1))
    # two micro-batches in flight, each with the output it sent, and one gradient coming back
    assert first["activations"] == 2 * ((5 + 3) + 2 * (70 + 10)) + (2 + 1) * 10
    # one in flight, and the next input received ahead
    assert last["activations"] == 2 * (70 + 10) + (30 + 10) + 10
    assert first["parameters"] == (1000 + 200) * 6


def test_tied_parameters_are_held_by_both_stages_and_once_by_one() -> None:
    workload, two, one = _workload(tied=500), _two_stages(), _one_stage()
    assert rank_memory(workload, two, rank=0)["gradients"] == (1000 + 200 + 500) * 4
    assert rank_memory(workload, two, rank=1)["gradients"] == (2000 + 200 + 500) * 4
    assert rank_memory(workload, one, rank=0)["gradients"] == (3400 + 500) * 4
    sharded = rank_memory(workload, _one_stage(data_parallel=2, distribute_param=3), rank=0)
    # When the head is reduced: nothing but the block before it is gathered.
    assert sharded["parameters"] == 1950 * 4 + 100 * 2
    assert sharded["gradients"] == (1950 + 2 * 2000) * 4


def test_frozen_parameters_have_no_gradients_or_states() -> None:
    memory = rank_memory(_workload(frozen=7), _one_stage(), rank=0)
    assert memory["parameters"] == (3400 + 6 * 7) * 6
    assert (memory["gradients"], memory["optimizer"]) == (3400 * 4, 3400 * 8)


def test_one_copy_where_compute_and_master_dtypes_agree() -> None:
    memory = rank_memory(_workload(precision=Precision.of("float32", "float32")), _one_stage(), rank=0)
    assert memory["parameters"] == 3400 * 4


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "in_flight"),
    [
        ("1f1b", 8, (4, 3, 2, 1)),
        ("1f1b", 2, (2, 2, 2, 1)),
        ("gpipe", 8, (8, 8, 8, 8)),
        ("zero_bubble", 8, (4, 4, 4, 4)),
        ("zero_bubble", 2, (2, 2, 2, 2)),
    ],
)
def test_in_flight(schedule: Any, micro_batches: int, in_flight: tuple[int, ...]) -> None:
    strategy = Strategy(num_stages=4, schedule=schedule, num_micro_batches=micro_batches)
    assert tuple(max(sum(m.forwarded + m.half_done) for m in moments) for moments in peaks(strategy)) == in_flight


def test_zero_bubble_by_hand() -> None:
    strategy = _two_stages(num_micro_batches=8, schedule="zero_bubble")
    first, last = (rank_memory(_workload(), strategy, rank=rank) for rank in (0, 1))
    # two forwarded, or one and the operands of another one's weight gradients
    forwarded, half_done = (5 + 3) + 2 * (70 + 10) + 10, 4 + 2 * 55
    assert first["activations"] == max(2 * forwarded, forwarded + half_done) + 10
    # the last stage makes weight gradients a micro-batch late
    forwarded, half_done = 2 * (70 + 10) + (30 + 10), 2 * 55 + 25
    assert last["activations"] == max(forwarded + half_done, 2 * half_done) + 10


def test_virtual_stages_by_hand() -> None:
    """Two ranks with two stages of one block each: a rank holds both, at the moment that is worst for their sum."""
    cuts = ((0, 1), (2, 2), (3, 3), (4, LAST))
    plans = tuple(StagePlan(first_segment=a, last_segment=b, recomputation="none") for a, b in cuts)
    fields: dict[str, Any] = {"num_stages": 2, "num_micro_batches": 4, "virtual_stages": 2, "schedule": "interleaved"}
    strategy = Strategy(stages=plans, **fields)
    first, last = (rank_memory(_workload(), strategy, rank=rank) for rank in (0, 1))
    embedding, block, head = 5 + 3, 70 + 10, 30 + 10
    # 0F0 0F1 2F0 2F1 0F2 2B0 0F3 ...: three on stage 0 and two on stage 2, or four and one
    first_stage, third_stage = embedding + block + 10, block + 10
    assert first["activations"] == max(3 * first_stage + 2 * third_stage, 4 * first_stage + third_stage) + 3 * 10
    # 1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 ...: two and one, or three later on
    second_stage, fourth_stage = block + 10, block + head
    assert last["activations"] == max(2 * second_stage + fourth_stage, 3 * second_stage) + 3 * 10
    assert first["parameters"] == (1000 + 2 * 100) * 6
    assert last["parameters"] == (2000 + 2 * 100) * 6
    tied = rank_memory(_workload(tied=500), strategy, rank=1)
    assert tied["gradients"] == (2000 + 2 * 100 + 500) * 4


STRATEGY = {
    "data_parallel": st.integers(1, 8),
    "num_micro_batches": st.integers(1, 12),
    "schedule": st.sampled_from(["1f1b", "gpipe", "zero_bubble"]),
    "recomputation": st.sampled_from(list(RECOMPUTATION_LEVELS)),
    "distribute_param": st.integers(0, 3),
}


@settings(max_examples=60, deadline=None)
@given(fields=st.fixed_dictionaries(STRATEGY), stage=st.integers(0, 1), tied=st.integers(0, 900))
def test_orders(fields: dict[str, Any], stage: int, tied: int) -> None:
    workload = _workload(tied=tied)

    def memory(**changes: Any) -> dict[str, int]:
        parts = rank_memory(workload, _two_stages(**{**fields, **changes}), rank=stage)
        assert all(size >= 0 for size in parts.values())
        return parts

    assert memory(data_parallel=1) == memory(data_parallel=1, distribute_param=0)
    whole, shards = (memory(distribute_param=level)["optimizer"] for level in (0, 1))
    assert whole >= shards == memory(distribute_param=2)["optimizer"] == memory(distribute_param=3)["optimizer"]
    activations = [memory(recomputation=level)["activations"] for level in ("none", "selective", "full")]
    assert activations == sorted(activations, reverse=True)
    more = fields["num_micro_batches"] + 1
    assert memory(num_micro_batches=more)["activations"] >= memory()["activations"]
    assert memory(schedule="gpipe")["activations"] >= memory(schedule="1f1b")["activations"]
