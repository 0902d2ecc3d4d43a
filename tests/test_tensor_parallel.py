"""Tensor parallelism: which structure is found, which splits are legal, and that each trains as one device does.

A loss can be exact while gradients are wrong, so every split is compared on every gradient (`tests.equality`).
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from autoparallel.capture.program import capture
from autoparallel.errors import ConfigError, PlanMismatchError
from autoparallel.plans.strategy import Strategy
from autoparallel.tensor_parallel.analysis import analyze
from autoparallel.tensor_parallel.layout import Atom, Misfit, Sharding, cut, new, take_inner, unify
from autoparallel.tensor_parallel.splits import SplitGraph, legal_splits, lower_split, split_names
from tests.equality import check_strategies, parallel
from tests.families import FAMILIES, UNSEEN, lifted, make_batch, make_model, program_of
from tests.ranks import run_ranks
from tests.strategies import all_splits, in_turn

TOLERANCE = 1e-9
ALL = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in UNSEEN)]

ALL_BUT_LLAMA = [family for family in (*FAMILIES, *UNSEEN) if family != "llama"]


# --- layouts ---


def test_what_one_view_reveals_every_tensor_sees() -> None:
    hidden = new(12)
    other = new(12)
    unify(hidden, other)
    heads, inner = take_inner(hidden, 4)
    assert [atom.size for atom in (*heads, *inner)] == [3, 4]
    assert Sharding(heads, 3).local_size(other) == 4


def test_a_fused_projection_is_a_sum_of_products() -> None:
    fused = new(4 * 6 + 2 * 6 + 2 * 6)  # q of four heads, k and v of two
    q, rest = cut(fused, 24)
    k, v = cut(rest, 12)
    for part, count in ((q, 4), (k, 2), (v, 2)):
        assert sum(atom.size for atom in take_inner(part, 6)[0]) == count
    kv, _ = take_inner(k, 6)
    unify(kv, take_inner(v, 6)[0])
    unify(take_inner(q, 6)[0], [*kv, (shared := Atom(2))])
    sharding = Sharding(kv, 2)
    assert sharding.local_size(fused) == 24
    assert sharding.global_indices(fused, 1).tolist() == [*range(12, 24), *range(30, 36), *range(42, 48)]
    assert Sharding([shared], 2).is_mixed(fused), "sharding the group leaves k and v whole"
    assert not sharding.is_mixed(fused)


def test_dims_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Misfit):
        unify([Atom(6, pinned=True)], [Atom(2), Atom(3)])
    with pytest.raises(Misfit):
        take_inner(new(10), 4)


# --- what is found ---


@pytest.mark.parametrize(
    ("family", "splits"),
    [
        ("llama", {"mlp.down_proj.weight[1]", "self_attn.k_proj.weight[0].0", "self_attn.o_proj.weight[1].1"}),
        ("gpt2", {"attn.c_attn.weight[1].0", "mlp.c_fc.weight[1]"}),
        ("phi3", {"mlp.down_proj.weight[1]", "self_attn.o_proj.weight[1].0", "self_attn.o_proj.weight[1].1"}),
    ],
)
def test_heads_groups_and_channels_are_found(family: str, splits: set[str]) -> None:
    assert set(split_names(analyze(program_of(family).graph, 1))) == splits


@pytest.mark.parametrize("family", ALL)
def test_a_block_communicates_as_megatron_does(family: str) -> None:
    """Two reductions forward and two backward where attention and MLP follow each other; reduce_scatter and all_gather
    instead under sequence parallelism. (Gemma 2 needs no more: its norms are on whole hidden states.)
    """
    graph = program_of(family).graph
    analysis = analyze(graph, 1)
    heads = next(s for s, _ in legal_splits(graph, 1, analysis, degree=2, sequence_parallel=False) if len(s) == 2)
    plain = lower_split(graph, 1, analysis, heads, degree=2, sequence_parallel=False)
    counted = Counter(op.target for op in plain.ops if op.target.startswith("tensor_parallel"))
    assert counted == {"tensor_parallel.all_reduce": 2, "tensor_parallel.copy": 2}
    spread = lower_split(graph, 1, analysis, heads, degree=2, sequence_parallel=True)
    counted = Counter(op.target for op in spread.ops if op.target.startswith("tensor_parallel"))
    assert counted["tensor_parallel.reduce_scatter"] == counted["tensor_parallel.all_gather"] == 2
    assert "tensor_parallel.all_reduce" not in counted
    assert spread.shared_parameters, "norms see only their rank's tokens"


def test_a_degree_that_divides_nothing_is_impossible_with_the_arithmetic() -> None:
    import autoparallel as ap

    with pytest.raises(ConfigError, match=r"no dim of the blocks divides by 3.*= 64"):
        ap.estimate(
            make_model("llama", dtype=torch.float32), "cpu:3", Strategy(tensor_parallel=3), batch_size=1, seq_len=6
        )


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        (((), ("mlp.nothing[0]",), ()), r"no dim mlp\.nothing"),
        (((), ()), "2 splits are given for 3 kinds"),
        (((), ("self_attn.k_proj.weight[0].0", "self_attn.o_proj.weight[1].1"), ()), "sharded twice"),
    ],
)
def test_splits_that_do_not_fit_are_refused(splits: tuple[tuple[str, ...], ...], words: str) -> None:
    with pytest.raises(PlanMismatchError, match=words):
        SplitGraph(program_of("llama").graph, 2, False, splits).lowered(1)


# --- exactness ---


def prove(family: str, strategies: list[Strategy]) -> None:
    (num_devices,) = {s.num_devices for s in strategies}
    for results in check_strategies(family, strategies, num_devices=num_devices):
        wrong = [(name, difference) for name, difference in results if not difference < TOLERANCE]
        assert not wrong


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("family", "sequence_parallel"), [("llama", False), ("llama", True), *in_turn(ALL_BUT_LLAMA, [False, True])]
)
def test_every_legal_split(family: str, sequence_parallel: bool) -> None:
    """All splits of a block, on all gradients."""
    splits = all_splits(program_of(family), 2, sequence_parallel=sequence_parallel)
    prove(
        family,
        [
            Strategy(
                tensor_parallel=2,
                sequence_parallel=sequence_parallel,
                batch_per_device=2,
                num_micro_batches=2,
                splits=split,
            )
            for split in splits
        ],
    )


@pytest.mark.parametrize("sequence_parallel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_more_ranks_than_key_value_heads(sequence_parallel: bool) -> None:
    """Four ranks, two key-value heads: the heads of a group are divided, keys and values are whole."""
    changes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
    strategy = Strategy(tensor_parallel=4, sequence_parallel=sequence_parallel, batch_per_device=2)
    for results in check_strategies("llama", [strategy], 2, changes, num_devices=4, timeout=120):
        assert all(difference < TOLERANCE for _, difference in results)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_a_vocabulary_that_does_not_divide(family: str) -> None:
    """Rows and logits in unequal chunks, sharded over replicas as well."""
    strategies = [
        Strategy(tensor_parallel=2, data_parallel=2, batch_per_device=2, distribute_param=level) for level in (0, 3)
    ]
    for results in check_strategies(family, strategies, 2, {"vocab_size": 97}, num_devices=4, timeout=120):
        assert all(difference < TOLERANCE for _, difference in results)


def evaluate_odd_lengths() -> float:
    """On every rank: the difference of loss and logits for a number of tokens that ranks cannot divide."""
    with lifted():
        model = make_model("llama", num_hidden_layers=2)
        program = capture(model)
        strategy = Strategy(tensor_parallel=2, sequence_parallel=True, batch_per_device=2)
        plain = make_model("llama", num_hidden_layers=2)
        trained = parallel(model, program, strategy)
        first, odd = make_batch(2, 8, seed=1), make_batch(2, 7, seed=2)
        trained(**first).loss.backward()
        loss, expected = trained(**odd).loss, plain(**odd, use_cache=False).loss
        with torch.no_grad():
            logits = trained(**odd).logits - plain(**odd, use_cache=False).logits
    return max(abs(loss.item() - expected.item()), logits.abs().max().item())


def test_a_sequence_that_does_not_divide_is_filled() -> None:
    assert all(difference < TOLERANCE for difference in run_ranks(2, evaluate_odd_lengths, timeout=60))


# --- random numbers ---


def train_with_dropout(sequence_parallel: bool) -> list[tuple[float, float]]:
    """On every rank: by step the loss, and the worst difference of whole parameters between the ranks."""
    model = make_model("gpt2", num_hidden_layers=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    strategy = Strategy(
        tensor_parallel=2, sequence_parallel=sequence_parallel, batch_per_device=4, recomputation="full"
    )
    trained = parallel(model, capture(model), strategy)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    steps = []
    for step in range(3):
        loss = trained(**make_batch(4, 8, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine = trained._parallel.engine
        whole = [p.master.detach() for p in engine.parameters.placed if not p.split.is_sharded]
        mine = torch.cat([w.reshape(-1) for w in whole])
        other = mine.clone()
        dist.broadcast(other, src=0)
        steps.append((loss.item(), float((mine - other).abs().max())))
    return steps


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_is_equal_on_replicas(sequence_parallel: bool) -> None:
    """Were masks of whole tensors to differ between ranks, their whole parameters would drift apart."""
    first, second = run_ranks(2, train_with_dropout, sequence_parallel, timeout=60)
    assert first == second
    assert all(difference < 1e-12 for _, difference in first)


def test_dropout_differs_on_shards() -> None:
    first, second = run_ranks(2, draw_apart, timeout=60)
    assert first["shared"] == second["shared"]
    assert first["apart"] != second["apart"]
    assert first["apart"] == first["again"], "recomputation restores the shared stream"
    assert first["after"] == second["after"]


def draw_apart() -> dict[str, list[float]]:
    from autoparallel.emit.randomness import drawing_apart

    torch.manual_seed(3)
    drawn = {"shared": torch.rand(4).tolist()}
    state = torch.get_rng_state()
    for name in ("apart", "again"):
        torch.set_rng_state(state)
        with drawing_apart(dist.get_rank(), torch.device("cpu")):
            drawn[name] = torch.rand(4).tolist()
    return drawn | {"after": torch.rand(4).tolist()}
