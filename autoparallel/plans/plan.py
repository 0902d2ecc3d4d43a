"""A plan is the compiled artefact: the question, the chosen strategy with its price, and every other candidate.

Saved as JSON. Same question, same bytes: it holds no time, no host and no path.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from autoparallel.errors import PlanFormatError, PlanMismatchError
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.precision import Precision
from autoparallel.ir.schema import Schema
from autoparallel.plans import files
from autoparallel.plans.candidate import Candidate, Pruned
from autoparallel.plans.estimate import Estimate
from autoparallel.plans.strategy import RECOMPUTATION_LEVELS, Constraints, Strategy

SCHEMA_VERSION = "1.0"
WRONG_PLAN = "make the plan again with `autoparallel plan`"


class ModelSummary(Schema):
    """What a plan remembers of its model."""

    name: str
    architecture: str
    fingerprint: str = Field(min_length=1)
    """sha256 of the captured graph's structure."""
    num_parameters: int = Field(ge=0)
    trainable_parameters: int = Field(ge=0)
    parameter_bytes: int = Field(ge=0)
    num_blocks: int = Field(ge=0)
    block_classes: tuple[int, ...]
    """Class of each block in order; equal blocks share a class."""


class Remembered:
    """What a plan was made for, while the process lives: never compared, copied, saved or sent, and a model that can
    be freed is not kept from it.
    """

    def __init__(self, model: Any = None) -> None:
        self._model: Any = weakref.ref(model) if hasattr(model, "named_parameters") else lambda: model

    @property
    def model(self) -> Any:
        """A model, its config or path, or its captured graph; None if that is not known."""
        return self._model()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remembered)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()


class Plan(Schema):
    """How one model trains on one flavor, and why so."""

    schema_version: str = SCHEMA_VERSION
    autoparallel_version: str
    torch_version: str
    model: ModelSummary
    flavor: Flavor
    constraints: Constraints
    batch_size: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    precision: Precision
    strategy: Strategy
    """The chosen one, its stages filled in."""
    estimate: Estimate
    bound_s: float = Field(default=0.0, ge=0.0)
    """No plan of the space that was searched has a shorter predicted step."""
    num_candidates: int = Field(default=0, ge=0)
    """In that space."""
    candidates: tuple[Candidate, ...]
    """Those that were looked at one by one, in the order of the space."""
    pruned: tuple[Pruned, ...] = ()
    """The others, in groups, and why none of them can be better."""
    notes: tuple[str, ...] = ()
    """What capture had to do differently, and what tensor parallelism computes on whole tensors."""
    assumptions: tuple[str, ...] = ()
    """Figures of kind "assumed" in the cost table that the prices rest on."""
    _remembered: Remembered = PrivateAttr(default_factory=Remembered)

    @model_validator(mode="after")
    def _is_consistent(self) -> Plan:
        _check_arithmetic(self)
        _check_stages(self)
        _check_recomputation(self)
        _check_amounts(self)
        return self

    @property
    def gap(self) -> float:
        """By what share of it the predicted step may exceed the shortest of the space, at most."""
        return self.estimate.step_time_s / self.bound_s - 1 if self.bound_s > 0 else 0.0

    def asked_for(self, model: Any) -> Plan:
        """This plan, which now remembers its model."""
        self._remembered = Remembered(model)
        return self

    def save(self, path: str | Path) -> None:
        """Write the plan as canonical JSON; an existing file is replaced at once or not at all."""
        files.write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. A broken file is a PlanFormatError, stages that do not add up are a PlanMismatchError."""
        file = Path(path)
        text = files.read_text(file)
        newer = _newer_minor(files.parse_object(text, path=file).get("schema_version", SCHEMA_VERSION), path=file)
        return files.validate(cls, text, path=file, newer=newer)

    def to_json(self) -> str:
        """Canonical JSON: equal plans give equal bytes."""
        return files.canonical_json(self)

    def hash(self) -> str:
        """sha256 of the canonical JSON; ranks compare it before they run."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def remembered(self) -> Any:
        """Its model, a config or path of it, or its graph; None for a plan from a file."""
        return self._remembered.model

    def explain(self, *, why_not: Constraints | Mapping[str, Any] | str | None = None, model: Any = None) -> str:
        """The plan in words and tables: what was chosen, what it costs, and why not the others.

        `why_not` (such as "tensor_parallel=8", a dict or `Constraints`) asks about one other way instead: the best plan
        under those constraints is made and put beside this one. A plan from a file needs its `model` for that.
        """
        if why_not is not None:
            from autoparallel.report.compare import why_not_text

            return why_not_text(self, why_not, model=model)
        from autoparallel.report.explain import explain

        return explain(self)

    def check_matches(self, *, fingerprint: str | None = None, num_devices: int | None = None) -> None:
        """Raise PlanMismatchError unless the plan is for this model and this number of devices."""
        if fingerprint is not None and fingerprint != self.model.fingerprint:
            raise PlanMismatchError(
                f"The plan is for another model than this one (planned: {self.model.name}).",
                why=f"this graph's fingerprint is {fingerprint[:12]}, the plan's is {self.model.fingerprint[:12]}",
                remedy=WRONG_PLAN,
            )
        if num_devices is not None and num_devices != self.flavor.num_devices:
            raise PlanMismatchError(
                f"The plan is for {self.flavor.num_devices} devices ({self.flavor.name}), and here are {num_devices}.",
                why=f"{_degrees(self.strategy)} = {self.strategy.num_devices} devices",
                remedy=f"run on {self.flavor.num_devices} devices, or {WRONG_PLAN} for {num_devices}",
            )


