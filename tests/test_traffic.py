"""What each rank communicates and contracts in one step equals what is computed from the lowered graph: nothing priced
that is not run, nothing run that is not priced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from autoparallel.capture.program import Program, capture
from autoparallel.cost.traffic import RankStep, Traffic, buckets
from autoparallel.ir.precision import Precision
from autoparallel.plans.grid import Place
from autoparallel.plans.strategy import Strategy
from autoparallel.search.stage_times import Overheads, StageSeconds, stage_seconds
from tests.fake_cluster import Recorder, Seen, adapted, fake_rank, llama_70b, qwen_7b, with_widest_splits
from tests.families import FAMILIES, UNSEEN
from tests.lowered import lowered_workload
from tests.strategies import even_stages, in_turn

SEQ = 16
ADAPTED: dict[str, Callable[[], nn.Module]] = {
    "llama-adapted": lambda: adapted(FAMILIES["llama"](), dtype=torch.float32),
    "llama-adapted-last": lambda: adapted(FAMILIES["llama"](), dtype=torch.float32, layers=[3]),
}


def multi_query() -> PretrainedConfig:
    """Queries are sharded, while every rank holds the one key and value of the fused projection."""
    config = UNSEEN["phi3"]()
    config.num_key_value_heads = 1
    return config


CONFIGS: dict[str, Callable[[], Any]] = {
    **FAMILIES, **UNSEEN, **ADAPTED, "multi-query": multi_query, "qwen-7b": qwen_7b, "llama-70b": llama_70b,
}  # fmt: skip
HUGE = {"qwen-7b", "llama-70b"}
FP32 = Precision.of("float32", "float32")


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


def check(family: str, strategy: Strategy, ranks: Iterable[int], programs: dict[str, Program]) -> None:
    """Every rank's second step, line by line."""
    config, dtype = CONFIGS[family](), "bfloat16" if family in HUGE else "float32"
    if family not in programs:
        programs[family] = capture(config, dtype=getattr(torch, dtype))
    program, seq_len = programs[family], 4096 if family in HUGE else SEQ
    strategy = even_stages(program.graph.num_segments, with_widest_splits(program, strategy))
    for rank in ranks:
        recorder = second_step(program, config, strategy, rank=rank, seq_len=seq_len, master_dtype="float32")
        expected = RankStep(program.graph, strategy, seq_len, rank, "float32")
        assert not differences(recorder.transfers, as_seen(expected.traffic())), f"rank {rank}"
        assert not differences(recorder.flops, expected.flops()), f"rank {rank}"


def second_step(program: Program, config: PretrainedConfig, strategy: Strategy, *, rank: int, **size: Any) -> Recorder:
    """The first one also opens connections."""
    with fake_rank(program, config, strategy, rank=rank, **size) as alone:
        alone.step()
        with Recorder() as recorder:
            alone.step()
    return recorder


def as_seen(traffic: Traffic) -> Counter[Seen]:
    """Sends, and the sums at the end of a step, run outside of the stages' modules, like backward."""
    found: Counter[Seen] = Counter()
    for transfer, count in traffic.items():
        outside = transfer.phase == "step" or transfer.axis == "pipeline"
        phase = "backward" if outside else transfer.phase
        found[Seen(phase, transfer.kind, transfer.ranks, transfer.dtype, transfer.size_bytes)] += count
    return found


def differences(run: Counter[Any], predicted: Counter[Any]) -> list[str]:
    return [
        f"{line}: {run[line]} run, {predicted[line]} predicted"
        for line in sorted(run | predicted)
        if run[line] != predicted[line]
    ]


def ends(strategy: Strategy) -> tuple[int, int]:
    return 0, strategy.num_devices - 1


