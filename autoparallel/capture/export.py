"""HF causal LM -> fx program of its training forward (labels -> loss, logits), symbolic in batch and sequence.

The model is never run and its weights are never touched: torch.export traces a twin whose parameters are fake tensors.
Inputs of the program: input_ids, attention_mask, labels [batch, seq] and num_items [], the global count of targets by
which the summed loss is divided, so that the losses of micro-batches and data-parallel ranks add up to the loss of the
whole batch.
"""

from __future__ import annotations

import copy
import operator
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from autoparallel.capture.attention import ATTENTION_TARGET, NAME, PADDING_TARGET, captured_attention
from autoparallel.capture.kept import draws
from autoparallel.capture.repeats import BLOCK_INPUTS, Repeats, UnlikeBlocks, drop_unread_inputs, repeating
from autoparallel.capture.segments import module_path
from autoparallel.errors import CaptureError, ConfigError

INPUTS = ("input_ids", "attention_mask", "labels", "num_items")
ROOT = "model."  # the wrapper's attribute that every captured parameter name begins with
_DROPPED = {torch.ops.aten._assert_tensor_metadata.default}


class _TrainingForward(nn.Module):
    """The step's forward as a single device runs it, with the divisor of the loss as an input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            use_cache=False,
            num_items_in_batch=num_items,
        )
        return out.loss, out.logits


@dataclass(frozen=True)
class Exported:
    """A traced program beside the twin it was traced from."""

    module: fx.GraphModule
    """Flat ATen graph; parameters and buffers are the twin's, under their original names."""
    twin: nn.Module
    notes: tuple[str, ...]
    repeats: Repeats | None = None
    """Which blocks of the program stand for others; None if every block is there."""


def export_training_forward(
    model: Any, *, dtype: torch.dtype | None = None, traced: frozenset[int] | None = None
) -> Exported:
    """Trace `model` (an HF model, real or on meta, a config, or a path to one).

    `dtype` is the compute dtype; None keeps the model's. Raises `CaptureError` naming the op and the line of the
    model's code. Given blocks to be `traced`, only those and one of each kind are (`repeats.py`).
    """
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    twin = fake_twin(model, fake_mode=fake_mode, dtype=dtype)
    with captured_attention() as recording:
        try:
            module, repeats = _trace(twin, fake_mode=fake_mode, attention=NAME, traced=traced)
            reason = recording.unsupported or _misused_mask(module)
        except CaptureError as error:
            module, repeats, reason = None, None, error.what
    if module is None or reason:
        fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        twin = fake_twin(model, fake_mode=fake_mode, dtype=dtype)
        module, repeats = _trace(twin, fake_mode=fake_mode, attention="eager", traced=traced)
        note = f"attention is captured as the model's own eager operators: {reason}"
        return Exported(module, twin, (note,), repeats)
    _take_windows_from_masks(module)
    return Exported(module, twin, (), repeats)