def _newer_minor(version: Any, *, path: Path) -> str:
    """`version` if a newer minor schema wrote the file, which may still be readable; other majors are refused."""
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        files.refuse(path, f"schema_version: expected a version such as {SCHEMA_VERSION!r}")
    major, minor = (int(part) for part in parts)
    our_major, our_minor = (int(part) for part in SCHEMA_VERSION.split("."))
    if major > our_major:
        newer = f"written by a newer autoparallel (schema {version}, this one reads {our_major}.x)"
        files.refuse(path, f"schema_version: {newer}; upgrade it")
    if major < our_major:
        files.refuse(path, f"schema_version: {version} is older than any released schema ({SCHEMA_VERSION})")
    return str(version) if minor > our_minor else ""


def _degrees(strategy: Strategy) -> str:
    parallel = f"{strategy.tensor_parallel} tensor parallel x {strategy.data_parallel} data parallel"
    return f"{strategy.num_stages} stages x {parallel}"


def _check_arithmetic(plan: Plan) -> None:
    """Degrees multiply to the flavor's devices, and rows to the batch."""
    strategy, flavor = plan.strategy, plan.flavor
    if strategy.num_devices != flavor.num_devices:
        raise PlanFormatError(
            f"strategy: its degrees do not use the {flavor.num_devices} devices of {flavor.name}.",
            why=f"{_degrees(strategy)} = {strategy.num_devices}, not {flavor.num_devices}",
            remedy=WRONG_PLAN,
        )
    if strategy.batch_size != plan.batch_size:
        rows = f"{strategy.data_parallel} data parallel x {strategy.batch_per_device} per device"
        raise PlanFormatError(
            f"strategy: its rows do not add up to batch_size {plan.batch_size}.",
            why=f"{rows} x {strategy.num_micro_batches} micro-batches = {strategy.batch_size}, not {plan.batch_size}",
            remedy=WRONG_PLAN,
        )


