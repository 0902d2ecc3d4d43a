"""Constraints as people write them (`tensor_parallel=8, schedule=1f1b`) in, `Constraints` out, or an error that names
the nearest one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from autoparallel.errors import ConfigError
from autoparallel.plans.strategy import Constraints


def parse_constraints(words: str | Mapping[str, Any]) -> Constraints:
    """Of a text, or of values by name; values may be text too. An order of axes is written with spaces."""
    values = dict(map(_pair, words.split(","))) if isinstance(words, str) else words
    for name in values:
        if name not in Constraints.model_fields:
            close = difflib.get_close_matches(name, Constraints.model_fields, n=1)
            raise ConfigError(
                f"there is no constraint {name!r}",
                why="constraints are " + ", ".join(Constraints.model_fields),
                remedy=f"did you mean {close[0]!r}?" if close else "remove it",
            )
    try:
        return Constraints(**{name: _value(name, value) for name, value in values.items()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        field = Constraints.model_fields[name]
        raise ConfigError(
            f"{name}={values[name]} cannot be a constraint",
            why=str(first["msg"]),
            remedy=f"{name}: {field.description}" if field.description else f'leave {name} at "auto"',
        ) from error


def narrowed(constraints: Constraints, further: Constraints) -> Constraints:
    """`constraints`, but for what `further` sets."""
    return constraints.model_copy(update={name: getattr(further, name) for name in further.model_fields_set})


def in_words(constraints: Constraints) -> str:
    """What it sets."""
    values = {name: getattr(constraints, name) for name in sorted(constraints.model_fields_set)}
    return ", ".join(f"{name}={' '.join(v) if isinstance(v, tuple) else v}" for name, v in values.items())


def _pair(word: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in word.partition("="))
    if not equals or not name or not value:
        raise ConfigError(f"{word.strip()!r} is no constraint", why="one is written NAME=VALUE, as tensor_parallel=8")
    return name.replace("-", "_"), value


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if name == "mesh_order" and value != "auto":
        return tuple(value.split())
    try:
        return json.loads(value.lower())
    except ValueError:
        return value