def fake_twin(model: Any, *, fake_mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """A training-mode copy of `model` without weights: every parameter and buffer is a fake CPU tensor."""
    if isinstance(model, (str, os.PathLike)):
        model = load_config(model)
    with fake_mode:
        if isinstance(model, PretrainedConfig):
            twin = _from_config(copy.deepcopy(model), dtype)
        elif isinstance(model, nn.Module):
            twin = _copy_with_fake_tensors(model, dtype)
        else:
            raise ConfigError(
                f"cannot plan for a {type(model).__name__}",
                why="a model is an HF causal LM (real or on meta), its config, or the path of either",
            )
    return twin.train()


def _from_config(config: PretrainedConfig, dtype: torch.dtype | None) -> nn.Module:
    try:
        made: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    except ValueError as error:
        raise ConfigError(
            f"{type(config).__name__} is not the configuration of a causal language model",
            why=str(error).splitlines()[0][:200],
            remedy="plan a model that AutoModelForCausalLM knows, or pass the model object itself",
        ) from error
    return made


def load_config(path: str | os.PathLike[str]) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(os.fspath(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no model configuration at '{path}'",
            why=str(error).splitlines()[0],
            remedy="give a directory with a config.json, or the config or model object itself",
        ) from error


def _copy_with_fake_tensors(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        floating = tensor.dtype.is_floating_point
        # Buffers keep their dtype under a compute dtype of our choice, as `from_pretrained(dtype=...)` keeps rotary
        # tables in fp32.
        wanted = dtype if dtype is not None and floating and isinstance(tensor, nn.Parameter) else tensor.dtype
        fake = torch.empty(tensor.shape, dtype=wanted, device="cpu")
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo)


def _set_attention(model: nn.Module, implementation: str) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._attn_implementation = implementation


def _trace(
    twin: nn.Module, *, fake_mode: FakeTensorMode, attention: str, traced: frozenset[int] | None
) -> tuple[fx.GraphModule, Repeats | None]:
    _set_attention(twin, attention)
    with fake_mode:
        tokens = {name: torch.zeros(4, 16, dtype=torch.long) for name in INPUTS[:3]}
        inputs = {**tokens, "num_items": torch.ones((), dtype=torch.long)}
    # The fallback serves models that slice tables of a fixed length, so there the length is a bound of the program.
    longest = getattr(getattr(twin, "config", None), "max_position_embeddings", None) if attention == "eager" else None
    dims = {
        0: torch.export.Dim("batch", min=1, max=1 << 20),
        1: torch.export.Dim("seq", min=2, max=(longest - 1) if longest else 1 << 24),
    }
    shapes = {name: (dims if name != "num_items" else None) for name in INPUTS}
    with repeating(twin, traced) as repeats:
        try:
            program = torch.export.export(_TrainingForward(twin), (), inputs, strict=False, dynamic_shapes=shapes)
        except UnlikeBlocks:
            raise
        except Exception as error:
            raise _capture_error(twin, error) from error
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _clean(module)
    if repeats is not None:
        drop_unread_inputs(module, repeats.calls)
    _check_random(module, type(twin).__name__)
    _check_symbolic(module, type(twin).__name__)
    if not _is_sum_over_num_items(module):
        raise CaptureError(
            f"the loss of {type(twin).__name__} is not a sum over targets divided by num_items_in_batch",
            why="the losses of micro-batches add up to the loss of the batch only in that form",
            remedy="pass **kwargs on to loss_function, as transformers does, and leave other terms (router loss) out",
        )
    return module, repeats


def _is_sum_over_num_items(module: fx.GraphModule) -> bool:
    """Whether the loss is cross_entropy(..., reduction="sum") / num_items, up to casts."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    division = _uncast(output.args[0][0])
    if str(division.target) != "aten.div.Tensor":
        return False
    total, divisor = (_uncast(node) if isinstance(node, fx.Node) else None for node in division.args)
    if total is None or divisor is not _placeholder(module, "num_items"):
        return False
    reduction = total.args[3] if len(total.args) > 3 else total.kwargs.get("reduction", 1)
    return str(total.target) == "aten.cross_entropy_loss.default" and bool(reduction == 2)


def _uncast(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and str(node.target).startswith(("aten.to.", "aten._to_copy", "aten.alias")):
        node = node.all_input_nodes[0]
    return node


def _check_random(module: fx.GraphModule, model_name: str) -> None:
    """Dropout becomes a module that follows `eval()`; any other random operator would go on drawing."""
    for node in module.graph.nodes:
        random = isinstance(node.target, torch._ops.OpOverload) and draws(node.target, node.args, node.kwargs)
        if random and str(node.target) != "aten.dropout.default":
            raise CaptureError(
                f"{model_name} draws random numbers with {node.target}",
                why=f"in {module_path(node) or 'its forward'}; once captured, eval() cannot switch that off",
                remedy="take out what adds noise to the forward; dropout is supported",
            )


def _check_symbolic(module: fx.GraphModule, model_name: str) -> None:
    """A forward that pins a dim gives a program that is right for the traced size only, without a word from
    torch.export.
    """
    output = next(node for node in module.graph.nodes if node.op == "output")
    for node in (_placeholder(module, "input_ids"), output.args[0][1]):
        sizes = node.meta["val"].shape[:2]
        if any(isinstance(size, int) or not size.node.expr.is_Symbol for size in sizes):
            raise CaptureError(
                f"{model_name} cannot be captured for every batch and sequence length",
                why=f"its forward fixes the first dims of {node.name} to {tuple(str(size) for size in sizes)}",
                remedy="keep shapes in the forward symbolic: no int(), len() or comparison that pins a dim",
            )


def _placeholder(module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in module.graph.nodes if node.op == "placeholder" and node.target == name)


def _clean(module: fx.GraphModule) -> None:
    """Drop guards and metadata checks, inline no-grad regions, and give parameters their original names."""
    for node in list(module.graph.nodes):
        if (node.op == "call_module" and node.target == "_guards_fn") or node.target in _DROPPED:
            module.graph.erase_node(node)
        elif node.op == "call_function" and getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled":
            _inline_no_grad(module, node)
    _make_functional(module)
    _slice_by_constants(module)
    _drop_identities(module)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()


def _make_functional(module: fx.GraphModule) -> None:
    """Replace in-place operators whose input nobody reads afterwards by the ones that return a new tensor."""
    seen: set[fx.Node] = set()
    for node in module.graph.nodes:
        seen.add(node)
        functional = _functional(node)
        if functional is not None and all(user in seen for user in _readers(node.args[0])):
            node.target = functional


def _drop_identities(module: fx.GraphModule) -> None:
    """`alias(x)`, `x * 1` and integer `x + 0` are `x`: models write them for the sake of others."""
    neutral: dict[Any, float] = {torch.ops.aten.mul.Tensor: 1, torch.ops.aten.add.Tensor: 0}
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.alias.default:
            if node.target not in neutral or isinstance(node.args[1], fx.Node) or node.args[1] != neutral[node.target]:
                continue
            value, source = node.meta["val"], node.args[0].meta["val"]
            # -0.0 + 0 is 0.0, and an integer times 1.0 is no integer any more.
            if value.dtype != source.dtype or (neutral[node.target] == 0 and value.dtype.is_floating_point):
                continue
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)


def _slice_by_constants(module: fx.GraphModule) -> None:
    """`x[..., [k], :]` is `x[..., k : k + 1, :]`: a view instead of a copy, and its bounds are known."""
    for node in list(module.graph.nodes):
        if str(node.target) != "aten.index.Tensor":
            continue
        source, picked = node.args
        positions = [k for k, index in enumerate(picked) if index is not None]
        constant = _constant(module, picked[positions[0]]) if len(positions) == 1 else None
        if constant is None or constant.shape != (1,) or constant.dtype != torch.long:
            continue
        dim = positions[0]
        first = int(constant) % source.meta["val"].shape[dim]
        node.target, node.args = torch.ops.aten.slice.Tensor, (source, dim, first, first + 1)


def _constant(module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The value of a constant of the program, behind copies of it."""
    while str(node.target) in ("aten.lift_fresh_copy.default", "aten.detach_.default", "aten.detach.default"):
        (node,) = node.all_input_nodes
    value = operator.attrgetter(str(node.target))(module) if node.op == "get_attr" else None
    known = isinstance(value, torch.Tensor) and not isinstance(value, (FakeTensor, torch.nn.Parameter))
    return value if known else None


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """`aten.add.Tensor` for a node of `aten.add_.Tensor`."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.name.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, node.target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, node.target._overloadname, None)


def _readers(tensor: Any) -> set[fx.Node]:
    """Every node that reads the storage of `tensor`, through any view of it."""
    base = tensor
    while _is_view(base):
        base = base.args[0]
    aliases, readers = [base], set[fx.Node]()
    while aliases:
        users = set(aliases.pop().users)
        aliases += [user for user in users - readers if _is_view(user)]
        readers |= users
    return readers


def _is_view(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    aliased = schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return aliased or (node.target is operator.getitem and _is_view(node.args[0]))


def _inline_no_grad(module: fx.GraphModule, call: fx.Node) -> None:
    """Replace a no-grad region by its nodes, each result detached: the same values and the same (absent) gradients."""
    enabled, body_node, *arguments = call.args
    assert enabled is False or enabled is True
    assert isinstance(body_node, fx.Node)
    body = getattr(module, str(body_node.target))
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    env: dict[fx.Node, Any] = dict(zip(placeholders, arguments, strict=True))
    with module.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output") or node.target in _DROPPED:
                continue
            env[node] = module.graph.node_copy(node, lambda n: env[n])
            env[node].meta.setdefault("nn_module_stack", call.meta.get("nn_module_stack"))
        returned = next(node for node in body.graph.nodes if node.op == "output").args[0]
        results = fx.node.map_arg(returned, lambda n: env[n])
        if not enabled:
            results = [_detach(module, value) for value in results]
    for user in list(call.users):
        assert getattr(user.target, "__name__", "") == "getitem"
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(call)


def _detach(module: fx.GraphModule, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    detached = module.graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    return detached


def _misused_mask(module: fx.GraphModule) -> str:
    """The first use of a captured mask that is not our attention's padding argument, or ""."""
    for node in module.graph.nodes:
        if str(node.target) != PADDING_TARGET:
            continue
        for user in node.users:
            if str(user.target) == BLOCK_INPUTS:
                continue
            if str(user.target) != ATTENTION_TARGET or node in user.args[:3]:
                return f"{user.target} uses the attention mask itself"
    return ""


def _take_windows_from_masks(module: fx.GraphModule) -> None:
    """Copy each mask's window onto the attention behind it, then let attention read the padding directly."""
    for node in list(module.graph.nodes):
        if str(node.target) == ATTENTION_TARGET and isinstance(node.args[3], fx.Node):
            mask = node.args[3]
            node.update_arg(5, mask.args[1])
            node.update_arg(3, mask.args[0])
    for node in list(module.graph.nodes):
        if str(node.target) == PADDING_TARGET:
            node.replace_all_uses_with(node.args[0])  # by calls of blocks
            module.graph.erase_node(node)
    module.recompile()


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    where = _user_line(error)
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {lines[0] if lines else type(error).__name__}",
        why=f"at {where}" if where else type(error).__name__,
        remedy="keep Python control flow independent of tensor values, and operators traceable by torch.export",
    )


def _user_line(error: BaseException) -> str:
    """The innermost frame that is model code: not torch, not us."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}")
        trace = trace.tb_next
    ours = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
    models = [frame for frame in frames if not frame.startswith(ours)]
    return models[-1] if models else ""
