"""The emitted stages as programs: what they take and return, what they hold, and where they run."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from autoparallel.capture.program import Program, capture
from autoparallel.emit.deferred import DeferredContraction, defer_weight_gradients
from autoparallel.emit.recompute import Recomputed
from autoparallel.emit.stage import INPUTS, emit_stage, readable, state_tensors
from autoparallel.plans.strategy import StagePlan, Strategy
from tests.families import make_batch, make_model
from tests.strategies import even_stages


def stages_of(model: nn.Module, program: Program, recomputation: str = "none") -> list[fx.GraphModule]:
    strategy = even_stages(program.graph.num_segments, Strategy(num_stages=2, recomputation=recomputation))
    tensors = state_tensors(model, program)
    assert strategy.stages is not None
    return [emit_stage(program, stage, lambda name: tensors[name]) for stage in strategy.stages]


def test_one_tensor_crosses_a_cut_and_every_parameter_has_one_home() -> None:
    model = make_model("llama")
    first, second = stages_of(model, capture(model))
    taken = [[n.target for n in stage.graph.nodes if n.op == "placeholder"] for stage in (first, second)]
    assert taken[0] == list(INPUTS)
    assert len(taken[1]) == len(INPUTS) + 1
    held = [{id(p) for p in stage.parameters()} for stage in (first, second)]
    assert not held[0] & held[1]
    assert held[0] | held[1] == {id(p) for p in model.parameters()}


def test_tied_embeddings_are_on_both_stages() -> None:
    model = make_model("qwen2")
    held = [{id(p) for p in stage.parameters()} for stage in stages_of(model, capture(model))]
    assert held[0] & held[1] == {id(model.get_input_embeddings().weight)}


def test_recomputation_wraps_blocks_and_leaves_the_ends_alone() -> None:
    model = make_model("llama")
    first, second = stages_of(model, capture(model), "full")
    wrapped = [
        name for stage in (first, second) for name, child in stage.named_children() if isinstance(child, Recomputed)
    ]
    assert wrapped == ["segment_1", "segment_2", "segment_3", "segment_4"]


def test_each_block_has_its_own_level() -> None:
    model = make_model("llama")
    program = capture(model)
    tensors = state_tensors(model, program)
    plan = StagePlan(first_segment=0, last_segment=5, recomputation=("full", "none", "selective", "none"))
    stage = emit_stage(program, plan, lambda name: tensors[name])
    levels = {name: child.level for name, child in stage.named_children() if isinstance(child, Recomputed)}
    assert levels == {"segment_1": "full", "segment_3": "selective"}
    assert "# segment_3, selective recomputation" in readable(stage)


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_the_text_of_a_stage_holds_its_blocks(recomputation: str) -> None:
    model = make_model("llama")
    first, second = (readable(stage) for stage in stages_of(model, capture(model), recomputation))
    assert first.count("aten.linear.default") == 2 * 7
    assert second.count("aten.linear.default") == 2 * 7 + 1


def test_recomputation_keeps_only_block_inputs() -> None:
    """What autograd holds after a forward: a fraction of what it holds without recomputation."""
    kept = {}
    for recomputation in ("none", "full"):
        model = make_model("llama")
        program = capture(model)
        tensors = state_tensors(model, program)
        whole = StagePlan(first_segment=0, last_segment=program.graph.num_segments - 1, recomputation=recomputation)
        stage = emit_stage(program, whole, lambda name, tensors=tensors: tensors[name])
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            stage(**make_batch(4, 16), num_items=torch.tensor(10))
        kept[recomputation] = sum(storages.values())
    assert kept["full"] < kept["none"] / 2


def test_dropout_follows_train_and_eval() -> None:
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    program = capture(model)
    tensors = state_tensors(model, program)
    whole = StagePlan(first_segment=0, last_segment=program.graph.num_segments - 1, recomputation="none")
    stage = emit_stage(program, whole, lambda name: tensors[name])
    inputs = {**make_batch(2, 8), "num_items": torch.tensor(5)}
    losses = {stage(**inputs)[0].item() for _ in range(3)}
    assert len(losses) == 3
    stage.eval()
    assert len({stage(**inputs)[0].item() for _ in range(3)}) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_stage_makes_its_tensors_where_it_runs(family: str) -> None:
    """On another device than capture's: nothing is made on the CPU (meta stands in for a GPU)."""
    model = make_model(family).to("meta")
    program = capture(model)
    tensors = {name: value.to("meta") for name, value in state_tensors(model, program).items()}
    whole = StagePlan(first_segment=0, last_segment=program.graph.num_segments - 1, recomputation="none")
    stage = emit_stage(program, whole, lambda name: tensors[name], device=torch.device("meta"))
    inputs = {name: value.to("meta") for name, value in make_batch(2, 8).items()}
    loss, logits = stage(**inputs, num_items=torch.tensor(5, device="meta"))
    assert loss.device.type == logits.device.type == "meta"
    loss.backward()


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_split_backward_makes_the_same_gradients_later(family: str, recomputation: str) -> None:
    """First everything but the weights of contractions; then those, one micro-batch after the other."""
    model = make_model(family)
    program = capture(model)
    batches = [make_batch(2, 8, seed=seed) for seed in (1, 2)]
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    strategy = even_stages(program.graph.num_segments, Strategy(recomputation=recomputation))
    tensors = state_tensors(model, program)
    (stage,) = (emit_stage(program, plan, lambda name: tensors[name]) for plan in strategy.stages or ())
    defer_weight_gradients(stage)
    deferred = [module for module in stage.modules() if isinstance(module, DeferredContraction)]
    assert len(deferred) == sum(
        "linear" in str(n.target) or "addmm" in str(n.target) for n in program.module.graph.nodes
    )
    for batch in batches:
        num_items = (batch["labels"][:, 1:] != -100).sum()
        loss, _ = stage(**batch, num_items=num_items, padding=batch["attention_mask"].bool())
        loss.backward()
    weights = {name for name, p in model.named_parameters() if p.grad is None}
    assert weights == {name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name} - {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    for _ in batches:
        for module in deferred:
            module.make_weight_gradient()
    assert not any(module.pending for module in deferred)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


def test_frozen_weights_are_not_deferred() -> None:
    model = make_model("llama")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    (stage,) = stages_of(model, capture(model))[1:]
    defer_weight_gradients(stage)
    assert sum(isinstance(module, DeferredContraction) for module in stage.modules()) == 1
