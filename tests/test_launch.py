"""Real scripts, started as people start them: plain python, -m, torchrun, srun's environment, -c, stdin."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoparallel.errors import LaunchError
from autoparallel.ir.flavor import Flavor
from autoparallel.runtime import launch, launcher

ROOT = str(Path(__file__).parent.parent)
TIMEOUT_S = 60
PREFIX = f"""
import os, sys, time
sys.path.append({ROOT!r})
from autoparallel.errors import ContractError
from autoparallel.ir.flavor import Flavor
from autoparallel.runtime import launch

def flavor(n):
    size = dict(num_devices=n, devices_per_host=n, memory_bytes=2**30, cores_per_host=2)
    return Flavor(name=f"cpu:{{n}}", device="cpu", **size)
"""
SUM = """
import torch, torch.distributed as dist
total = torch.tensor(float(launch.rank() + 1))
dist.all_reduce(total)
print(f"rank {launch.rank()} of {launch.world_size()}, sum {total.item()}", flush=True)
"""


@pytest.fixture(autouse=True, scope="module")
def _logs_of_failed_runs() -> Iterator[None]:
    """They are kept on purpose; here, in a folder that goes."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield


def environment(**changes: str) -> dict[str, str]:
    launchers = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM",
        "TORCHELASTIC",
        "AUTOPARALLEL",
    )
    return {k: v for k, v in os.environ.items() if not k.startswith((*launchers, "OMP_NUM", "PYTHONPATH"))} | changes


def python(*words: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    options.setdefault("env", environment())
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, **options)


def write(folder: Path, body: str, *, name: str = "train.py") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(PREFIX + body)
    return path


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_plain_python_looks_like_one_process(tmp_path: Path) -> None:
    """Output once, arguments untouched, the exit code of the script; nothing is guarded by `if __name__`."""
    threads = "print('threads', os.environ['OMP_NUM_THREADS'])\n"
    write(tmp_path, "print('start', sys.argv[1:])\nlaunch.ensure_launched(flavor(2))\n" + SUM + threads + "sys.exit(7)")
    done = python("-X", "utf8", "train.py", "a$$b", "${local_rank}", cwd=tmp_path)
    assert done.stdout == "start ['a$$b', '${local_rank}']\nrank 0 of 2, sum 3.0\nthreads 1\n"
    assert done.returncode == 7
    assert "exited with code 7" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_looks_like_one_process_before_the_line_and_after_it(tmp_path: Path) -> None:
    """Libraries find no rank variables, so that accelerate counts one process; torch.distributed goes on telling."""
    look = """
def look():
    from accelerate.state import PartialState
    PartialState._reset_state()
    found = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") if name in os.environ]
    return found, PartialState(cpu=True).num_processes, launch.world_size()
before = look()
launch.ensure_launched(flavor(2))
"""
    write(tmp_path, look + "print(before, look())\n")
    assert python("train.py", cwd=tmp_path).stdout == "([], 1, 1) ([], 1, 2)\n"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    write(tmp_path, "launch.ensure_launched(flavor(2))\n" + look.replace("before = look()", "") + "print(look())\n")
    done = python(*torchrun, cwd=tmp_path)
    assert done.stdout == "([], 1, 2)\n", done.stderr[-2000:]


TRAINER_FIRST = """
import torch, transformers
from transformers import Trainer, TrainingArguments
from autoparallel.runtime.one_process import see_one_process
arguments = TrainingArguments("out", use_cpu=True, report_to=[])
counted = arguments.world_size
launch.ensure_launched(flavor(2))
see_one_process(torch.device("cpu"))
config = transformers.LlamaConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
)
trainer = Trainer(transformers.LlamaForCausalLM(config), arguments)
counts = [arguments.world_size, trainer.accelerator.num_processes]
found = [*counts, arguments.should_save, trainer.is_world_process_zero()]
everyone = [None, None]
torch.distributed.all_gather_object(everyone, found)
sys.stdout.write(f"{counted} {everyone[0]} {everyone[1]}\\n")  # at once: the ranks share the pipe
"""


@pytest.mark.slow
def test_training_arguments_made_before_the_line_see_one_process(tmp_path: Path) -> None:
    """Under torchrun they have counted the ranks by then, and set up torch.distributed."""
    write(tmp_path, TRAINER_FIRST)
    expected = "[1, 1, True, True] [1, 1, False, False]\n"
    assert python("train.py", cwd=tmp_path).stdout == f"1 {expected}"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    done = python(*torchrun, cwd=tmp_path)
    assert sorted(done.stdout.splitlines())[0] + "\n" == f"2 {expected}", done.stderr[-2000:]


