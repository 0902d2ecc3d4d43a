"""Plans made by hand: what the tests of files, explain and the command line read."""

from __future__ import annotations

from typing import Any

from autoparallel.ir.flavor import Flavor
from autoparallel.ir.precision import Precision
from autoparallel.plans.candidate import Candidate
from autoparallel.plans.estimate import Breakdown, Estimate, Rejection, StageEstimate
from autoparallel.plans.plan import ModelSummary, Plan
from autoparallel.plans.strategy import Constraints, StagePlan, Strategy

GIB = 2**30
NUM_BLOCKS = 8
PARTS = ("parameters", "gradients", "optimizer", "activations", "workspace", "reserve")
FLAVOR = Flavor(name="4xTest", device="test-gpu", num_devices=4, devices_per_host=4, memory_bytes=16 * GIB)


def estimate(num_stages: int, *, step_time_s: float, **terms: float) -> Estimate:
    """An estimate whose breakdown sums to the step time; compute takes what the given terms leave."""
    zero = dict.fromkeys(Breakdown.model_fields, 0.0)
    breakdown = Breakdown(**zero | terms | {"compute": step_time_s - sum(terms.values())})
    sizes = {name: GIB * (index + 1) // 2 for index, name in enumerate(PARTS)}
    stage = StageEstimate(
        forward_s=0.01,
        backward_s=0.02,
        parameters=10_000_000,
        peak_memory_bytes=sum(sizes.values()),
        memory_parts_bytes=sizes,
    )
    tokens = 16 * 128 / step_time_s
    return Estimate(
        step_time_s=step_time_s,
        tokens_per_second=tokens,
        mfu=0.4,
        breakdown_s=breakdown,
        stages=(stage,) * num_stages,
    )


def strategy(num_stages: int = 2, **changes: Any) -> Strategy:
    """Sixteen rows on four devices unless `changes` say otherwise."""
    fields = {"data_parallel": 2, "batch_per_device": 1, "num_micro_batches": 8}
    return Strategy(num_stages=num_stages, **fields | changes)


def with_stages(chosen: Strategy) -> Strategy:
    """Cut the test model's ten segments into equal stages."""
    size = (NUM_BLOCKS + 2) // chosen.num_stages
    stages = tuple(
        StagePlan(first_segment=i * size, last_segment=(i + 1) * size - 1, recomputation=chosen.recomputation)
        for i in range(chosen.num_stages)
    )
    return chosen.model_copy(update={"stages": stages})


def candidates() -> tuple[Candidate, ...]:
    """Five possible candidates, the last as fast as the first, and three impossible ones."""
    memory = Rejection(reason="stage 0 does not fit", kind="memory", shortfall_bytes=3 * GIB)
    fast = estimate(2, step_time_s=0.5, bubble=0.1)
    fewer = estimate(2, step_time_s=0.6, bubble=0.2)
    recomputed = estimate(2, step_time_s=0.7, bubble=0.1, recompute=0.2)
    sharded = estimate(2, step_time_s=0.55, bubble=0.1, dp_comm=0.05)
    more = Rejection(reason="stage 1 does not fit", kind="memory", shortfall_bytes=5 * GIB // 2)
    layers = Rejection(reason="16 stages, 10 segments", kind="layers")
    return (
        Candidate(strategy=strategy(), estimate=fast),
        Candidate(strategy=strategy(num_micro_batches=4, batch_per_device=2), estimate=fewer),
        Candidate(strategy=strategy(recomputation="full"), estimate=recomputed),
        Candidate(strategy=strategy(distribute_param=1), estimate=sharded),
        Candidate(strategy=strategy(1, data_parallel=4, num_micro_batches=4), rejection=memory),
        Candidate(strategy=strategy(1, data_parallel=4, num_micro_batches=2, batch_per_device=2), rejection=more),
        Candidate(strategy=strategy(4, data_parallel=1, num_micro_batches=16), rejection=layers),
        Candidate(strategy=strategy(schedule="gpipe"), estimate=fast),
    )


def sample_plan(**changes: Any) -> Plan:
    """Two stages on four devices; `changes` replace fields."""
    model = ModelSummary(
        name="tiny-llama",
        architecture="LlamaForCausalLM",
        fingerprint="ab" * 32,
        num_parameters=20_000_000,
        trainable_parameters=20_000_000,
        parameter_bytes=80_000_000,
        num_blocks=NUM_BLOCKS,
        block_classes=(1,) * NUM_BLOCKS,
    )
    fields: dict[str, Any] = {
        "autoparallel_version": "0.1.0",
        "torch_version": "2.13.0",
        "model": model,
        "flavor": FLAVOR,
        "constraints": Constraints(),
        "batch_size": 16,
        "seq_len": 128,
        "precision": Precision.of("bfloat16", "float32"),
        "strategy": with_stages(strategy()),
        "estimate": estimate(2, step_time_s=0.5, bubble=0.1),
        "candidates": candidates(),
        "assumptions": ("test-gpu: matrix_efficiency 0.6", "test-gpu: link latency 5 us"),
    }
    return Plan(**(fields | changes))
