"""Claim: the emitted program costs no more than what an expert writes by hand for the same plan.

Both programs are built in the same processes from the same weights and fed the same batches: (a) against
DistributedDataParallel, (b) fully_shard, (c) torch.distributed.pipelining, (d) parallelize_module, each on two gloo
ranks of one thread, (e) in one process against plain eager. Losses must agree. Operators, collectives and allocated
bytes of a step (see counting.py) may not exceed the hand-written program's on any rank. Times are taken in alternating
pairs, with pairs of the hand-written program against itself in between; the upper 95 % bound of the median ratio may
not exceed 1.05. The first step may take one step more than a normal one (or as much as the hand-written one's, whose
optimizer makes its states there too); what planning leaves to do before it is named and timed apart.

    python examples/prepare_smollm2.py && make bench-speed
    python -m benchmarks.runtime_speed --quick --cases ddp --models llama
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from torch import Tensor, nn

import autoparallel
from autoparallel.plans.plan import Plan
from autoparallel.plans.strategy import Constraints
from benchmarks.counting import Counts, counts_of
from benchmarks.handwritten import PROGRAMS, Batch, user_loop

SMOLLM2 = Path("runs/smollm2")
LIMIT = 1.05
LOSS_TOLERANCE = 2e-6
"""Relative, of fp32 losses of the first steps."""
WARM_UP = 3
CONTROL_EVERY = 3


@dataclass(frozen=True)
class Case:
    """A hand-written program and the constraints under which the planner chooses its plan."""

    title: str
    num_ranks: int
    constraints: Constraints


def _constraints(**fields: Any) -> Constraints:
    return Constraints(activation_recomputation=False, sequence_parallel=False, **fields)


_REPLICAS: dict[str, Any] = {"num_stages": 1, "tensor_parallel": 1, "data_parallel": 2, "num_micro_batches": 1}
CASES = {
    "ddp": Case("(a) DDP", 2, _constraints(distribute_parameter=0, **_REPLICAS)),
    "fsdp": Case("(b) fully_shard", 2, _constraints(distribute_parameter=3, **_REPLICAS)),
    "pipeline": Case(
        "(c) pipelining, 1F1B",
        2,
        _constraints(num_stages=2, data_parallel=1, tensor_parallel=1, num_micro_batches=4, schedule="1f1b"),
    ),
    "tensor": Case(
        "(d) parallelize_module", 2, _constraints(num_stages=1, data_parallel=1, tensor_parallel=2, num_micro_batches=1)
    ),
    "eager": Case("(e) plain eager", 1, _constraints(num_micro_batches=1)),
}


def llama() -> nn.Module:
    """Six layers of width 512."""
    config = transformers.LlamaConfig(
        num_hidden_layers=6, hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def smollm2() -> nn.Module:
    """SmolLM2-135M, tied."""
    return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    rows: int
    tokens: int


MODELS = {"llama": Model(llama, 8, 64), "smollm2": Model(smollm2, 4, 64)}


# ---------------------------------------------------------------------------------------- on every rank


def compare(case: str, model: nn.Module, plan: str, *, rows: int, tokens: int, pairs: int) -> dict[str, Any]:
    """Both programs in this process: losses, counts, seconds."""
    model.train()
    vocabulary = model.config.vocab_size
    strategy = Plan.load(plan).strategy
    hand = PROGRAMS[case](copy.deepcopy(model), strategy)
    with stopwatch() as setup_s:
        ours = user_loop(autoparallel.compile(model, plan=plan, example_inputs=make_batch(0, rows, tokens, vocabulary)))
    steps = {"hand": hand, "ours": ours}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    first_s: dict[str, float] = {}
    for index in range(WARM_UP):
        batch = make_batch(index, rows, tokens, vocabulary)
        for name, step in steps.items():
            spent = seconds_of(lambda name=name, step=step, batch=batch: losses[name].append(step(batch).item()))
            first_s.setdefault(name, spent.wall)
    batch = make_batch(WARM_UP, rows, tokens, vocabulary)
    counts, calls = {}, {}
    for name, step in steps.items():
        counts[name], calls[name] = counts_of(lambda step=step: step(batch))
    kinds = {
        name: sorted((kind, size, times) for (kind, size), times in found.collectives.items())
        for name, found in calls.items()
    }
    return {
        "losses": losses,
        "first_s": first_s,
        "setup_s": setup_s,
        "counts": {name: found.as_dict() for name, found in counts.items()},
        "collectives": kinds,
        "operators": {name: dict(found.operators) for name, found in calls.items()},
        "seconds": alternate(steps, batch, pairs),
    }


def make_batch(seed: int, rows: int, tokens: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}


def alternate(steps: dict[str, Callable[[Batch], Tensor]], batch: Batch, pairs: int) -> dict[str, list[Seconds]]:
    """Pairs in the order ABBA, every third one followed by a pair of hand-written steps whose roles alternate too."""
    found: dict[str, list[Seconds]] = {"hand": [], "ours": [], "control": [], "control again": []}
    for turn in range(pairs):
        order = [("ours", "ours"), ("hand", "hand")][:: 1 - 2 * (turn % 2)]
        control = [("control", "hand"), ("control again", "hand")][:: 1 - 2 * (turn // CONTROL_EVERY % 2)]
        for name, program in order + (control if turn % CONTROL_EVERY == 0 else []):
            found[name].append(seconds_of(lambda program=program: steps[program](batch)))
    return found


class Seconds(NamedTuple):
    wall: float
    """From the moment when all ranks may begin to the one when all have ended."""
    cores: float
    """Of all threads of this process: what other programs on the machine hardly disturb."""


def seconds_of(step: Callable[[], Any]) -> Seconds:
    dist.barrier()
    wall, cores = time.perf_counter(), time.process_time()
    step()
    cores = time.process_time() - cores
    dist.barrier()
    return Seconds(time.perf_counter() - wall, cores)


class stopwatch:
    """Seconds of each part of what `compile` does when it is given a plan and a batch."""

    def __enter__(self) -> dict[str, float]:
        from autoparallel.runtime import engine, start

        self.spent: dict[str, float] = {}
        self.originals = [(start, "capture"), (engine, "place"), (engine.Engine, "_emit")]
        for owner, name in self.originals:
            setattr(owner, name, self.timed(getattr(owner, name), name.strip("_")))
        return self.spent

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.spent[name] = time.perf_counter() - start
            return result

        return run

    def __exit__(self, *error: object) -> None:
        for owner, name in self.originals:
            setattr(owner, name, getattr(owner, name).__wrapped__)


def rank_main(rank: int, num_ranks: int, port: int, folder: str, case: str, model: str, plan: str, pairs: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    quiet()
    size = MODELS[model]
    found = compare(case, size.make(), plan, rows=size.rows, tokens=size.tokens, pairs=pairs)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # torch's own goodbye waits for threads of both programs' groups


def quiet() -> None:
    from loguru import logger

    logger.remove()


# ---------------------------------------------------------------------------------------- in the first process


def run(case: str, model: str, *, pairs: int) -> dict[str, Any]:
    """Plan, start the ranks, and put together what they found."""
    made, size = CASES[case], MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "plan.json"))
        plan = autoparallel.plan(
            size.make(),
            f"cpu:{made.num_ranks}",
            batch_size=size.rows,
            seq_len=size.tokens,
            constraints=made.constraints,
        )
        plan.save(path)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (made.num_ranks, port, folder, case, model, path, pairs)
        torch.multiprocessing.spawn(rank_main, arguments, nprocs=made.num_ranks)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(made.num_ranks)]
    return {"case": case, "model": model, "plan": plan.strategy.summary(), "ranks": ranks, **judged(ranks)}


def judged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The gates: loss, counts on every rank, time of the first rank (barriers make ranks alike), the first step."""
    pairs = list(zip(ranks[0]["losses"]["ours"], ranks[0]["losses"]["hand"], strict=True))
    seconds, cores = ({n: [pair[i] for pair in ps] for n, ps in ranks[0]["seconds"].items()} for i in (0, 1))
    ratio = bound_of_median([o / h for o, h in zip(seconds["ours"], seconds["hand"], strict=True)])
    control = bound_of_median([a / b for a, b in zip(seconds["control"], seconds["control again"], strict=True)])
    normal_s = statistics.median(seconds["ours"])
    first_overhead = ranks[0]["first_s"]["ours"] / normal_s - 1
    gates = {"losses": all(abs(o - h) <= LOSS_TOLERANCE * abs(h) for o, h in pairs)}
    for name in Counts.__dataclass_fields__:
        gates[name] = all(r["counts"]["ours"][name] <= r["counts"]["hand"][name] for r in ranks)
    hand_overhead = ranks[0]["first_s"]["hand"] / statistics.median(seconds["hand"]) - 1
    gates |= {"time": ratio[1] <= LIMIT, "first step": first_overhead <= max(1.0, hand_overhead)}
    return {
        "gates": gates,
        "median_s": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": ratio,
        "control": control,
        "cores_ratio": bound_of_median([o / h for o, h in zip(cores["ours"], cores["hand"], strict=True)]),
        "first_step_overhead": first_overhead,
        "first_step_overhead_hand": hand_overhead,
    }


