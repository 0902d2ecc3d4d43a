"""The command line: pure JSON on stdout, one message and a documented exit code on failure, no torch to read a plan."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autoparallel.cli import app
from autoparallel.errors import ConfigError, NoFeasiblePlanError
from autoparallel.ir.flavor import Flavor
from autoparallel.plans.plan import Plan
from autoparallel.plans.strategy import Constraints
from tests import plans

ROOT = Path(__file__).parent.parent
PLAN_OPTIONS = ("--flavor", "4xTest", "--batch-size", "16", "--seq-len", "128")


def run(*words: str, **variables: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"AUTOPARALLEL_DEBUG": None} | variables)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    plans.sample_plan().save(path)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for the planner, and keep what it was asked."""
    questions: list[Any] = []

    def plan(model: str, flavor: str, **options: Any) -> Plan:
        questions.append((model, flavor, options))
        if flavor == "tiny":
            raise NoFeasiblePlanError("Nothing fits.", why="3.00 GiB short", remedy="take a larger flavor")
        return plans.sample_plan()

    api = types.ModuleType("autoparallel.api")
    api.plan = plan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "autoparallel.api", api)
    return questions


def test_explain_prints_text_or_json(saved: Path) -> None:
    assert run("explain", str(saved)).stdout == plans.sample_plan().explain()
    assert run("explain", str(saved), "--json").stdout == saved.read_text()


def test_plan_asks_explains_and_saves(asked: list[Any], tmp_path: Path) -> None:
    output = tmp_path / "new.json"
    done = run("plan", "some/model", *PLAN_OPTIONS, "-o", str(output))
    assert done.exit_code == 0
    assert asked == [
        ("some/model", "4xTest", {"batch_size": 16, "seq_len": 128, "dtype": "auto", "constraints": Constraints()})
    ]
    assert done.stdout == plans.sample_plan().explain()
    assert Plan.load(output) == plans.sample_plan()
    pure = run("plan", "some/model", *PLAN_OPTIONS, "--dtype", "float32", "--json")
    assert json.loads(pure.stdout)["model"]["name"] == "tiny-llama"
    assert asked[1][2]["dtype"] == "float32"


def test_an_unwritable_output_is_refused_before_the_search(asked: list[Any], tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "missing" / "plan.json"):
        done = run("plan", "some/model", *PLAN_OPTIONS, "-o", str(output))
        assert (done.exit_code, asked) == (2, [])
        assert "cannot be written" in done.stderr


def test_errors_are_messages_with_exit_codes(asked: list[Any], tmp_path: Path) -> None:
    missing = run("explain", str(tmp_path / "none.json"))
    assert missing.exit_code == 2
    assert missing.stderr.splitlines()[0].endswith("none.json cannot be read.")
    assert missing.stdout == ""
    infeasible = run("plan", "m", "--flavor", "tiny", "--batch-size", "16", "--seq-len", "128")
    assert infeasible.exit_code == 3
    assert infeasible.stderr == "Nothing fits.\n  why: 3.00 GiB short\n  try: take a larger flavor\n"
    assert run("plan", "m", "--flavor", "x", "--batch-size", "0", "--seq-len", "1").exit_code == 2
    assert run("nonsense").exit_code == 2


@pytest.mark.parametrize("words", [("--debug", "explain"), ("explain", "--debug")])
def test_debug_adds_the_traceback(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(*words, str(tmp_path / "none.json"))
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "Traceback" in run("explain", str(tmp_path / "none.json"), AUTOPARALLEL_DEBUG="1").stderr


def test_flavors_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str) -> Flavor:
        if name == "local":
            raise ConfigError("there is no cost table for this GPU")
        return plans.FLAVOR

    monkeypatch.setattr("autoparallel.cost.flavors.list_flavors", lambda: ["4xTest", "local"])
    monkeypatch.setattr("autoparallel.cost.flavors.resolve_flavor", resolve)
    rows = run("flavors").stdout.splitlines()
    assert rows == ["4xTest      4 x test-gpu, 1 host, 64 GiB", "local   there is no cost table for this GPU"]
    facts = json.loads(run("flavors", "--json").stdout)
    assert facts["4xTest"]["num_devices"] == 4
    assert "error" in facts["local"]


def test_env_is_for_pasting() -> None:
    done = run("env", "--json", AUTOPARALLEL_WORKERS="3")
    assert json.loads(done.stdout)["AUTOPARALLEL_WORKERS"] == "3"
    assert "torch" in run("env").stdout


def test_reading_plans_never_imports_torch(saved: Path) -> None:
    """In fresh processes, as `python -m autoparallel` runs."""
    code = (
        "import runpy, sys\n"
        "sys.argv[0] = 'autoparallel'\n"
        "try: runpy.run_module('autoparallel', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not [m for m in ('torch', 'transformers') if m in sys.modules]\n"
    )
    for words in (("--help",), ("explain", str(saved)), ("flavors",), ("env",)):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_a_closed_pipe_and_a_poor_encoding_are_no_errors(saved: Path) -> None:
    plan = plans.sample_plan()
    plans.sample_plan(model=plan.model.model_copy(update={"name": "模型"})).save(saved)
    explain = f"{sys.executable} -m autoparallel explain {saved}"
    done = subprocess.run(
        ["bash", "-c", f"PYTHONIOENCODING=latin-1 {explain} | head -n 1; exit 0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "Plan for ??\n"
    assert "Traceback" not in done.stderr
