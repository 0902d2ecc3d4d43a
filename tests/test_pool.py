"""The search with other worker counts, with workers that die, and from a user's script; its progress bar."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autoparallel.errors import ConfigError
from autoparallel.plans.candidate import Candidate
from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.progress import is_shown
from autoparallel.search import select
from autoparallel.search.pool import Jobs, WorkerPool, default_num_workers
from autoparallel.search.problem import Problem
from autoparallel.search.select import Searched, search
from tests.workloads import gpus, strategies, workload

ANY = Constraints()


def dumped(found: Searched) -> str:
    """All that a search says."""
    entries = [entry.model_dump_json() for entry in (*found.candidates, *found.pruned)]
    return "\n".join([*entries, f"{found.num_candidates} {found.bound_s!r}"])


def test_worker_counts_and_hash_seeds_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = workload(gpus(4), num_blocks=6, tied=1_000_000)
    here = dumped(search(drawn, ANY, workers=0))
    monkeypatch.setattr(select, "PATIENCE_S", 0.0)
    assert dumped(search(drawn, ANY, workers=1)) == here
    assert dumped(search(drawn, ANY, workers=3)) == here
    (tmp_path / "workload.json").write_text(drawn.model_dump_json())
    code = (
        "import sys\n"
        "from autoparallel.cost.workload import Workload\n"
        "from autoparallel.plans.strategy import Constraints\n"
        "from autoparallel.search.select import search\n"
        "found = search(Workload.model_validate_json(open(sys.argv[1]).read()), Constraints(), workers=0)\n"
        "for entry in (*found.candidates, *found.pruned):\n"
        "    print(entry.model_dump_json())\n"
        "print(found.num_candidates, repr(found.bound_s))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "workload.json")],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.rstrip("\n") == here


def jobs(asked: list[Strategy]) -> Jobs:
    return Jobs(asked, [math.inf] * len(asked))


def test_a_search_that_lasts_does_use_workers() -> None:
    with WorkerPool(Problem(workload(gpus(4), batch_size=64)), 2, patience_s=0.0) as pool:
        list(pool.map(jobs(strategies(workload(gpus(4), batch_size=64)))))
        assert len(pool.pids) == 2
        assert os.getpid() not in pool.pids


def test_a_search_that_ends_soon_starts_no_worker() -> None:
    drawn = workload(gpus(2))
    with WorkerPool(Problem(drawn), 2) as pool:
        assert len(list(pool.map(jobs(strategies(drawn)[:3])))) == 3
        assert pool.pids == []


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("killed", [1, 2])
def test_killed_workers_lose_nothing(killed: int, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoparallel.search import pool as pool_module

    warnings: list[str] = []
    monkeypatch.setattr(pool_module.logger, "warning", lambda text, *values: warnings.append(text.format(*values)))
    drawn = workload(gpus(4), num_blocks=6)
    with WorkerPool(Problem(drawn), 2, patience_s=0.0) as pool:
        expected = dict(WorkerPool(Problem(drawn), 0).map(jobs(strategies(drawn))))
        if when == "before":
            list(pool.map(jobs(strategies(drawn)[:2])))
        found = {}
        victims = pool.pids[:killed]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for index, candidate in pool.map(jobs(strategies(drawn))):
            assert index not in found
            found[index] = candidate
            if not victims:
                victims = pool.pids[:killed]
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
    assert found == expected
    assert sorted(int(line.split()[2]) for line in warnings) == sorted(victims)


def test_a_job_that_fails_in_a_worker_is_done_here() -> None:
    """Its exception then is the caller's."""
    drawn = workload(gpus(2))
    wrong = Strategy(num_stages=8, data_parallel=1)
    with WorkerPool(Problem(drawn), 1, patience_s=0.0) as pool, pytest.raises(ConfigError, match="8 devices"):
        list(pool.map(jobs([*strategies(drawn), wrong])))


def worker(**options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "autoparallel.search.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        **options,
    )


def test_a_worker_has_no_torch_ignores_ctrl_c_and_ends_with_its_stdin() -> None:
    with worker() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            greeting = json.loads(process.stdout.readline())
            assert greeting == {"pid": process.pid, "torch_loaded": False}
            process.send_signal(signal.SIGINT)
            process.stdin.write(workload(gpus(2)).model_dump_json() + "\n")
            asked = [[5, math.inf, Strategy(data_parallel=2, num_micro_batches=8).model_dump_json()]]
            process.stdin.write(json.dumps({"polished": False, "jobs": asked}) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert answer["index"] == 5
            assert Candidate.model_validate_json(answer["candidate"]).strategy.stages is not None
            process.stdin.close()
            assert process.wait(2) == 0
        finally:
            process.kill()


def test_ctrl_c_ends_all_workers_within_two_seconds() -> None:
    drawn = workload(gpus(8), num_blocks=40, batch_size=128)
    pids: list[int] = []
    begin_s = time.monotonic()

    def interrupted() -> None:
        nonlocal begin_s
        with WorkerPool(Problem(drawn), 2, patience_s=0.0) as pool:
            for _ in pool.map(jobs(strategies(drawn))):
                pids.extend(pool.pids)
                begin_s = time.monotonic()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - begin_s < 2
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_users_main_is_never_imported(tmp_path: Path) -> None:
    """An unguarded script that searches with workers runs once."""
    drawn = workload(gpus(4), batch_size=64)
    (tmp_path / "workload.json").write_text(drawn.model_dump_json())
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(
        "from pathlib import Path\n"
        "from autoparallel.cost.workload import Workload\n"
        "from autoparallel.plans.strategy import Constraints\n"
        "from autoparallel.search import select\n"
        "select.PATIENCE_S = 0.0\n"
        "print('started')\n"
        "workload = Workload.model_validate_json(Path('workload.json').read_text())\n"
        "print(select.search(workload, Constraints(), workers=2).num_candidates)\n"
    )
    # In the working folder, which `python -m` would put first: it must not shadow the standard library in workers.
    (tmp_path / "selectors.py").write_text("raise RuntimeError('shadowed')")
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "scripts/train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["started", str(len(strategies(drawn)))], done.stderr
    assert "died" not in done.stderr


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPARALLEL_WORKERS", "5")
    assert default_num_workers() == 5
    monkeypatch.delenv("AUTOPARALLEL_WORKERS")
    assert 0 <= default_num_workers() <= 8
    with pytest.raises(ConfigError, match="workers=-1"):
        search(workload(gpus(1)), ANY, workers=-1)


def test_the_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_shown()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("CI", raising=False)
    assert is_shown()
    monkeypatch.setenv("CI", "true")
    assert not is_shown()
