"""The arithmetic of the accuracy report, on hand-made runs whose figures are known."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from autoparallel.cost.tables import CostTable, load_table
from autoparallel.errors import ConfigError
from autoparallel.plans.estimate import Breakdown, Estimate, StageEstimate
from benchmarks.accuracy import PUBLISHED, main, score_runs
from benchmarks.published.question import Question, question_of
from benchmarks.published.rows import Run, read_runs
from benchmarks.scores import memory
from benchmarks.scores.answers import Answer, answer, answer_all, timed
from benchmarks.scores.baseline import Baseline, Sample, _best_rate, work
from benchmarks.scores.errors import average, score, spread
from benchmarks.scores.held_out import tables_without, with_figures
from benchmarks.scores.layouts import Family, Member, choice, families, repeated
from benchmarks.scores.price import price
from benchmarks.scores.ratios import ratios
from benchmarks.scores.report import as_json, report_of
from benchmarks.scores.tables import print_report
from tests.test_published import GPT, ROW

GIB = 2**30
RATE = 1.5e14


def estimate(seconds: float, *, peak_gib: float = 40.0) -> Estimate:
    parts = dict.fromkeys(Breakdown.model_fields, 0.0) | {"compute": seconds}
    held = {"parameters": 10, "gradients": 5, "optimizer": 5, "activations": 20}
    stage = StageEstimate(
        forward_s=seconds / 3,
        backward_s=seconds * 2 / 3,
        parameters=1,
        peak_memory_bytes=int(peak_gib * GIB),
        memory_parts_bytes={name: size * GIB for name, size in held.items()},
    )
    return Estimate(
        step_time_s=seconds, tokens_per_second=1.0, mfu=0.5, breakdown_s=Breakdown(**parts), stages=(stage,)
    )


def constant_rate(question: Question, table: CostTable | None = None) -> Estimate:
    """A stand-in for the cost model: the baseline itself at one rate, a tenth slower by another table."""
    return estimate(work(question) / RATE * (1.1 if table is not None else 1.0))


def run(**changes: Any) -> Run:
    return Run.model_validate({**ROW, **changes})


def from_(source: str, **changes: Any) -> Run:
    return run(source={"name": source}, **changes)


def test_a_source_counts_once_however_many_rows_it_has() -> None:
    scores = [score([0.1] * 98 + [-0.1, 0.3]), score([-0.5])]
    found = average(scores)
    assert found is not None
    assert scores[0].mean == pytest.approx(0.102)
    assert (scores[0].median, scores[0].bias, scores[0].worst) == pytest.approx((0.1, 0.1, 0.3))
    assert (found.mean, found.worst, found.bias) == pytest.approx((0.301, 0.5, -0.2))
    assert average([]) is None


def test_fp16_runs_at_the_rate_of_fp16() -> None:
    """A V100 computes bf16 in fp32, eight times slower."""
    v100 = {"gpu": {"name": "V100-SXM2-32GB"}, "tp": 1, "pp": 1, "n_gpus": 8, "model": GPT, "recompute": "full"}
    half, brain = (price(question_of(run(**v100, precision=dtype))).step_time_s for dtype in ("fp16", "bf16"))
    assert half < brain / 3


def test_the_floor_is_the_spread_of_identical_runs() -> None:
    assert spread([1.0, 1.0]) == 0
    assert spread([0.9, 1.1]) == pytest.approx(0.1)
    twice = [run(id=str(i), measured={"iter_s": time_s}) for i, time_s in enumerate((2.0, 3.0))]
    other = run(micro_batch=1, repeats=[{"iter_s": 2.5}, {"tokens_per_s_per_gpu": 64 * 4096 / 16 / 4}])
    groups = repeated(timed(answer_all([*twice, other], price=constant_rate)))
    assert [sorted(group) for group in groups] == [[2.0, 3.0], [2.0, 2.5, 4.0]]


def test_the_baseline_is_exact_where_the_rate_is_constant() -> None:
    rows = []
    for changes in ({}, {"pp": 4, "tp": 1}, {"micro_batch": 1}, {"global_batch": 256}):
        seconds = work(timed(answer_all([run(**changes)], price=constant_rate))[0].question) / RATE
        rows.append(run(**changes, measured={"iter_s": seconds}))
    answered = timed(answer_all(rows, price=constant_rate))
    baseline = Baseline(answered)
    assert [baseline.step_time_s(row.question) for row in answered] == pytest.approx([r.measured_s for r in answered])
    few, many = answered[0].question, answered[3].question
    assert work(few) / 64 > work(many) / 256  # two stages: a bubble of 1/8 of the step against 1/32
    assert (work(few) / 64) / (work(many) / 256) == pytest.approx((1 + 1 / 8) / (1 + 1 / 32))


def test_the_baseline_without_a_source_falls_back_to_what_is_alike() -> None:
    rows = [
        from_("a", measured={"iter_s": 1.0}),
        from_("b", measured={"iter_s": 2.0}, recompute="full"),
        from_("c", measured={"iter_s": 4.0}, gpu={"name": "H100", "memory_gb": 80}),
    ]
    answered = timed(answer_all(rows, price=constant_rate))
    baseline, first, third = Baseline(answered), answered[0].question, answered[2].question
    assert baseline.step_time_s(first) == pytest.approx(1.0)
    assert baseline.step_time_s(first, without="a") == pytest.approx(2.0)  # the same GPU, recomputing
    share = load_table("A100-SXM4-80GB").peak_flops_per_s["bfloat16"].value
    by_share = baseline.step_time_s(third, without="c")
    assert by_share is not None
    peak = load_table("H100-SXM5-80GB").peak_flops_per_s["bfloat16"].value
    assert by_share * peak / share in (pytest.approx(1.0), pytest.approx(2.0))
    assert Baseline(answered[:1]).step_time_s(first, without="a") is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(1.0, 10.0)), min_size=1, max_size=12))
def test_the_fitted_rate_has_the_least_error(samples: list[tuple[str, float]]) -> None:
    rows = [Sample(source=source, keys=(), rate=rate) for source, rate in samples]
    weights = {source: 1 / sum(s == source for s, _ in samples) for source, _ in samples}

    def cost(rate: float) -> float:
        return sum(weights[source] * abs(own / rate - 1) for source, own in samples)

    best = cost(_best_rate(rows))
    assert all(best <= cost(rate) + 1e-9 for _, rate in samples)
    assert all(best <= cost(0.5 + i / 10) + 1e-9 for i in range(100))


def member(measured_s: float, predicted_s: float, *, parallel: int = 1, micro_batch: int = 1) -> Member:
    return Member((f"{measured_s}",), measured_s, predicted_s, parallel, micro_batch)


def test_regret_and_order_by_hand() -> None:
    right = Family("right", (member(1.0, 5.0, parallel=8), member(1.5, 6.0), member(1.02, 5.5, parallel=4)))
    assert (right.ours, right.rule) == pytest.approx((0.0, 0.5))
    assert right.random == pytest.approx((1.0 + 1.5 + 1.02) / 3 - 1)
    assert right.pairs() == (2, 2)  # 1.0 and 1.02 are too close to count
    wrong = Family("wrong", (member(1.0, 2.0, micro_batch=4), member(1.2, 1.0)))
    assert (wrong.ours, wrong.rule, wrong.pairs()) == (pytest.approx(0.2), 0.0, (1, 0))
    tied = Family("tied", (member(1.0, 1.0), member(1.4, 1.0)))
    assert tied.ours == pytest.approx(0.2)
    every, large = choice([right, wrong], at_least=2), choice([right, wrong], at_least=3)
    assert every is not None
    assert large is not None
    assert (every.ours, every.ours_worst, every.pairs, every.ordered) == (pytest.approx(0.1), pytest.approx(0.2), 3, 2)
    assert (large.families, large.runs, large.ours) == (1, 3, 0.0)
    assert choice([wrong], at_least=3) is None


def test_families_differ_in_their_layout_only() -> None:
    layouts = [run(id="a"), run(id="b", tp=1), run(id="c", micro_batch=1), run(id="d", recompute="full"), run(id="a2")]
    others = [
        from_("another"),
        run(n_gpus=8),
        run(global_batch=128),
        run(precision="fp16"),
        run(framework="NeMo"),
        run(model={**ROW["model"], "layers": 30}),
    ]
    (family,) = families(timed(answer_all([*layouts, *others], price=constant_rate)))
    assert [one.ids for one in family.members] == [("a", "a2"), ("b",), ("c",), ("d",)]
    assert family.members[0].tensor_times_stages == 4


def test_no_row_stops_the_others() -> None:
    def failing(question: Question, table: CostTable | None = None) -> Estimate:
        if question.strategy.tensor_parallel == 1:
            raise ConfigError("not today", why="for no reason", remedy="none")
        if question.strategy.tensor_parallel == 4:
            raise ZeroDivisionError("oh")
        return constant_rate(question)

    rows = [run(tp=1), run(tp=2), run(tp=4), run(pp=None)]
    found = answer_all(rows, price=failing)
    assert [one.estimate is not None for one in found] == [False, True, False, False]
    assert "not today" in found[0].reason
    assert "ZeroDivisionError" in found[2].reason
    assert found[3].reason == "pp is not stated"
    report = report_of(found)
    assert (report.rows, report.expressed, sum(report.reasons.values())) == (4, 1, 3)


def test_the_held_out_time_is_by_the_table_without_the_source(tmp_path: Path) -> None:
    changes = {"a": {"A100-SXM4-80GB": {"network.efficiency": 0.5, "matmul_efficiency.default.points": [[1e9, 0.4]]}}}
    (tmp_path / "held_out.json").write_text(json.dumps(changes))
    without = tables_without(tmp_path / "held_out.json")
    assert without is not None
    table = without("A100-SXM4-80GB", "a")
    assert table is not None
    assert (table.network.efficiency.value, table.matmul_efficiency["default"].points) == (0.5, ((1e9, 0.4),))
    assert table.memory_bytes == load_table("A100-SXM4-80GB").memory_bytes
    assert without("A100-SXM4-80GB", "b") is None
    assert tables_without(tmp_path / "absent.json") is None
    own, other = answer_all([from_("a"), from_("b")], price=constant_rate, table_without=without)
    assert own.estimate is not None
    assert own.held_out_s == pytest.approx(1.1 * own.estimate.step_time_s)
    assert other.estimate is not None
    assert other.held_out_s == other.estimate.step_time_s
    with pytest.raises(KeyError):
        with_figures(table, {"no.such.figure": 1.0})


def memory_answer(peak_gib: float, **changes: Any) -> Answer:
    return answer(run(**changes), price=lambda question, table: estimate(1.0, peak_gib=peak_gib))


def test_memory_is_compared_with_what_rows_state() -> None:
    stated = {"peak_mem_gb": 50, "param_opt_mem_gib": 16, "activation_mem_gib": 25, "iter_s": 1.0}
    found = memory.amounts([memory_answer(40.0, measured=stated)])
    assert [(one.what, one.error) for one in found] == [
        ("peak", pytest.approx(-0.2)),
        ("parameters and states", pytest.approx(0.25)),
        ("activations", pytest.approx(-0.2)),
    ]
    (megabytes,) = memory.amounts([memory_answer(40.0, measured={"peak_mem_mb": 51200.0})])
    assert megabytes.error == pytest.approx(-0.2)


def test_both_wrong_verdicts_on_memory_are_counted() -> None:
    ran = [memory_answer(70.0, id="fits", micro_batch=1), memory_answer(90.0, id="does not", micro_batch=2)]
    oom = {"measured": {}, "outcome": "out of memory"}
    failed = [
        memory_answer(90.0, id="right", micro_batch=2, **oom),
        memory_answer(79.0, id="wrong", micro_batch=4, **oom),
    ]
    assert memory.ran([*ran, *failed]) == memory.Verdicts(2, ("does not",))
    assert memory.failed([*ran, *failed]) == memory.Verdicts(2, ("wrong",))
    # micro-batch 1 ran and 2 failed: right; 2 ran and 4 failed: wrong on both sides; 1 and 4 are two steps apart
    assert memory.boundary([*ran, *failed]) == (2, 1)


def test_the_report_accounts_for_every_row_and_is_plain_json() -> None:
    runs, unread = read_runs(PUBLISHED / "runs.json")
    report = score_runs(runs[::10], unread, price=constant_rate)
    assert report.expressed + sum(report.reasons.values()) == report.rows == len(runs[::10])
    found = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert len(found["rows"]) == report.rows
    assert all(row["reason"] or row["predicted_s"] > 0 for row in found["rows"])
    assert found["never_fitted"][0]["ours"]["rows"] == 401
    assert found["memory"]["ran"]["runs"] == 401 + sum(line["ours"]["rows"] for line in found["sources"])
    assert found["memory"]["boundary_pairs"]["pairs"] > 100
    assert found["over_sources"]["baseline"]["mean"] < found["over_sources"]["ours"]["mean"]
    assert {bar["name"] for bar in found["bars"]} >= {"rows expressed", "plan choice, pairs in order"}
    printed = StringIO()
    print_report(report, Console(file=printed, width=160))
    assert all(line.name[:20] in printed.getvalue() for line in report.sources)
    assert "Asked and found" in printed.getvalue()


def test_ratios_are_of_the_named_quantity() -> None:
    found = {ratio.what: ratio for ratio in ratios(PUBLISHED / "ratios.json", price=constant_rate)}
    assert all(ratio.reason == "" for ratio in found.values()), found
    assert found["full recomputation"].ours == pytest.approx(1.0)  # a constant rate knows no recomputation
    assert found["full recomputation"].measured == pytest.approx(1.39, abs=0.01)
    assert found["ZeRO-3, 768 GPUs over 384"].ours == pytest.approx(1.0)


def test_a_file_of_others_is_scored_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ROW, {**ROW, "id": "odd", "gpu": {"name": "Abacus"}}, {"id": "empty"}, 7, {**ROW, "quality": "poor"}]
    (tmp_path / "others.json").write_text(json.dumps({"runs": rows}))
    monkeypatch.setattr("benchmarks.accuracy.price", constant_rate)
    assert main(["--runs", str(tmp_path / "others.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows_total"], found["rows_expressed"], found["rows_unscored"]) == (4, 1, 1)
    assert sum(found["reasons"].values()) == 3
