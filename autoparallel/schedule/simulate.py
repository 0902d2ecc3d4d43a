"""Actions of every pipeline rank and the seconds of each stage in, the timeline of one step out.

An action starts when its rank is free and its input has arrived: a forward needs the forward of the stage before and a
send; a backward (B or I) the backward of the stage after and a send, on the last stage its own forward; a weight
gradient (W) its own I. Each is timed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoparallel.schedule.actions import Action, Kind

_UNKNOWN = -1.0
_SENDS: Mapping[Kind, int] = {"F": 1, "B": -1, "I": -1}
"""Where an action's result goes, in stages from its own."""


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


def simulate(
    actions: Sequence[Sequence[Action]],
    *,
    cost_s: Mapping[Kind, Sequence[float]],
    send_s: Sequence[float],
    start_s: Sequence[float] | None = None,
) -> Timeline:
    """Time one step.

    `cost_s[kind][i]` is an action on stage i, `send_s[i]` a send between stages i and i + 1, either way; `start_s` is
    when each rank may begin, 0 by default.
    """
    assert all(len(of_stages) == len(send_s) + 1 for of_stages in cost_s.values())
    sweep = _Sweep(actions, cost_s=cost_s, send_s=send_s, start_s=start_s)
    waiting = deque(range(len(actions)))
    queued = [True] * len(actions)
    while waiting:
        rank = waiting.popleft()
        queued[rank] = False
        for neighbour in sweep.advance(rank):
            if not queued[neighbour]:
                queued[neighbour] = True
                waiting.append(neighbour)
    stuck = [order[done] for order, done in zip(actions, sweep.position, strict=True) if done < len(order)]
    assert not stuck, f"the schedule deadlocks; waiting: {', '.join(map(repr, stuck))}"
    return sweep.timeline()


class _Sweep:
    """How far each rank has come, and when each stage finished each micro-batch."""

    def __init__(
        self,
        actions: Sequence[Sequence[Action]],
        *,
        cost_s: Mapping[Kind, Sequence[float]],
        send_s: Sequence[float],
        start_s: Sequence[float] | None,
    ) -> None:
        num_stages, num_ranks = len(send_s) + 1, len(actions)
        num_micro_batches = 1 + max(action.micro_batch for order in actions for action in order)
        self.actions = actions
        self.cost_s = cost_s
        self.send_s = send_s
        self.begin_s = list(start_s) if start_s is not None else [0.0] * num_ranks
        self.clock_s = list(self.begin_s)
        self.position = [0] * num_ranks
        self.starts_s: list[list[float]] = [[] for _ in actions]
        self.busy_s = [0.0] * num_ranks
        self.transfer_s = [0.0] * num_ranks
        # I hands on what B does, so that both end as "B".
        forward_s, backward_s, weights_s = ([[_UNKNOWN] * num_micro_batches for _ in range(num_stages)] for _ in "FBW")
        self.end_s: Mapping[Kind, list[list[float]]] = {
            "F": forward_s,
            "B": backward_s,
            "I": backward_s,
            "W": weights_s,
        }
        self.rank_of_stage = {action.stage: rank for rank, order in enumerate(actions) for action in order}

    def advance(self, rank: int) -> set[int]:
        """Run this rank until it must wait; the ranks that got new input."""
        order, starts_s, last_stage = self.actions[rank], self.starts_s[rank], len(self.send_s)
        clock_s, busy_s, transfer_s = self.clock_s[rank], self.busy_s[rank], self.transfer_s[rank]
        position, reached = self.position[rank], set()
        while position < len(order):
            stage, kind, micro_batch = order[position]
            source_s, sent_s = self._input(stage, kind, micro_batch)
            if source_s == _UNKNOWN:
                break
            arrival_s = source_s + sent_s
            if arrival_s > clock_s:
                transfer_s += min(sent_s, arrival_s - clock_s)
                clock_s = arrival_s
            starts_s.append(clock_s)
            cost_s = self.cost_s[kind][stage]
            clock_s += cost_s
            busy_s += cost_s
            self.end_s[kind][stage][micro_batch] = clock_s
            position += 1
            target = stage + _SENDS.get(kind, 0)
            if 0 <= target <= last_stage:
                reached.add(self.rank_of_stage[target])
        self.clock_s[rank], self.busy_s[rank], self.transfer_s[rank] = clock_s, busy_s, transfer_s
        self.position[rank] = position
        return reached - {rank}

    def _input(self, stage: int, kind: Kind, micro_batch: int) -> tuple[float, float]:
        """When the action's input was made, and how long it travels."""
        if kind == "F":
            return (self.end_s["F"][stage - 1][micro_batch], self.send_s[stage - 1]) if stage else (0.0, 0.0)
        if kind == "W":
            return self.end_s["I"][stage][micro_batch], 0.0
        own_s = self.end_s["F"][stage][micro_batch]
        if own_s == _UNKNOWN or stage == len(self.send_s):
            return own_s, 0.0
        return self.end_s["B"][stage + 1][micro_batch], self.send_s[stage]

    def timeline(self) -> Timeline:
        ranks = range(len(self.actions))
        idle_s = [max(0.0, self.clock_s[r] - self.begin_s[r] - self.busy_s[r]) for r in ranks]
        return Timeline(self.starts_s, self.busy_s, self.transfer_s, idle_s, self.clock_s)
