"""A problem in; what planning for it took and what the plan is out, measured in a process of its own, imports included.

As a program: the problem as JSON on stdin, the measurement as JSON on stdout.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.searches.problems import Problem

ROOT = Path(__file__).resolve().parents[2]


class NoPlan(Exception):
    """The process found no plan."""


@dataclass(frozen=True)
class Measured:
    """Seconds are wall clock unless they say otherwise; the estimates are predicted."""

    whole_s: float
    """The process, from its start to its end."""
    imports_s: float
    capture_s: float
    price_s: float
    """Segments under every split and micro-batch size."""
    search_s: float
    search_cpu_s: float
    """Of this process and its workers, pricing left out."""
    cpu_s: float
    """Of the whole process and its workers."""
    rss_mib: int
    """Peak of the process, its workers left out."""
    num_candidates: int
    looked_at: int
    gap: float
    plan: str
    blocks: tuple[int, ...]
    """By stage."""
    step_time_s: float
    mfu: float
    model_tflops_per_s: float
    """Of one device: model FLOPs of a step over its time."""
    peak_memory_gib: float


def measured(problem: Problem) -> Measured:
    """In a fresh process. Raises NoPlan where that fails, with the error."""
    begin_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.searches.measure"],
        input=json.dumps(problem.as_dict()),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it died without a word"]
        raise NoPlan(next((line for line in reversed(said) if "Error: " in line), said[-1]))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    whole_s = time.perf_counter() - begin_s
    return Measured(**found | {"whole_s": whole_s, "blocks": tuple(found["blocks"])})


def measure(problem: Problem) -> Measured:
    """In this process."""
    begin_s = time.perf_counter()
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from autoparallel import api
    from autoparallel.cost.tables import load_table
    from autoparallel.ir.precision import choose_precision
    from autoparallel.plans.strategy import Constraints
    from autoparallel.search.select import search, select_best_graph_from_candidates

    flavor, constraints, config = problem.cluster, Constraints(**problem.constraints), problem.structure.config()
    precision = choose_precision(
        flavor, dtype=problem.dtype, model_dtype=api._model_dtype(config), mixed_precision="auto"
    )
    imported_s = time.perf_counter()
    graph = api._capture(config, precision).graph
    captured_s = time.perf_counter()
    workload = api._workload(
        graph,
        flavor,
        load_table(flavor.device),
        batch_size=problem.batch_size,
        seq_len=problem.seq_len,
        precision=precision,
        constraints=constraints,
    )
    priced_s, before_s = time.perf_counter(), _cpu_s()
    found = search(workload, constraints, workers=problem.workers)
    chosen = select_best_graph_from_candidates(found.candidates, workload=workload, constraints=constraints)
    searched_s, after_s = time.perf_counter(), _cpu_s()
    assert chosen.estimate is not None
    estimate, strategy = chosen.estimate, chosen.strategy
    num_segments = graph.num_segments
    return Measured(
        whole_s=searched_s - begin_s,
        imports_s=imported_s - begin_s,
        capture_s=captured_s - imported_s,
        price_s=priced_s - captured_s,
        search_s=searched_s - priced_s,
        search_cpu_s=after_s - before_s,
        cpu_s=after_s,
        rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        num_candidates=found.num_candidates,
        looked_at=len(found.candidates),
        gap=estimate.step_time_s / found.bound_s - 1,
        plan=strategy.summary(),
        blocks=tuple(len(stage.blocks(num_segments)) for stage in strategy.stages or ()),
        step_time_s=estimate.step_time_s,
        mfu=estimate.mfu,
        model_tflops_per_s=workload.step_flops / estimate.step_time_s / flavor.num_devices / 1e12,
        peak_memory_gib=estimate.peak_memory_bytes / 2**30,
    )


def _cpu_s() -> float:
    """Of this process and of those children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Problem(**json.load(sys.stdin))))))