SIZE: dict[str, Any] = {"num_stages": 2, "data_parallel": 2, "num_micro_batches": 3}
SAMPLE = {
    "replicas": ("llama", {}),
    "tensor": ("llama", {"tensor_parallel": 2}),
    "tensor-full": ("llama", {"tensor_parallel": 2, "recomputation": "full"}),
    "tensor-selective": ("qwen2", {"tensor_parallel": 4, "recomputation": "selective"}),
    "sequence": ("qwen2", {"tensor_parallel": 2, "sequence_parallel": True}),
    "sequence-full": ("llama", {"tensor_parallel": 4, "sequence_parallel": True, "recomputation": "full"}),
    "sequence-selective-gpt2": (
        "gpt2",
        {"tensor_parallel": 2, "sequence_parallel": True, "recomputation": "selective", "distribute_param": 1},
    ),
    "masters-sharded": ("qwen2", {"distribute_param": 1, "recomputation": "full"}),
    "gradients-sharded": ("llama", {"distribute_param": 2, "tensor_parallel": 2}),
    "parameters-sharded": ("llama", {"distribute_param": 3, "recomputation": "full"}),
    "parameters-sharded-sequence": (
        "qwen2",
        {"distribute_param": 3, "tensor_parallel": 2, "sequence_parallel": True, "recomputation": "selective"},
    ),
    "one-stage-tied": ("qwen2", {"num_stages": 1, "distribute_param": 2, "tensor_parallel": 2}),
    "one-stage": ("llama", {"num_stages": 1, "data_parallel": 1, "tensor_parallel": 2, "sequence_parallel": True}),
    "gpipe": ("llama", {"schedule": "gpipe", "distribute_param": 3, "tensor_parallel": 2}),
    "interleaved": (
        "qwen2",
        {"schedule": "interleaved", "virtual_stages": 2, "num_micro_batches": 4, "tensor_parallel": 2},
    ),
    "interleaved-sharded": (
        "llama",
        {"schedule": "interleaved", "virtual_stages": 2, "num_micro_batches": 4, "distribute_param": 3},
    ),
    "zero-bubble": ("llama", {"schedule": "zero_bubble", "tensor_parallel": 2, "sequence_parallel": True}),
    "zero-bubble-sharded": ("qwen2", {"schedule": "zero_bubble", "distribute_param": 3, "recomputation": "full"}),
    "fused": ("multi-query", {"tensor_parallel": 2}),
    "fused-sharded": ("multi-query", {"tensor_parallel": 2, "sequence_parallel": True, "distribute_param": 3}),
    "adapters": ("llama-adapted", {"distribute_param": 3}),
    "adapters-tensor": ("llama-adapted", {"tensor_parallel": 2, "sequence_parallel": True, "recomputation": "full"}),
    "frozen-stage": ("llama-adapted-last", {"distribute_param": 3, "schedule": "zero_bubble"}),
    "frozen-stage-replicas": ("llama-adapted-last", {"distribute_param": 1}),
    "groups": ("qwen2", {"data_parallel": 4, "distribute_param": 3, "shard_group_size": 2, "recomputation": "full"}),
    "groups-tensor": (
        "multi-query",
        {"data_parallel": 4, "distribute_param": 1, "shard_group_size": 2, "tensor_parallel": 2},
    ),
    "groups-gradients": ("llama", {"data_parallel": 4, "distribute_param": 2, "shard_group_size": 2}),
    "groups-uneven": ("llama", {"data_parallel": 6, "distribute_param": 2, "shard_group_size": 3}),
    "groups-zero-bubble": (
        "qwen2",
        {"data_parallel": 4, "distribute_param": 2, "shard_group_size": 2, "schedule": "zero_bubble"},
    ),
    "order": ("qwen2", {"tensor_parallel": 2, "sequence_parallel": True, "mesh_order": ("tp", "pp", "dp")}),
    "order-groups": (
        "llama",
        {
            "data_parallel": 4,
            "distribute_param": 3,
            "shard_group_size": 2,
            "tensor_parallel": 2,
            "mesh_order": ("dp", "tp", "pp"),
            "schedule": "interleaved",
            "virtual_stages": 2,
            "num_micro_batches": 4,
        },
    ),
    "windowed": ("mistral", {"tensor_parallel": 2, "sequence_parallel": True, "recomputation": "full"}),
}


QUICK = [
    "replicas",
    "frozen-stage",
    "tensor-full",
    "zero-bubble",
    "order-groups",
]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SAMPLE])
def test_a_step_communicates_what_is_predicted(name: str, programs: dict[str, Program]) -> None:
    family, changes = SAMPLE[name]
    strategy = Strategy(**(SIZE | changes))
    check(family, strategy, ends(strategy), programs)


TENSOR = [(1, False), (2, False), (2, True), (4, False), (4, True)]
SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero_bubble"]
RECOMPUTATIONS = ["none", "selective", "full"]


@pytest.mark.parametrize(("tensor", "schedule"), in_turn(TENSOR, SCHEDULES, period=2))
def test_every_combination(tensor: tuple[int, bool], schedule: Any, programs: dict[str, Program]) -> None:
    """Tied and untied, with and without biases, in turn."""
    degree, by_tokens = tensor
    fields = SIZE | {"num_micro_batches": 4, "tensor_parallel": degree, "sequence_parallel": by_tokens}
    fields |= {"schedule": schedule, "virtual_stages": 2 if schedule == "interleaved" else 1}
    choices = list(product(RECOMPUTATIONS, range(4)))
    for turn in range(TENSOR.index(tensor) + SCHEDULES.index(schedule), len(choices), 4):
        recomputation, level = choices[turn]
        family = ("llama", "qwen2", "gpt2")[turn % 3]
        strategy = Strategy(recomputation=recomputation, distribute_param=level, **fields)
        check(family, strategy, ends(strategy), programs)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNSEEN)
def test_other_families(family: str, programs: dict[str, Program]) -> None:
    for by_tokens in (False, True):
        fields = SIZE | {"tensor_parallel": 2, "sequence_parallel": by_tokens, "recomputation": "full"}
        strategy = Strategy(distribute_param=3, **fields)
        check(family, strategy, ends(strategy), programs)


