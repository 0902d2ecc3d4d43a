"""What single-device users do, as short scripts: run plain and with the one line under several plans, they have the
same losses, norms, evaluations, files and final parameters.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import make_model

FAMILIES = {"trainer": "llama", "adapters": "llama", "shapes": "llama-tied", "dropout": "gpt2", "tuning": "llama"}
PIPELINED = {"num_stages": 2, "data_parallel": 1, "tensor_parallel": 1, "num_micro_batches": 2}
TENSOR_PARALLEL = {"pipeline_parallel": False, "data_parallel": 1, "tensor_parallel": 2}
SHARDED = {"pipeline_parallel": False, "data_parallel": 2, "tensor_parallel": 1, "distribute_parameter": 3}
PLANS = {
    "pipelined": ("cpu:2", PIPELINED),
    "tensor-parallel": ("cpu:2", TENSOR_PARALLEL),
    "sharded": ("cpu:2", SHARDED),
    "pipelined-sharded": (
        "cpu:4",
        {**PIPELINED, "data_parallel": 2, "num_micro_batches": 1, "distribute_parameter": 2},
    ),
    "pipelined-tensor-parallel": ("cpu:4", {**PIPELINED, "tensor_parallel": 2}),
    "sharded-over-four": ("cpu:4", {**SHARDED, "data_parallel": 4, "distribute_parameter": 1}),
}
LIMIT_S = 280


@dataclass(frozen=True)
class Run:
    """What a script left behind."""

    printed: Any
    state: dict[str, torch.Tensor]
    files: list[str]
    journal: list[str]
    """Lines that a callback has appended to a file."""


def start(models: Path, out: Path, *names: str, flavor: str = "", options: tuple[str, ...] = ()) -> Any:
    """Run scripts in one process, or one of each rank."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTOPARALLEL_")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"AUTOPARALLEL_FLAVOR": flavor} if flavor else {})
    pairs = [word for name in names for word in (name, str(models / FAMILIES[name]))]
    command = [sys.executable, str(Path(__file__).with_name("several.py")), *pairs, "--", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)


def results(done: Any, out: Path, *names: str) -> dict[str, Run]:
    assert done.returncode == 0, done.stderr[-4000:]
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    runs = {}
    for name, found in zip(names, printed, strict=True):
        folder = out / name
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        journal = [line for path in folder.glob("journal.txt") for line in path.read_text().splitlines()]
        runs[name] = Run(found, torch.load(folder / "state.pt", weights_only=True), files, journal)
    return runs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in set(FAMILIES.values()):
        make_model(family, dtype=torch.float32, num_hidden_layers=2).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def plain(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A script's results on one device."""
    made: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in made:
            out = tmp_path_factory.mktemp("plain")
            made.update(results(start(models, out, name), out, name))
        return made[name]

    return run


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Of nested lists and dicts, with where each stands."""
    if not isinstance(value, (list, dict)):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from numbers(item, f"{path}/{key}")


def check(found: Run, expected: Run) -> None:
    assert dict(numbers(found.printed)) == pytest.approx(dict(numbers(expected.printed)), rel=1e-4)
    assert found.files == expected.files
    assert found.journal == expected.journal
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        torch.testing.assert_close(found.state[name], value, rtol=1e-3, atol=2e-5)


def compare(models: Path, plain: Callable[[str], Run], out: Path, plan: str, *names: str, **more: Any) -> None:
    flavor, constraints = PLANS[plan]
    options = ("--plan", json.dumps(constraints), *more.get("options", ()))
    found = results(start(models, out, *names, flavor=flavor, options=options), out, *names)
    for name in names:
        check(found[name], plain(name))


ONCE_IN_CI = {"pipelined", "tensor-parallel", "sharded"}
"""A minute each on two cores; `make exhaustive` runs the others."""


@pytest.mark.parametrize(
    "plan", [pytest.param(p, marks=pytest.mark.slow if p in ONCE_IN_CI else pytest.mark.exhaustive) for p in PLANS]
)
def test_every_habit(models: Path, plain: Any, tmp_path: Path, plan: str) -> None:
    compare(models, plain, tmp_path, plan, *FAMILIES)


@pytest.mark.slow
def test_every_habit_while_weights_are_still_in_their_files(models: Path, plain: Any, tmp_path: Path) -> None:
    others = [name for name in FAMILIES if name != "tuning"]  # which has a line of its own, before it loads
    compare(models, plain, tmp_path, "sharded", *others, options=("--lazy",))


@pytest.mark.slow
def test_an_adapter_put_into_a_compiled_model(models: Path, plain: Any, tmp_path: Path) -> None:
    compare(models, plain, tmp_path, "tensor-parallel", "adapters", options=("--base-first",))


@pytest.mark.slow
def test_mixed_precision_of_trainer_is_refused_with_a_remedy(models: Path, tmp_path: Path) -> None:
    options = ("--bf16", "--plan", json.dumps(PIPELINED))
    done = start(models, tmp_path, "trainer", flavor="cpu:2", options=options)
    assert done.returncode == 2
    assert "bf16" in done.stderr.split("try:")[1]
    assert "Traceback" not in done.stderr
