"""Schedules against closed forms, published orders, and an independent, naive simulator."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.plans.strategy import ScheduleName
from autoparallel.schedule.actions import Action, Kind, Order, actions, in_flight, runs_as_named, splits_backward
from autoparallel.schedule.simulate import Timeline, simulate, timetable, timetable_of

ONE_STAGE_A_RANK: tuple[ScheduleName, ...] = ("1f1b", "gpipe", "zero_bubble")
SCHEDULES: tuple[tuple[ScheduleName, int], ...] = (
    *((name, 1) for name in ONE_STAGE_A_RANK),
    ("interleaved", 2),
    ("interleaved", 3),
    ("gpipe", 2),
)
"""With their virtual stages."""
PREVIOUS = {"F": -1, "B": 1, "I": 1}
"""Whose result an action needs, in stages from its own."""


def naive_ends(order: Sequence[Order], *, cost_s: dict[str, list[int]], send_s: list[int]) -> dict[Action, int]:
    """Longest paths by relaxation until nothing changes: no queue, no clock."""
    before = {rank_order[i]: rank_order[i - 1] for rank_order in order for i in range(1, len(rank_order))}
    ends = {action: 0 for rank_order in order for action in rank_order}
    changed = True
    while changed:
        changed = False
        for action in ends:
            stage, kind, micro_batch = action
            ready = [ends[before[action]]] if action in before else [0]
            if kind == "W":
                ready.append(ends[Action(stage, "I", micro_batch)])
            elif 0 <= stage + PREVIOUS[kind] <= len(send_s):
                sent_s = send_s[min(stage, stage + PREVIOUS[kind])]
                ready.append(ends[Action(stage + PREVIOUS[kind], kind, micro_batch)] + sent_s)
            end = max(ready) + cost_s[kind][stage]
            changed |= end != ends[action]
            ends[action] = end
    return ends


def equal_stages(
    schedule: ScheduleName, p: int, m: int, v: int = 1, *, forward: int, backward: int, weights: int = 0
) -> Timeline:
    """`backward` is that of the input alone where backward is split."""
    costs = {"F": forward, "B": backward, "I": backward, "W": weights}
    cost_s = {kind: [cost] * (p * v) for kind, cost in costs.items()}
    return simulate(timetable_of(schedule, p, m, v), cost_s=cost_s, send_s=[0] * (p * v - 1))  # type: ignore[arg-type]


def test_notation_round_trips() -> None:
    assert repr(Action(2, "F", 10)) == "2F10"
    assert Action.parse(" 2W10 ") == Action(2, "W", 10)
    with pytest.raises(ValueError, match="as in 2F0"):
        Action.parse("F2")


def published(schedule: ScheduleName, p: int, m: int, v: int = 1) -> list[str]:
    return [" ".join(map(repr, rank)) for rank in actions(schedule, p, m, v)]


def test_1f1b_is_the_published_order() -> None:
    assert published("1f1b", 3, 4) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]
    assert published("gpipe", 2, 2)[1] == "1F0 1F1 1B0 1B1"


def test_interleaved_is_the_published_order() -> None:
    """Figure 4 of Narayanan et al., with two ranks."""
    assert published("interleaved", 2, 4, 2) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


def test_zero_bubble_is_the_published_order() -> None:
    """ZB-H1: the first stage is 1F1B's, the last one makes its weight gradients in the end."""
    assert published("zero_bubble", 3, 4) == [
        "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3",
        "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
    ]


@pytest.mark.parametrize(("schedule", "v"), SCHEDULES)
@given(data=st.data(), m=st.integers(1, 13))
@settings(max_examples=30, deadline=None)
def test_every_action_once_on_its_rank(data: st.DataObject, schedule: ScheduleName, v: int, m: int) -> None:
    p = data.draw(st.integers(min(v, 2), 6))
    kinds = "FIW" if splits_backward(schedule, p) else "FB"
    for rank, order in enumerate(actions(schedule, p, m, v)):
        stages = range(rank, p * v, p)
        assert sorted(order) == sorted(Action(s, kind, i) for s in stages for kind in kinds for i in range(m))


