"""Links between the devices of this host, from collectives of as many processes: gloo on CPU, NCCL or RCCL on GPUs."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from autoparallel.measure.stopwatch import Stopwatch

SMALL, LARGE = 1 << 10, 1 << 24
"""Elements of fp32 are four bytes: a payload that is all latency, and one that is all bandwidth."""


@dataclass(frozen=True)
class Links:
    """Of one device to another in the same host."""

    latency_s: float
    """One step of a ring: half of a small all_reduce between two."""
    bandwidth_bytes_per_s: float
    """Of a large message from one to another."""
    efficiency: float
    """Bus bandwidth of large collectives over that."""


def measure_links(device_type: str, num_ranks: int, *, budget_s: float) -> Links:
    """Start `num_ranks` processes, each with a device, and time what they say to each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "links.json"
        arguments = (num_ranks, port, device_type, budget_s, str(result))
        spawn(_rank, arguments, nprocs=num_ranks)
        return Links(**json.loads(result.read_text()))


def _rank(rank: int, num_ranks: int, port: int, device_type: str, budget_s: float, result: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=num_ranks)
    links = _measure(num_ranks, device, budget_s=budget_s)
    if rank == 0:
        Path(result).write_text(json.dumps(asdict(links)))
    dist.destroy_process_group()


def _measure(num_ranks: int, device: torch.device, *, budget_s: float) -> Links:
    watch = Stopwatch(device)
    shard = LARGE // num_ranks
    whole, part = torch.zeros(shard * num_ranks, device=device), torch.zeros(shard, device=device)
    small = torch.zeros(SMALL, device=device)
    calls: dict[str, Callable[[], object]] = {
        "small": lambda: dist.all_reduce(small),
        "message": lambda: _message(whole),
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_single(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_single(part, whole),
    }
    seconds = {name: _agreed_s(call, watch, budget_s=budget_s / len(calls)) for name, call in calls.items()}
    bandwidth = whole.nbytes / seconds["message"]
    ring_bytes = whole.nbytes * (num_ranks - 1) / num_ranks
    laps = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    bus = sum(laps.values()) * ring_bytes / sum(seconds[name] for name in laps)
    return Links(
        latency_s=seconds["small"] / (2 * (num_ranks - 1)),
        bandwidth_bytes_per_s=bandwidth,
        efficiency=min(1.0, bus / bandwidth),
    )


def _message(tensor: torch.Tensor) -> None:
    """From rank 0 to rank 1; the others stand by."""
    if dist.get_rank() == 0:
        dist.send(tensor, 1)
    elif dist.get_rank() == 1:
        dist.recv(tensor, 0)


def _agreed_s(call: Callable[[], object], watch: Stopwatch, *, budget_s: float) -> float:
    """The mean of as many calls as rank 0 finds to fit: all ranks must make the same."""
    call()
    once_s = watch.once_s(call)
    times = torch.tensor(max(3, min(1000, int(budget_s / max(once_s, 1e-7)))), device=watch.device)
    dist.broadcast(times, src=0)
    dist.barrier()
    return watch.once_s(call, times=int(times))
