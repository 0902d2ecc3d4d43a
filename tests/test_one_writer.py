"""One path, one writer: what every rank saves is written by rank 0, and the others go on when it is there."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from autoparallel.errors import ContractError, WorkerError
from autoparallel.runtime import one_writer
from tests.ranks import run_ranks


def saved(folder: str) -> tuple[list[float], list[str], list[str]]:
    """What a rank finds right after it saved, and who opened files for writing."""
    rank, write, writers = dist.get_rank(), torch.save, []

    def slow(value: Any, f: Any, *args: Any) -> None:
        time.sleep(0.5)
        writers.append(f"{rank} {os.path.basename(f)}")
        write(value, f, *args)

    torch.save = slow
    one_writer.mend_saving()
    found = []
    for turn in range(2):
        torch.save({"value": torch.tensor(float(turn))}, Path(folder) / "state.pt")
        found.append(float(torch.load(Path(folder) / "state.pt", weights_only=True)["value"]))
    safetensors.torch.save_file({"value": torch.tensor(2.0)}, f"{folder}/model.safetensors")
    found.append(float(safetensors.torch.load_file(f"{folder}/model.safetensors")["value"]))
    with open(f"{folder}/own{rank}", "wb") as file:
        write(torch.tensor(1.0), file)
    if rank == 0:
        torch.save(1, f"{folder}/alone.pt")
    failures = []
    try:
        torch.save(1, f"{folder}/missing/state.pt")
    except Exception as error:
        failures.append(type(error).__name__)
    one_writer.APART = timedelta(seconds=1)
    if rank == 1:
        try:
            torch.save(1, f"{folder}/other.pt")
        except ContractError as error:
            failures.append(error.what.split(folder)[1])
    dist.barrier()
    return found, writers, failures


def test_a_path_is_written_once(tmp_path: Path) -> None:
    first, second = run_ranks(2, saved, str(tmp_path))
    assert first[0] == second[0] == [0.0, 1.0, 2.0]
    assert first[1] == ["0 state.pt", "0 state.pt", "0 alone.pt", "0 state.pt"]
    assert second[1] == []
    assert first[2] == ["RuntimeError"]
    assert second[2] == [WorkerError.__name__, "/other.pt, and another rank does"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone.pt",
        "model.safetensors",
        "own0",
        "own1",
        "state.pt",
    ]
