"""A flavor in, one process per device out: `ensure_launched` returns only in a process that is one of them.

Under torchrun or srun it joins them. A plain `python train.py` becomes their launcher: the process replaces itself by
torch's elastic agent, which runs the same command once per device. (Replaced, so that a model which the script loaded
before the call is not held once more, in host memory or on the first GPU.) What the script printed before the call was
seen once already: rank 0 gets the terminal when it reaches the call, the other ranks write to log files.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from loguru import logger
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from autoparallel.errors import AutoParallelError, LaunchError, PlanMismatchError
from autoparallel.ir.flavor import Flavor
from autoparallel.runtime.launcher import LAUNCHER_PID, OURS, OUTPUT_SOCKET, RANK_VARIABLES
from autoparallel.runtime.uncaught import exit_code, install_error_hook

MPI_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What srun and mpirun set beside, and accelerate counts processes by."""

ARRIVAL_S = {"cpu": 60, "gpu": 600}
"""How long ranks may be apart when they reach the call; loading weights is what keeps GPU ranks."""


class RankMissingError(LaunchError):
    """A rank did not arrive in time."""

    exit_code = 6


def ensure_launched(flavor: Flavor) -> None:
    """Return in each of the `flavor.num_devices` ranks with torch.distributed initialised; start them if nobody has."""
    install_error_hook()
    if dist.is_initialized():
        if dist.get_world_size() != flavor.num_devices:
            raise _world_size_error(flavor, dist.get_world_size())
        _hide_ranks()
        _register_exit()
        return
    environment = _rank_environment()
    if environment:
        os.environ.update(environment)
        _join(flavor)
    elif flavor.num_devices == 1:
        _select_device(flavor, local_rank=0)
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(_backend(flavor), store=store, rank=0, world_size=1)
    else:
        _relaunch(flavor)
    _hide_ranks()
    install_error_hook()  # over torch's, which init_process_group has just put on top
    _register_exit()


def rank() -> int:
    """This process's rank, 0 where nothing is launched."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are, 1 where nothing is launched."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the rank that prints and plans."""
    return rank() == 0


def distributed_timeout() -> timedelta:
    """Of one collective: others wait while rank 0 plans or saves, so minutes are normal."""
    return timedelta(minutes=30)


# --- joining -----------------------------------------------------------------------------------------------------


def _rank_environment() -> dict[str, str]:
    """RANK and its companions from our launcher or as torchrun sets them, else from Slurm, else nothing."""
    environ = os.environ
    if OURS + "RANK" in environ:
        return {name: environ[OURS + name] for name in RANK_VARIABLES}
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return {"LOCAL_RANK": environ.get("LOCAL_RANK", environ["RANK"])}
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    num_tasks, index = environ.get("SLURM_NTASKS", ""), environ.get("SLURM_PROCID", "")
    if not (index.isdigit() and num_tasks.isdigit() and int(num_tasks) > 1) or not (nodes or "MASTER_ADDR" in environ):
        return {}  # no Slurm, one task, or a batch script's own shell: only srun sets the step's node list
    first_host = nodes.split(",")[0]
    if "[" in first_host:  # node[007-015,020]
        prefix, numbers = first_host.split("[")
        first_host = prefix + numbers.split("-")[0].rstrip("]")
    port = 61440 + int(environ.get("SLURM_JOB_ID", "0")) % 4096  # the same on every host, apart from other jobs'
    return {
        "RANK": index,
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first_host),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }


def _hide_ranks() -> None:
    """The script is that of one process: a library that finds rank variables would shard the data, wrap the model once
    more, or take another device. torch itself has read them; `torch.distributed` goes on telling who asks it.
    """
    for name in (*RANK_VARIABLES, *MPI_VARIABLES):
        os.environ.pop(name, None)
        os.environ.pop(OURS + name, None)