QWEN: dict[str, Any] = {"num_stages": 4, "num_micro_batches": 5}
LLAMA: dict[str, Any] = {"num_stages": 4, "tensor_parallel": 8, "data_parallel": 2, "num_micro_batches": 5}
INTERLEAVED: dict[str, Any] = {"schedule": "interleaved", "virtual_stages": 5, "num_micro_batches": 4}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param(
            "qwen-7b",
            QWEN | {"data_parallel": 8, "distribute_param": 1, "recomputation": "selective"},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "qwen-7b",
            QWEN | {"tensor_parallel": 4, "data_parallel": 2, "recomputation": "full"},
            marks=pytest.mark.exhaustive,
        ),
        ("qwen-7b", QWEN | {"tensor_parallel": 8, "sequence_parallel": True, "schedule": "zero_bubble"}),
        pytest.param(
            "llama-70b", LLAMA | {"distribute_param": 1, "recomputation": "full"}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            "llama-70b",
            LLAMA | {"sequence_parallel": True, "distribute_param": 3, "recomputation": "selective"},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "llama-70b",
            LLAMA | INTERLEAVED | {"sequence_parallel": True, "distribute_param": 2},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_full_size_models(family: str, fields: dict[str, Any], programs: dict[str, Program]) -> None:
    strategy = Strategy(**fields)
    middle = strategy.num_devices // 2 + 1
    check(family, strategy, (0, middle, strategy.num_devices - 1), programs)


def test_buckets() -> None:
    sizes = [("float32", 40), ("float32", 60), ("float32", 1), ("bfloat16", 1), ("bfloat16", 200), ("bfloat16", 0)]
    found = [list(bucket) for bucket in buckets(sizes, limit_bytes=100)]
    assert found == [[0, 1], [2], [3], [4], [5]]
    assert buckets([]) == []


TENSOR_PARALLEL = ["tensor", "tensor-full", "sequence", "sequence-full", "sequence-selective-gpt2", "order"]
SHARDED = [
    "replicas",
    "masters-sharded",
    "gradients-sharded",
    "parameters-sharded",
    "parameters-sharded-sequence",
    "groups",
    "groups-gradients",
]


def spent_and_priced(
    name: str, axes: tuple[str, ...], programs: dict[str, Program]
) -> list[tuple[Counter[str], StageSeconds, int]]:
    """By stage: the seconds of its transfers by phase, what the plan says, and micro-batches."""
    family, changes = SAMPLE[name]
    if family not in programs:
        programs[family] = capture(CONFIGS[family](), dtype=torch.float32)
    program = programs[family]
    strategy = Strategy(**(SIZE | changes))
    strategy = even_stages(program.graph.num_segments, with_widest_splits(program, strategy))
    workload = lowered_workload(program.graph, strategy, seq_len=SEQ, tensor_index=0, precision=FP32)
    overheads, found = Overheads(workload, strategy), []
    groups = {"tensor": overheads.tensor, "data": overheads.shards, "shard_groups": overheads.shard_groups}
    for stage, plan in enumerate(strategy.stages or ()):
        rank = strategy.rank_of(Place(stage, 0, 0))
        spent: Counter[str] = Counter()
        for transfer, count in RankStep(program.graph, strategy, SEQ, rank, "float32").traffic().items():
            if transfer.axis in axes:
                group = groups[transfer.axis]
                assert (
                    transfer.ranks == tuple(range(rank, strategy.num_devices, group["stride"]))[: group["group_size"]]
                )
                time_s = getattr(overheads.topology, f"{transfer.kind}_s")
                spent[transfer.phase] += count * time_s(transfer.size_bytes, **group)
        found.append((spent, stage_seconds(workload, strategy, plan), strategy.num_micro_batches))
    return found


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_tensor_parallelism_is_priced_as_it_communicates(name: str, programs: dict[str, Program]) -> None:
    for spent, seconds, micro_batches in spent_and_priced(name, ("tensor",), programs):
        assert micro_batches * seconds.forward_tensor_s == pytest.approx(spent["forward"])
        assert micro_batches * seconds.backward_tensor_s == pytest.approx(spent["backward"])
        assert spent["forward"] > 0
        assert (spent["recompute"] > 0) == name.endswith("full")


@pytest.mark.parametrize("name", SHARDED)
def test_data_parallelism_is_priced_as_it_communicates(name: str, programs: dict[str, Program]) -> None:
    for spent, seconds, micro_batches in spent_and_priced(name, ("data", "shard_groups"), programs):
        shown_s = seconds.start_s + seconds.reduce_s + micro_batches * seconds.comm_s
        hidden_s = seconds.hidden_step_s + micro_batches * seconds.hidden_s
        assert shown_s + hidden_s == pytest.approx(sum(spent.values()))
        assert 0 <= hidden_s <= seconds.hidden_step_s + micro_batches * (seconds.forward_s + seconds.backward_s)
