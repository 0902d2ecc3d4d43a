"""Every `AUTOPARALLEL_*` environment variable, read once and typed: the only place that knows their names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from autoparallel.errors import ConfigError

PREFIX = "AUTOPARALLEL_"
KNOWN = {
    "WORKERS": "processes that compile candidates; 0 compiles in this process",
    "FLAVOR": "flavor of a program that names none",
    "COST_MODELS": "folder of cost tables that come before ours",
    "CACHE": "folder of plans that were made before; 0 keeps none",
    "DUMP": "folder that receives what each step of planning made",
    "DEBUG": "1 adds tracebacks to errors",
}
"""What a user may set, and what it means."""
LAUNCHER_KEYS = frozenset({"LAUNCHER_PID", "OUTPUT_SOCKET", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"})
"""Set by our own launcher for the processes that it starts."""


@dataclass(frozen=True)
class Settings:
    """What the environment says; None where it says nothing."""

    workers: int | None = None
    flavor: str | None = None
    cost_models: str | None = None
    cache: str | None = None
    dump: str | None = None
    debug: bool = False


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process. An empty value counts as unset; ConfigError for an unknown name or a bad value."""
    found = os.environ if environ is None else environ
    values = {key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)}
    unknown = sorted(values.keys() - KNOWN.keys() - LAUNCHER_KEYS)
    if unknown:
        raise _unknown(unknown[0])
    return Settings(
        workers=_workers(values.get("WORKERS", "")),
        flavor=values.get("FLAVOR") or None,
        cost_models=values.get("COST_MODELS") or None,
        cache=values.get("CACHE") or None,
        dump=values.get("DUMP") or None,
        debug=values.get("DEBUG", "").casefold() not in ("", "0", "false", "no"),
    )


def _unknown(name: str) -> ConfigError:
    close = difflib.get_close_matches(name.upper(), KNOWN, n=1, cutoff=0.5)
    hint = f"did you mean {PREFIX}{close[0]} ({KNOWN[close[0]]})?" if close else f"unset {PREFIX}{name}"
    return ConfigError(
        f"unknown environment variable {PREFIX}{name}",
        why="known are " + ", ".join(PREFIX + known for known in KNOWN),
        remedy=hint,
    )


def _workers(value: str) -> int | None:
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 4):
        raise ConfigError(
            f"{PREFIX}WORKERS={value!r} is not a number of processes",
            why="it must be a whole number from 0 to 9999",
            remedy=f"set {PREFIX}WORKERS=0 to search in this process, or unset it",
        )
    return int(value)
