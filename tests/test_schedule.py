"""Schedules against the closed form and against an independent, naive simulator."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.plans.strategy import ScheduleName
from autoparallel.schedule.actions import Action, actions, in_flight
from autoparallel.schedule.simulate import simulate

SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "gpipe")


def naive_ends(order: list[list[Action]], *, forward_s: list[int], backward_s: list[int], send_s: list[int]) -> dict:
    """Longest paths by relaxation until nothing changes: no queue, no clock."""
    before = {rank_order[i]: rank_order[i - 1] for rank_order in order for i in range(1, len(rank_order))}
    ends = {action: 0 for rank_order in order for action in rank_order}
    last, changed = len(forward_s) - 1, True
    while changed:
        changed = False
        for action in ends:
            stage, kind, micro_batch = action
            ready = [ends[before[action]]] if action in before else [0]
            if kind == "F" and stage > 0:
                ready.append(ends[Action(stage - 1, "F", micro_batch)] + send_s[stage - 1])
            if kind == "B" and stage < last:
                ready.append(ends[Action(stage + 1, "B", micro_batch)] + send_s[stage])
            end = max(ready) + (forward_s if kind == "F" else backward_s)[stage]
            changed |= end != ends[action]
            ends[action] = end
    return ends


def test_notation_round_trips() -> None:
    assert repr(Action(2, "F", 10)) == "2F10"
    assert Action.parse(" 2B10 ") == Action(2, "B", 10)
    with pytest.raises(ValueError, match="as in 2F0"):
        Action.parse("F2")


def test_1f1b_is_the_published_order() -> None:
    order = [" ".join(map(repr, rank)) for rank in actions("1f1b", 3, 4)]
    assert order == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]
    assert " ".join(map(repr, actions("gpipe", 2, 2)[1])) == "1F0 1F1 1B0 1B1"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 1), (1, 5), (2, 1), (4, 2), (4, 4), (3, 9)])
def test_every_action_once_and_in_flight_is_the_peak(
    schedule: ScheduleName, num_stages: int, num_micro_batches: int
) -> None:
    for stage, order in enumerate(actions(schedule, num_stages, num_micro_batches)):
        assert sorted(order) == sorted(Action(stage, kind, m) for kind in "FB" for m in range(num_micro_batches))
        alive = [sum(1 if a.kind == "F" else -1 for a in order[: i + 1]) for i in range(len(order))]
        assert max(alive) == in_flight(
            schedule, stage=stage, num_stages=num_stages, num_micro_batches=num_micro_batches
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(p=st.integers(1, 8), m=st.integers(1, 12), forward=st.integers(1, 9), backward=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_equal_stages_match_the_closed_form(
    schedule: ScheduleName, p: int, m: int, forward: int, backward: int
) -> None:
    timeline = simulate(
        actions(schedule, p, m), forward_s=[forward] * p, backward_s=[backward] * p, send_s=[0] * (p - 1)
    )
    assert timeline.makespan_s == (m + p - 1) * (forward + backward)
    assert timeline.busy_s == [m * (forward + backward)] * p
    assert timeline.finish_s[0] == timeline.makespan_s
    assert timeline.idle_s[0] == (p - 1) * (forward + backward)


@given(data=st.data(), schedule=st.sampled_from(SCHEDULES), p=st.integers(1, 5), m=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_unequal_stages_match_the_naive_simulator(data: st.DataObject, schedule: ScheduleName, p: int, m: int) -> None:
    times = st.integers(0, 20)
    forward_s = data.draw(st.lists(times, min_size=p, max_size=p))
    backward_s = data.draw(st.lists(times, min_size=p, max_size=p))
    send_s = data.draw(st.lists(times, min_size=p - 1, max_size=p - 1))
    order = actions(schedule, p, m)
    timeline = simulate(order, forward_s=forward_s, backward_s=backward_s, send_s=send_s)
    ends = naive_ends(order, forward_s=forward_s, backward_s=backward_s, send_s=send_s)
    for rank, rank_order in enumerate(order):
        cost_s = {"F": forward_s[rank], "B": backward_s[rank]}
        measured = [start + cost_s[a.kind] for start, a in zip(timeline.starts_s[rank], rank_order, strict=True)]
        assert measured == [ends[a] for a in rank_order]
        assert timeline.busy_s[rank] + timeline.idle_s[rank] == timeline.finish_s[rank]
        assert 0 <= timeline.transfer_s[rank] <= timeline.idle_s[rank]


def test_a_late_rank_delays_the_ranks_after_it() -> None:
    order = actions("1f1b", 2, 1)
    late = simulate(order, forward_s=[1, 1], backward_s=[1, 1], send_s=[0], start_s=[5, 0])
    assert late.makespan_s == 9
    hidden = simulate(order, forward_s=[1, 1], backward_s=[1, 1], send_s=[0], start_s=[0, 1])
    assert hidden.makespan_s == 4


def test_deadlock_names_the_actions_that_wait() -> None:
    order = [[Action(0, "B", 0), Action(0, "F", 0)], [Action(1, "F", 0), Action(1, "B", 0)]]
    with pytest.raises(AssertionError, match="0B0, 1F0"):
        simulate(order, forward_s=[1, 1], backward_s=[1, 1], send_s=[0])


def test_large_pipelines_take_well_under_half_a_second() -> None:
    order = actions("1f1b", 64, 512)
    begin = time.process_time()
    simulate(order, forward_s=[1.0] * 64, backward_s=[2.0] * 64, send_s=[0.1] * 63)
    assert time.process_time() - begin < 0.5
