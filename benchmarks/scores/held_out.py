"""Tables fitted without one source: for each source, the figures of each device that the fit would then have chosen.

The file is what `make fit` writes: {source: {device: {path of a figure: value}}}. A source that is absent from it
changes nothing.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from autoparallel.cost.tables import CostTable, load_table
from benchmarks.scores.answers import TableWithout

Changes = dict[str, dict[str, dict[str, Any]]]


def tables_without(path: Path) -> TableWithout | None:
    """None where there is no such file."""
    if not path.exists():
        return None
    changes: Changes = json.loads(path.read_text(encoding="utf-8"))

    @cache
    def table_without(device: str, source: str) -> CostTable | None:
        figures = changes.get(source, {}).get(device)
        return None if figures is None else with_figures(load_table(device), figures)

    return table_without


def with_figures(table: CostTable, figures: dict[str, Any]) -> CostTable:
    """The table with other values: `network.efficiency` stands for the figure's value, a longer path for itself."""
    content = table.model_dump(mode="json")
    for path, value in figures.items():
        *parents, last = path.split(".")
        place = content
        for part in parents:
            place = place[part]
        if isinstance(place[last], dict) and "value" in place[last]:
            place, last = place[last], "value"
        place[last] = value
    return CostTable.model_validate_json(json.dumps(content))
