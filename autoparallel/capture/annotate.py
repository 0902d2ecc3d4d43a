"""fx program -> Graph: symbolic shapes, what autograd saves, what is a view, what selective recomputation keeps.

What is saved, and what selective recomputation keeps, is observed, not tabulated: the program runs once on fake tensors
under autograd with saved-tensor hooks, the attention op already in the form it is emitted in, so any operator of any
family is right by construction.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.printers import PythonPrinter

from autoparallel.capture.assemble import assemble
from autoparallel.capture.attention import Attention
from autoparallel.capture.export import INPUTS, ROOT, Exported
from autoparallel.capture.kept import is_kept
from autoparallel.capture.repeats import BLOCK_INPUTS, BLOCK_OUTPUT
from autoparallel.capture.segments import Segments, module_path
from autoparallel.capture.unfold import unfold
from autoparallel.ir.dims import Dim
from autoparallel.ir.graph import Argument, Graph, Op, Parameter, Ref, SavedTensor, TensorSpec


def annotate(exported: Exported, segments: Segments, names: dict[str, str]) -> Graph:
    """The cost-annotated DAG of an exported training forward; `names` are canonical parameter names by attribute."""
    return _Annotator(exported, segments, names).graph()


class _Annotator:
    def __init__(self, exported: Exported, segments: Segments, names: dict[str, str]) -> None:
        self.exported, self.segments, self.names = exported, segments, names
        self.module = exported.module
        self.symbols = _symbol_names(self.module)
        self.dims: dict[Any, Dim] = {}
        self.observed = _Observer(self).run()

    def graph(self) -> Graph:
        twin = self.exported.twin
        return assemble(
            self.ops(),
            [
                Parameter(name, tuple(p.shape), dtype_name(p.dtype), p.requires_grad, ())
                for name, p in twin.named_parameters()
            ],
            inputs=INPUTS,
            outputs=self.outputs(),
            model_name=str(getattr(getattr(twin, "config", None), "_name_or_path", "") or type(twin).__name__),
            architecture=type(twin).__name__,
            notes=self.exported.notes,
        )

    def ops(self) -> list[Op]:
        ops = [self.op(node) for node in self.module.graph.nodes if node.op == "call_function"]
        repeats = self.exported.repeats
        return ops if repeats is None else unfold(ops, repeats.calls, block_list=repeats.block_list, root=ROOT)

    def op(self, node: fx.Node) -> Op:
        inputs: list[TensorSpec] = []  # in argument order, repeated when an op takes one tensor twice
        arguments = tuple((name, self.argument(value, inputs, of=node)) for name, value in named_arguments(node))
        value = node.meta.get("val")
        outputs = [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, Tensor)]
        stack = (node.meta.get("stack_trace") or "").strip().splitlines()
        return Op(
            name=node.name,
            target=str(node.target),
            inputs=tuple(inputs),
            outputs=tuple(self.tensor_spec(node.name, v, node) for v in outputs),
            arguments=arguments,
            segment=self.segments.get(node),
            is_view=node in self.observed.views,
            is_pointwise=_is_pointwise(node.target),
            saved=tuple(self.observed.saved.get(node, ())),
            kept=tuple(self.observed.kept.get(node, ())),
            module=module_path(node),
            source=stack[-2].strip() if len(stack) > 1 else "",
        )

    def spec(self, node: fx.Node) -> TensorSpec:
        name = self.names.get(str(node.target), str(node.target)) if node.op == "get_attr" else node.name
        return self.tensor_spec(name, node.meta["val"], node)

    def tensor_spec(self, name: str, value: Tensor, node: fx.Node) -> TensorSpec:
        shape = tuple(self.dim(size) for size in value.shape)
        return TensorSpec(name, shape, dtype_name(value.dtype), node in self.observed.differentiable)

    def dim(self, size: Any) -> Dim:
        """An int, or the expression of `batch` and `seq` that a symbolic size stands for."""
        if isinstance(size, int):
            return size
        symbolic = size.node.expr
        if symbolic not in self.dims:
            expression = sympy.expand(symbolic.xreplace(self.symbols))
            self.dims[symbolic] = int(expression) if expression.is_Integer else PythonPrinter().doprint(expression)
        return self.dims[symbolic]

    def argument(self, value: Any, inputs: list[TensorSpec], *, of: fx.Node | None = None) -> Argument:
        """`value` as data; a tensor is appended to `inputs`. What `of` picks from several tensors is that tensor."""
        picked = of.meta["val"] if of is not None and of.target is operator.getitem else None
        if isinstance(value, fx.Node) and isinstance(picked, Tensor):
            inputs.append(self.tensor_spec(value.name, picked, value))
            return Ref(len(inputs) - 1)
        if self.is_tensor(value):
            inputs.append(self.spec(value))
            return Ref(len(inputs) - 1)
        if isinstance(value, (list, tuple)):
            return tuple(self.argument(item, inputs) for item in value)
        if isinstance(value, fx.Node):
            size = value.meta.get("val")
            return self.dim(size) if isinstance(size, (int, torch.SymInt)) else "*"
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    @staticmethod
    def is_tensor(value: Any) -> bool:
        return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)

    def outputs(self) -> tuple[str, str]:
        output = next(node for node in self.module.graph.nodes if node.op == "output")
        loss, logits = output.args[0]
        return loss.name, logits.name


def named_arguments(node: fx.Node) -> list[tuple[str, Any]]:
    """Arguments by schema name; those of `getitem` are called `value` and `index`."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        names = [argument.name for argument in schema.arguments]
    else:
        names = ["value", "index"] if node.target is operator.getitem else [str(i) for i in range(len(node.args))]
    return [*zip(names, node.args, strict=False), *node.kwargs.items()]


