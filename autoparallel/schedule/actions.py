"""A schedule's name and size in, the order of actions of every rank out.

An action is data in torch's compact notation: `2F0` is the forward of micro-batch 0 on stage 2, `2B0` its backward.
GPipe: Huang et al. 2019 (arXiv 1811.06965). 1F1B: Narayanan et al. 2021 (arXiv 2104.04473).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast

from autoparallel.plans.strategy import ScheduleName

Kind = Literal["F", "B"]
_NOTATION = re.compile(r"(\d+)([FB])(\d+)")


class Action(NamedTuple):
    """One forward or backward of one micro-batch on one stage."""

    stage: int
    kind: Kind
    micro_batch: int

    def __repr__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read `2F0`."""
        match = _NOTATION.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not an action: stage, F or B, micro-batch, as in 2F0")
        stage, kind, micro_batch = match.groups()
        return cls(int(stage), cast(Kind, kind), int(micro_batch))


def in_flight(schedule: ScheduleName, *, stage: int, num_stages: int, num_micro_batches: int) -> int:
    """The most micro-batches whose forward is done and whose backward is not, on one stage."""
    if schedule == "gpipe":
        return num_micro_batches
    return min(num_micro_batches, num_stages - stage)


def actions(schedule: ScheduleName, num_stages: int, num_micro_batches: int) -> list[list[Action]]:
    """The actions of every rank, in the order in which it runs them."""
    assert num_stages >= 1
    assert num_micro_batches >= 1
    return [
        _rank_actions(
            stage,
            ahead=in_flight(schedule, stage=stage, num_stages=num_stages, num_micro_batches=num_micro_batches),
            num_micro_batches=num_micro_batches,
        )
        for stage in range(num_stages)
    ]


def _rank_actions(stage: int, *, ahead: int, num_micro_batches: int) -> list[Action]:
    """`ahead` forwards, then one backward and one forward in turn, then the backwards that are left."""
    order = [Action(stage, "F", micro_batch) for micro_batch in range(ahead)]
    for micro_batch in range(num_micro_batches):
        order.append(Action(stage, "B", micro_batch))
        if ahead + micro_batch < num_micro_batches:
            order.append(Action(stage, "F", ahead + micro_batch))
    return order
