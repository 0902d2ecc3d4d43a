"""What explain says, how wide, and that no name in a plan can steer a terminal."""

from __future__ import annotations

import re

import pytest

from autoparallel.ir.flavor import Flavor
from autoparallel.plans.candidate import Candidate
from autoparallel.plans.estimate import Rejection
from autoparallel.plans.strategy import StagePlan
from autoparallel.report.explain import explain
from autoparallel.report.text import WIDTH, clean
from tests import plans

TEXT = explain(plans.sample_plan())


def section(title: str) -> str:
    return next(part for part in TEXT.split("\n\n") if part.startswith(title))


def test_the_question_and_the_choice() -> None:
    assert "tiny-llama" in TEXT
    assert "4xTest: 4 x test-gpu in 1 host, 16.0 GiB each, of which 12.8 may be used" in TEXT
    assert "16 rows of 128 tokens a step, compute in bfloat16" in TEXT
    assert "of 8 candidates (5 possible)" in TEXT
    assert "predicted: 500.0 ms a step, 4,096 tokens/s, MFU 40.0 %" in TEXT


def test_stages_memory_and_breakdown() -> None:
    assert re.search(r"0  embedding, blocks 1-4 +10\.00 M +10\.0 ms +20\.0 ms", TEXT)
    assert re.search(r"1  blocks 5-8, head and loss", TEXT)
    assert re.search(r"1  10\.50 +82 % +0\.50 +1\.00 +1\.50 +2\.00 +2\.50 +3\.00", section("Predicted peak memory"))
    assert re.search(r"bubble +100\.0 ms +20\.0 %", section("Predicted step time"))


def test_runners_up_are_distinct_ordered_and_say_where_they_lose() -> None:
    rows = section("Why this one").splitlines()[2:]
    assert [re.findall(r"\d\.\d{3}", row) for row in rows] == [["1.000"], ["1.100"], ["1.200"], ["1.400"]]
    assert rows[0].endswith("nothing: a tie")
    assert rows[1].endswith("dp_comm +50.0 ms")
    assert rows[3].endswith("recompute +200.0 ms")


@pytest.mark.parametrize(
    ("choice", "row"),
    [
        ("stages", r"2 +none possible of 3"),
        ("micro-batches", r"8 of 1 rows +4 of 2 rows +600\.0 ms +\+20\.0 % +bubble"),
        ("recomputation", r"none +full +700\.0 ms +\+40\.0 % +recompute"),
        ("sharding", r"distribute_param 0 +distribute_param 1 +550\.0 ms +\+10\.0 % +dp_comm"),
        ("schedule", r"1f1b +gpipe +500\.0 ms"),
        ("tensor parallel", r"1 +none tried"),
    ],
)
def test_each_choice_shows_its_best_alternative(choice: str, row: str) -> None:
    assert re.search(rf"  {choice} +{row}", section("Each choice"))


def test_candidates_that_became_one_program_are_one_runner_up() -> None:
    """Where memory allows it, what might be recomputed is not."""
    chosen = plans.with_stages(plans.strategy())
    lenient = chosen.model_copy(update={"recomputation": "full", "least_recomputation": "none"})
    price = plans.estimate(2, step_time_s=0.5, bubble=0.1)
    candidates = tuple(Candidate(strategy=strategy, estimate=price) for strategy in (chosen, lenient))
    text = explain(plans.sample_plan(candidates=candidates))
    assert "No other candidate is possible." in text
    assert re.search(r"recomputation +none +the same programs", text)


def test_impossible_ones_are_grouped_with_amounts() -> None:
    text = section("Impossible")
    assert "2 by memory, 2.50 to 3.00 GiB short on a device; nearest: stage 1 does not fit" in text
    assert "1 by layers; nearest: 16 stages, 10 segments" in text


def test_assumed_figures_are_listed_and_everything_is_predicted() -> None:
    assert "- test-gpu: matrix_efficiency 0.6" in section("Assumed figures")
    assert "measured" not in TEXT.lower()
    assert TEXT.isascii()


