"""The wheel carries everything: built here and unpacked elsewhere, it reads all of its cost tables."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=250)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import autoparallel; from autoparallel.cost.tables import available_devices, load_table;"
        "print(autoparallel.__file__); print(len([load_table(name) for name in available_devices()]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    where, tables = done.stdout.split()
    assert where.startswith(str(tmp_path))
    assert int(tables) == len(list((ROOT / "cost_models").glob("*.json")))
