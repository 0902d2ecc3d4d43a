"""A schedule's name and size in, the order of actions of every pipeline rank out; simulator and runtime read the same
lists.

An action is data in torch's compact notation: `2F0` is the forward of micro-batch 0 on stage 2, `2B0` its backward;
where backward is split, `2I0` makes the gradient of the stage's input and `2W0` those of its weights. With `v` virtual
stages, stage `s` of `num_stages × v` sits on rank `s % num_stages`.

    gpipe        Huang et al. 2019 (arXiv 1811.06965); with virtual stages breadth-first, Lamy-Poirier 2022 (2211.05953)
    1f1b         Narayanan et al. 2021 (arXiv 2104.04473)
    interleaved  the same paper, section 2.2: virtual stages; micro-batches come in groups of `num_stages`
    zero_bubble  ZB-H1 of Qi et al. 2023 (arXiv 2401.10241): split backward, no more in flight than 1F1B's first stage
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Literal, NamedTuple, cast

from autoparallel.plans.strategy import ScheduleName

Kind = Literal["F", "B", "I", "W"]
_NOTATION = re.compile(r"(\d+)([FBIW])(\d+)")


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
            raise ValueError(f"{text!r} is not an action: stage, one of F B I W, micro-batch, as in 2F0")
        stage, kind, micro_batch = match.groups()
        return cls(int(stage), cast(Kind, kind), int(micro_batch))


Order = tuple[Action, ...]


def splits_backward(schedule: ScheduleName, num_stages: int) -> bool:
    """Whether the schedule's lists hold I and W instead of B."""
    return schedule == "zero_bubble" and num_stages > 1


def runs_as_named(schedule: ScheduleName, num_stages: int, num_micro_batches: int) -> bool:
    """Whether `actions` follows the name: a single stage always runs 1f1b, and interleaved needs whole groups of
    `num_stages` micro-batches; without them it runs gpipe's lists.
    """
    if num_stages == 1:
        return schedule == "1f1b"
    return schedule != "interleaved" or num_micro_batches % num_stages == 0


@lru_cache(maxsize=8)
def actions(
    schedule: ScheduleName, num_stages: int, num_micro_batches: int, virtual_stages: int = 1
) -> tuple[Order, ...]:
    """The actions of every pipeline rank, in the order in which it runs them; any number of micro-batches has lists."""
    assert min(num_stages, num_micro_batches, virtual_stages) >= 1
    assert virtual_stages == 1 or (num_stages > 1 and schedule in ("interleaved", "gpipe")), "one stage a rank"
    if not runs_as_named(schedule, num_stages, num_micro_batches):
        schedule = "1f1b" if num_stages == 1 else "gpipe"
    return tuple(
        tuple(_rank_order(schedule, rank, num_stages, num_micro_batches, virtual_stages)) for rank in range(num_stages)
    )


def _rank_order(schedule: ScheduleName, rank: int, num_stages: int, count: int, virtual_stages: int) -> list[Action]:
    """`count` is the number of micro-batches."""
    stages = range(rank, num_stages * virtual_stages, num_stages)
    if schedule == "zero_bubble":
        return _zero_bubble(rank, count=count, ahead=min(count, num_stages - rank))
    if schedule == "1f1b":
        return _in_turn(stages, group=count, count=count, ahead=min(count, num_stages - rank))
    if schedule == "gpipe":
        return _in_turn(stages, group=count, count=count, ahead=len(stages) * count)
    ahead = 2 * (num_stages - rank - 1) + (virtual_stages - 1) * num_stages + 1
    return _in_turn(stages, group=num_stages, count=count, ahead=min(len(stages) * count, ahead))


def _in_turn(stages: Sequence[int], *, group: int, count: int, ahead: int) -> list[Action]:
    """`ahead` forwards, then one backward and one forward in turn, then the backwards that are left.

    A rank takes `group` micro-batches through its first stage, then through the next one; backwards from the last.
    """
    groups = [range(first, first + group) for first in range(0, count, group)]
    forwards = [Action(stage, "F", i) for micro_batches in groups for stage in stages for i in micro_batches]
    backwards = [Action(stage, "B", i) for micro_batches in groups for stage in reversed(stages) for i in micro_batches]
    turns = [action for pair in zip_longest(backwards, forwards[ahead:]) for action in pair if action is not None]
    return forwards[:ahead] + turns


def _zero_bubble(stage: int, *, count: int, ahead: int) -> list[Action]:
    """1F1B whose weight gradients lag `stage` micro-batches behind: as many as this stage forwards fewer ahead than the
    first one, so that every stage has as much in flight, and what is left fills the end of the step.
    """
    order = [Action(stage, "F", i) for i in range(ahead)]
    for i in range(count):
        order.append(Action(stage, "I", i))
        if i >= stage:
            order.append(Action(stage, "W", i - stage))
        if ahead + i < count:
            order.append(Action(stage, "F", ahead + i))
    return order + [Action(stage, "W", i) for i in range(max(0, count - stage), count)]


class InFlight(NamedTuple):
    """Micro-batches that the stages of one rank hold at one moment, stage by stage."""

    forwarded: tuple[int, ...]
    """Forward is done, B or I is not."""
    half_done: tuple[int, ...]
    """I is done, W is not."""


@lru_cache(maxsize=64)
def in_flight(
    schedule: ScheduleName, num_stages: int, num_micro_batches: int, virtual_stages: int = 1
) -> tuple[tuple[InFlight, ...], ...]:
    """By rank: the moments that may be the peak of its memory, since no other moment holds as many or more of each."""
    if schedule == "gpipe" and virtual_stages == 1:
        return ((InFlight((num_micro_batches,), (0,)),),) * num_stages
    if schedule != "gpipe":
        # Beyond the first few, every group of micro-batches goes like the one before.
        num_micro_batches = min(num_micro_batches, 2 * (virtual_stages + 1) * num_stages)
    orders = actions(schedule, num_stages, num_micro_batches, virtual_stages)
    return tuple(_peaks(order, virtual_stages=virtual_stages) for order in orders)


def _peaks(order: Order, *, virtual_stages: int) -> tuple[InFlight, ...]:
    index = {stage: i for i, stage in enumerate(sorted({action.stage for action in order}))}
    forwarded, half_done = [0] * virtual_stages, [0] * virtual_stages
    moments = set()
    for stage, kind, _ in order:
        forwarded[index[stage]] += {"F": 1, "B": -1, "I": -1, "W": 0}[kind]
        half_done[index[stage]] += {"F": 0, "B": 0, "I": 1, "W": -1}[kind]
        if kind in "FI":
            moments.add((*forwarded, *half_done))
    peaks: list[tuple[int, ...]] = []
    for moment in sorted(moments, reverse=True):
        if not any(all(a <= b for a, b in zip(moment, peak, strict=True)) for peak in peaks):
            peaks.append(moment)
    return tuple(InFlight(peak[:virtual_stages], peak[virtual_stages:]) for peak in peaks)
