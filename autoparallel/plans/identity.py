"""A model in; out come the facts that decide how it is captured, as JSON can hold them, or None where facts cannot tell
(code from elsewhere, hooks, patched forwards). No torch is imported: what is not loaded cannot have been changed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRUSTED = ("huggingface_hub", "torch", "transformers")
"""Packages whose versions stand for their code."""
PLAIN = (type(None), bool, int, float, str)
PRINTED = ("torch.dtype", "torch.device")
MODELING = re.compile(r"transformers\.(models\..*\.modeling_\w+|loss\.loss_utils)")
OTHER_CODE = ("auto_map", "configuration_files")
"""Keys of a config.json that send transformers to other files."""


class _UnknownError(Exception):
    """A value that may hold anything."""


def model_facts(model: Any) -> object | None:
    """Of an HF model, its config, or the folder of either."""
    try:
        if any(map(_is_patched, _modeling_modules())) or _registers_others():
            return None
        if isinstance(model, (str, os.PathLike)):
            return _of_folder(os.fspath(model))
        return [_default_dtype(), _Facts().of(model)]
    except _UnknownError:
        return None


def _of_folder(folder: str) -> object:
    """Its name is a fact too: the plan tells it."""
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        raise _UnknownError from None
    if not isinstance(config, dict) or any(key in config for key in OTHER_CODE):
        raise _UnknownError
    return [_default_dtype(), folder, config]


def _default_dtype() -> str:
    """What a model is made in whose config names no dtype."""
    torch = sys.modules.get("torch")
    return str(torch.get_default_dtype()) if torch is not None else "torch.float32"


class _Facts:
    """Of everything that can be reached from a value, each object once."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def of(self, value: Any) -> object:
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return sorted(json.dumps(self.of(item)) for item in value)
        if isinstance(value, dict):
            return [[self.of(key), self.of(item)] for key, item in value.items()]
        if isinstance(value, (type, types.FunctionType)):
            return _name(value)
        cls = _name(type(value))
        return [cls, str(value)] if cls in PRINTED else self._of_object(cls, value)

    def _of_object(self, cls: str, value: Any) -> object:
        """A config, a module or a tensor; shared ones stay shared."""
        if id(value) in self._seen:
            return ["seen", self._seen[id(value)]]
        self._seen[id(value)] = len(self._seen)
        if hasattr(value, "requires_grad"):
            return [cls, list(map(int, value.shape)), str(value.dtype), bool(value.requires_grad)]
        if not hasattr(value, "__dict__") or any(map(_is_foreign, _functions(type(value)))):
            raise _UnknownError
        attributes = vars(value)
        hooked = any(name.endswith("_hooks") and attributes[name] for name in attributes)
        if hooked or "forward" in attributes:
            raise _UnknownError
        return [cls, self.of(attributes)]


def _name(value: Any) -> str:
    """Of a class or function of a package that we trust."""
    name = f"{value.__module__}.{value.__qualname__}"
    if name.split(".")[0] not in TRUSTED or "<" in name:
        raise _UnknownError
    return name


def _modeling_modules() -> list[Any]:
    """Where loaded models have their code, and where somebody may have put other code."""
    return [module for name, module in list(sys.modules.items()) if MODELING.fullmatch(name)]


def _is_patched(module: Any) -> bool:
    for value in list(vars(module).values()):
        if isinstance(value, (type, types.FunctionType)) and _is_foreign(value):
            return True
        if isinstance(value, type) and value.__module__ == module.__name__ and any(map(_is_foreign, _functions(value))):
            return True
    return False


def _functions(cls: type) -> Iterator[Any]:
    """Of a class and of those that it inherits from."""
    for base in cls.__mro__:
        yield from (value for value in list(vars(base).values()) if isinstance(value, types.FunctionType))


def _is_foreign(value: Any) -> bool:
    package = str(value.__module__ or "").split(".")[0]
    return package not in TRUSTED and package not in sys.stdlib_module_names


def _registers_others() -> bool:
    """Whether AutoConfig or AutoModelForCausalLM have learned of classes that transformers does not have."""
    places = {"configuration_auto": "CONFIG_MAPPING", "modeling_auto": "MODEL_FOR_CAUSAL_LM_MAPPING"}
    mappings = [
        getattr(sys.modules.get(f"transformers.models.auto.{file}"), name, None) for file, name in places.items()
    ]
    return any(getattr(mapping, "_extra_content", None) for mapping in mappings)
