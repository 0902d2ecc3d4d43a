"""The guess that every price must beat: model FLOPs over a constant rate, times the bubble's closed form.

    time = FLOPs / (devices × rate) × (1 + (stages - 1) / (micro-batches × virtual stages))

The rate is fitted for each GPU, dtype and level of recomputation on the very rows it is judged by, which flatters it;
`without` leaves a source out of the fit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoparallel.cost.tables import load_table
from benchmarks.published.question import Question
from benchmarks.scores.answers import Timed

Key = tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One row, and the rate in FLOP/s of a device at which the guess would be right."""

    source: str
    keys: tuple[Key, ...]
    """What its rate is shared by: the narrowest first."""
    rate: float


def work(question: Question) -> float:
    """FLOPs of one device, stretched by the bubble: over a rate, the time of a step."""
    strategy, tokens = question.strategy, question.batch_size * question.seq_len
    bubble = (strategy.num_stages - 1) / (strategy.num_micro_batches * strategy.virtual_stages)
    return tokens * question.structure.train_flops_per_token / question.flavor.num_devices * (1 + bubble)


class Baseline:
    """Rates fitted on rows that state a time."""

    def __init__(self, rows: Iterable[Timed]) -> None:
        self.samples = [
            Sample(row.run.source.name, _keys(row.question), work(row.question) / row.measured_s) for row in rows
        ]

    def step_time_s(self, question: Question, *, without: str | None = None) -> float | None:
        """None where no row of any GPU is left."""
        samples = [sample for sample in self.samples if sample.source != without]
        for key in _keys(question):
            alike = [sample for sample in samples if key in sample.keys]
            if alike:
                return work(question) / _best_rate(alike)
        if not samples:
            return None
        shares = [Sample(s.source, (), s.rate / _peak(s.keys[0][0], s.keys[0][1])) for s in samples]
        return work(question) / (_best_rate(shares) * _peak(question.flavor.device, question.options.dtype))


def _keys(question: Question) -> tuple[Key, ...]:
    device, dtype, again = question.flavor.device, question.options.dtype, question.strategy.recomputation
    return (device, dtype, again), (device, dtype)


def _peak(device: str, dtype: str) -> float:
    """Of the nearest dtype that the table has: this only carries a rate from one GPU to another."""
    peaks = load_table(device).peak_flops_per_s
    return next((peaks[name].value for name in (dtype, "bfloat16", "float16", "float32") if name in peaks), 1.0)


def _best_rate(samples: Sequence[Sample]) -> float:
    """That with the least mean absolute error, every source counting once: a weighted median.

    The error of a sample is |its rate / rate - 1|, linear in 1 / rate with slope its own rate.
    """
    per_source = Counter(sample.source for sample in samples)
    weights: dict[float, float] = defaultdict(float)
    for sample in samples:
        weights[sample.rate] += sample.rate / per_source[sample.source]
    half, passed = sum(weights.values()) / 2, 0.0
    for rate in sorted(weights, reverse=True):
        passed += weights[rate]
        if passed >= half:
            return rate
    raise AssertionError("no samples")
