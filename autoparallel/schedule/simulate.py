"""Actions of every pipeline rank and the seconds of each stage in, the timeline of one step out.

An action starts when its rank is free and its input has arrived: a forward needs the forward of the stage before and a
send; a backward (B or I) the backward of the stage after and a send, on the last stage its own forward; a weight
gradient (W) its own I. Each is timed once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from autoparallel.plans.strategy import ScheduleName
from autoparallel.schedule.actions import Action, Kind, actions

KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")
RESULTS: tuple[Kind, ...] = ("F", "B", "W")
MISSING = -1


@dataclass(frozen=True)
class Timeline:
    """Seconds since the step began; every list has one entry a rank."""

    starts_s: list[list[float]]
    """When each action started, in the order of the rank's actions."""
    busy_s: list[float]
    transfer_s: list[float]
    """Waiting while the input was on the wire; the rest of the idle time is the pipeline's bubble."""
    idle_s: list[float]
    """Waiting from the rank's start to its last action, transfers included."""
    finish_s: list[float]

    @property
    def makespan_s(self) -> float:
        return max(self.finish_s)


Turn = tuple[int, int, int, int]
"""One action, by places in lists: its rank; its cost, of its kind and stage; the turn that makes its input; the
boundary between stages that the input crosses. One beyond the last where nothing makes it, or it crosses none.
"""


@dataclass(frozen=True)
class Timetable:
    """All actions of a step, each behind what it waits for."""

    turns: tuple[Turn, ...]
    num_ranks: int
    num_stages: int
    counts: tuple[tuple[int, int, int], ...]
    """Rank, cost, and how many turns have both."""


@lru_cache(maxsize=256)
def timetable_of(schedule: ScheduleName, num_stages: int, num_micro_batches: int, virtual_stages: int = 1) -> Timetable:
    """Of a schedule by name: the lists of `actions`."""
    orders = actions(schedule, num_stages, num_micro_batches, virtual_stages)
    return timetable(orders, num_stages=num_stages * virtual_stages)


def timetable(orders: Sequence[Sequence[Action]], *, num_stages: int) -> Timetable:
    """Of every rank's list."""
    width = 1 + max(action.micro_batch for order in orders for action in order)
    place = [MISSING] * (len(RESULTS) * num_stages * width)
    """Where the turn is that makes a result: forward, backward (I hands on what B does) or weights' gradients."""
    goes_on: dict[int, int] = {}
    """By result, the rank that waits for it."""
    turns: list[Turn] = []
    position, waiting = [0] * len(orders), deque(range(len(orders)))
    nothing, last = sum(map(len, orders)), num_stages - 1
    while waiting:
        rank = waiting.popleft()
        order = orders[rank]
        while position[rank] < len(order):
            stage, kind, micro_batch = order[position[rank]]
            forward = stage * width + micro_batch
            backward = forward + num_stages * width
            source, send, made = MISSING, last, forward
            if kind == "F" and stage:
                source, send = forward - width, stage - 1
            elif kind == "W":
                source, made = backward, backward + num_stages * width
            elif kind in "BI":
                made = backward
                source, send = (backward + width, stage) if stage < last and place[forward] >= 0 else (forward, last)
            if source >= 0 and place[source] < 0:
                goes_on[source] = rank
                break
            place[made] = len(turns)
            cost = KINDS.index(kind) * num_stages + stage
            turns.append((rank, cost, nothing if source < 0 else place[source], send))
            position[rank] += 1
            if made in goes_on:
                waiting.append(goes_on.pop(made))
    stuck = [order[done] for order, done in zip(orders, position, strict=True) if done < len(order)]
    assert not stuck, f"the schedule deadlocks; waiting: {', '.join(map(repr, stuck))}"
    counts = Counter((rank, cost) for rank, cost, _, _ in turns)
    return Timetable(tuple(turns), len(orders), num_stages, tuple((*key, count) for key, count in counts.items()))


def simulate(
    table: Timetable,
    *,
    cost_s: Mapping[Kind, Sequence[float]],
    send_s: Sequence[float],
    start_s: Sequence[float] | None = None,
) -> Timeline:
    """Time one step.

    `cost_s[kind][i]` is an action on stage i, `send_s[i]` a send between stages i and i + 1, either way; `start_s` is
    when each rank may begin, 0 by default.
    """
    num_stages, ranks = table.num_stages, range(table.num_ranks)
    assert len(send_s) == num_stages - 1
    assert all(len(of_stages) == num_stages for of_stages in cost_s.values())
    unused = [0.0] * num_stages
    costs_s = [seconds for kind in KINDS for seconds in cost_s.get(kind, unused)]
    sends_s = [*send_s, 0.0]
    begins_s = list(start_s) if start_s is not None else [0.0 for _ in ranks]
    clocks_s, transfer_s = list(begins_s), [0.0 for _ in ranks]
    ends_s = [0.0] * (len(table.turns) + 1)
    starts_s: list[list[float]] = [[] for _ in ranks]
    for place, (rank, cost, source, send) in enumerate(table.turns):  # thousands: nothing else is as hot
        clock_s, arrival_s = clocks_s[rank], ends_s[source] + sends_s[send]
        if arrival_s > clock_s:
            transfer_s[rank] += min(sends_s[send], arrival_s - clock_s)
            clock_s = arrival_s
        starts_s[rank].append(clock_s)
        ends_s[place] = clocks_s[rank] = clock_s + costs_s[cost]
    busy_s = [0.0 for _ in ranks]
    for rank, cost, count in table.counts:
        busy_s[rank] += count * costs_s[cost]
    idle_s = [max(0.0, clocks_s[rank] - begins_s[rank] - busy_s[rank]) for rank in ranks]
    return Timeline(starts_s, busy_s, transfer_s, idle_s, clocks_s)
