"""What a step of the emitted program asks of torch is no more than what a hand-written program for the same plan asks:
operators, collectives and their bytes, bytes allocated. `benchmarks/runtime_speed.py` adds the times.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

from autoparallel.plans.strategy import Strategy
from benchmarks.counting import Counts, counts_of
from benchmarks.handwritten import PROGRAMS, Step, user_loop
from tests.equality import parallel
from tests.families import make_batch, make_model, program_of
from tests.ranks import run_ranks
from tests.strategies import plan_for

SEQ = 8
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"data_parallel": 2, "batch_per_device": 2},
    "fsdp": {"data_parallel": 2, "batch_per_device": 2, "distribute_param": 3},
    "pipeline": {"num_stages": 2, "num_micro_batches": 4},
    "tensor": {"tensor_parallel": 2, "batch_per_device": 2},  # split by heads, as by hand
    "eager": {"batch_per_device": 2},
}


def warm(step: Step, rows: int) -> list[float]:
    """Optimizer states and receive buffers exist after the first steps; the third is like all later ones."""
    return [step(make_batch(rows, SEQ, seed=seed, padded=False)).item() for seed in range(3)]


def compared(family: str, names: list[str]) -> list[tuple[str, list[float], list[float], Counts, Counts]]:
    """On every rank: by case, losses and counts of ours and of the hand-written program."""
    model = make_model(family, dtype=torch.float32)
    program, found = program_of(family), []
    for name in names:
        fields = CASES[name] | ({"splits": splits(model)} if name == "tensor" else {})
        strategy = plan_for(program, Strategy(**fields), seq_len=SEQ).strategy
        ours = user_loop(parallel(copy.deepcopy(model), program, strategy))
        hand = PROGRAMS[name](copy.deepcopy(model), strategy)
        losses = [warm(step, strategy.batch_size) for step in (ours, hand)]
        batch = make_batch(strategy.batch_size, SEQ, seed=9, padded=False)
        counts = [counts_of(partial(step, batch))[0] for step in (ours, hand)]
        found.append((name, losses[0], losses[1], counts[0], counts[1]))
    return found


def splits(model: Any) -> tuple[tuple[str, ...], ...]:
    head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    block = ("mlp.down_proj.weight[1]", "self_attn.k_proj.weight[0].0")
    return ("embed_tokens.weight[0]",), block, (f"{head}.weight[0]",)


def check(family: str, num_ranks: int, names: list[str]) -> None:
    for rank in run_ranks(num_ranks, compared, family, names, first=partial(program_of, family)):
        for name, our_losses, losses, ours, hand in rank:
            assert our_losses == pytest.approx(losses, rel=1e-5), name
            for field, most in hand.as_dict().items():
                assert 0 <= ours.as_dict()[field] <= most, f"{name}: {field} {ours.as_dict()[field]}, by hand {most}"


def test_no_more_than_by_hand() -> None:
    check("llama", 2, ["ddp", "fsdp", "pipeline", "tensor"])


def test_no_more_than_plain_eager() -> None:
    check("llama", 1, ["eager"])


@pytest.mark.slow
def test_no_more_than_by_hand_with_tied_weights() -> None:
    check("llama-tied", 2, ["ddp", "fsdp", "pipeline", "tensor"])
    check("llama-tied", 1, ["eager"])