def held(order: Order) -> list[int]:
    """Micro-batches between forward and the end of backward, after every action, summed over the rank's stages."""
    return list(accumulate({"F": 1, "I": 0, "B": -1, "W": -1}[action.kind] for action in order))


@pytest.mark.parametrize(("schedule", "v"), SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(2, 1), (2, 5), (4, 2), (4, 4), (3, 9), (4, 8)])
def test_in_flight_is_the_peak_of_the_lists(schedule: ScheduleName, v: int, p: int, m: int) -> None:
    for order, moments in zip(actions(schedule, p, m, v), in_flight(schedule, p, m, v), strict=True):
        assert max(sum(moment.forwarded + moment.half_done) for moment in moments) == max(held(order))


def test_zero_bubble_holds_no_more_than_1f1b() -> None:
    for p in range(2, 9):
        for m in range(1, 20):
            lean, split = (max(max(held(order)) for order in actions(name, p, m)) for name in ("1f1b", "zero_bubble"))
            assert split == lean == min(p, m)


def test_interleaved_holds_what_its_paper_says() -> None:
    """The first rank holds p·v + p - 1 forwards of a p·v-th of the model, 1F1B p of a p-th."""
    for p, v in ((2, 2), (4, 2), (4, 4)):
        assert max(held(actions("interleaved", p, 4 * p, v)[0])) == p * v + p - 1


@pytest.mark.parametrize("schedule", ONE_STAGE_A_RANK)
def test_a_single_stage_runs_each_micro_batch_to_its_end(schedule: ScheduleName) -> None:
    assert published(schedule, 1, 2) == ["0F0 0B0 0F1 0B1"]