def bound_of_median(ratios: Sequence[float], *, resamples: int = 4000) -> tuple[float, float]:
    """(median, its upper 95 % bound by the bootstrap)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return statistics.median(ratios), medians[int(0.95 * resamples)]


def report(found: dict[str, Any]) -> str:
    lines = [f"{CASES[found['case']].title}, {found['model']}: {found['plan']}"]
    for rank, held in enumerate(found["ranks"]):
        ours, hand = held["counts"]["ours"], held["counts"]["hand"]
        parts = ", ".join(f"{name.replace('_', ' ')} {ours[name]:,} / {hand[name]:,}" for name in ours)
        lines.append(f"  rank {rank}, ours / by hand: {parts}")
    median, bound = found["ratio"]
    seconds = found["median_s"]
    lines.append(
        f"  step {seconds['ours']:.3f} s / {seconds['hand']:.3f} s, ratio {median:.3f}, upper 95 % bound {bound:.3f}; "
        f"control {found['control'][0]:.3f}, bound {found['control'][1]:.3f}; "
        f"seconds of cores: ratio {found['cores_ratio'][0]:.3f}, bound {found['cores_ratio'][1]:.3f}"
    )
    setup = ", ".join(f"{name} {spent:.2f} s" for name, spent in found["ranks"][0]["setup_s"].items())
    lines.append(
        f"  first step: {found['first_step_overhead']:+.2f} steps beyond a normal one "
        f"(by hand {found['first_step_overhead_hand']:+.2f}); before it {setup}"
    )
    lines.append("  " + ", ".join(f"{name} {'pass' if ok else 'FAIL'}" for name, ok in found["gates"].items()))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="6 pairs: counts are as good, times are not")
    parser.add_argument("--json", action="store_true", help="everything that was found, one JSON list on stdout")
    args = parser.parse_args()
    quiet()
    results = []
    for model in args.models:
        for case in args.cases:
            results.append(run(case, model, pairs=6 if args.quick else args.pairs))
            print(report(results[-1]), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(results))
    return 0 if all(all(found["gates"].values()) for found in results) else 1


if __name__ == "__main__":
    sys.exit(main())