def test_only_one_candidate_and_nothing_assumed() -> None:
    plan = plans.sample_plan(candidates=plans.candidates()[:1], assumptions=())
    text = plan.explain()
    assert "No other candidate is possible." in text
    assert "Impossible" not in text
    assert "Assumed" not in text


def test_equal_text_for_equal_plans() -> None:
    assert explain(plans.sample_plan()) == TEXT


def test_hostile_and_long_names_stay_inert_and_narrow() -> None:
    evil = "\x1b]0;owned\x07\x1b[31m\u202egnp.exe\r\nroot# " + "long" * 100
    sample = plans.sample_plan()
    flavor = Flavor(**sample.flavor.model_dump() | {"name": evil, "device": evil})
    rejected = Candidate(strategy=plans.strategy(4, data_parallel=1), rejection=Rejection(reason=evil, kind=evil))
    text = explain(
        plans.sample_plan(
            model=sample.model.model_copy(update={"name": evil, "architecture": evil}),
            flavor=flavor,
            candidates=(*sample.candidates, rejected),
            assumptions=(evil,),
        )
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert not any(line.startswith("root#") for line in text.splitlines())


def test_wide_numbers_stay_narrow() -> None:
    chosen = plans.strategy(1, data_parallel=4, num_micro_batches=4)
    wide = plans.strategy(
        128, data_parallel=1024, tensor_parallel=16, num_micro_batches=4096, recomputation="selective"
    )
    price = plans.estimate(1, step_time_s=5000.0, core_sharing=4999.0)
    candidates = (Candidate(strategy=wide, estimate=price),)
    one = plans.estimate(1, step_time_s=0.5)
    text = explain(plans.sample_plan(strategy=plans.with_stages(chosen), estimate=one, candidates=candidates))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert "core_sharing" in text
    assert "embedding, blocks 1-8, head and loss" in text


def test_a_rank_names_all_blocks_of_its_virtual_stages() -> None:
    chosen = plans.strategy(schedule="interleaved", virtual_stages=2)
    bounds = ((0, 2), (3, 4), (5, 5), (6, 9))
    stages = tuple(StagePlan(first_segment=a, last_segment=b, recomputation="none") for a, b in bounds)
    text = explain(plans.sample_plan(strategy=chosen.model_copy(update={"stages": stages})))
    assert "0  embedding, blocks 1-2, 5 " in text
    assert "1  blocks 3-4, 6-8, head and loss " in text
    assert "interleaved x 2" in text
    assert "virtual_stages : 2" in text


def test_groups_of_shards_and_the_order_of_the_mesh_are_named() -> None:
    order = ("dp", "pp", "tp")
    chosen = plans.strategy(data_parallel=4, num_micro_batches=4, distribute_param=3, shard_group_size=2)
    other = plans.strategy(data_parallel=4, num_micro_batches=4, distribute_param=3, mesh_order=order)
    candidates = tuple(
        Candidate(strategy=strategy, estimate=plans.estimate(2, step_time_s=step_time_s))
        for strategy, step_time_s in ((chosen, 0.5), (other, 0.6))
    )
    flavor = plans.FLAVOR.model_copy(update={"num_devices": 8, "devices_per_host": 8})
    text = explain(plans.sample_plan(flavor=flavor, strategy=plans.with_stages(chosen), candidates=candidates))
    assert "distribute_param : 3, shard_group_size : 2, schedule" in text
    assert re.search(r"sharding +distribute_param 3 over 2 +distribute_param 3 +600\.0 ms", text)
    assert re.search(r"mesh order +pp dp tp +dp pp tp +600\.0 ms", text)
    assert "shard 3, 1f1b, dp pp tp " in text
    assert "mesh order" not in TEXT


def test_clean_keeps_ordinary_letters() -> None:
    assert clean("Qwen2.5-7B-Instruct é 模型") == "Qwen2.5-7B-Instruct é 模型"
