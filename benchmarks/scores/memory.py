"""Memory that rows state beside what we predict, and whether what ran is called possible and what failed impossible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scores.answers import Answer

GIB = 2**30
STATES = ("parameters", "gradients", "optimizer")
ACTIVATIONS = ("activations",)
LAYOUT_FIELDS = ("micro_batch", "tp", "pp", "sequence_parallel", "recompute", "attention_kernel", "notes")


@dataclass(frozen=True)
class Amount:
    """Of one device: the fullest one's peak, or a part of the first stage's."""

    id: str
    source: str
    what: str
    stated_bytes: float
    predicted_bytes: float

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.stated_bytes - 1


def amounts(answers: Sequence[Answer]) -> list[Amount]:
    """All that rows state. Published "GB" are those of nvidia-smi and torch: 2^30 bytes."""
    found = []
    for answer in answers:
        measured, estimate = answer.run.measured, answer.estimate
        if estimate is None:
            continue
        first = estimate.stages[0].memory_parts_bytes
        peak = max(stage.peak_memory_bytes for stage in estimate.stages)
        stated = (
            ("peak", measured.peak_mem_gb, 1, peak),
            ("peak", measured.peak_mem_mb, 1 / 1024, peak),
            ("parameters and states", measured.param_opt_mem_gib, 1, sum(first.get(part, 0) for part in STATES)),
            ("activations", measured.activation_mem_gib, 1, sum(first.get(part, 0) for part in ACTIVATIONS)),
        )
        for what, amount, unit, predicted in stated:
            if amount is not None:
                found.append(Amount(answer.run.id, answer.run.source.name, what, amount * unit * GIB, predicted))
    return found


@dataclass(frozen=True)
class Verdicts:
    """On runs whose end is known; `wrong` are the ids of those that we judge the other way."""

    runs: int
    wrong: tuple[str, ...]


def ran(answers: Sequence[Answer]) -> Verdicts:
    """Of those that were timed, the ones that we call impossible."""
    judged = [a for a in answers if a.estimate is not None and a.measured is not None and not a.run.out_of_memory]
    return Verdicts(runs=len(judged), wrong=tuple(a.run.id for a in judged if not fits(a)))


def failed(answers: Sequence[Answer]) -> Verdicts:
    """Of those that ran out of memory, the ones that we call possible."""
    judged = [a for a in answers if a.estimate is not None and a.run.out_of_memory]
    return Verdicts(runs=len(judged), wrong=tuple(a.run.id for a in judged if fits(a)))


def fits(answer: Answer) -> bool:
    assert answer.question is not None
    assert answer.estimate is not None
    capacity = answer.question.flavor.memory_bytes
    return all(stage.peak_memory_bytes <= capacity for stage in answer.estimate.stages)


def boundary(answers: Sequence[Answer]) -> tuple[int, int]:
    """Pairs of a run that ran and one that failed which differ in one field of the layout, by one step where it is a
    number: how many there are, and of how many both are called right.
    """
    known = [a for a in answers if a.estimate is not None]
    ended = [a for a in known if a.measured is not None and not a.run.out_of_memory]
    pairs = [(a, b) for b in known if b.run.out_of_memory for a in ended if _neighbours(a, b)]
    return len(pairs), sum(fits(a) and not fits(b) for a, b in pairs)


def _neighbours(one: Answer, other: Answer) -> bool:
    a, b = one.run, other.run
    if (a.source.name, a.model, a.n_gpus, a.global_batch) != (b.source.name, b.model, b.n_gpus, b.global_batch):
        return False
    differing = [(getattr(a, f), getattr(b, f)) for f in LAYOUT_FIELDS if getattr(a, f) != getattr(b, f)]
    if len(differing) != 1:
        return False
    ((x, y),) = differing
    numbers = isinstance(x, int) and isinstance(y, int) and not isinstance(x, bool)
    return not numbers or max(x, y) == 2 * min(x, y)
