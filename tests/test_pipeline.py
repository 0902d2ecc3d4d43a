"""What a rank holds while a schedule runs: the memory model counts on it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from autoparallel.capture.program import capture
from autoparallel.cost.memory import peaks
from autoparallel.emit.deferred import DeferredContraction, defer_weight_gradients
from autoparallel.emit.stage import emit_stage, state_tensors
from autoparallel.plans.strategy import Strategy
from autoparallel.runtime.torch_schedule import Sharding, Stage
from tests.equality import parallel
from tests.families import make_batch, make_model, program_of
from tests.ranks import run_ranks
from tests.strategies import even_stages

SIZE: dict[str, Any] = {"num_stages": 2, "num_micro_batches": 5}


def buffers(stage: Stage) -> int:
    """Receive buffers that hold memory."""
    received = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
    return sum(info.buffer is not None for infos in received for info in infos)


def watched_step(strategy: Strategy) -> tuple[list[int], int, bool]:
    """Micro-batches in flight after each forward, what is left after a step, and whether parameters were given back
    when weight gradients were made.
    """
    alive, sharded = [], []
    forward, second_half = Stage.forward_one_chunk, Sharding.make_weight_gradients

    def count(stage: Stage, *args: Any, **kwargs: Any) -> Any:
        output = forward(stage, *args, **kwargs)
        alive.append(len(stage.fwd_cache) + len(stage.dw_runner))
        return output

    def look(sharding: Sharding, *, last: bool) -> None:
        parts = [part for part in sharding.stage.modules() if isinstance(part, FSDPModule)]
        sharded.extend(group.is_sharded for part in parts for group in part._get_fsdp_state()._fsdp_param_groups)
        second_half(sharding, last=last)

    Stage.forward_one_chunk = count  # type: ignore[method-assign,assignment]
    Sharding.make_weight_gradients = look  # type: ignore[method-assign]
    model = make_model("llama", dtype=torch.float32)
    model = parallel(model, program_of("llama"), strategy)
    model(**make_batch(strategy.batch_size, 8), use_cache=False).loss.backward()
    (schedule,) = model._parallel.engine.pipeline._schedules.values()
    left = sum(buffers(stage) + len(stage._sending) + len(stage.fwd_cache) for stage in schedule._own_stages)
    return alive, left, all(sharded)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble"])
def test_a_rank_holds_what_the_lists_say_and_keeps_nothing(schedule: Any) -> None:
    strategy = Strategy(schedule=schedule, **SIZE)
    ranks = run_ranks(2, watched_step, strategy, first=partial(program_of, "llama"))
    for moments, (alive, left, _) in zip(peaks(strategy), ranks, strict=True):
        assert max(alive) == max(sum(moment.forwarded + moment.half_done) for moment in moments)
        assert left == 0


def test_weight_gradients_need_no_parameters() -> None:
    strategy = Strategy(schedule="zero_bubble", data_parallel=2, distribute_param=3, **SIZE)
    for _, left, given_back in run_ranks(4, watched_step, strategy, first=partial(program_of, "llama")):
        assert given_back
        assert left == 0


def test_a_step_that_failed_leaves_no_gradients_to_the_next() -> None:
    model = make_model("llama")
    program = capture(model)
    tensors = state_tensors(model, program)
    (plan,) = even_stages(program.graph.num_segments, Strategy()).stages or ()
    stage = emit_stage(program, plan, lambda name: tensors[name])
    defer_weight_gradients(stage)
    stage(**make_batch(2, 8, padded=False), num_items=torch.tensor(16))[0].backward()
    contractions = [module for module in stage.modules() if isinstance(module, DeferredContraction)]
    assert all(module.pending for module in contractions)
    Sharding(stage, 0).forget_weight_gradients()
    assert not any(module.pending for module in contractions)
