"""A file of published training runs in, one `Run` for each of its rows out; what a row lacks is None, what it has
beside is ignored. A row that cannot even be read comes back as `Unread`, with the reason: no row is dropped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _absent(value: Any) -> Any:
    """Zero, nothing and words for it are no count and no amount."""
    words = ("", "none", "null", "n/a", "na", "auto", "unknown", "-")
    return None if value == 0 or (isinstance(value, str) and value.strip().casefold() in words) else value


def _level(value: Any) -> Any:
    """`ZeRO-3` and `FSDP` are 3."""
    if not isinstance(value, str):
        return value
    digit = re.search(r"\d", value)
    return int(digit[0]) if digit else 3 if "fsdp" in value.casefold() else None


T = TypeVar("T")
Text = Annotated[str, BeforeValidator(_text)]
Count = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_absent)]
Amount = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_absent)]
Level = Annotated[Annotated[int, Field(ge=0, le=3)] | None, BeforeValidator(_level)]


class Facts(BaseModel):
    """Part of a row."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Source(Facts):
    """Where the row was published."""

    name: Text = "unnamed"
    where: Text = ""
    url: Text = ""


class ModelFacts(Facts):
    """A decoder."""

    name: Text = ""
    family: Text = ""
    layers: Count = None
    hidden: Count = None
    heads: Count = None
    kv_heads: Count = None
    head_dim: Count = None
    ffn_hidden: Count = None
    vocab: Count = None
    seq_len: Count = None
    gated_mlp: bool | None = None
    tied_embeddings: bool | None = None
    params: Amount = None
    moe: Any = None


class Gpu(Facts):
    """What the row calls one GPU: a card of two dies is one."""

    name: Text = ""
    memory_gb: Amount = None


class Measured(Facts):
    """As published; rates are those of model FLOPs unless `tflops_kind` says otherwise."""

    iter_s: Amount = None
    tokens_per_s: Amount = None
    tokens_per_s_per_gpu: Amount = None
    samples_per_s: Amount = None
    samples_per_s_per_gpu: Amount = None
    tflops_per_gpu: Amount = None
    tflops_kind: Text = ""
    tflops_formula: Text = ""
    mfu: Amount = None
    hfu: Amount = None
    mfu_peak_tflops: Amount = None
    peak_mem_gb: Amount = None
    peak_mem_mb: Amount = None
    param_opt_mem_gib: Amount = None
    activation_mem_gib: Amount = None


class Repeat(Facts):
    """The same run once more: with another version of the software, say."""

    iter_s: Amount = None
    tokens_per_s_per_gpu: Amount = None


class Run(Facts):
    """One published run. `dp` counts ranks outside `tp`, `pp` and `cp`."""

    id: Text = ""
    source: Source = Source()
    model: ModelFacts = ModelFacts()
    gpu: Gpu = Gpu()
    n_gpus: Count = None
    gpus_per_node: Count = None
    ranks_per_gpu: Count = None
    interconnect: Text = ""
    precision: Text = ""
    global_batch: Count = None
    micro_batch: Count = None
    dp: Count = None
    tp: Count = None
    pp: Count = None
    cp: Count = None
    ep: Count = None
    sequence_parallel: bool | None = None
    virtual_stages: Count = None
    schedule: Text = ""
    zero: Level = None
    recompute: Text = ""
    attention_kernel: Text = ""
    framework: Text = ""
    compile: bool | None = None
    measured: Measured = Measured()
    derived: Measured = Measured()
    repeats: tuple[Repeat, ...] = ()
    outcome: Text = ""
    """`out of memory` where the run failed."""
    quality: Text = ""
    notes: Text = ""

    @cached_property
    def said(self) -> str:
        """Everything the row states in words about how it ran, for facts that have no field."""
        return f"{self.notes} {self.schedule} {self.recompute}".casefold()

    @property
    def out_of_memory(self) -> bool:
        return "memory" in self.outcome.casefold() or "oom" in self.outcome.casefold()


class Unexpressed(Exception):
    """Why there is no question that we can ask of a row."""


def stated(value: T | None, name: str) -> T:
    """What a row must state."""
    if value is None:
        raise Unexpressed(f"{name} is not stated")
    return value


@dataclass(frozen=True)
class Unread:
    """A row that is not one."""

    id: str
    source: str
    reason: str


def read_runs(path: Path) -> tuple[list[Run], list[Unread]]:
    """Rows of a file, which is a list of them or has one under `runs`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.get("runs", []) if isinstance(content, dict) else content
    runs: list[Run] = []
    unread: list[Unread] = []
    for number, row in enumerate(rows if isinstance(rows, list) else []):
        found = read_run(row, number=number)
        (runs if isinstance(found, Run) else unread).append(found)  # type: ignore[arg-type]
    return runs, unread


def read_run(row: Any, *, number: int = 0) -> Run | Unread:
    """One row. Empty parts (`null`) count as absent, numbers may be text; whatever else does not fit is `Unread`."""
    if not isinstance(row, dict):
        return Unread(id=f"row {number}", source="unnamed", reason=f"the row is a {type(row).__name__}, not an object")
    stated = {key: value for key, value in row.items() if value is not None}
    try:
        return Run.model_validate({"id": f"row {number}", **stated})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("constrained"))
        source = row.get("source")
        return Unread(
            id=str(row.get("id", f"row {number}")),
            source=str(source.get("name", "unnamed")) if isinstance(source, dict) else "unnamed",
            reason=f"the field {field} cannot be read: {problem['msg']}",
        )
