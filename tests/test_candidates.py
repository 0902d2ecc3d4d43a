"""The enumerator: complete, without doubles, narrowed by constraints, and clear about what is left out."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoparallel.errors import ConfigError
from autoparallel.plans.strategy import Constraints, Strategy
from autoparallel.space.candidates import EMITTED, divisors, enumerate_space, tensor_degrees


def strategies(devices: int = 4, batch: int = 8, blocks: int = 6, **constraints: Any) -> list[Strategy]:
    return enumerate_space(
        num_devices=devices, batch_size=batch, num_blocks=blocks, constraints=Constraints(**constraints)
    ).listed()


@given(devices=st.integers(1, 24), batch=st.integers(1, 96), blocks=st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_all_layouts_once(devices: int, batch: int, blocks: int) -> None:
    layouts = {
        (p, devices // p, b, batch // (devices // p) // b)
        for p in divisors(devices)
        if p <= blocks and batch % (devices // p) == 0
        for b in divisors(batch // (devices // p))
        if b <= 64 or b & (b - 1) == 0 or b == batch // (devices // p)
    }
    if not layouts:
        with pytest.raises(ConfigError):
            strategies(devices, batch, blocks)
        return
    found = strategies(devices, batch, blocks)
    assert len(set(found)) == len(found)
    assert all(s.num_devices == devices and s.batch_size == batch for s in found)
    fitting = [s for s in found if s.num_stages <= blocks]
    assert {(s.num_stages, s.data_parallel, s.batch_per_device, s.num_micro_batches) for s in fitting} == layouts
    beyond = [s.num_stages for s in found if s.num_stages > blocks]
    assert beyond == [p for p in divisors(devices) if p > blocks and batch % (devices // p) == 0]


def test_every_stage_count_not_powers_of_two_only() -> None:
    assert {s.num_stages for s in strategies(devices=12, batch=12, blocks=12)} == {1, 2, 3, 4, 6, 12}


def test_two_names_of_one_program_are_listed_once() -> None:
    for s in strategies(devices=4, batch=8, blocks=6):
        if s.data_parallel == 1:
            assert s.distribute_param == 0
        if s.num_micro_batches == 1:
            assert s.distribute_param != 2
            assert s.schedule == "1f1b"
        if s.num_stages == 1:
            assert s.schedule == "1f1b"
        if s.schedule == "interleaved":
            assert s.num_micro_batches % s.num_stages == 0
            assert 1 < s.virtual_stages <= 6 // s.num_stages
        assert s.recomputation in EMITTED.recomputations
        assert s.schedule in EMITTED.schedules


def test_virtual_stages_are_few_and_have_blocks() -> None:
    found = {(s.num_stages, s.virtual_stages) for s in strategies(devices=4, batch=16, blocks=12)}
    assert found == {(1, 1), (2, 1), (2, 2), (2, 3), (2, 4), (4, 1), (4, 2), (4, 3)}
    assert {s.virtual_stages for s in strategies(devices=2, batch=16, blocks=8)} == {1, 2, 4}


def test_order_is_canonical() -> None:
    found = strategies()
    key = [(s.num_stages, s.batch_per_device, s.distribute_param) for s in found]
    assert key == sorted(key)
    first = Strategy(data_parallel=4, num_micro_batches=2, recomputation="full", least_recomputation="none")
    assert found[0] == first


@pytest.mark.parametrize(
    ("constraint", "allowed"),
    [
        ({"pipeline_parallel": False}, lambda s: s.num_stages == 1),
        ({"num_stages": 3}, lambda s: s.num_stages <= 3),
        ({"data_parallel": 2}, lambda s: s.data_parallel == 2),
        ({"batch_per_device": 2}, lambda s: s.batch_per_device == 2),
        ({"num_micro_batches": 4}, lambda s: s.num_micro_batches == 4),
        ({"schedule": "gpipe"}, lambda s: s.schedule == "gpipe" or s.num_stages == 1 or s.num_micro_batches == 1),
        ({"schedule": "1f1b"}, lambda s: s.schedule == "1f1b"),
        (
            {"schedule": "zero_bubble"},
            lambda s: s.schedule == "zero_bubble" or 1 in (s.num_stages, s.num_micro_batches),
        ),
        ({"distribute_parameter": True}, lambda s: s.distribute_param > 0 or s.data_parallel == 1),
        ({"distribute_parameter": False}, lambda s: s.distribute_param == 0),
        ({"distribute_parameter": 3}, lambda s: s.distribute_param == 3 or s.data_parallel == 1),
    ],
)
def test_a_constraint_narrows_and_never_adds(constraint: dict[str, Any], allowed: Any) -> None:
    everything, narrowed = strategies(), strategies(**constraint)
    assert narrowed == [s for s in everything if allowed(s)]


@pytest.mark.parametrize(
    ("wanted", "ranges"),
    [
        ("auto", ["none to full"]),
        (True, ["selective to full"]),
        (False, ["none"]),
        ("none", ["none"]),
        ("selective", ["selective"]),
        ("full", ["full"]),
    ],
)
def test_a_named_recomputation_is_that_of_every_block(wanted: Any, ranges: list[str]) -> None:
    found = strategies(activation_recomputation=wanted)
    assert list(dict.fromkeys(s.recomputation_range for s in found)) == ranges


def test_level_2_stays_available_with_one_micro_batch_when_it_is_the_only_one() -> None:
    found = strategies(num_micro_batches=1, distribute_parameter=2, num_stages=1)
    assert {s.distribute_param for s in found} == {2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"devices": 4, "batch": 6, "num_stages": 1}, ["6", "multiple of", "4, 8"]),
        ({"devices": 4, "batch": 6, "num_stages": 1, "batch_per_device": 3}, ["batch_per_device 3", "12"]),
        ({"devices": 2, "batch": 9, "batch_per_device": 2, "num_micro_batches": 2}, ["must equal", "work: 8"]),
        ({"devices": 8, "data_parallel": 3}, ["do not divide into 3", "1, 2, 4, 8"]),
        ({"devices": 8, "data_parallel": 2, "num_stages": 2}, ["8 devices / 2 = 4 stages"]),
        ({"devices": 8, "data_parallel": 1, "blocks": 6}, ["6 blocks"]),
        ({"sequence_parallel": True}, ["degree above 1"]),
    ],
)
def test_what_cannot_be_is_said_with_the_arithmetic(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        strategies(**arguments)
    for word in words:
        assert re.search(word, str(raised.value)), str(raised.value)
    assert raised.value.why
    assert raised.value.remedy


@given(devices=st.integers(2, 12), batch=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_the_remedy_works(devices: int, batch: int) -> None:
    try:
        strategies(devices, batch, blocks=1)
    except ConfigError as error:
        sizes = [int(size) for size in error.remedy.split(": ")[1].split(", ")]
        assert sizes
        assert all(strategies(devices, size, blocks=1) for size in sizes)


def test_tensor_parallel_degrees_tile_a_host() -> None:
    assert tensor_degrees(32, Constraints()) == [1, 2, 4, 8, 16, 32]
    assert tensor_degrees(12, Constraints()) == [1, 2, 3, 4, 6, 12]
    assert tensor_degrees(12, Constraints(tensor_parallel=4)) == [4]
    with pytest.raises(ConfigError, match="groups of 5"):
        tensor_degrees(12, Constraints(tensor_parallel=5))


def test_tensor_and_sequence_parallelism_are_listed_where_they_can_be() -> None:
    def layouts(seq_len: int, **constraints: Any) -> set[tuple[int, int, int, bool]]:
        found = enumerate_space(
            num_devices=4,
            batch_size=8,
            num_blocks=4,
            constraints=Constraints(**constraints),
            tensor_degrees=[1, 2, 4],
            seq_len=seq_len,
        ).listed()
        return {(s.num_stages, s.tensor_parallel, s.data_parallel, s.sequence_parallel) for s in found}

    assert all(a * b * c == 4 for a, b, c, _ in layouts(128))
    assert {(tp, sp) for _, tp, _, sp in layouts(128)} == {(1, False), (2, False), (2, True), (4, False), (4, True)}
    assert {(tp, sp) for _, tp, _, sp in layouts(126)} == {(1, False), (2, False), (2, True), (4, False)}
    assert {(tp, sp) for _, tp, _, sp in layouts(128, sequence_parallel=True)} == {(2, True), (4, True)}
    assert layouts(128, data_parallel=2) == {(2, 1, 2, False), (1, 2, 2, False), (1, 2, 2, True)}
