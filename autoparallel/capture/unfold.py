"""Ops with calls of blocks among them in, the ops of the whole model out: a template's ops are repeated where a copy of
it was called, with the names of the copy's parameters and of what it was called with.

A copy must have been called with what its template was called with, or with tensors of the same shape, dtype and
`requires_grad` that come from parameters if those of the template do; else `UnlikeBlocks` is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from autoparallel.capture.repeats import BLOCK_INPUTS, BLOCK_OUTPUT, Call, UnlikeBlocks
from autoparallel.ir.dims import numel
from autoparallel.ir.graph import Op, SavedTensor, TensorSpec

_SIZES = {"batch": 1009, "seq": 2003}  # two shapes of equally many elements at these sizes are so at all


def unfold(ops: Sequence[Op], calls: Sequence[Call], *, block_list: str, root: str) -> list[Op]:
    """The ops of every block. `block_list` is the name of the list of blocks, `root` what buffers' names begin with."""
    return list(_Unfolding(ops, calls, block_list, root).ops())


class _Unfolding:
    def __init__(self, ops: Sequence[Op], calls: Sequence[Call], block_list: str, root: str) -> None:
        self.source, self.calls, self.block_list, self.root = ops, calls, block_list, root
        self.op = {op.name: op for op in ops}
        self.entries = {_call_of(op): op for op in ops if op.target == BLOCK_INPUTS}
        self.bodies = self.bodies_of_templates()
        self.owner = _owners(ops)
        """Of every storage in the source, the op, input or parameter that makes it."""
        self.results: dict[str, str] = {}
        """What each `block_output` is in the whole model."""
        self.owner_of_result: dict[str, str] = {}

    def ops(self) -> Iterator[Op]:
        copied: dict[int, _Copy] = {}
        for op in self.source:
            if op.target == BLOCK_INPUTS:
                number = _call_of(op)
                template = self.calls[number].template
                if template is not None:
                    copied[number] = _Copy(self, number, template)
                    yield from copied[number].ops()
            elif op.target == BLOCK_OUTPUT:
                call, result = _call_of(self.op[op.inputs[0].name]), op.inputs[1].name
                self.check_result(op, result)
                names = copied[call].names if call in copied else self.results
                owners = copied[call].owners if call in copied else self.owner_of_result
                self.results[op.name] = names.get(result, result)
                owner = self.owner.get(result, result)
                self.owner_of_result[op.name] = owners.get(owner, owner)
            else:
                yield _renamed(op, self.results, self.owner_of_result)

    def bodies_of_templates(self) -> dict[int, list[Op]]:
        bodies: dict[int, list[Op]] = {}
        open_call: int | None = None
        for op in self.source:
            if op.target == BLOCK_INPUTS:
                number = _call_of(op)
                open_call = number if self.calls[number].template is None else None
                bodies[number] = []
            elif op.target == BLOCK_OUTPUT:
                open_call = None
            elif open_call is not None:
                bodies[open_call].append(op)
        return bodies

    def check_result(self, output: Op, result: str) -> None:
        """Users of a result were seen with a tensor that owns its storage and comes from parameters."""
        made = self.op.get(result)
        if made is None or made.segment is None:
            raise UnlikeBlocks(f"a block returns {result}, which it does not compute from its parameters")
        owner = self.op.get(self.owner.get(result, result))
        if owner is None or numel(owner.outputs[0].shape, **_SIZES) != numel(output.outputs[0].shape, **_SIZES):
            raise UnlikeBlocks(f"a block returns a part of {self.owner.get(result, result)}")


