"""What the search benchmark rests on beside the planner: MoAI's space, and fitted exponents."""

from __future__ import annotations

import pytest

from benchmarks.searches.growth import slope
from benchmarks.searches.moai import AS_READ, PUBLISHED, Published, even_stages, space


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: f"{run.problem.name} {run.version}")
def test_moai_s_space_has_as_many_candidates_as_its_logs(run: Published) -> None:
    strategies = space(run, AS_READ[run.version], num_blocks=run.problem.structure.layers)
    assert len(set(strategies)) == run.candidates
    chosen = (run.num_stages, run.num_micro_batches, run.batch_per_device, run.recomputation)
    assert chosen in {(s.num_stages, s.num_micro_batches, s.batch_per_device, s.recomputation) for s in strategies}


def test_even_stages_hold_as_many_blocks_each() -> None:
    stages = even_stages(40, 8, "full")
    assert [len(stage.blocks(42)) for stage in stages] == [5] * 8
    assert (stages[0].first_segment, stages[-1].last_segment) == (0, 41)


def test_slope_is_the_power() -> None:
    assert slope([(x, 3 * x**1.5) for x in (1, 2, 8, 100)]) == pytest.approx(1.5)