def test_threads_finish_before_the_interpreter_ends() -> None:
    """A thread that still computes, outside the interpreter, and needs it once more."""
    data, done = bytes(100 << 20), threading.Event()

    def compute() -> None:
        hashlib.sha256(data)
        done.set()

    threading.Thread(target=compute).start()
    assert not done.is_set()
    launch._let_threads_finish()
    assert done.is_set()


@pytest.mark.parametrize("before", ["", "dist.init_process_group('gloo')"], ids=["ours", "the-script's"])
def test_ranks_leave_whoever_set_up_torch_distributed(before: str, tmp_path: Path) -> None:
    """The last collectives are of groups that nobody destroys."""
    body = """
import atexit
import torch, torch.distributed as dist
left, register = [], atexit.register
atexit.register = lambda handler: (left.append(handler), register(handler))
BEFORE
launch.ensure_launched(flavor(2))
groups = [dist.new_group([0, 1]) for _ in range(8)]
works = [dist.all_reduce(torch.ones(2000), group=group, async_op=True) for group in groups for _ in range(8)]
for work in works:
    work.wait()
sys.stdout.write(f"{works[0].is_completed()} {launch._leave in left}\\n")  # at once: the ranks share the pipe
"""
    write(tmp_path, body.replace("BEFORE", before))
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "True True"), done.stderr[-2000:]


def test_a_module_runs_and_the_failing_rank_is_shown_last(tmp_path: Path) -> None:
    body = SUM + "if launch.rank() == 1: raise ValueError('boom')\ndist.all_reduce(total)\nprint('not reached')\n"
    write(tmp_path, "launch.ensure_launched(flavor(2))\n" + body, name="pkg/mod.py")
    done = python("-m", "pkg.mod", cwd=tmp_path)
    assert done.stdout == "rank 0 of 2, sum 3.0\n"
    assert done.returncode == 1
    assert "autoparallel: rank 1 exited with code 1" in done.stderr
    assert done.stderr.strip().endswith("ValueError: boom")
    assert "ChildFailedError" not in done.stderr


