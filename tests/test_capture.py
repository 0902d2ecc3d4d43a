"""Capture: what goes in, what is refused and how, and that nothing of the user's model is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from autoparallel.capture.attention import ATTENTION_TARGET
from autoparallel.capture.program import capture
from autoparallel.errors import CaptureError, ConfigError
from tests.families import FAMILIES, UNSEEN, make_model


def test_model_meta_config_and_path_give_one_program(tmp_path: Path) -> None:
    config = FAMILIES["qwen2"]()
    model = make_model("qwen2", dtype=torch.float32)
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    model.save_pretrained(tmp_path)
    sources: list[Any] = [model, meta, config, str(tmp_path)]
    fingerprints = {capture(source, dtype=torch.float32).graph.fingerprint for source in sources}
    assert len(fingerprints) == 1


def test_the_users_model_is_left_alone() -> None:
    model = make_model("llama").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    capture(model)
    assert model.config._attn_implementation == implementation
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_large_model_is_captured_without_its_weights() -> None:
    config = transformers.Qwen2Config(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64, vocab_size=128256
    )
    graph = capture(config, dtype=torch.bfloat16).graph
    assert sum(p.numel for p in graph.parameters) > 5e9


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in UNSEEN)])
def test_attention_is_one_op_with_unexpanded_heads(family: str) -> None:
    graph = capture(make_model(family)).graph
    calls = [op for op in graph.ops() if op.target == ATTENTION_TARGET]
    assert len(calls) == 4
    config = {**FAMILIES, **UNSEEN}[family]()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert all(op.inputs[1].shape[1] == heads for op in calls)
    windows = [op.argument("window") for op in calls]
    expected = {"mistral": [5, 5, 5, 5], "gemma2": [5, 0, 5, 0]}.get(family, [0, 0, 0, 0])
    assert windows == expected


def test_a_mask_that_attention_cannot_express_falls_back_and_says_so() -> None:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    graph = capture(config).graph
    assert not any(op.target == ATTENTION_TARGET for op in graph.ops())
    assert "eager" in graph.notes[0]


class _Branching(nn.Module):
    """Control flow that depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("llama", dtype=torch.float32)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **other: Any) -> Any:
        if input_ids.sum() > 10:  # this line must be named
            input_ids = input_ids + 1
        return self.inner(input_ids=input_ids, labels=labels, **other)


def test_value_dependent_control_flow_names_the_line() -> None:
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ in forward") as caught:
        capture(_Branching())
    assert caught.value.remedy


class _MeanLoss(nn.Module):
    """A loss that is a mean over whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("llama", dtype=torch.float32)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor, **other: Any) -> Any:
        return self.inner(input_ids=input_ids, labels=labels, attention_mask=attention_mask, use_cache=False)


def test_a_loss_that_cannot_be_summed_over_micro_batches_is_refused() -> None:
    with pytest.raises(CaptureError, match="num_items_in_batch"):
        capture(_MeanLoss())
    with pytest.raises(CaptureError, match="num_items_in_batch"):
        capture(_ExtraTerm())


def test_noise_that_eval_could_not_switch_off_is_refused() -> None:
    model: Any = make_model("llama", dtype=torch.float32)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    with pytest.raises(CaptureError, match=r"draws random numbers with aten.randn_like") as caught:
        capture(model)
    assert "model.layers.1.mlp" in caught.value.why


class _ExtraTerm(nn.Module):
    """A term beside the token loss, of which every micro-batch would bring its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("llama", dtype=torch.float32)

    def forward(self, **inputs: Any) -> Any:
        out = self.inner(**inputs)
        out.loss = out.loss + 0.1 * out.logits.logsumexp(-1).pow(2).mean()
        return out


class _Pinned(nn.Module):
    """A forward that is right for one sequence length only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("llama", dtype=torch.float32)

    def forward(self, input_ids: torch.Tensor, **other: Any) -> Any:
        assert int(input_ids.shape[1]) == 16
        return self.inner(input_ids=input_ids, **other)


def test_a_forward_that_pins_the_length_is_refused() -> None:
    with pytest.raises(CaptureError):
        capture(_Pinned())


def test_not_a_model() -> None:
    with pytest.raises(ConfigError, match="cannot plan for a dict"):
        capture({})
    with pytest.raises(ConfigError, match="not the configuration of a causal language model"):
        capture(transformers.T5Config())
    with pytest.raises(ConfigError, match="no model configuration at"):
        capture("/nowhere/at/all")
