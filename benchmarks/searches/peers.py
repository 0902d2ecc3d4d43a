"""Problems that other planners were timed on, our plans for them, and what we find within the limits of their spaces.

The peers' seconds are their planners' own, run on a machine of two cores too: meta-pytorch/autoparallel (whose problem
was LLaMA-7B on a mesh of 8 and of 2 x 8; its batch is not stated, Galvatron's is taken), Galvatron 2.4 and Aceso. Of
their plans only this is stated: Aceso's has seven uneven stages, a number that divides no 16 devices evenly, so that no
strategy of ours is it; Galvatron's cuts are even and its micro-batches fixed by hand, their number is not stated. So
their plans have no price; our best within their limits has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.searches.measure import Measured, NoPlan
from benchmarks.searches.problems import Problem

ONE_HOST = Problem("Llama-2-7B", "8xA100-SXM4-40GB", 64, 2048, memory_gib=36, constraints={"memory_ratio": 1.0})
TWO_HOSTS = replace(ONE_HOST, flavor="2x8xA100-SXM4-40GB")
VOLTAS = Problem("GPT-6.7B", "2x8xV100-SXM2-32GB", 1024, 2048, dtype="float16")
NO_PIPELINE = {"pipeline_parallel": False, "num_micro_batches": 1, "activation_recomputation": False}
"""meta-pytorch/autoparallel: no pipeline, no micro-batches, no recomputation."""


@dataclass(frozen=True)
class Peer:
    """A problem within some limits."""

    problem: Problem
    limits: str = "none: our space"
    peer: str = ""
    peer_cpu_s: float | None = None


def _within(problem: Problem, **limits: Any) -> Problem:
    return replace(problem, constraints={**problem.constraints, **limits})


PEERS = (
    Peer(ONE_HOST, peer="Galvatron 2.4", peer_cpu_s=70),
    Peer(_within(ONE_HOST, **NO_PIPELINE), "no pipeline, micro-batches, recomputation", "autoparallel (Meta)", 102),
    *(Peer(_within(ONE_HOST, num_micro_batches=count), f"{count} micro-batches by hand") for count in (1, 8)),
    Peer(TWO_HOSTS, peer="Galvatron 2.4", peer_cpu_s=113),
    Peer(_within(TWO_HOSTS, **NO_PIPELINE), "no pipeline, micro-batches, recomputation", "autoparallel (Meta)", 243),
    *(Peer(_within(TWO_HOSTS, num_micro_batches=count), f"{count} micro-batches by hand") for count in (1, 8)),
    Peer(VOLTAS, peer="Aceso", peer_cpu_s=161),
    Peer(_within(VOLTAS, tensor_parallel=1, data_parallel=2), "8 stages, the nearest to 7 that divide 16 devices"),
)


def answers(ask: Callable[[Problem], Measured]) -> Iterator[tuple[Peer, Measured | str]]:
    """Or why there is no plan within the limits."""
    for peer in PEERS:
        try:
            yield peer, ask(peer.problem)
        except NoPlan as error:
            yield peer, str(error)
