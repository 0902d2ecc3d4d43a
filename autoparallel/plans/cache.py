"""Plans of earlier questions: everything that decides an answer in, the plan that it got the last time out.

A folder of canonical plan files, each named by the hash of its question. What cannot be read or written is passed over:
a cache never fails a question. Only its own files are ever removed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel

from autoparallel.errors import AutoParallelError
from autoparallel.plans import files
from autoparallel.plans.identity import model_facts
from autoparallel.plans.plan import Plan
from autoparallel.settings import read_settings

MAX_ENTRIES = 256
OURS = re.compile(r"[0-9a-f]{64}\.json|\.[0-9a-f]{64}\.json\..*\.tmp")
"""Entries, and what a killed writer left."""
PACKAGES = ("torch", "transformers", "huggingface_hub", "numpy", "networkx")
"""A plan rests on their code."""


def key_of(model: object, **question: object) -> str | None:
    """The name of a question; None for one whose answer must not be kept, or where there is no cache."""
    facts = model_facts(model) if folder() is not None else None
    if facts is None:
        return None
    told = {
        name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for name, value in question.items()
    }
    text = json.dumps([facts, told, _versions()], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read(key: str, **question: object) -> Plan | None:
    """The plan of that name, if there is one and it answers `question` (fields of a plan)."""
    from loguru import logger

    path = _path(key)
    if path is None or not path.is_file():
        return None
    try:
        found = Plan.load(path)
    except AutoParallelError as error:
        logger.debug("Passed over a plan of the cache: {}", error)
        return None
    if any(getattr(found, name) != value for name, value in question.items()):
        logger.debug("Passed over {}: it answers another question", path)
        return None
    logger.info("Took the plan from the cache ({})", path)
    return found


def write(key: str, plan: Plan) -> None:
    """Keep a plan, and no more than `MAX_ENTRIES` of them."""
    from loguru import logger

    path = _path(key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, plan.to_json())
        _remove_oldest(path.parent)
    except (OSError, AutoParallelError) as error:
        logger.debug("The plan is not kept in the cache: {}", error)


def folder() -> Path | None:
    """`AUTOPARALLEL_CACHE`, or a folder in the user's cache; None where it is turned off or the user has no home."""
    wanted = read_settings().cache
    if wanted is not None:
        return None if wanted.casefold() in ("0", "off", "no", "false") else Path(wanted)
    caches = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(caches) if os.path.isabs(caches) else Path(os.path.expanduser("~"), ".cache")
    return parent / "autoparallel" / "plans" if parent.is_absolute() else None


def _path(key: str) -> Path | None:
    place = folder()
    return None if place is None else place / f"{key}.json"


def _remove_oldest(place: Path) -> None:
    """Another process may remove the same ones at the same time."""
    ours = [entry for entry in os.scandir(place) if OURS.fullmatch(entry.name)]
    if len(ours) <= MAX_ENTRIES:
        return
    for path in sorted((Path(entry.path) for entry in ours), key=_changed)[:-MAX_ENTRIES]:
        path.unlink(missing_ok=True)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@lru_cache(maxsize=1)
def _versions() -> list[object]:
    """Of all code that makes a plan; of our own, the names, sizes and times of the files, so that an edited checkout
    asks anew.
    """
    packages = [_version(package) for package in PACKAGES]
    return [platform.python_version(), *packages, sorted(_sources(Path(__file__).parents[1]))]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sources(place: Path) -> Iterator[tuple[str, int, int]]:
    for path in place.rglob("*.py"):
        status = path.stat()
        yield str(path.relative_to(place)), status.st_size, status.st_mtime_ns