class _Copy:
    """A template's ops for another call."""

    def __init__(self, whole: _Unfolding, number: int, template: int) -> None:
        if template not in whole.entries:
            raise UnlikeBlocks("the output of a template is not used")
        self.template, self.entry = whole.entries[template], whole.entries[number]
        self.body = whole.bodies[template]
        mine, theirs = (f"{whole.block_list}.{whole.calls[k].block}." for k in (number, template))
        self.prefixes = {theirs: mine, whole.root + theirs: whole.root + mine}
        self.module = (theirs.removesuffix("."), mine.removesuffix("."))
        self.names = {op.name: f"{op.name}@{number}" for op in self.body}
        self.owners = dict(self.names)
        for of_template, own in zip(self.template.inputs, self.entry.inputs, strict=True):
            self.check(whole, of_template, own)
            self.add(self.names, of_template.name, whole.results.get(own.name, own.name))
            old, new = (whole.owner.get(spec.name, spec.name) for spec in (of_template, own))
            self.add(self.owners, old, whole.owner_of_result.get(new, new))
        self.known = whole.op.keys() - self.names.keys()

    def ops(self) -> Iterator[Op]:
        for op in self.body:
            if not op.outputs:
                continue  # a size, which is computed once for all blocks
            if op.segment not in (None, self.template.segment):
                raise UnlikeBlocks(f"{op.name} of a block belongs to another segment")
            strangers = [spec.name for spec in op.inputs if spec.name in self.known]
            if strangers:
                raise UnlikeBlocks(f"a block reads {strangers[0]}, which it was not called with")
            for spec in op.inputs:
                self.names.setdefault(spec.name, self.held(spec.name))
            for kept in (*op.saved, *op.kept):
                maker = kept.storage.partition(":")[0]
                self.owners.setdefault(maker, self.held(maker))
            renamed = _renamed(op, self.names, self.owners)
            yield replace(
                renamed,
                name=self.names[op.name],
                outputs=tuple(_spec(spec, self.names) for spec in op.outputs),
                segment=None if op.segment is None else self.entry.segment,
                module=self.own_module(op.module),
            )

    def held(self, name: str) -> str:
        """A parameter or a buffer of the template is the same one of the copy."""
        for theirs, mine in self.prefixes.items():
            if name.startswith(theirs):
                return mine + name.removeprefix(theirs)
        return name

    def own_module(self, path: str) -> str:
        theirs, mine = self.module
        return mine + path.removeprefix(theirs) if f"{path}.".startswith(f"{theirs}.") else path

    def check(self, whole: _Unfolding, of_template: TensorSpec, own: TensorSpec) -> None:
        if own.name == of_template.name:
            return
        mine, theirs = (whole.op.get(spec.name) for spec in (own, of_template))
        alike = mine is not None and theirs is not None and (mine.segment is None) == (theirs.segment is None)
        if not alike or replace(own, name="") != replace(of_template, name=""):
            raise UnlikeBlocks(f"a block is called with {own}, one that is alike with {of_template}")

    @staticmethod
    def add(mapping: dict[str, str], old: str, new: str) -> None:
        if mapping.setdefault(old, new) != new:
            raise UnlikeBlocks(f"two things that a block is called with are both {old} for its template")


def _call_of(entry: Op) -> int:
    number = entry.argument("call")
    assert isinstance(number, int)
    return number


def _owners(ops: Sequence[Op]) -> dict[str, str]:
    """The maker of the storage behind every view."""
    owners: dict[str, str] = {}
    for op in ops:
        if op.is_view and op.inputs:
            owners[op.name] = owners.get(op.inputs[0].name, op.inputs[0].name)
    return owners


def _renamed(op: Op, names: dict[str, str], owners: dict[str, str]) -> Op:
    return replace(
        op,
        inputs=tuple(_spec(spec, names) for spec in op.inputs),
        saved=tuple(_storage(kept, owners) for kept in op.saved),
        kept=tuple(_storage(kept, owners) for kept in op.kept),
    )


def _spec(spec: TensorSpec, names: dict[str, str]) -> TensorSpec:
    return replace(spec, name=names[spec.name]) if spec.name in names else spec


def _storage(kept: SavedTensor, owners: dict[str, str]) -> SavedTensor:
    maker, colon, which = kept.storage.partition(":")
    return replace(kept, storage=owners[maker] + colon + which) if maker in owners else kept
