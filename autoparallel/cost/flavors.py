"""Flavors: a name, a file or this machine in; how many devices of which kind, in how many hosts, out.

The thirteen named sizes are those of Moreh's MoAI platform: MI250 dies (GCDs), eight a host.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import ValidationError

from autoparallel.cost.tables import available_devices, first_problem, load_table, nearest
from autoparallel.errors import ConfigError
from autoparallel.ir.flavor import Flavor

NAMED_DIES: dict[str, int] = {
    "Small.64GB": 1,
    "Medium.128GB": 2,
    "Large.256GB": 4,
    "xLarge.512GB": 8,
    "1.5xLarge.768GB": 12,
    "2xLarge.1024GB": 16,
    "3xLarge.1536GB": 24,
    "4xLarge.2048GB": 32,
    "6xLarge.3072GB": 48,
    "8xLarge.4096GB": 64,
    "12xLarge.6144GB": 96,
    "24xLarge.12288GB": 192,
    "48xLarge.24576GB": 384,
}

DRIVER_MODELS: tuple[tuple[str, str], ...] = (
    ("V100-SXM2-32GB", "V100-SXM2-32GB"),
    ("A100-SXM4-40GB", "A100-SXM4-40GB"),
    ("A100-SXM4-80GB", "A100-SXM4-80GB"),
    ("A100 80GB PCIe", "A100-PCIe-80GB"),
    ("A800-SXM4-80GB", "A800-SXM4-80GB"),
    ("RTX A6000", "A6000"),
    ("RTX 3090", "RTX3090"),
    ("RTX 4090", "RTX4090"),
    ("L40S", "L40S"),
    ("L4", "L4"),
    ("H100 80GB HBM3", "H100-SXM5-80GB"),
    ("H100 PCIe", "H100-PCIe"),
    ("H800", "H800-SXM5-80GB"),
    ("H200", "H200"),
    ("GB300", "GB300"),
    ("GB200", "GB200"),
    ("B200", "B200"),
)
"""The NVIDIA driver's name of a model, or the end of it, and its cost table."""

CPU = "cpu"
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
FORMS = 'use "4xLarge.2048GB", "8xH100-SXM5-80GB", "4x8xH100-SXM5-80GB" (hosts x GPUs), "cpu:4", "local" or a JSON file'


def list_flavors() -> list[str]:
    """Names to choose from: the named sizes, one full host of every GPU, and this machine's."""
    return [*NAMED_DIES, *gpu_hosts(), f"cpu:{_num_cores()}", "local"]


def gpu_hosts() -> list[str]:
    """One full host of every GPU."""
    return [f"{int(load_table(name).devices_per_host.value)}x{name}" for name in _gpu_names()]


