"""JSON files that may come from anyone: bytes in, a checked schema out, or a PlanFormatError that says where.

Refused before or while parsing: what is not a regular file, over 64 MiB, a pickle or archive (never opened as one),
not UTF-8, truncated, nested too deep, an integer beyond 64 bits, a duplicate key. Then pydantic checks names, types
and finiteness.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from autoparallel.errors import ConfigError, PlanFormatError

MAX_FILE_BYTES = 64 * 2**20
MAX_DEPTH = 100
MAX_INTEGER_DIGITS = 19  # 2**63 has 19
FOREIGN_MAGIC = {
    b"\x80": "a pickle",
    b"PK\x03\x04": "a zip archive (torch.save writes those)",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a numpy array",
}
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"(?P<key>\s*:)?|[\[{]|[\]}]', re.DOTALL)  # strings, keys, brackets
REMEDY = "write it again with `autoparallel plan ... -o FILE` or Plan.save"

S = TypeVar("S", bound=BaseModel)


class _DuplicateError(Exception):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


class _LongIntegerError(Exception):
    def __init__(self, literal: str) -> None:
        self.literal = literal
        super().__init__(literal)


def refuse(path: Path, why: str) -> NoReturn:
    """Raise the PlanFormatError for `path`."""
    raise PlanFormatError(f"{path} is not a plan.", why=why, remedy=REMEDY)


def read_text(path: Path) -> str:
    """The file as text, its size and first bytes checked before anything parses it."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            refuse(path, "it is a directory or a device, not a file")
        if status.st_size > MAX_FILE_BYTES:
            refuse(path, f"it has {status.st_size:,} bytes, and the limit is {MAX_FILE_BYTES:,} (64 MiB)")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        remedy = "check the path and its permissions"
        raise PlanFormatError(f"{path} cannot be read.", why=str(error), remedy=remedy) from error
    if not data.strip():
        refuse(path, "it is empty (byte 0)")
    for magic, name in FOREIGN_MAGIC.items():
        if data.startswith(magic):
            refuse(path, f"it starts like {name} at byte 0; a plan is JSON, and nothing else is ever loaded")
    if data.startswith(b"\xef\xbb\xbf"):
        refuse(path, "it starts with a byte order mark at byte 0; save it as UTF-8 without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(path, f"it is not UTF-8 at byte {error.start}")


def parse_object(text: str, *, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, with every key unique at its level."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_small_int)
    except json.JSONDecodeError as error:
        refuse(path, f"{error.msg} at {_place(text, error.pos)}")
    except RecursionError:
        refuse(path, f"it is nested more than {MAX_DEPTH} deep at {_place(text, _too_deep(text))}")
    except _DuplicateError as error:
        refuse(path, f"the key {error.key!r} appears twice in one object at {_place(text, _duplicate(text))}")
    except _LongIntegerError as error:
        refuse(path, f"an integer of {len(error.literal)} digits at {_place(text, text.find(error.literal))}")
    if not isinstance(value, dict):
        start = len(text) - len(text.lstrip())
        refuse(path, f"it holds a JSON {type(value).__name__}, not an object, at {_place(text, start)}")
    return value


def validate(schema: type[S], text: str, *, path: Path, newer: str = "") -> S:
    """`text` as a `schema`; the first error is told with its field path.

    `newer` is the schema version of the writer where that is newer than ours.
    """
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if not first["loc"]:
        refuse(path, first["msg"])
    field, parent = _walk(schema, first["loc"])
    if first["type"] != "extra_forbidden":
        refuse(path, f"{field}: {first['msg']}")
    if newer:
        refuse(path, f"{field}: unknown field, written by newer version {newer} of the schema; upgrade autoparallel")
    near = difflib.get_close_matches(str(first["loc"][-1]), parent.model_fields if parent else (), n=1)
    refuse(path, f"{field}: unknown field" + (f", did you mean {near[0]!r}?" if near else ""))


def canonical_json(value: BaseModel) -> str:
    """Sorted keys, one-space indent, ASCII, a newline at the end: equal values give equal bytes."""
    return json.dumps(value.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: a reader, a crash or ctrl-C never sees half a file."""
    target = path.resolve()
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".tmp")
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, target)
        temporary = ""
    except OSError as error:
        remedy = "choose a file in a writable folder"
        raise ConfigError(f"{path} cannot be written.", why=str(error), remedy=remedy) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateError(key)
            seen.add(key)
    return unique


def _small_int(literal: str) -> int:
    if len(literal.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise _LongIntegerError(literal)
    return int(literal)


def _too_deep(text: str) -> int:
    """Where the nesting passes `MAX_DEPTH`; json itself gives up later, at the interpreter's own limit."""
    depth = 0
    for match in TOKENS.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return match.start()
        elif match[0] in "]}":
            depth -= 1
    return 0


def _duplicate(text: str) -> int:
    """Where a key repeats in its object; the text is known to be JSON up to there."""
    open_objects: list[set[str]] = []
    for match in TOKENS.finditer(text):
        if match[0] in "[{":
            open_objects.append(set())
        elif match[0] in "]}":
            open_objects.pop()
        elif match["key"]:
            key = json.loads(match[0].rstrip(": \t\r\n"))
            if key in open_objects[-1]:
                return match.start()
            open_objects[-1].add(key)
    return 0


def _place(text: str, position: int) -> str:
    before = text[:position]
    line, column = before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1
    return f"byte {len(before.encode('utf-8', 'surrogatepass'))} (line {line}, column {column})"


def _walk(schema: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """The field path of a pydantic error, without the tags of union members, and the schema of its last field."""
    annotation: Any = schema
    path, parent = "", None
    for part in loc:
        parent = _schema_in(annotation)
        arguments = [a for a in typing.get_args(_without_none(annotation)) if a is not Ellipsis]
        if isinstance(part, int):
            path, annotation = f"{path}[{part}]", arguments[0] if arguments else None
        elif parent is not None:
            path = f"{path}.{part}" if path else part
            annotation = parent.model_fields[part].annotation if part in parent.model_fields else None
        elif typing.get_origin(_without_none(annotation)) is dict:
            path, annotation = f"{path}.{part}", arguments[-1]
        else:
            break
    return path, parent


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        return members[0] if len(members) == 1 else annotation
    return annotation


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    inner = _without_none(annotation)
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
