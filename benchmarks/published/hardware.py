"""What a row says of its GPUs and links in, a `Flavor` out.

A GPU is looked up among the cost tables by its chip ("H100"), then its form (SXM, PCIe), then the nearest memory; the
name as published need not be a table's name. The links between hosts are read from the row's own words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from autoparallel.cost.tables import available_devices, load_table
from autoparallel.ir.flavor import Flavor
from benchmarks.published.rows import Run, Unexpressed, stated

GIB = 2**30
INFINIBAND_GBIT = {"sdr": 10, "qdr": 40, "fdr": 56, "edr": 100, "hdr": 200, "ndr": 400, "xdr": 800}
"""Gb/s of a port of four lanes, by generation (InfiniBand Trade Association's roadmap)."""
VARIANTS = {
    "gh200": "h200", "mi350x": "mi355x", "rtx3090ti": "rtx3090", "rtx4090d": "rtx4090",
}  # fmt: skip
"""Nearly the same chip (fewer NVLinks, another host), where there is no table of its own."""
NETWORKS = "slingshot|infiniband|roce|ethernet|efa|omni.?path|network|between nodes|per node"
INSIDE = "nvlink|nvswitch|xgmi|infinity|pcie"
MAKERS = ("nvidia", "amd", "instinct", "tesla", "geforce", "quadro", "rtx", "intel", "gpu", "accelerator", "card")
FORMS = ("pcie", "nvl", "sxm")
RACK = 64
"""GPUs that jobs use of a rack of 72 in one NVLink domain, a power of two."""


@dataclass(frozen=True)
class Device:
    """A cost table and how it stands for the row's GPU."""

    table: str
    ranks_per_gpu: int
    assumption: str
    """Empty where the row names the table."""


def flavor_of(run: Run) -> tuple[Flavor, list[str]]:
    """The cluster, and what had to be assumed of it. Raises Unexpressed."""
    num_gpus = stated(run.n_gpus, "n_gpus")
    device = device_of(run.gpu.name, memory_gb=run.gpu.memory_gb, ranks_per_gpu=run.ranks_per_gpu)
    assumptions = [device.assumption] if device.assumption else []
    table = load_table(device.table)
    num_devices = num_gpus * device.ranks_per_gpu
    per_host = (run.gpus_per_node or 0) * device.ranks_per_gpu
    if not per_host:
        per_host = min(num_devices, int(table.devices_per_host.value))
        assumptions.append(f"gpus_per_node is not stated: {per_host} devices in a host")
    if re.search(r"nvl72|nvl36|rack.?scale", run.interconnect.casefold()):
        per_host = max(per_host, min(RACK, num_devices))
    network = network_bytes_per_s(run.interconnect, devices_per_host=per_host)
    memory_bytes = int(table.memory_bytes.value)
    published = int((run.gpu.memory_gb or 0) * GIB) // device.ranks_per_gpu
    if published and abs(published / memory_bytes - 1) > 0.1:
        memory_bytes = published
    per_host = min(per_host, num_devices)
    fields: dict[str, Any] = {"network_bandwidth_bytes_per_s": network}
    known = {name: value for name, value in fields.items() if name in Flavor.model_fields}
    flavor = Flavor(
        name=f"{-(-num_devices // per_host)}x{per_host}x{device.table}",
        device=device.table,
        num_devices=num_devices,
        devices_per_host=per_host,
        memory_bytes=memory_bytes,
        **known,
    )
    return flavor, assumptions


def device_of(name: str, *, memory_gb: float | None, ranks_per_gpu: int | None) -> Device:
    """The cost table of a GPU by whatever name. Raises Unexpressed where there is none of its chip."""
    words = [word for word in _words(name) if word not in MAKERS]
    chip = _chip(words)
    tables = {table: _words(table) for table in available_devices() if table != "cpu"}
    same = [table for table, parts in tables.items() if _chip(parts) == chip]
    variant = VARIANTS.get(chip, "")
    if not same and variant:
        same = [table for table, parts in tables.items() if _chip(parts) == variant]
    if not chip or not same:
        raise Unexpressed(f"no cost table for the GPU {name!r}")

    def unlike(table: str) -> tuple[bool, bool, float, str]:
        """Another name, another form (SXM where none is named), the distance in memory."""
        memory = load_table(table).memory_bytes.value / GIB
        other_form = _form(tables[table]) != _form(words)
        return tables[table] != words, other_form, abs(memory - (memory_gb or memory)), table

    best = min(same, key=unlike)
    dies = ranks_per_gpu or 1
    card = load_table(best).memory_bytes.value * 2 / GIB
    if ranks_per_gpu is None and memory_gb and abs(memory_gb / card - 1) < 0.1:
        dies = 2
    exact = "".join(words) == "".join(_words(best)) or (len(same) == 1 and words == [chip])
    about = "" if exact and not variant else f"{name} is priced by the table of {best}"
    if dies == 2 and ranks_per_gpu is None:
        about = f"{name} of {memory_gb:g} GB is a card of two dies of {best}"
    return Device(table=best, ranks_per_gpu=dies, assumption=about)


def _words(name: str) -> list[str]:
    spaced = re.sub(r"\brtx\s*(?=\d)", "rtx", name.casefold())
    return re.findall(r"[a-z0-9]+", re.sub(r"\bmi\s+(?=\d)", "mi", spaced))


def _chip(words: list[str]) -> str:
    """The first word with letters and digits that is no amount of memory and no form: `a100`, `mi250x`, `rtx4090`."""
    for word in words:
        if re.search(r"\d", word) and not re.fullmatch(r"\d*gi?b|hbm\w*|sxm\d?|\d+w|gen\d|x\d+", word):
            return f"rtx{word}" if re.fullmatch(r"[2-5]0[5-9]0(ti|d)?", word) else word.removesuffix("sxm")
    return ""


def _form(words: list[str]) -> str:
    found = [form for form in FORMS for word in words if form in word]
    return found[0] if found else "sxm"


def network_bytes_per_s(interconnect: str, *, devices_per_host: int) -> float | None:
    """One device's share of its host's ports, one direction, from words such as `8x HDR200 per node`, `1600 Gb/s RoCE
    per node` or `400 Gb/s per GPU`; None where they do not say how much.

    Networks are stated in bits; bytes count only beside the name of a network, since links inside a host are in bytes.
    """
    between_hosts = _search(NETWORKS, interconnect)
    for part in re.split(r"[;,(]", interconnect.replace("×", "x")):
        ports = re.search(r"(\d+)\s*x(?![a-z])", part)
        num_ports = int(ports[1]) if ports else 1
        if match := re.search(r"(\d+(?:\.\d+)?)\s*([TtGg])(?:b(?:it)?s?/s|bps|bE\b|bit\b)", part):
            bytes_per_s = float(match[1]) / 8 * (1e12 if match[2] in "Tt" else 1e9)
        elif (match := re.search(r"(\d+(?:\.\d+)?)\s*GB/s", part)) and between_hosts and not _search(INSIDE, part):
            bytes_per_s = float(match[1]) * 1e9
        elif ports and (match := _search("|".join(INFINIBAND_GBIT), part)):
            bytes_per_s = INFINIBAND_GBIT[match[0].casefold()] / 8 * 1e9
        else:
            continue
        if ports is None and _search(r"per (gpu|device|rank|gcd)", part):
            return bytes_per_s
        return bytes_per_s * num_ports / devices_per_host
    return None


def _search(pattern: str, text: str) -> re.Match[str] | None:
    return re.search(pattern, text, re.IGNORECASE)