class _Observer(fx.Interpreter):
    """Runs the program on fake tensors under autograd and notes views, differentiable values, saved and kept
    storages.
    """

    def __init__(self, annotator: _Annotator) -> None:
        super().__init__(annotator.module, garbage_collect_values=False)
        self.annotator = annotator
        self.views: set[fx.Node] = set()
        self.differentiable: set[fx.Node] = set()
        self.saved: dict[fx.Node, list[SavedTensor]] = {}
        self.kept: dict[fx.Node, list[SavedTensor]] = {}
        self.owner: dict[int, str] = {}
        self.num_hidden: dict[fx.Node, int] = {}
        self.alive: list[Tensor] = []  # storages are told apart by address, so none may be freed and reused
        self.current: fx.Node | None = None

    def run(self) -> _Observer:  # type: ignore[override]
        nodes = self.annotator.module.graph.nodes
        placeholders = [n.meta["val"] for n in nodes if n.op == "placeholder"]
        with (
            placeholders[0].fake_mode,
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t),
            _KeptOutputs(self.keep),
        ):
            super().run(*placeholders)
        return self

    def pack(self, tensor: Tensor) -> Tensor:
        assert self.current is not None
        key = tensor.untyped_storage()._cdata
        self.alive.append(tensor)
        if key not in self.owner:
            self.owner[key] = self.transposed_parameter(tensor) or self.hidden()
        self.saved.setdefault(self.current, []).append(self.storage(tensor))
        return tensor

    def keep(self, tensor: Tensor) -> None:
        """A storage that a kept kernel makes; one that draws random numbers runs again."""
        assert self.current is not None
        if self.current.target is torch.ops.autoparallel.attention.default and self.current.args[7]:
            return
        self.alive.append(tensor)
        self.owner.setdefault(tensor.untyped_storage()._cdata, self.hidden())
        self.kept.setdefault(self.current, []).append(self.storage(tensor))

    def hidden(self) -> str:
        """A new name for a storage that the current op makes."""
        assert self.current is not None
        self.num_hidden[self.current] = self.num_hidden.get(self.current, 0) + 1
        return f"{self.current.name}:{self.num_hidden[self.current]}"

    def storage(self, tensor: Tensor) -> SavedTensor:
        storage = tensor.untyped_storage()
        numel = self.annotator.dim(storage.nbytes() // tensor.dtype.itemsize)
        return SavedTensor(self.owner[storage._cdata], numel, dtype_name(tensor.dtype))

    def keeps_result(self, node: fx.Node, key: int) -> None:
        """An op that keeps its own result (softmax, rsqrt, a contraction) was seen keeping it before it returned it."""
        hidden, self.owner[key] = self.owner[key], node.name
        for noted in (self.saved, self.kept):
            entries = noted.get(node, ())
            noted[node] = [replace(s, storage=node.name) if s.storage == hidden else s for s in entries]

    def transposed_parameter(self, tensor: Tensor) -> str | None:
        """A linear's saved weight: its fake transpose does not share the weight's storage, as the real one does."""
        assert self.current is not None
        for parent in self.current.all_input_nodes:
            value = self.env.get(parent)
            same = isinstance(value, nn.Parameter) and tuple(tensor.shape) == tuple(reversed(value.shape))
            if parent.op == "get_attr" and same:
                return self.annotator.names.get(str(parent.target), str(parent.target))
        return None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        try:
            result = super().run_node(n)
        except Exception:  # a few operators have no fake kernel for symbolic shapes under autograd
            result = self.assumed_result(n)
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(value, Tensor):
                continue
            self.alive.append(value)
            key = value.untyped_storage()._cdata
            name = self.annotator.names.get(str(n.target), str(n.target)) if n.op == "get_attr" else n.name
            owner = self.owner.setdefault(key, name)
            if owner.startswith(f"{n.name}:"):
                self.keeps_result(n, key)
            elif owner != name and n.op == "call_function":
                self.views.add(n)
            if value.requires_grad:
                self.differentiable.add(n)
        return result

    def assumed_result(self, node: fx.Node) -> Any:
        """The recorded shape of a node that will not run, keeping every floating input for backward."""
        inputs = [self.env[parent] for parent in node.all_input_nodes if isinstance(self.env[parent], Tensor)]
        differentiable = [t for t in inputs if t.requires_grad]
        for tensor in inputs if differentiable else []:
            self.pack(tensor)
        value = node.meta["val"]
        assert isinstance(value, Tensor), f"{node.target} returns no single tensor"
        return torch.empty(value.shape, dtype=value.dtype, device="cpu").requires_grad_(bool(differentiable))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.autoparallel.attention.default:
            query, key, value, _, scale, _, softcap, dropout = args  # priced unpadded; a window's mask is added later
            # With dropout the CPU has no fused kernel, and what its matmuls keep is not what a GPU keeps.
            observed = dropout if softcap else 0.0
            return Attention(scale=scale, window=0, softcap=softcap, dropout=observed)(query, key, value, None)
        if str(target) == BLOCK_INPUTS:
            return None
        if str(target) == BLOCK_OUTPUT:
            _, result = args
            return torch.empty_like(result, requires_grad=result.requires_grad)
        return super().call_function(target, args, kwargs)


# Pointwise in effect, though torch does not tag them so: they copy or rename.
_COPIES = {"to", "_to_copy", "contiguous", "clone", "alias", "detach", "dropout", "type_as", "lift_fresh_copy"}


def _is_pointwise(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target._schema.name.removeprefix("aten::") in _COPIES


class _KeptOutputs(TorchDispatchMode):
    """Hands what selective recomputation would keep to `note`, one tensor at a time."""

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result) if is_kept(func, args, kwargs or {}) else ():
            if isinstance(value, Tensor):
                self.note(value)
        return result


def canonical_parameter_names(exported: Exported) -> dict[str, str]:
    """From the program's attribute names to `named_parameters()` of the model, tied ones to their first name."""
    by_id = {id(p): name for name, p in exported.twin.named_parameters()}
    attributes = exported.module.named_parameters(remove_duplicate=False)
    return {name: by_id[id(p)] for name, p in attributes if id(p) in by_id}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _symbol_names(module: fx.GraphModule) -> dict[Any, Any]:
    """The sympy symbols of the batch and the sequence dim, renamed."""
    tokens = next(n.meta["val"] for n in module.graph.nodes if n.op == "placeholder" and n.target == "input_ids")
    renamed = {}
    for size, name in zip(tokens.shape, ("batch", "seq"), strict=True):
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            renamed[size.node.expr] = sympy.Symbol(name, integer=True, positive=True)
    return renamed
