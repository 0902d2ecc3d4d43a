"""Kernels of a step: their work is that of the graph, whichever way a program runs its operators."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
import pytest
import torch
import transformers

from autoparallel.capture.attention import Attention
from autoparallel.capture.program import Program, capture
from autoparallel.cost.activations import attention_core_bytes, saved_under, workspace_under
from autoparallel.cost.collectives import Topology
from autoparallel.cost.compute import Device
from autoparallel.cost.flavors import resolve_flavor
from autoparallel.cost.kernels import Kernel, Size, groups, kernels, launched
from autoparallel.cost.practice import OURS, Practice
from autoparallel.cost.segments import Pricing
from autoparallel.cost.tables import load_table
from autoparallel.ir.graph import DTYPE_BYTES, Graph, Op
from autoparallel.ir.ops import ATTENTION, CONTRACTIONS, contracted_inputs, flops
from autoparallel.ir.precision import Precision
from autoparallel.tensor_parallel.splits import SplitGraph
from tests.families import make_model
from tests.strategies import all_splits

SIZE = Size(batch=2, seq=16)
FUSED = Practice(fused=True)
UNFUSED_ATTENTION = Practice(fused=True, attention="unfused")


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    return {family: capture(make_model(family)).graph for family in ("llama", "gpt2")}


def _matmul_flops(found: Iterable[Kernel]) -> float:
    return sum(2.0 * k.products * k.rows * k.columns * k.depth for k in found if k.kind == "matmul")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("practice", [OURS, FUSED])
def test_matmuls_do_the_flops_of_the_graph(family: str, practice: Practice, graphs: dict[str, Graph]) -> None:
    ops = list(graphs[family].ops())
    counted = [flops(op, **SIZE.whole) for op in ops if op.target != ATTENTION]
    found = kernels(ops, SIZE, practice)
    assert _matmul_flops(k for part in found for k in part.forward) == sum(f.forward for f in counted)
    backward = (k for part in found for k in (*part.backward, *part.weight))
    assert _matmul_flops(backward) == sum(f.backward for f in counted)


def test_unfused_attention_does_what_is_masked_too(graphs: dict[str, Graph]) -> None:
    ops = [op for op in graphs["llama"].ops() if op.target == ATTENTION]
    counted = [flops(op, **SIZE.whole) for op in ops]
    flash, unfused = (kernels(ops, SIZE, practice) for practice in (FUSED, UNFUSED_ATTENTION))
    assert sum(k.flops for part in flash for k in part.forward) == sum(f.executed_forward for f in counted)
    assert _matmul_flops(k for part in unfused for k in part.forward) == sum(f.forward for f in counted)
    assert _matmul_flops(k for part in unfused for k in part.backward) == sum(f.backward for f in counted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_groups_hold_every_op_once_and_run_at_one_time(family: str, graphs: dict[str, Graph]) -> None:
    """No path leaves a group and comes back: the kernel could not run."""
    graph = graphs[family]
    ops = graph.segment_ops(1)
    found = groups(ops)
    assert sorted(op.name for group in found for op in group) == sorted(op.name for op in ops)
    assert max(len(group) for group in found) > 3
    block = nx.DiGraph(graph.dag.subgraph([op.name for op in ops]))
    for group in found:
        assert len(group) == 1 or not any(contracted_inputs(op) for op in group)
        whole = block.copy()
        for op in group[1:]:
            nx.contracted_nodes(whole, group[0].name, op.name, self_loops=False, copy=False)
        assert nx.is_directed_acyclic_graph(whole)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fusion_saves_bytes_and_launches(family: str, graphs: dict[str, Graph]) -> None:
    ops = graphs[family].segment_ops(1)
    eager, fused = (kernels(ops, SIZE, practice) for practice in (OURS, FUSED))

    def moved(parts: Iterable[tuple[Kernel, ...]]) -> tuple[int, float]:
        light = [k for part in parts for k in part if k.kind == "memory"]
        return len(light), sum(k.moved_bytes for k in light)

    for phase in ("forward", "backward"):
        (more, large), (fewer, small) = (moved(getattr(part, phase) for part in found) for found in (eager, fused))
        assert fewer < more
        assert small < 0.7 * large
    entering = {spec.name for spec in graphs[family].boundaries[1]}
    assert 0 < saved_under(ops, entering, SIZE, FUSED) < saved_under(ops, entering, SIZE, OURS)


def test_merged_norms_are_one_kernel_each_and_nothing_else_is(graphs: dict[str, Graph]) -> None:
    ops = [op for op in graphs["llama"].segment_ops(1) if not op.is_view]
    found = [group for group in launched(ops, Practice(merged_norms=True)) if len(group) > 1]
    assert len(found) == 2
    entering = {spec.name for spec in graphs["llama"].boundaries[1]}
    kept = [saved_under(ops, entering, SIZE, practice) for practice in (FUSED, Practice(merged_norms=True), OURS)]
    assert kept == sorted(set(kept))
    for group in found:
        assert len({op.module for op in group}) == 1
        assert group == [op for op in ops if op.module == group[0].module and op.target not in CONTRACTIONS]


def test_probabilities_are_kept_by_unfused_attention(graphs: dict[str, Graph]) -> None:
    ops = graphs["gpt2"].segment_ops(1)
    (query,) = (op.inputs[0] for op in ops if op.target == ATTENTION)
    more = saved_under(ops, set(), SIZE, UNFUSED_ATTENTION) - saved_under(ops, set(), SIZE, FUSED)
    heads = query.shape[1]
    assert isinstance(heads, int)
    assert more == SIZE.batch * heads * SIZE.seq**2 * 8  # fp64


def test_ranks_of_a_context_share_the_work(graphs: dict[str, Graph]) -> None:
    def attention(size: Size) -> Kernel:
        (op,) = _attentions(graphs["llama"].segment_ops(1))
        return kernels([op], size, OURS)[0].forward[0]

    alone, shared = attention(Size(2, 64)), attention(Size(2, 64, context_parallel=4))
    assert shared.flops == alone.flops / 4


def _attentions(ops: Iterable[Op]) -> list[Op]:
    return [op for op in ops if op.target == ATTENTION]


def test_low_precision_matmuls_come_after_a_cast(graphs: dict[str, Graph]) -> None:
    ops = [op for op in graphs["llama"].segment_ops(1) if op.target == "aten.linear.default"]
    low = Practice(matmul_dtype="float8")
    assert len(ops) == 7
    for op, part in zip(ops, kernels(ops, SIZE, low), strict=True):
        cast, matmul = part.forward
        assert (cast.kind, matmul.kind, matmul.dtype) == ("memory", "matmul", "float8")
        assert cast.moved_bytes == op.inputs[0].numel(**SIZE.local) * (8 + 2)  # read in fp64, written twice
        assert part.backward[0].moved_bytes == op.outputs[0].numel(**SIZE.local) * (8 + 2)


HIDDEN, HEADS, SEQ, VOCABULARY = 1024, 16, 2048, 8192
MEGATRON = Practice(fused=True, attention="unfused", keeps_gathered=False)


@pytest.fixture(scope="module")
def gpt() -> Program:
    """With dropout everywhere, in bf16."""
    config = transformers.GPT2Config(n_embd=HIDDEN, n_layer=3, n_head=HEADS, vocab_size=VOCABULARY, n_positions=SEQ)
    return capture(config, dtype=torch.bfloat16)


def test_activations_of_a_block_are_those_of_the_formula(gpt: Program) -> None:
    """sbh (34 + 5as/h) bytes, Korthikanti et al., arXiv 2205.05198, equation 1."""
    ops = gpt.graph.segment_ops(2)
    entering = {spec.name for spec in gpt.graph.boundaries[2]}
    size = Size(1, SEQ)
    found = saved_under(ops, entering, size, MEGATRON) + 2 * SEQ * HIDDEN  # with what enters
    assert found == pytest.approx(SEQ * HIDDEN * (34 + 5 * HEADS * SEQ / HIDDEN), rel=0.02)


@pytest.mark.parametrize("ways", [2, 4])
def test_sequence_parallelism_divides_all_of_them(ways: int, gpt: Program) -> None:
    """sbh/t (34 + 5as/h) bytes, equation 4: what is gathered for a matmul is not kept."""
    splits = all_splits(gpt, ways, sequence_parallel=True)
    lowered = SplitGraph(gpt.graph, ways, True, splits[0]).lowered(2)
    size, entering = Size(1, SEQ), {spec.name for spec in lowered.entering}
    whole = SEQ * HIDDEN * (34 + 5 * HEADS * SEQ / HIDDEN)
    found = saved_under(list(lowered.ops), entering, size, MEGATRON)
    assert found + 2 * SEQ * HIDDEN / ways == pytest.approx(whole / ways, rel=0.02)
    kept = saved_under(list(lowered.ops), entering, size, MEGATRON.model_copy(update={"keeps_gathered": True}))
    assert kept - found == 2 * 2 * SEQ * HIDDEN * (1 - 1 / ways), "of two gathered inputs, all but this rank's part"


@pytest.mark.parametrize("ways", [1, 2])
def test_every_matrix_of_a_split_block_has_its_gradient_apart(ways: int, gpt: Program) -> None:
    """Also where a projection is split by rows, whose bias is added to the sum: it runs in fp8, and its weight's
    gradient may wait.
    """
    split = SplitGraph(gpt.graph, ways, False, all_splits(gpt, ways, sequence_parallel=False)[0]) if ways > 1 else None
    lowered = (split or SplitGraph(gpt.graph)).lowered(2)
    found = kernels(list(lowered.ops), Size(1, SEQ), Practice(matmul_dtype="float8"))
    matmuls = [k for part in found for k in part.forward if k.kind == "matmul"]
    assert len(matmuls) == 4
    assert {k.dtype for k in matmuls} == {"float8"}
    assert _matmul_flops(k for part in found for k in part.weight) == _matmul_flops(matmuls)


def test_gradients_summed_in_matmuls_hide_behind_them(gpt: Program) -> None:
    """Without, two reads and a write of each in fp32; with, what is not made by a matmul alone."""
    flavor, table, lowered = resolve_flavor("8xA100-SXM4-80GB"), load_table("A100-SXM4-80GB"), SplitGraph(gpt.graph)
    precision = Precision.of("bfloat16", "float32")
    apart, within = (
        Pricing(gpt.graph, table, Topology(flavor, table), SEQ, precision, Practice(accumulates_in_matmul=merged))
        .segment_cost(lowered.lowered(2), 4)
        .weight_gradient_s
        for merged in (False, True)
    )
    made = 12 * HIDDEN**2
    assert apart - within == pytest.approx(Device(table).stream_s(3 * 4 * made))


def test_low_precision_keeps_what_its_matmuls_read(graphs: dict[str, Graph]) -> None:
    """A byte an element: of the outputs of both norms and of the MLP's product instead of all of theirs, of attention's
    output beside what attention itself keeps.
    """
    graph = graphs["llama"]
    ops, entering = graph.segment_ops(1), {spec.name for spec in graph.boundaries[1]}
    linear = [op.inputs[0] for op in ops if op.target == "aten.linear.default"]
    elements = {spec.name: spec.numel(**SIZE.local) for spec in linear}
    (output,) = (op.outputs[0] for op in ops if op.target == ATTENTION)
    beside = output.numel(**SIZE.local)
    wide = DTYPE_BYTES[output.dtype]
    high, low = (saved_under(ops, entering, SIZE, Practice(fused=True, matmul_dtype=d)) for d in (None, "float8"))
    assert len(elements) == 4
    assert high - low == (wide - 1) * (sum(elements.values()) - beside) - beside


def test_a_merged_loss_makes_nothing_of_the_size_of_logits_but_their_gradient(gpt: Program) -> None:
    """In bf16; else log-probabilities in fp32 are kept, and their gradient is as large as they are."""
    head, logits = gpt.graph.segment_ops(gpt.graph.num_segments - 1), VOCABULARY * (SEQ - 1)
    entering = {spec.name for spec in gpt.graph.boundaries[-1]}
    size, merged = Size(1, SEQ), Practice(merged_loss=True)
    kept = saved_under(head, entering, size, OURS) - saved_under(head, entering, size, merged)
    assert kept == pytest.approx((4 - 2) * logits, rel=0.01)
    assert workspace_under(head, size, merged) < 0.5 * workspace_under(head, size, OURS)
    assert workspace_under(head, size, OURS) >= 2 * 4 * logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_in_attention_keeps_more_on_a_cpu_than_on_a_gpu(dtype: torch.dtype) -> None:
    """A GPU's fused kernel keeps its operands and results; a CPU has none that drops out."""
    config = transformers.GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=64, resid_pdrop=0.0, embd_pdrop=0.0)
    (op,) = _attentions(capture(config, dtype=dtype).graph.segment_ops(2))
    size = Size(2, 48)
    shape = (2, 4, 48, 16)
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    operands = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    attention = Attention(scale=0.25, window=0, softcap=0.0, dropout=0.1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = attention(*operands, None)
    held = sum(storages.get(t.untyped_storage().data_ptr(), 0) for t in (*operands, result))
    math = Practice(attention="math")
    assert attention_core_bytes([op], size, math) == pytest.approx(sum(storages.values()) - held, rel=0.03)
    assert attention_core_bytes([op], size, OURS) == 0
    private = sum(s.size_bytes(**size.local) for s in op.saved if s.storage.startswith(f"{op.name}:"))
    assert private == 2 * 4 * 48 * 4, "the log-sum-exp alone"
