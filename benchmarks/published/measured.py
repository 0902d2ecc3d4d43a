"""The step time of a row in seconds, and how it was stated or follows from what was."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.published.question import Question
from benchmarks.published.rows import Run


@dataclass(frozen=True)
class StepTime:
    """Of one optimizer step of the whole cluster."""

    seconds: float
    how: str


def step_time(run: Run, question: Question) -> StepTime | None:
    """None where the row states no speed. What was measured comes before what was derived, and of the former what
    needs the fewest other facts: FLOP/s last, since their formula is a convention.
    """
    measured, gpus = run.measured, run.n_gpus or 1
    tokens = question.batch_size * question.seq_len
    samples = tokens / (run.model.seq_len or question.seq_len)
    if measured.iter_s:
        return StepTime(measured.iter_s, "iter_s")
    if measured.tokens_per_s:
        return StepTime(tokens / measured.tokens_per_s, "tokens_per_s")
    if measured.tokens_per_s_per_gpu:
        return StepTime(tokens / (measured.tokens_per_s_per_gpu * gpus), "tokens_per_s_per_gpu")
    if measured.samples_per_s:
        return StepTime(samples / measured.samples_per_s, "samples_per_s")
    if measured.samples_per_s_per_gpu:
        return StepTime(samples / (measured.samples_per_s_per_gpu * gpus), "samples_per_s_per_gpu")
    if run.derived.iter_s:
        return StepTime(run.derived.iter_s, "derived.iter_s")
    if run.derived.tokens_per_s_per_gpu:
        return StepTime(tokens / (run.derived.tokens_per_s_per_gpu * gpus), "derived.tokens_per_s_per_gpu")
    return _from_flops(run, question, tokens=tokens, gpus=gpus)


def _from_flops(run: Run, question: Question, *, tokens: int, gpus: int) -> StepTime | None:
    """From FLOP/s or utilisation. `hardware` counts recomputation; attention is uncut unless the row says that
    causality was subtracted.
    """
    measured, structure = run.measured, question.structure
    per_token = structure.train_flops_per_token
    said = f"{measured.tflops_kind} {measured.tflops_formula} {run.notes}".casefold()
    if "causal" in said and ("half" in said or "subtract" in said):
        per_token -= 6 * structure.layers * structure.heads * structure.head_dim * structure.seq_len
    if measured.tflops_per_gpu:
        hardware = "hardware" in measured.tflops_kind.casefold()
        per_token *= 1 + (forward_again(question) / 3 if hardware else 0)
        return StepTime(tokens * per_token / (measured.tflops_per_gpu * 1e12 * gpus), "tflops_per_gpu")
    if measured.mfu and measured.mfu_peak_tflops:
        return StepTime(tokens * per_token / (measured.mfu * measured.mfu_peak_tflops * 1e12 * gpus), "mfu")
    return None


def forward_again(question: Question) -> float:
    """The share of the forward that backward repeats, attention alone under selective recomputation."""
    strategy, structure = question.strategy, question.structure
    if strategy.recomputation == "selective":
        attention = 12 * structure.layers * structure.heads * structure.head_dim * question.seq_len
        return attention / structure.train_flops_per_token
    if strategy.least_recomputation == "none" and strategy.stages:
        levels = [level for stage in strategy.stages for level in _levels(stage.recomputation)]
        return levels.count("full") / max(1, len(levels))
    return 1.0 if strategy.recomputation == "full" else 0.0


def _levels(recomputation: str | tuple[str, ...]) -> tuple[str, ...]:
    return (recomputation,) if isinstance(recomputation, str) else recomputation
