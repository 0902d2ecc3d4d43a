"""How long planning takes, how that grows, and how its plans compare with those of other planners' spaces.

In: nothing. Out, by part: `headline` problems, each in a fresh process; `growth` with layers, devices and workers;
`moai`: its published runs, its space and our plans under one price; `peers`: problems that other planners were timed
on. Seconds of planning are measured on this machine, steps are predicted.

    make bench-search
    python benchmarks/search.py headline moai --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, its own folder is on the path, and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from loguru import logger
from rich.console import Console

from benchmarks.searches import tables
from benchmarks.searches.growth import exponents, points
from benchmarks.searches.measure import measured
from benchmarks.searches.moai import comparisons
from benchmarks.searches.peers import answers
from benchmarks.searches.problems import HEADLINE

PARTS = ("headline", "growth", "moai", "peers")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 whatever is found: figures, not verdicts, are the output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    logger.disable("autoparallel")
    console = Console(width=None if sys.stdout.isatty() else 200, quiet=options.json)
    found = {part: _run(part, console) for part in PARTS if part in (options.parts or PARTS)}
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()
    return 0


def _run(part: str, console: Console) -> Any:
    """Print a part, and give it as plain values."""
    if part == "headline":
        headline = [(problem.name, measured(problem)) for problem in HEADLINE]
        tables.print_headline(headline, console)
        return [{"problem": name, **asdict(one)} for name, one in headline]
    if part == "growth":
        series = list(points(measured))
        powers = exponents(series)
        tables.print_growth(series, powers, console)
        return {"points": [asdict(point) for point in series], "exponents of price and search": powers}
    if part == "moai":
        compared = list(comparisons())
        tables.print_moai(compared, console)
        return [asdict(one) for one in compared]
    peers = list(answers(measured))
    tables.print_peers(peers, console)
    return [{**asdict(peer), **(asdict(one) if not isinstance(one, str) else {"no plan": one})} for peer, one in peers]


if __name__ == "__main__":
    sys.exit(main())