def test_interleaved_without_whole_groups_is_breadth_first() -> None:
    assert runs_as_named("interleaved", 2, 4)
    assert not runs_as_named("interleaved", 2, 3)
    assert actions("interleaved", 2, 3, 2) == actions("gpipe", 2, 3, 2)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@given(p=st.integers(1, 8), m=st.integers(1, 12), forward=st.integers(1, 9), backward=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_equal_stages_match_the_closed_form(
    schedule: ScheduleName, p: int, m: int, forward: int, backward: int
) -> None:
    timeline = equal_stages(schedule, p, m, forward=forward, backward=backward)
    assert timeline.makespan_s == (m + p - 1) * (forward + backward)
    assert timeline.busy_s == [m * (forward + backward)] * p
    assert timeline.finish_s[0] == timeline.makespan_s
    assert timeline.idle_s[0] == (p - 1) * (forward + backward)


@given(p=st.integers(2, 6), groups=st.integers(1, 4), v=st.integers(2, 4), times=st.tuples(*[st.integers(1, 9)] * 2))
@settings(max_examples=40, deadline=None)
def test_interleaved_has_a_vth_of_the_bubble(p: int, groups: int, v: int, times: tuple[int, int]) -> None:
    """(p - 1) / (m·v) of the step's work, where 1F1B has (p - 1) / m."""
    forward, backward = times
    timeline = equal_stages("interleaved", p, groups * p, v, forward=forward, backward=backward)
    work = groups * p * v * (forward + backward)
    assert timeline.makespan_s == work + (p - 1) * (forward + backward)


@given(p=st.integers(2, 8), more=st.integers(0, 12), forward=st.integers(1, 9), backward=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_zero_bubble_has_the_bubble_of_zb_h1(p: int, more: int, forward: int, backward: int) -> None:
    """(p - 1)(F + I - W), where 1F1B has (p - 1)(F + I + W); the weights' gradient is no longer than the rest."""
    for weights in range(1, min(forward, backward) + 1):
        timeline = equal_stages("zero_bubble", p, p + more, forward=forward, backward=backward, weights=weights)
        work = (p + more) * (forward + backward + weights)
        assert timeline.makespan_s == work + (p - 1) * (forward + backward - weights)


@given(data=st.data(), kind=st.sampled_from(SCHEDULES), m=st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_unequal_stages_match_the_naive_simulator(data: st.DataObject, kind: tuple[ScheduleName, int], m: int) -> None:
    schedule, v = kind
    p = data.draw(st.integers(min(v, 2), 4))
    times = st.integers(0, 20)
    cost_s = {kind: data.draw(st.lists(times, min_size=p * v, max_size=p * v)) for kind in "FBIW"}
    send_s = data.draw(st.lists(times, min_size=p * v - 1, max_size=p * v - 1))
    order = actions(schedule, p, m, v)
    timeline = simulate(timetable(order, num_stages=p * v), cost_s=cost_s, send_s=send_s)  # type: ignore[arg-type]
    ends = naive_ends(order, cost_s=cost_s, send_s=send_s)
    for rank, rank_order in enumerate(order):
        starts_s = zip(timeline.starts_s[rank], rank_order, strict=True)
        assert [start + cost_s[a.kind][a.stage] for start, a in starts_s] == [ends[a] for a in rank_order]
        assert timeline.busy_s[rank] + timeline.idle_s[rank] == timeline.finish_s[rank]
        assert 0 <= timeline.transfer_s[rank] <= timeline.idle_s[rank]


def test_a_late_rank_delays_the_ranks_after_it() -> None:
    order, cost_s = timetable_of("1f1b", 2, 1), {"F": [1, 1], "B": [1, 1]}
    assert simulate(order, cost_s=cost_s, send_s=[0], start_s=[5, 0]).makespan_s == 9  # type: ignore[arg-type]
    assert simulate(order, cost_s=cost_s, send_s=[0], start_s=[0, 1]).makespan_s == 4  # type: ignore[arg-type]


def test_deadlock_names_the_actions_that_wait() -> None:
    order = [[Action(0, "B", 0), Action(0, "F", 0)], [Action(1, "F", 0), Action(1, "B", 0)]]
    with pytest.raises(AssertionError, match="0B0, 1F0"):
        timetable(order, num_stages=2)


@pytest.mark.parametrize(("schedule", "p", "m", "v"), [("1f1b", 64, 512, 1), ("interleaved", 16, 512, 4)])
def test_large_pipelines_take_well_under_half_a_second(schedule: ScheduleName, p: int, m: int, v: int) -> None:
    """The timetable once, and then a fifth of it for each set of times."""
    cost_s: dict[Kind, list[float]] = {"F": [1.0] * (p * v), "B": [2.0] * (p * v)}
    orders = actions(schedule, p, m, v)
    begin = time.process_time()
    table = timetable(orders, num_stages=p * v)
    arranged = time.process_time()
    simulate(table, cost_s=cost_s, send_s=[0.1] * (p * v - 1))
    assert arranged - begin < 0.5
    assert time.process_time() - arranged < 0.1


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "interleaved"])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_what_is_in_flight_settles(schedule: ScheduleName, num_stages: int) -> None:
    """Peaks are looked for in the first groups of micro-batches only; lists of many more hold no other peak."""
    for virtual_stages in (2, 3, 4) if schedule == "interleaved" else (1,):
        count = 9 * virtual_stages * num_stages
        orders = actions(schedule, num_stages, count, virtual_stages)
        found = in_flight(schedule, num_stages, count, virtual_stages)
        for rank, order in enumerate(orders):
            forwarded, seen = Counter[int](), set()
            for stage, kind, _ in order:
                forwarded[stage] += {"F": 1, "B": -1, "I": -1, "W": 0}[kind]
                seen.add(tuple(forwarded[s] for s in range(rank, num_stages * virtual_stages, num_stages)))
            peaks = [moment.forwarded for moment in found[rank]]
            assert all(peak in seen for peak in peaks)
            assert all(any(all(a <= b for a, b in zip(m, p, strict=True)) for p in peaks) for m in seen)
