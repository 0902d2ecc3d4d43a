"""Plans on disk: the same bytes every time, and every broken file refused with a place and a remedy."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from autoparallel.errors import AutoParallelError, ConfigError, PlanFormatError, PlanMismatchError
from autoparallel.plans.plan import Plan
from autoparallel.plans.strategy import StagePlan
from tests import plans

GOOD: dict[str, Any] = json.loads(plans.sample_plan().to_json())


def edited(path: str, value: Any) -> str:
    """The sample plan as JSON with one field, named by a dotted path, replaced or added."""
    tree = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    node = tree
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return json.dumps(tree)


def load_error(tmp_path: Path, content: str | bytes) -> AutoParallelError:
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    start = time.monotonic()
    with pytest.raises(AutoParallelError) as caught:
        Plan.load(path)
    assert time.monotonic() - start < 5.0
    return caught.value


def test_saved_plan_loads_equal_with_stable_bytes(tmp_path: Path) -> None:
    plan = plans.sample_plan()
    plan.save(tmp_path / "a.json")
    loaded = Plan.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    assert loaded == plan
    assert loaded.hash() == plan.hash()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json").read_text().endswith("}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_bytes_do_not_depend_on_the_hash_seed() -> None:
    code = "from tests import plans; print(plans.sample_plan().hash())"
    root = Path(__file__).parent.parent
    hashes = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=True
        )
        hashes.append(done.stdout)
    assert hashes[0] == hashes[1] != b""


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(ConfigError, match="No space left"):
        plans.sample_plan().save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert path.read_text() == "old"
    with pytest.raises(ConfigError, match="cannot be written"):
        plans.sample_plan().save(tmp_path / "missing" / "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty (byte 0)"),
        ("  \n", "empty (byte 0)"),
        ("\ufeff{}", "byte order mark at byte 0"),
        ("[1]", "JSON list, not an object"),
        ("3", "JSON int, not an object"),
        (json.dumps(GOOD)[:100], "at byte"),
        ('{"a": 1,}', "at byte 8"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ('{"a": 1, "a": 2}', "the key 'a' appears twice in one object at byte 9 (line 1, column 10)"),
        (
            '{"b": [{"a": ":"}, {"a": {"a": 1}, \n "a": 2}]}',
            "the key 'a' appears twice in one object at byte 37 (line 2",
        ),
        ('{"x": ' + "[" * 5000 + "]" * 5000 + "}", "nested more than 100 deep at byte 105"),
        ('{"x": ' + "[" * 300 + "]" * 300 + "}", "recursion limit exceeded at line 1"),
        ('{"x": ' + "9" * 5000 + "}", "an integer of 5000 digits at byte 6"),
        ('{"schema_version": "1.0", "dtype": "\\ud800"}', "hex escape at line 1 column 43"),
        (pickle.dumps({"a": 1}), "pickle at byte 0"),
        (b"PK\x03\x04rest", "zip archive"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_not_json_is_refused_with_its_place(tmp_path: Path, content: str | bytes, message: str) -> None:
    error = load_error(tmp_path, content)
    assert isinstance(error, PlanFormatError)
    assert message in str(error)
    assert "plan.json" in str(error)
    assert error.exit_code == 2
    assert len(str(error).splitlines()) == 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("estimate.mfu", float("nan"), "estimate.mfu: Input should be a finite number"),
        ("estimate.step_time_s", float("inf"), "estimate.step_time_s: Input should be a finite number"),
        ("estimate.step_time_s", -1.0, "estimate.step_time_s: negative"),
        ("estimate.stages.1.memory_parts_bytes.reserve", -1, "estimate.stages[1].memory_parts_bytes.reserve: negative"),
        ("estimate.stages.0.parameters", 1.5, "estimate.stages[0].parameters: "),
        ("estimate.stages.0.memory_parts_bytes.reserve", "1", "estimate.stages[0].memory_parts_bytes.reserve: "),
        ("batch_size", "16", "batch_size: Input should be a valid integer"),
        ("constraints.num_stages", 1.5, "constraints.num_stages: "),
        ("flavor.num_devices", 0, "flavor.num_devices: "),
        ("strategy.stages.0.first_segmnt", 0, "strategy.stages[0].first_segmnt: unknown field, did you mean"),
        ("strategy.stages.0.recomputation", "half", "strategy.stages[0].recomputation: "),
        ("strategy.stages.0.recomputation", ["full", "half"], "strategy.stages[0].recomputation: "),
        ("strategy.stages.0.recomputation", [], "strategy.stages[0].recomputation: "),
        ("batch_sise", 1, "batch_sise: unknown field, did you mean 'batch_size'?"),
        ("estimate.breakdown_s.bubbles", 0.0, "did you mean 'bubble'?"),
        ("candidates.0.rejection", None, ""),
        ("candidates.0.estimate", None, "candidates[0]: it must have either"),
        ("schema_version", "2.0", "newer autoparallel (schema 2.0"),
        ("schema_version", "0.9", "older than any released"),
        ("schema_version", 1, "schema_version: expected a version"),
        ("schema_version", "1.x", "schema_version: expected a version"),
        ("batch_size", 32, "= 16, not 32"),
        ("strategy.data_parallel", 4, "= 8, not 4"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    content = edited(path, value)
    if not message:  # an explicit null is the default
        (tmp_path / "plan.json").write_text(content)
        assert Plan.load(tmp_path / "plan.json") == plans.sample_plan()
        return
    error = load_error(tmp_path, content)
    assert isinstance(error, PlanFormatError)
    assert message in str(error)


def test_float_overflow_and_missing_field(tmp_path: Path) -> None:
    overflow = edited("estimate.mfu", "@").replace('"@"', "1e999")
    assert "estimate.mfu: Input should be a finite" in str(load_error(tmp_path, overflow))
    without = {key: value for key, value in GOOD.items() if key != "precision"}
    assert "precision: Field required" in str(load_error(tmp_path, json.dumps(without)))


def test_a_newer_minor_schema_loads_unless_it_says_something_new(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(edited("schema_version", "1.7"))
    assert Plan.load(path).schema_version == "1.7"
    newer = json.loads(edited("schema_version", "1.7")) | {"expert_map": 1}
    assert "newer version 1.7" in str(load_error(tmp_path, json.dumps(newer)))


def test_unreadable_paths_and_the_size_limit(tmp_path: Path) -> None:
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(200 * 2**20)
    for path, message in ((big, "64 MiB"), (tmp_path, "directory"), (tmp_path / "none.json", "cannot be read")):
        with pytest.raises(PlanFormatError, match=message):
            Plan.load(path)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    for protocol in (0, 2, 5):
        load_error(tmp_path, pickle.dumps(Evil(), protocol=protocol))
    assert not canary.exists()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), min_size=2, max_size=2))
def test_only_contiguous_stage_ranges_make_a_plan(ranges: list[tuple[int, int]]) -> None:
    stages = tuple(StagePlan(first_segment=a, last_segment=b, recomputation="none") for a, b in ranges)
    (a, b), (c, d) = ranges
    good = a == 0 <= b and c == b + 1 <= d == plans.NUM_BLOCKS + 1
    chosen = plans.strategy().model_copy(update={"stages": stages})
    if good:
        assert plans.sample_plan(strategy=chosen).strategy.stages == stages
    else:
        with pytest.raises(PlanMismatchError) as caught:
            plans.sample_plan(strategy=chosen)
        assert caught.value.exit_code == 4


def with_recomputation(*stages: Any, **changes: Any) -> Plan:
    """The sample plan, its two stages of four blocks recomputed as given."""
    chosen = plans.with_stages(plans.strategy(**{"recomputation": "full", "least_recomputation": "none", **changes}))
    assert chosen.stages is not None
    found = (
        StagePlan(first_segment=plan.first_segment, last_segment=plan.last_segment, recomputation=recomputation)
        for plan, recomputation in zip(chosen.stages, stages, strict=True)
    )
    return plans.sample_plan(strategy=chosen.model_copy(update={"stages": tuple(found)}))


MIXED = ("full", "selective", "none", "none")


def test_mixed_recomputation_survives_a_file(tmp_path: Path) -> None:
    plan = with_recomputation(MIXED, "selective")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert "1 full, 1 selective, 2 none" in plan.explain()


def test_blocks_that_agree_are_one_name() -> None:
    assert with_recomputation(("full",) * 4, MIXED) == with_recomputation("full", MIXED)
    assert with_recomputation(("full",) * 4, MIXED).to_json() == with_recomputation("full", MIXED).to_json()


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        ((MIXED[:3], "none"), {}, r"stages\[0\]\.recomputation: 3 names for 4 blocks"),
        (("none", (*MIXED, "none")), {}, r"stages\[1\]\.recomputation: 5 names for 4 blocks"),
        (("none", MIXED), {"recomputation": "selective"}, r"stages\[1\]\.recomputation: full is not in none to sel"),
        ((MIXED, "full"), {"least_recomputation": "selective"}, r"stages\[0\]\.recomputation: none is not in sel"),
        (("full", "none"), {"least_recomputation": None}, r"stages\[1\]\.recomputation: none is not in full"),
    ],
)
def test_recomputation_must_fit_its_blocks_and_the_strategy(stages: Any, changes: Any, message: str) -> None:
    with pytest.raises(PlanMismatchError, match=message):
        with_recomputation(*stages, **changes)


def test_a_least_recomputation_is_less() -> None:
    with pytest.raises(ValueError, match="not less"):
        plans.strategy(recomputation="selective", least_recomputation="full")


def test_stage_count_must_match() -> None:
    with pytest.raises(PlanMismatchError, match="2 stages are announced"):
        plans.sample_plan(strategy=plans.strategy())
    with pytest.raises(PlanMismatchError, match=r"estimate\.stages 1"):
        plans.sample_plan(estimate=plans.estimate(1, step_time_s=0.5))
    interleaved = plans.strategy(schedule="interleaved", virtual_stages=2)
    with pytest.raises(PlanMismatchError, match="4 stages are announced, on 2 pipeline ranks"):
        plans.sample_plan(strategy=plans.with_stages(interleaved))


@pytest.mark.parametrize(
    "changes", [{"schedule": "interleaved"}, {"virtual_stages": 2}, {"virtual_stages": 2, "schedule": "zero_bubble"}]
)
def test_virtual_stages_are_interleaved(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="interleaved, and nothing else"):
        plans.strategy(**changes)
    with pytest.raises(ValidationError, match="interleaved, and nothing else"):
        plans.strategy(1, data_parallel=4, schedule="interleaved", virtual_stages=2)


def test_a_plan_knows_its_model_and_cluster() -> None:
    plan = plans.sample_plan()
    plan.check_matches(fingerprint="ab" * 32, num_devices=4)
    plan.check_matches()
    with pytest.raises(PlanMismatchError, match="another model"):
        plan.check_matches(fingerprint="cd" * 32)
    with pytest.raises(PlanMismatchError, match="for 4 devices") as caught:
        plan.check_matches(num_devices=2)
    assert caught.value.exit_code == 4
