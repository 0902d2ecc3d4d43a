"""Questions around a plan: answers in the order of their cost, one capture for all, and reasons with amounts."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import autoparallel as ap
from autoparallel import api
from autoparallel.cli import app
from autoparallel.cost.memory import capacity_bytes
from autoparallel.errors import ConfigError, PlanMismatchError
from autoparallel.plans.plan import Remembered
from autoparallel.plans.words import in_words, narrowed, parse_constraints
from autoparallel.questions import FlavorAnswer, ScaleAnswer
from autoparallel.report.compare import scaling_text, which_text
from autoparallel.report.text import WIDTH
from tests import plans
from tests.families import FAMILIES, make_model
from tests.workloads import GIB, gpus, workload

SMALL = ap.Constraints(num_micro_batches=1, pipeline_parallel=False)
SIZES: dict[str, Any] = {"batch_size": 8, "seq_len": 32, "constraints": SMALL, "workers": 0}
FLAVORS = ["2xH100-SXM5-80GB", "2xL4", "3xL4", "cpu:2"]


@pytest.fixture(scope="module")
def config() -> Any:
    return FAMILIES["llama"]()


def test_which_flavor_orders_by_cost_and_captures_once_a_precision(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[str] = []
    capture = api._capture
    monkeypatch.setattr(api, "_capture", lambda m, p: captured.append(p.compute_dtype) or capture(m, p))
    rows = ap.which_flavor(config, FLAVORS, **SIZES)
    assert sorted(captured) == ["bfloat16", "float32"]
    assert [row.fits for row in rows] == [True, True, True, False]
    assert (rows[-1].flavor, rows[-1].step_time_s) == ("3xL4", None)
    assert "3" in rows[-1].reason
    hours = [row.device_hours_per_step for row in rows[:-1] if row.device_hours_per_step]
    assert hours == sorted(hours)
    first = rows[0]
    assert first.step_time_s == ap.plan(config, first.flavor, **SIZES).estimate.step_time_s
    assert hours[0] == pytest.approx(first.num_devices * first.step_time_s / 3600)
    assert first.device_hours_per_billion_tokens == pytest.approx(hours[0] * 1e9 / (8 * 32))


def test_prices_decide_where_they_are_given(config: Any) -> None:
    asked = ["2xH100-SXM5-80GB", "2xL4"]
    dear = ap.which_flavor(config, asked, **SIZES, prices={"h100-sxm5-80gb": 1000.0, "2xL4": 1.0})
    assert [row.flavor for row in dear] == ["2xL4", "2xH100-SXM5-80GB"]
    assert dear[0].price_per_billion_tokens == pytest.approx(dear[0].device_hours_per_billion_tokens)
    one = ap.which_flavor(config, asked, **SIZES, prices={"L4": 1000.0})
    assert [(row.flavor, row.price_per_billion_tokens is None) for row in one] == [
        ("2xL4", False),
        ("2xH100-SXM5-80GB", True),
    ]
    with pytest.raises(ConfigError, match=r"(?s)'H100-SXM4'.*did you mean .*H100-SXM5-80GB"):
        ap.which_flavor(config, asked, **SIZES, prices={"H100-SXM4": 1.0})
    with pytest.raises(ConfigError, match="-1 is no price"):
        ap.which_flavor(config, asked, **SIZES, prices={"L4": -1})


def test_a_question_that_no_flavor_can_be_asked_is_an_error(config: Any) -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'int4'"):
        ap.which_flavor(config, ["2xL4", "cpu:2"], **SIZES, dtype="int4")
    with pytest.raises(ConfigError, match="unknown flavor"):
        ap.which_flavor(config, ["2xL44444"], **SIZES)


def test_scaling_is_strong_or_weak_and_against_the_smallest(config: Any) -> None:
    options = {"seq_len": 32, "constraints": SMALL, "workers": 0}
    rows = ap.scaling(config, "8xH100-SXM5-80GB", (16, 2, 1), batch_size=16, **options)
    assert [(row.flavor, row.num_hosts) for row in rows] == [
        ("1xH100-SXM5-80GB", 1),
        ("2xH100-SXM5-80GB", 1),
        ("2x8xH100-SXM5-80GB", 2),
    ]
    assert rows[0].efficiency == 1.0
    for row in rows:
        speed = row.tokens_per_second / row.num_devices
        assert row.efficiency == pytest.approx(speed / rows[0].tokens_per_second)
        assert row.batch_size == 16
    assert rows[2].step_time_s == ap.plan(config, rows[2].flavor, batch_size=16, **options).estimate.step_time_s
    weak = ap.scaling(config, "cpu:1", (1, 2), rows_per_device=4, **options)
    assert [(row.flavor, row.batch_size) for row in weak] == [("cpu:1", 4), ("cpu:2", 8)]
    for sizes in ({}, {"batch_size": 4, "rows_per_device": 4}):
        with pytest.raises(ConfigError, match="needs a batch"):
            ap.scaling(config, "cpu:1", (1,), **sizes, **options)
    with pytest.raises(ConfigError, match="0 devices"):
        ap.scaling(config, "cpu:1", (0,), batch_size=4, **options)


@pytest.fixture(scope="module")
def plan(config: Any) -> ap.Plan:
    options = {**SIZES, "constraints": ap.Constraints(num_micro_batches=1, memory_gib=40.0)}
    return ap.plan(config, "2xH100-SXM5-80GB", **options)


def test_why_not_shows_the_best_of_the_subspace_term_by_term(plan: ap.Plan, config: Any, tmp_path: Path) -> None:
    assert plan.strategy.tensor_parallel == 1
    text = plan.explain(why_not=ap.Constraints(tensor_parallel=2))
    assert text.startswith("Why not tensor_parallel=2\n")
    asked = ap.Constraints(num_micro_batches=1, memory_gib=40.0, tensor_parallel=2)
    there = ap.plan(config, "2xH100-SXM5-80GB", **{**SIZES, "constraints": asked})
    assert there.strategy.summary()[:60] in text
    terms, chosen = (p.estimate.breakdown_s.model_dump() for p in (there, plan))
    worst = max(terms, key=lambda name: terms[name] - chosen[name])
    assert f"it loses most in {worst}\n" in text
    change = 100 * (there.estimate.step_time_s / plan.estimate.step_time_s - 1)
    assert f"({change:+.1f} %)" in text
    assert re.search(r"tp_comm +0\.0 us +\S+ us +\+\S+ us", text)
    assert plan.explain(why_not={"tensor_parallel": 2}) == plan.explain(why_not="tensor-parallel=2") == text
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = ap.Plan.load(path)
    with pytest.raises(ConfigError, match=r"(?s)loaded from a file.*--model"):
        loaded.explain(why_not="tensor_parallel=2")
    assert loaded.explain(why_not="tensor_parallel=2", model=config) == text
    with pytest.raises(PlanMismatchError, match="another model"):
        loaded.explain(why_not="tensor_parallel=2", model=FAMILIES["gpt2"]())
    config.save_pretrained(tmp_path / "model")
    words = ["explain", str(path), "--why-not", "tensor_parallel=2", "--model", str(tmp_path / "model")]
    assert CliRunner().invoke(app, words).stdout == text
    assert CliRunner().invoke(app, [*words, "--json"]).exit_code == 2


def test_why_not_says_what_is_impossible_and_what_is_the_plan_itself(plan: ap.Plan) -> None:
    text = plan.explain(why_not="memory_gib=0.5")
    assert "Nothing there is possible." in text
    assert re.search(r"lacks \d+\.\d\d GiB per device", text)
    assert "Nothing there is possible." in plan.explain(why_not="data_parallel=3")
    assert "It is the plan itself." in plan.explain(why_not="tensor_parallel=1")
    with pytest.raises(ConfigError, match="nothing to ask for"):
        plan.explain(why_not=ap.Constraints())


def test_what_a_plan_remembers_is_neither_compared_nor_kept(plan: ap.Plan) -> None:
    assert plan.remembered is not None
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert pickle.loads(pickle.dumps(plan)).remembered is None
    assert "remembered" not in plan.to_json()
    model = make_model("llama")
    remembered = Remembered(model)
    assert remembered.model is model
    del model
    assert remembered.model is None


def test_a_plan_from_the_cache_remembers_its_model(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path))
    texts = [ap.plan(config, "cpu:2", **SIZES).explain(why_not="tensor_parallel=1") for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_limit_in_gib_is_what_a_plan_may_use(config: Any) -> None:
    flavor = gpus(1, memory_bytes=80 * GIB)
    for constraints, usable in (
        (ap.Constraints(memory_gib=40.0), 40),
        (ap.Constraints(memory_gib=70.0), 64),
        (ap.Constraints(memory_gib=70.0, memory_ratio=0.9), 70),
        (ap.Constraints(), 64),
    ):
        ratio = constraints.usable_ratio(flavor.memory_bytes)
        assert capacity_bytes(workload(flavor, memory_ratio=ratio)) == pytest.approx(usable * GIB, abs=1)
    plan = ap.plan(config, "1xL4", **{**SIZES, "constraints": ap.Constraints(num_micro_batches=1, memory_gib=2.5)})
    assert plan.estimate.stages[0].peak_memory_bytes <= 2.5 * GIB
    assert "of which 2.5 may be used" in plan.explain()


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("tensor_parallel=8, schedule=1f1b", {"tensor_parallel": 8, "schedule": "1f1b"}),
        ("distribute-parameter=1", {"distribute_parameter": 1}),
        ("distribute_parameter=True", {"distribute_parameter": True}),
        ("mesh_order=tp dp pp", {"mesh_order": ("tp", "dp", "pp")}),
        ("memory_gib=40", {"memory_gib": 40.0}),
    ],
)
def test_constraints_as_words(words: str, values: dict[str, Any]) -> None:
    parsed = parse_constraints(words)
    assert parsed == ap.Constraints(**values)
    assert parse_constraints(in_words(parsed)) == parsed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tensor_paralel=8", "did you mean 'tensor_parallel'"),
        ("tensor_parallel=eight", "valid integer"),
        ("memory_gib=0", "more than 0 GiB"),
        ("schedule=1f2b", "'1f1b'"),
        ("tensor_parallel", "NAME=VALUE"),
    ],
)
def test_constraints_that_are_none(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_constraints(words)


def test_further_constraints_leave_the_others() -> None:
    first = ap.Constraints(memory_ratio=0.5, num_stages=2)
    assert narrowed(first, ap.Constraints(num_stages=4)) == ap.Constraints(memory_ratio=0.5, num_stages=4)


def test_every_constraint_is_an_option_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ap.Constraints] = []

    def planned(*_: Any, constraints: ap.Constraints, **__: Any) -> ap.Plan:
        asked.append(constraints)
        return plans.sample_plan()

    monkeypatch.setattr(api, "plan", planned)
    values = {
        "pipeline_parallel": False, "num_stages": 1, "num_micro_batches": 2, "batch_per_device": 2, "memory_gib": 40.0,
        "tensor_parallel": 1, "data_parallel": 2, "sequence_parallel": False, "schedule": "gpipe", "memory_ratio": 0.5,
        "activation_recomputation": "full", "distribute_parameter": 3, "shard_group_size": 2, "mixed_precision": False,
        "mesh_order": ("dp", "pp", "tp"),
    }  # fmt: skip
    assert values.keys() == ap.Constraints.model_fields.keys()
    given = ap.Constraints(**values)
    words = [
        w
        for pair in in_words(given).split(", ")
        for w in (f"--{pair.split('=')[0].replace('_', '-')}", pair.split("=")[1])
    ]
    done = CliRunner().invoke(app, ["plan", "m", "--flavor", "f", "--batch-size", "1", "--seq-len", "1", *words])
    assert (done.exit_code, asked) == (0, [given])
    wrong = CliRunner().invoke(
        app, ["plan", "m", "--flavor", "f", "--batch-size", "1", "--seq-len", "1", "--num-stages", "x"]
    )
    assert (wrong.exit_code, len(asked)) == (2, 1)


def test_which_and_scale_on_the_command_line(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPARALLEL_WORKERS", "0")
    config.save_pretrained(tmp_path)
    rows = ["--seq-len", "32", "--num-micro-batches", "1", "--pipeline-parallel", "false", "--json"]
    which = ["which", str(tmp_path), "--flavor", "2xL4", "--flavor", "cpu:1", "--price", "L4=2.5", "--batch-size", "8"]
    answers = [FlavorAnswer.model_validate(row) for row in _json(which + rows)]
    sizes = {**SIZES, "prices": {"L4": 2.5}}
    assert answers == ap.which_flavor(str(tmp_path), ["2xL4", "cpu:1"], **sizes)
    scale = ["scale", str(tmp_path), "--flavor", "L4", "--devices", "1,2", "--rows-per-device", "4"]
    assert [row["num_devices"] for row in _json(scale + rows)] == [1, 2]
    assert CliRunner().invoke(app, [*which, *rows, "--price", "L4"]).exit_code == 2
    assert CliRunner().invoke(app, [*scale, *rows, "--devices", "1,b"]).exit_code == 2


def _json(words: list[str]) -> Any:
    return json.loads(CliRunner().invoke(app, words).stdout)


FACTS: dict[str, Any] = {
    "flavor": "8xA", "device": "A", "num_devices": 8, "num_hosts": 1, "strategy": "No PP", "step_time_s": 2.0,
    "tokens_per_second": 1e6, "mfu": 0.5, "gap": 0.001,
}  # fmt: skip


def test_tables_fit_and_say_the_answer_first() -> None:
    costs = {"device_hours_per_step": 0.01, "device_hours_per_billion_tokens": 123456.7}
    rows = [
        FlavorAnswer(**FACTS, **costs, price_per_billion_tokens=1234567.8),
        FlavorAnswer(**{**FACTS, "flavor": "12xLarge.6144GB"}, **costs),
        FlavorAnswer(flavor="B\x1b[31m", device="B", num_devices=1, num_hosts=1, reason="lacks 3.00 GiB"),
    ]
    text = which_text(rows)
    assert text.startswith("8xA takes the least money (predicted): No PP\n")
    assert "1,234,567.80" in text
    assert "B[31m: lacks 3.00 GiB" in text
    assert which_text(rows[1:]).startswith("12xLarge.6144GB takes the fewest device-hours")
    assert which_text(rows[2:]).startswith("No flavor can.")
    scaled = [ScaleAnswer(**FACTS, batch_size=64, efficiency=1.0), ScaleAnswer(**FACTS, batch_size=64, efficiency=0.5)]
    bars = [line.count("#") for line in scaling_text(scaled).splitlines() if "#" in line]
    assert bars == [20, 10]
    assert max(map(len, (text + scaling_text(scaled)).splitlines())) <= WIDTH
