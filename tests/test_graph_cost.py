"""The cost-annotated DAG against torch's own counts: FLOPs, parameter bytes, what autograd keeps, and equal blocks."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
import pytest
import torch
import transformers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from autoparallel.capture.program import Program, capture
from autoparallel.cost.activations import deferred_bytes, kept_bytes, replayed, saved_bytes
from autoparallel.emit.deferred import DeferredContraction, defer_weight_gradients
from autoparallel.emit.stage import emit_stage, state_tensors
from autoparallel.ir.dims import evaluate
from autoparallel.ir.ops import flops
from autoparallel.plans.strategy import Recomputation, StagePlan
from tests.families import FAMILIES, UNSEEN, make_batch, make_model, program_of

ROWS, SEQ = 3, 24
ALL = {**FAMILIES, **UNSEEN}
PROVED = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in UNSEEN)]


@pytest.mark.parametrize("family", PROVED)
def test_flops_equal_torchs_counter(family: str) -> None:
    graph = program_of(family).graph
    counted = [flops(op, batch=ROWS, seq=SEQ) for op in graph.ops()]
    config = ALL[family]()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    batch = {name: value.to("meta") for name, value in make_batch(ROWS, SEQ).items()}
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch, use_cache=False).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert sum(f.forward for f in counted) == pytest.approx(forward.get_total_flops(), rel=1e-3)
    assert sum(f.backward for f in counted) == pytest.approx(backward.get_total_flops(), rel=1e-3)
    assert sum(f.executed_forward for f in counted) < sum(f.forward for f in counted)


def test_window_limits_executed_flops() -> None:
    windowed, full = (program_of(name).graph for name in ("mistral", "llama"))
    executed = [sum(flops(op, batch=1, seq=48).executed_forward for op in graph.ops()) for graph in (windowed, full)]
    counted = [sum(flops(op, batch=1, seq=48).forward for op in graph.ops()) for graph in (windowed, full)]
    assert counted[0] == counted[1]
    assert executed[0] < executed[1] < counted[1]


@pytest.mark.parametrize("family", PROVED)
def test_parameter_bytes_equal_the_models(family: str) -> None:
    model = make_model(family, dtype=torch.float32)
    graph = program_of(family).graph
    assert sum(p.size_bytes for p in graph.parameters) == sum(p.nbytes for p in model.parameters())
    assert {p.name for p in graph.parameters} == {name for name, _ in model.named_parameters()}


class LiveStorages(TorchDispatchMode):
    """Every storage that an operator makes inside; afterwards, the bytes of those that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                self.made[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
        return result

    def size_bytes(self, but: set[int]) -> int:
        """But for the storages in `but`."""
        return sum(n for key, (storage, n) in self.made.items() if key not in but and not storage.expired())


def storages(tensors: Iterable[Any]) -> set[int]:
    return {StorageWeakRef(t.untyped_storage()).cdata for t in tensors if isinstance(t, torch.Tensor)}


@dataclass
class Block:
    """An emitted block with the arguments that its stage gives it."""

    module: nn.Module
    arguments: list[Any]
    held: set[int]
    """Storages that live anyway: arguments, parameters, buffers."""

    def forward(self) -> torch.Tensor:
        result: torch.Tensor = self.module(*self.arguments)
        return result


def emitted_block(model: nn.Module, program: Program, recomputation: Recomputation) -> Block:
    """The second block, as the whole model in one stage holds it."""
    graph, tensors = program.graph, state_tensors(model, program)
    whole = StagePlan(first_segment=0, last_segment=graph.num_segments - 1, recomputation=recomputation)
    stage = emit_stage(program, whole, lambda name: tensors[name])
    module, captured = stage.get_submodule("segment_2"), []
    handle = module.register_forward_pre_hook(lambda module, args: captured.append(args))
    stage(**make_batch(ROWS, SEQ, padded=False), num_items=torch.tensor(ROWS * SEQ))
    handle.remove()
    inputs = [
        t.detach().requires_grad_(t.is_floating_point() and t.requires_grad) if isinstance(t, torch.Tensor) else t
        for t in captured[0]
    ]
    return Block(module, inputs, storages([*inputs, *model.parameters(), *model.buffers()]))


@pytest.mark.parametrize("recomputation", ["none", pytest.param("selective", marks=pytest.mark.slow), "full"])
@pytest.mark.parametrize("family", PROVED)
def test_saved_bytes_equal_what_stays_alive(family: str, recomputation: Recomputation) -> None:
    """From the forward of one block to its backward: what autograd and the selective cache hold."""
    model = make_model(family, dtype=torch.float32)
    program = program_of(family)
    block = emitted_block(model, program, recomputation)
    with LiveStorages() as live:
        result = block.forward()
    gc.collect()
    measured = live.size_bytes(but=block.held | storages([result]))
    ops, entering = program.graph.segment_ops(2), {spec.name for spec in program.graph.boundaries[2]}
    size = {"batch": ROWS, "seq": SEQ}
    predicted = {"none": saved_bytes(ops, entering, **size), "selective": kept_bytes(ops, **size), "full": 0}
    assert predicted[recomputation] == pytest.approx(measured, rel=0.03)


def flash_flops(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """torch's table lacks the attention kernel of CPUs."""
    rows, heads, length, head_dim = query
    return 2 * rows * heads * length * key[2] * (head_dim + value[3])


class ContractionFlops(TorchDispatchMode):
    """FLOPs of the contractions that run inside. torch's own counter adds operators to a second run, which
    selective recomputation takes for another program.
    """

    formulas = flop_registry | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(flash_flops)}

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.formulas:
            self.total += self.formulas[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("recomputation", ["selective", "full"])
@pytest.mark.parametrize("family", PROVED)
def test_backward_repeats_the_predicted_flops(family: str, recomputation: Recomputation) -> None:
    """Forward is left before the last kernels, whose results nobody needs again."""
    model = make_model(family, dtype=torch.float32)
    program = program_of(family)
    counted = {}
    for level in ("none", recomputation):
        result = emitted_block(model, program, level).forward()
        with ContractionFlops() as counter:
            result.sum().backward()
        counted[level] = counter.total
    ops = program.graph.segment_ops(2)
    repeated = [op for op in replayed(ops) if recomputation == "full" or not op.kept]
    predicted = sum(flops(op, batch=ROWS, seq=SEQ).forward for op in repeated)
    assert counted[recomputation] - counted["none"] == predicted
    assert (predicted == 0) == (recomputation == "selective")


@pytest.mark.parametrize("family", PROVED)
def test_deferred_bytes_equal_what_a_split_backward_keeps(family: str) -> None:
    model = make_model(family, dtype=torch.float32)
    program = capture(model)
    graph, tensors = program.graph, state_tensors(model, program)
    whole = StagePlan(first_segment=0, last_segment=graph.num_segments - 1, recomputation="none")
    stage = emit_stage(program, whole, lambda name: tensors[name])
    defer_weight_gradients(stage)
    loss, _ = stage(**make_batch(ROWS, SEQ, padded=False), num_items=torch.tensor(ROWS * SEQ))
    loss.backward()
    for segment in range(graph.num_segments):
        modules = stage.get_submodule(f"segment_{segment}").modules()
        pending = [p for module in modules if isinstance(module, DeferredContraction) for p in module.pending]
        storages = {t.untyped_storage().data_ptr(): t for p in pending for t in (p.value, p.output_gradient)}
        predicted = deferred_bytes(graph.segment_ops(segment), batch=ROWS, seq=SEQ)
        assert predicted == sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize(
    ("family", "classes"), [("llama", 1), ("qwen2", 1), ("gpt2", 1), ("mistral", 1), ("gemma2", 2), ("phi3", 1)]
)
def test_equal_blocks_share_a_class(family: str, classes: int) -> None:
    blocks = program_of(family).graph.segment_classes[1:-1]
    assert len(blocks) == 4
    assert len(set(blocks)) == classes


def test_blocks_that_differ_by_a_scalar_are_not_equal() -> None:
    graph = capture(make_model("gpt2", scale_attn_by_inverse_layer_idx=True)).graph
    assert len(set(graph.segment_classes[1:-1])) == 4


@pytest.mark.parametrize("family", PROVED)
def test_no_tensor_has_two_sequence_dims(family: str) -> None:
    for op in program_of(family).graph.ops():
        for tensor in op.outputs:
            assert sum("seq" in str(dim) for dim in tensor.shape) < 2, f"{op.name}: {tensor.shape}"


def test_the_dag_is_a_dag_with_shapes_as_functions() -> None:
    graph = program_of("llama").graph
    assert nx.is_directed_acyclic_graph(graph.dag)
    hidden = graph.boundaries[1][0]
    assert [evaluate(dim, batch=5, seq=7) for dim in hidden.shape] == [5, 7, 32]
    assert all(op.source for op in graph.segment_ops(1))


def test_the_fingerprint_is_of_the_structure() -> None:
    same = capture(make_model("llama", seed=1)).graph.fingerprint
    assert capture(make_model("llama", seed=2)).graph.fingerprint == same
    assert capture(make_model("llama", rms_norm_eps=1e-3)).graph.fingerprint != same
    assert capture(make_model("llama", num_hidden_layers=3)).graph.fingerprint != same
