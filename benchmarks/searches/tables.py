"""What the parts of the search benchmark found, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from benchmarks.searches.growth import Point
from benchmarks.searches.measure import Measured
from benchmarks.searches.moai import Comparison, Priced
from benchmarks.searches.peers import Peer
from benchmarks.searches.problems import PUBLISHED_405B_MEASURED


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _mfu(found: Measured) -> str:
    return f"{found.mfu:.1%}"


def print_headline(found: Sequence[tuple[str, Measured]], console: Console) -> None:
    times = _table(
        "Planning, each in a fresh process: seconds",
        "problem",
        *("whole", "imports", "capture", "price", "search", "CPU", "MiB", "candidates", "looked at", "gap"),
    )
    for name, one in found:
        seconds = (one.whole_s, one.imports_s, one.capture_s, one.price_s, one.search_s, one.cpu_s)
        counts = (one.rss_mib, one.num_candidates, one.looked_at)
        times.add_row(name, *(f"{s:.1f}" for s in seconds), *map(str, counts), f"{one.gap:.2%}")
    console.print(times, "")
    plans = _table("Plans, predicted", "problem", "step, s", "MFU", "TFLOP/s", "GiB", "plan", "blocks by stage")
    for name, one in found:
        figures = (f"{one.step_time_s:.3f}", _mfu(one), f"{one.model_tflops_per_s:.0f}", f"{one.peak_memory_gib:.1f}")
        plans.add_row(name, *figures, one.plan, _in_short(one.blocks))
    console.print(plans, "")
    console.print(f"Llama-3-405B as Meta trained it: {PUBLISHED_405B_MEASURED}", "", highlight=False)


def _in_short(blocks: Sequence[int]) -> str:
    return " ".join(f"{len(list(same))}x{size}" for size, same in groupby(blocks))


def print_growth(found: Sequence[Point], exponents: dict[str, tuple[float, float]], console: Console) -> None:
    table = _table(
        "Growth: seconds", "series", "size", "price", "search", "CPU of it", "candidates", "looked at", "gap"
    )
    for point in sorted(found, key=lambda point: ("layers", "devices", "workers").index(point.series)):
        one = point.measured
        seconds = (one.price_s, one.search_s, one.search_cpu_s)
        counts = (one.num_candidates, one.looked_at)
        table.add_row(
            point.series, str(point.size), *(f"{s:.2f}" for s in seconds), *map(str, counts), f"{one.gap:.2%}"
        )
    console.print(table, "")
    for name, (price, search) in exponents.items():
        console.print(
            f"{name}: seconds of pricing grow with its power {price:.2f}, of the search with {search:.2f}",
            highlight=False,
        )
    console.print()


def print_moai(found: Sequence[Comparison], console: Console) -> None:
    table = _table(
        "MoAI's published runs, priced by us: seconds a step, and times our best",
        "run",
        *("version", "candidates", "fit", "chosen", "best of its space", "of the widest", "ours", "gap"),
        *("our search, s", "its search, s"),
    )
    for one in found:
        table.add_row(
            one.name,
            one.version,
            f"{one.candidates} ({one.published_candidates})",
            f"{one.possible} ({one.published_possible})",
            *(_priced(one, other) for other in (one.chosen, one.best_of_theirs, one.best_of_widest)),
            f"{one.ours.step_time_s:.3f}",
            f"{one.gap:.2%}",
            f"{one.search_s:.1f}",
            f"{one.published_search_s:.1f}",
        )
    console.print(table, "(in brackets: as published; ! does not fit by our memory model)", "")
    for one in found:
        console.print(f"{one.name}, {one.version}", highlight=False)
        for what in ("chosen", "best_of_theirs", "best_of_widest", "ours"):
            priced: Priced | None = getattr(one, what)
            if priced is not None:
                console.print(f"  {what}: {priced.plan} ({priced.peak_memory_gib:.1f} GiB)", highlight=False)
    console.print()


def _priced(one: Comparison, other: Priced | None) -> str:
    if other is None:
        return "none fits"
    return f"{other.step_time_s:.3f} ({one.ratio(other):.2f}x){'' if other.fits else ' !'}"


def print_peers(found: Sequence[tuple[Peer, Measured | str]], console: Console) -> None:
    table = _table(
        "Peers' problems: CPU seconds of planning, and our plans",
        "problem",
        *("within", "peer", "its CPU s", "our CPU s", "search alone", "step, s", "MFU", "gap", "plan"),
    )
    for peer, one in found:
        theirs = (peer.limits, peer.peer, "" if peer.peer_cpu_s is None else f"{peer.peer_cpu_s:.0f}")
        if isinstance(one, str):
            table.add_row(peer.problem.name, *theirs, *("-",) * 5, one)
            continue
        times = (f"{one.cpu_s:.1f}", f"{one.search_cpu_s:.1f}", f"{one.step_time_s:.3f}", _mfu(one), f"{one.gap:.2%}")
        table.add_row(peer.problem.name, *theirs, *times, one.plan)
    console.print(table, "")