def test_our_errors_are_messages_with_their_exit_code(tmp_path: Path) -> None:
    error = (
        "if launch.rank() == int(sys.argv[1]): raise ContractError('bad loop', why='w', remedy='r')\ntime.sleep(50)\n"
    )
    write(tmp_path, "launch.ensure_launched(flavor(2))\n" + error)
    for rank in ("0", "1"):
        done = python("train.py", rank, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("bad loop\n  why: w\n  try: r\n  at: ") == 1
        assert "Traceback" not in done.stderr


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        "launch.ensure_launched(flavor(2))\n" + SUM + "if launch.rank(): os.kill(os.getpid(), 9)\ntime.sleep(50)",
    )
    done = python("train.py", cwd=tmp_path)
    assert "rank 1 was ended by SIGKILL" in done.stderr
    assert done.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGTERM))]
)
def test_no_rank_outlives_its_launcher(tmp_path: Path, number: signal.Signals) -> None:
    mark = "open(f'pid{launch.rank()}', 'w').write(str(os.getpid()))\nprint('up')\ntime.sleep(50)\n"
    write(tmp_path, "launch.ensure_launched(flavor(2))\nlaunch.dist.barrier()\n" + mark)
    command = [sys.executable, "train.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not all((tmp_path / f"pid{i}").exists() and (tmp_path / f"pid{i}").read_text() for i in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pids = [int((tmp_path / f"pid{i}").read_text()) for i in (0, 1)]
        assert all(map(is_alive, pids))
        process.send_signal(number)
        code = process.wait(TIMEOUT_S)
    finally:
        process.kill()
        process.communicate()
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_torchrun_runs_the_same_script(tmp_path: Path) -> None:
    write(tmp_path, "launch.ensure_launched(flavor(2))\n" + SUM)
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rank 0 of 2, sum 3.0\n"


def test_a_wrong_world_size_ends_every_rank_with_one_message(tmp_path: Path) -> None:
    write(tmp_path, "time.sleep(int(os.environ['RANK']))\nlaunch.ensure_launched(flavor(4))\n")
    command = ("--standalone", "--nproc-per-node", "2", "train.py", "--lr", "1")
    done = python("-m", "torch.distributed.run", *command, cwd=tmp_path)
    assert done.stderr.count("2 processes run, and flavor cpu:4 has 4 devices.") == 1
    assert "torchrun --standalone --nproc-per-node 4 train.py --lr 1" in done.stderr
    assert len(re.findall(r"exitcode +: 4 ", done.stderr)) == 2
    assert done.returncode != 0


def test_slurm_tasks_find_each_other(tmp_path: Path) -> None:
    write(tmp_path, "launch.ensure_launched(flavor(2))\n" + SUM)
    tasks = []
    for index in ("1", "0"):
        slurm = {"SLURM_PROCID": index, "SLURM_NTASKS": "2", "SLURM_LOCALID": index, "SLURM_JOB_ID": str(os.getpid())}
        env = environment(SLURM_STEP_NODELIST="localhost", **slurm)
        tasks.append(
            subprocess.Popen([sys.executable, "train.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
        )
    try:
        outputs = [task.communicate(timeout=TIMEOUT_S)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert outputs == ["", "rank 0 of 2, sum 3.0\n"]


def test_one_device_needs_no_launch_and_what_cannot_be_rerun_is_refused(tmp_path: Path) -> None:
    code = PREFIX + "launch.ensure_launched(flavor(1))\n" + SUM + "dist.destroy_process_group()\n"
    code += "launch.ensure_launched(flavor(2))\nprint('not reached')\n"
    for done in (python("-c", code, cwd=tmp_path), python("-", cwd=tmp_path, input=code)):
        assert done.stdout == "rank 0 of 1, sum 1.0\n"
        assert done.returncode == 2
        assert "save it as a file and run `python FILE`" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("python train.py --lr 1", "train.py --lr 1"),
        ("python -u -X dev -W ignore train.py -c", "train.py -c"),
        ("python -Xdev -Wignore -um pkg.train -m", "-m pkg.train -m"),
        ("python -mpkg.train a", "-m pkg.train a"),
        ("python --check-hash-based-pycs always -OO train.py", "train.py"),
        ("python -c print() train.py", ""),
        ("python -uc print()", ""),
        ("python -", ""),
        ("python", ""),
        ("python -i", ""),
    ],
)
def test_the_program_in_a_command_line(monkeypatch: pytest.MonkeyPatch, command: str, program: str) -> None:
    monkeypatch.setattr(sys, "orig_argv", command.split())
    assert launch._program() == program.split()


def test_several_hosts_are_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pkg.train", "x y"])
    hosts = Flavor(name="1.5x4", device="cpu", num_devices=6, devices_per_host=4, memory_bytes=1, cores_per_host=4)
    with pytest.raises(LaunchError) as caught:
        launch.ensure_launched(hosts)
    line = "torchrun --nnodes 2 --node-rank {} --nproc-per-node {} --master-addr FIRST_HOST --master-port 29500"
    for host, devices in ((0, 4), (1, 2)):
        assert f"{line.format(host, devices)} -m pkg.train 'x y'" in str(caught.value)
    gpus = Flavor(name="64xTest", device="test-gpu", num_devices=64, devices_per_host=64, memory_bytes=1)
    with pytest.raises(LaunchError, match="drives 64 GPUs"):
        launch.ensure_launched(gpus)


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({"SLURM_STEP_NODELIST": "gpu[007-015,020],cpu1"}, "gpu007"),
        ({"SLURM_STEP_NODELIST": "node3,node4"}, "node3"),
        ({"SLURM_STEP_NODELIST": "a[5]"}, "a5"),
        ({"SLURM_STEP_NODELIST": "a1", "MASTER_ADDR": "b"}, "b"),
        ({}, None),
        ({"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1"}, None),
    ],
)
def test_slurm_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], address: str | None) -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4097"}
    monkeypatch.setattr(os, "environ", environment() | slurm | variables)
    found = launch._rank_environment()
    assert found.get("MASTER_ADDR") == address
    if address:
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_PORT"]) == (
            "3",
            "8",
            "1",
            "61441",
        )


def test_the_root_cause_is_neither_ended_nor_bereaved() -> None:
    def failed(code: int, *, time_s: float | None = None, lost_peer: bool = False) -> Any:
        note = {"time_s": time_s, "lost_peer": lost_peer} if time_s is not None else None
        return SimpleNamespace(exitcode=code, error_file_data={"autoparallel": note} if note else {"message": "<NONE>"})

    lost, ended = failed(1, time_s=1.0, lost_peer=True), failed(-signal.SIGTERM)
    assert launcher._root_cause({0: lost, 1: ended, 2: failed(1, time_s=5.0), 3: failed(1, time_s=4.0)}) == 3
    assert launcher._root_cause({0: lost, 1: failed(-signal.SIGKILL)}) == 1
    assert launcher._root_cause({0: ended, 1: lost}) == 1