def _join(flavor: Flavor) -> None:
    """Meet the other ranks, agree that their number is right, and initialise torch.distributed."""
    _take_output()
    arrival = timedelta(seconds=ARRIVAL_S["cpu" if flavor.is_cpu else "gpu"])
    try:
        store, index, size = next(rendezvous("env://", timeout=arrival))
    except (ValueError, RuntimeError) as error:
        why = f"{error}".strip().splitlines()[0]
        raise LaunchError("This rank cannot meet the others.", why=why, remedy=torchrun_lines(flavor)) from error
    _wait_for_all(store, key="arrived", index=index, size=size, timeout=arrival)
    if size != flavor.num_devices:
        _exit_together(_world_size_error(flavor, size), store=store, index=index, size=size)
    _select_device(flavor, local_rank=int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(_backend(flavor), store=store, rank=index, world_size=size, timeout=distributed_timeout())


def _register_exit() -> None:
    """Once, however often the script compiles: the last registered runs first."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    """The exit handler. After an error nothing is torn down, since collectives may never end."""
    code = exit_code()
    if code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    _let_threads_finish()


def _let_threads_finish() -> None:
    """Wait, at most a second, until no thread of this process has anything left to run.

    A collective is done for who waits for it before gloo's thread lets go of its tensors. For that the thread needs the
    interpreter; Python 3.11 ends a thread that asks for it too late, and C++ answers by aborting the process
    (https://github.com/pytorch/pytorch/pull/179291). Destroying the groups ends their threads only where nothing
    refers to a group any more, and the user's model does.
    """
    tasks = Path("/proc/self/task")
    for _ in range(100):
        time.sleep(0.01)  # others may have the interpreter meanwhile
        if not tasks.exists() or not any(
            _is_running(task) for task in tasks.iterdir() if task.name != str(os.getpid())
        ):
            return


def _is_running(task: Path) -> bool:
    """Whether the thread computes or waits for a core, by its state in /proc."""
    with contextlib.suppress(OSError):  # it has just ended
        return (task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "R"
    return False


def _wait_for_all(store: Store, *, key: str, index: int, size: int, timeout: timedelta) -> None:
    keys = [f"autoparallel/{key}/{other}" for other in range(size)]
    store.set(keys[index], "1")
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [str(other) for other in range(size) if not store.check([keys[other]])]
        raise RankMissingError(
            f"Rank {', '.join(missing)} did not arrive.",
            why=f"rank {index} waited {timeout.total_seconds():.0f} s for {size} ranks",
            remedy="look at what those ranks last printed; every rank must reach the same call",
        ) from error


def _exit_together(error: AutoParallelError, *, store: Store, index: int, size: int) -> NoReturn:
    """Rank 0 prints `error`, then all ranks leave: a launcher ends the others as soon as the first is gone."""
    if index == 0:
        print(error, file=sys.stderr, flush=True)
    with contextlib.suppress(RuntimeError, LaunchError):  # the store may leave with rank 0
        _wait_for_all(store, key="told", index=index, size=size, timeout=timedelta(seconds=10))
    sys.stdout.flush()
    os._exit(error.exit_code)  # interpreter shutdown would give the launcher time to kill the slower ranks


def _world_size_error(flavor: Flavor, size: int) -> PlanMismatchError:
    return PlanMismatchError(
        f"{size} processes run, and flavor {flavor.name} has {flavor.num_devices} devices.",
        why="each device is driven by one process",
        remedy=torchrun_lines(flavor),
    )


def _backend(flavor: Flavor) -> str:
    return "gloo" if flavor.is_cpu else "cpu:gloo,cuda:nccl"


def _select_device(flavor: Flavor, *, local_rank: int) -> None:
    if flavor.is_cpu:
        return
    count = torch.cuda.device_count()
    index = local_rank if count > 1 else 0  # a launcher may have shown each rank its own GPU only
    if index >= count or (count > 1 and count < flavor.local_devices):
        raise _too_few_devices(flavor, count)
    torch.cuda.set_device(index)


def _too_few_devices(flavor: Flavor, count: int) -> LaunchError:
    return LaunchError(
        f"Flavor {flavor.name} drives {flavor.local_devices} GPUs on this host, and torch sees {count}.",
        why=f"each of its {flavor.num_devices} processes drives one GPU",
        remedy="run where the GPUs are, or take a flavor such as 'local' or 'cpu:2'; planning needs no GPU",
    )


def _take_output() -> None:
    """Rank 0 gets the terminal (from our launcher), the others leave it."""
    path, index = os.environ.pop(OUTPUT_SOCKET, ""), int(os.environ["RANK"])
    sys.stdout.flush()
    sys.stderr.flush()
    if path:
        threading.Thread(target=_end_with_launcher, args=(int(os.environ[LAUNCHER_PID]),), daemon=True).start()
    if path and index == 0:
        with socket.socket(socket.AF_UNIX) as launcher:
            launcher.connect(path)
            _, descriptors, _, _ = socket.recv_fds(launcher, 1, 2)
        for target, descriptor in zip((1, 2), descriptors, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
    elif index != 0 and not path:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.close(descriptor)


def _end_with_launcher(pid: int) -> None:
    """A launcher that is killed outright cannot end its ranks: they notice."""
    while os.getppid() == pid:
        time.sleep(1.0)
    os._exit(128 + signal.SIGHUP)


# --- starting: in the user's process -----------------------------------------------------------------------------


def _relaunch(flavor: Flavor) -> NoReturn:
    """Become the launcher of this same command, or say why that cannot be."""
    _check_startable(flavor)
    num_ranks = flavor.num_devices
    cores = flavor.cores_per_host or os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",  # gloo has no authentication
    } | os.environ
    logger.info(f"Starting {num_ranks} processes; each runs this program again, up to here without output.")
    sys.stdout.flush()
    sys.stderr.flush()
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.append({root!r}); from autoparallel.runtime.launcher import run_ranks; run_ranks()"
    os.execve(sys.executable, [sys.executable, "-P", "-c", code, str(num_ranks), *sys.orig_argv[1:]], environment)


def _check_startable(flavor: Flavor) -> None:
    if flavor.num_hosts > 1:
        raise LaunchError(
            f"Flavor {flavor.name} spans {flavor.num_hosts} hosts, and this program was started on one.",
            why="a plain `python` start reaches no other host",
            remedy=f"run each of these on its host:{torchrun_lines(flavor)}",
        )
    if not flavor.is_cpu and torch.cuda.device_count() < flavor.local_devices:
        raise _too_few_devices(flavor, torch.cuda.device_count())
    needs = f"Flavor {flavor.name} needs {flavor.num_devices} processes"
    if multiprocessing.parent_process() is not None:
        raise LaunchError(
            f"{needs}, and this one is a multiprocessing worker.",
            why="a worker cannot stand for the whole program",
            remedy="call it in the main process, with `if __name__ == '__main__':` around what starts workers",
        )
    if not _is_rerunnable():
        raise LaunchError(
            f"{needs}, and this program cannot be run again to start them.",
            why="it is a notebook, a prompt, standard input or -c, or its file is not found from this directory",
            remedy="save it as a file and run `python FILE`, or take a flavor of one device",
        )


def _is_rerunnable() -> bool:
    """True for a script file, a folder with a `__main__.py` or a module, not waiting for a person."""
    if sys.flags.interactive or sys.flags.inspect or hasattr(builtins, "get_ipython"):
        return False
    words = _program()
    if not words or not hasattr(sys.modules["__main__"], "__file__"):
        return False
    return words[0] == "-m" or os.path.isfile(words[0]) or os.path.isdir(words[0])


def torchrun_lines(flavor: Flavor) -> str:
    """The command that runs this program on the flavor: one line, or one for each of its hosts."""
    program = _program() or ["train.py"]
    if flavor.num_hosts == 1:
        return shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(flavor.num_devices), *program])
    lines = []
    for host in range(flavor.num_hosts):
        devices = min(flavor.devices_per_host, flavor.num_devices - host * flavor.devices_per_host)
        options = ["--nnodes", str(flavor.num_hosts), "--node-rank", str(host), "--nproc-per-node", str(devices)]
        meeting = ["--master-addr", "FIRST_HOST", "--master-port", "29500"]
        lines.append(f"\n    {shlex.join(['torchrun', *options, *meeting, *program])}")
    return "".join(lines)


def _program() -> list[str]:
    """The command line after python's own options: a script or `-m module`, and arguments; empty for -c and stdin."""
    words = sys.orig_argv[1:]
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            return [word, *words]
        if word in ("-", "-c"):
            return []
        if word == "--check-hash-based-pycs":
            words = words[1:]
        for position, letter in enumerate("" if word.startswith("--") else word[1:], start=2):
            rest = [word[position:]] if word[position:] else []
            if letter == "c":
                return []
            if letter == "m":
                return ["-m", *rest, *words]
            if letter in "WX":
                words = words if rest else words[1:]
                break
    return []