def _check_stages(plan: Plan) -> None:
    """Every segment, first to last, belongs to exactly one stage, in order; estimates are by pipeline rank."""
    stages, strategy, estimates = plan.strategy.stages, plan.strategy, plan.estimate.stages
    if stages is None or len(stages) != strategy.total_stages or len(estimates) != strategy.num_stages:
        found = f"strategy.stages has {len(stages or ())} entries, estimate.stages {len(estimates)}"
        announced = f"{strategy.total_stages} stages are announced"
        if strategy.virtual_stages > 1:
            announced += f", on {strategy.num_stages} pipeline ranks"
        raise PlanMismatchError(f"strategy.stages: {announced}.", why=found, remedy=WRONG_PLAN)
    expected = 0
    for index, stage in enumerate(stages):
        first, last = stage.first_segment, stage.last_segment
        if first != expected or last < first:
            kind = "gap" if first > expected else "overlap" if first < expected else "empty stage"
            raise PlanMismatchError(
                f"strategy.stages[{index}]: {kind} in the stage ranges.",
                why=f"it holds segments {first} to {last}, and the next segment to place is {expected}",
                remedy=WRONG_PLAN,
            )
        expected = last + 1
    num_segments = plan.model.num_blocks + 2
    if expected != num_segments:
        raise PlanMismatchError(
            f"strategy.stages: they end at segment {expected - 1}, and the model's last segment is {num_segments - 1}.",
            why=f"{plan.model.num_blocks} blocks, what comes before and what comes after are {num_segments} segments",
            remedy=WRONG_PLAN,
        )


def _check_recomputation(plan: Plan) -> None:
    """A name for every block where there are several, and none beyond what the strategy allows."""
    strategy = plan.strategy
    highest, least = strategy.recomputation, strategy.least_recomputation or strategy.recomputation
    allowed = range(RECOMPUTATION_LEVELS[least], RECOMPUTATION_LEVELS[highest] + 1)
    for index, stage in enumerate(strategy.stages or ()):
        where, names = f"strategy.stages[{index}].recomputation", stage.recomputation
        num_blocks = len(stage.blocks(plan.model.num_blocks + 2))
        if isinstance(names, tuple) and len(names) != num_blocks:
            raise PlanMismatchError(
                f"{where}: {len(names)} names for {num_blocks} blocks.",
                why="it is one name for all blocks of the stage, or one for each",
                remedy=WRONG_PLAN,
            )
        for name in names if isinstance(names, tuple) else (names,):
            if RECOMPUTATION_LEVELS[name] not in allowed:
                raise PlanMismatchError(
                    f"{where}: {name} is not in {strategy.recomputation_range}.",
                    why="strategy.recomputation is the highest level, least_recomputation the lowest",
                    remedy=WRONG_PLAN,
                )


def _check_amounts(plan: Plan) -> None:
    """No negative times or bytes, and every candidate is either priced or rejected."""
    _check_estimate(plan.estimate, "estimate")
    for index, candidate in enumerate(plan.candidates):
        if (candidate.estimate is None) == (candidate.rejection is None):
            raise PlanFormatError(
                f"candidates[{index}]: it must have either an estimate or a rejection.",
                why="it has both or neither",
                remedy=WRONG_PLAN,
            )
        if candidate.estimate is not None:
            _check_estimate(candidate.estimate, f"candidates[{index}].estimate")


def _check_estimate(estimate: Estimate, path: str) -> None:
    amounts: list[tuple[str, float]] = [(f"{path}.step_time_s", estimate.step_time_s), (f"{path}.mfu", estimate.mfu)]
    amounts.append((f"{path}.tokens_per_second", estimate.tokens_per_second))
    for index, stage in enumerate(estimate.stages):
        where = f"{path}.stages[{index}]"
        amounts += [(f"{where}.forward_s", stage.forward_s), (f"{where}.backward_s", stage.backward_s)]
        amounts += [(f"{where}.parameters", stage.parameters), (f"{where}.peak_memory_bytes", stage.peak_memory_bytes)]
        amounts += [(f"{where}.memory_parts_bytes.{name}", size) for name, size in stage.memory_parts_bytes.items()]
    for where, amount in amounts:
        if amount < 0:
            raise PlanFormatError(f"{where}: negative.", why=f"it is {amount}", remedy=WRONG_PLAN)