def resolve_flavor(flavor: str | Flavor | os.PathLike[str]) -> Flavor:
    """The hardware a flavor names: a name (case ignored), `cpu:N`, `local`, a JSON file of a `Flavor`, or a `Flavor`.

    Raises ConfigError with the nearest name for anything else.
    """
    if isinstance(flavor, Flavor):
        return _checked(flavor)
    if isinstance(flavor, os.PathLike):
        return _from_file(Path(flavor))
    text = flavor.strip()
    by_folded = {name.casefold(): name for name in NAMED_DIES}
    if name := by_folded.get(text.casefold()):
        return _gpus(name, "MI250", hosts=-(-NAMED_DIES[name] // 8), per_host=8, num_devices=NAMED_DIES[name])
    if text.casefold() == "local":
        return _local()
    if match := re.fullmatch(r"cpu(?::(\d{1,6}))?", text, re.IGNORECASE):
        return _cpu(int(match[1] or 1))
    if text.endswith(".json") or os.sep in text:
        return _from_file(Path(text))
    return _counted(text)


def _gpu_names() -> tuple[str, ...]:
    return tuple(name for name in available_devices() if name != CPU)


def _checked(flavor: Flavor) -> Flavor:
    """A flavor somebody wrote by hand: its device must have a table, and only CPU flavors share cores."""
    load_table(flavor.device)
    if (flavor.device == CPU) != flavor.is_cpu:
        raise ConfigError(
            f"the flavor {flavor.name!r} does not fit its device {flavor.device!r}",
            why=f"cores_per_host is {flavor.cores_per_host}: CPU flavors need a number, all others must leave it out",
            remedy="correct cores_per_host, or use a name such as cpu:4",
        )
    return flavor


def _counted(text: str) -> Flavor:
    """`H200`, `8xH200` and `4x8xH200`."""
    match = re.fullmatch(r"(?:(\d{1,6})x)?(?:(\d{1,6})x)?([a-z].*)", text, re.IGNORECASE)
    devices = {name.casefold(): name for name in _gpu_names()}
    device = devices.get(match[3].casefold()) if match else None
    if match is None or device is None:
        raise _unknown(text, counts=text[: match.start(3)] if match else "", device=match[3] if match else text)
    counts = [int(count) for count in match.groups()[:2] if count is not None]
    hosts, per_host = [1, 1, *counts][-2:]
    if hosts == 0 or per_host == 0:
        raise ConfigError(f"the flavor {text!r} has no devices", why="a count in it is 0", remedy=FORMS)
    limit = int(load_table(device).devices_per_host.value)
    if per_host > limit:
        raise ConfigError(
            f"the flavor {text!r} puts {per_host} devices in one host",
            why=f"a host of {device} holds {limit}",
            remedy=f'name the hosts too: "{-(-hosts * per_host // limit)}x{limit}x{device}"',
        )
    prefix = "".join(f"{count}x" for count in counts)
    return _gpus(f"{prefix}{device}", device, hosts=hosts, per_host=per_host, num_devices=hosts * per_host)


def _unknown(text: str, *, counts: str, device: str) -> ConfigError:
    close = nearest(text, tuple(NAMED_DIES)) or [f"{counts}{name}" for name in nearest(device, _gpu_names())]
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ConfigError(
        f"unknown flavor {text!r}",
        why="it is neither a named size nor a count of a device that has a cost table",
        remedy=f"{hint}Otherwise {FORMS}; `autoparallel flavors` lists all names",
    )


def _gpus(name: str, device: str, *, hosts: int, per_host: int, num_devices: int) -> Flavor:
    return Flavor(
        name=name,
        device=device,
        num_devices=num_devices,
        devices_per_host=per_host if hosts > 1 else num_devices,
        memory_bytes=int(load_table(device).memory_bytes.value),
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu(num_processes: int) -> Flavor:
    """Processes on this host, which share its cores and its memory."""
    if num_processes == 0:
        raise ConfigError('the flavor "cpu:0" has no devices', why="the count in it is 0", remedy='use "cpu:1"')
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Flavor(
        name=f"cpu:{num_processes}",
        device=CPU,
        num_devices=num_processes,
        devices_per_host=num_processes,
        memory_bytes=host_bytes // num_processes,
        cores_per_host=_num_cores(),
    )


def _local() -> Flavor:
    """This machine: its NVIDIA GPUs where the driver shows some, otherwise one process for every core."""
    models = nvidia_models(NVIDIA_GPUS)
    if not models:
        return _cpu(_num_cores())
    if len(set(models)) > 1:
        raise ConfigError(
            "the GPUs of this machine differ",
            why="a plan needs equal devices; found " + ", ".join(sorted(set(models))),
            remedy="choose equal ones with CUDA_VISIBLE_DEVICES, or name a flavor",
        )
    device = _device_of_model(models[0])
    return _gpus(f"{len(models)}x{device}", device, hosts=1, per_host=len(models), num_devices=len(models))


def device_of_model(model: str) -> str:
    """The name of the cost table of a GPU that its driver calls `model`, whether there is one or not."""
    for ending, device in DRIVER_MODELS:
        if model == ending or model.endswith(f" {ending}"):
            return device
    return re.sub(r"[^A-Za-z0-9]+", "-", model).strip("-")


def _device_of_model(model: str) -> str:
    device = device_of_model(model)
    if device not in available_devices():
        raise ConfigError(
            f"there is no cost table for this machine's GPU, {model!r}",
            why="tables exist for " + ", ".join(available_devices()),
            remedy="measure one with `autoparallel profile` and name its folder in AUTOPARALLEL_COST_MODELS, or name "
            "the flavor of a GPU like it",
        )
    return device


def nvidia_models(gpus: Path) -> list[str]:
    """Model names of the NVIDIA GPUs that this process may use, as the driver's `/proc` tells; [] without a driver."""
    entries = sorted(gpus.glob("*/information"))
    models = [match[1] for entry in entries if (match := re.search(r"^Model:\s*(.+?)\s*$", entry.read_text(), re.M))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return models
    chosen = []
    for item in visible.split(","):
        # CUDA ignores everything from the first invalid index on; UUIDs are not in /proc, so each counts as one GPU.
        if item.strip().startswith("GPU-") and models:
            chosen.append(models[0])
        elif item.strip().isdigit() and int(item) < len(models):
            chosen.append(models[int(item)])
        else:
            break
    return chosen


def _from_file(path: Path) -> Flavor:
    try:
        flavor = Flavor.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fields = ", ".join(Flavor.model_fields)
        raise ConfigError(
            f"the file {path} is not a flavor", why=first_problem(error), remedy=f"its fields are {fields}"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ConfigError(f"cannot read the flavor file {str(path)!r}", why=str(error), remedy=FORMS) from error
    return _checked(flavor)
