"""Claim: a few physical values for each chip explain the published runs. Fits them, and writes them into the cost
tables.

In: the carried-over rows, and priors (what isolated kernels and collectives reach). Out: the figures of kind `fitted`
in `cost_models/`, and what each would be without any one source, in `published/held_out.json`.

Least squares of log(predicted / measured), in which a source weighs as four rows at most, with a Huber loss (rows of
one configuration scatter by up to a third) and a normal prior on the logarithm of each value; by Gauss-Newton steps. A
fit without a source is one more step from the optimum.

    make fit
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, its own folder is on the path, and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.tables import load_table
from benchmarks.published.measured import step_time
from benchmarks.published.question import Question, question_of
from benchmarks.published.rows import Unexpressed, read_runs
from benchmarks.scores.held_out import with_figures
from benchmarks.scores.price import price

PUBLISHED = Path(__file__).parent / "published"
TABLES = Path(__file__).parents[1] / "cost_models"
HUBER = 0.1
"""Residuals beyond it count linearly."""
NOISE = {"good": 0.08, "fair": 0.16}
"""Of a row, by its quality, as a share of its time: good rows that are identical in every field differ by about as
much, and of fair ones something had to be inferred.
"""
FILL_DEPTH = 64.0
STEP = 0.03
"""Of a logarithm, for derivatives."""
ROUNDS = 4
TOLD = 0.95
"""Of a value's prior spread: where rows leave it more, they say nothing of the value, and it stays assumed."""
ENOUGH_SOURCES = 4
"""For a spread of a chip's own; with fewer, it is that of all chips together."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Value:
    """One fitted value of a chip: where it stands in the table, and what is known of it without these rows."""

    path: str
    prior: float
    spread: float
    """Standard deviation of the logarithm."""
    least: float
    most: float
    meaning: str


def _share(path: str, prior: float, spread: float, meaning: str) -> Value:
    return Value(path, prior, spread, 0.05, 1.0, meaning)


def _values(
    *,
    matmul: float,
    attention: tuple[str, float] | None,
    link: float,
    link_spread: float = 0.2,
    memory: float = 0.75,
    spread: float = 0.06,
    low: tuple[tuple[str, float, float], ...] = (),
) -> tuple[Value, ...]:
    """Those of one chip; `low` are the shares of peaks in low dtypes, each with its prior and spread. The depth that a
    tile loses matters less: where there are such dtypes, it stays at its prior.
    """
    low_values = tuple(
        _share(f"matmul_efficiency.{dtype}", prior, spread, f"share of the {dtype} peak that large matmuls reach")
        for dtype, prior, spread in low
    )
    fill = Value("matmul_fill_depth", FILL_DEPTH, 0.5, 1.0, 2000.0, "depth that a tile loses at its ends")
    values = [
        _share("matmul_efficiency.default", matmul, spread, "share of the peak that large matmuls reach in training"),
        *(low_values or (fill,)),
        _share("memory_efficiency", memory, 0.12, "share of the bandwidth that element-wise kernels reach"),
        _share("intra_host.efficiency", link, link_spread, "share of the links inside a host that collectives reach"),
        _share("network.efficiency", 0.80, 0.2, "share of the network that collectives reach"),
    ]
    if attention is not None:
        values.append(_share(*attention, 0.2, "share of the peak that fused attention reaches"))
    return tuple(values)


FLASH, VENDOR = "attention_efficiency", "vendor_attention_efficiency"
"""Kernels alone reach 0.55 of the peak (cuDNN on H100, 0.50 on Blackwell); clocks fall under the load of training, to
0.87 of that, as for matmuls.
"""
CHIPS: dict[tuple[str, ...], tuple[Value, ...]] = {
    ("A100-SXM4-80GB", "A100-SXM4-40GB", "A800-SXM4-80GB"): _values(matmul=0.80, attention=(FLASH, 0.60), link=0.78),
    ("H100-SXM5-80GB", "H800-SXM5-80GB"): _values(
        matmul=0.68, low=(("float8", 0.60, 0.08),), attention=(VENDOR, 0.48), link=0.80
    ),
    # Clocks follow the power limit, 500 W of 700, by less than its ratio.
    ("H100-SXM5-96GB",): _values(
        matmul=0.55, spread=0.12, low=(("float8", 0.48, 0.12),), attention=(FLASH, 0.30), link=0.80
    ),
    ("H200",): _values(matmul=0.66, low=(("float8", 0.60, 0.08),), attention=(VENDOR, 0.44), link=0.80),
    ("B200",): _values(
        matmul=0.66, low=(("float8", 0.60, 0.08), ("float4", 0.55, 0.15)), attention=(VENDOR, 0.44), link=0.80
    ),
    ("GB200", "GB300"): _values(
        matmul=0.68, low=(("float8", 0.60, 0.08), ("float4", 0.55, 0.15)), attention=(VENDOR, 0.44), link=0.80
    ),
    ("V100-SXM2-32GB",): _values(matmul=0.75, spread=0.12, attention=None, link=0.78),
    # Consumer cards clock higher than their data sheets say: 158 to 172 of 165 TFLOP/s are measured on RTX 4090.
    ("RTX4090",): _values(
        matmul=0.92, spread=0.12, low=(("float8", 0.80, 0.15),), memory=0.85, attention=(FLASH, 0.70), link=0.40
    ),
    ("RTX3090",): _values(matmul=0.92, spread=0.12, memory=0.85, attention=(FLASH, 0.70), link=0.40),
    ("A6000",): _values(matmul=0.65, spread=0.12, memory=0.85, attention=(FLASH, 0.50), link=0.60),
    ("L40S",): _values(
        matmul=0.60, spread=0.12, low=(("float8", 0.50, 0.15),), memory=0.80, attention=(FLASH, 0.45), link=0.60
    ),
    ("MI250", "MI250X"): _values(matmul=0.60, attention=(FLASH, 0.35), link=0.60),
    # The links of these two are measured: all_reduce reaches 313 of 448 GB/s.
    ("MI300X",): _values(
        matmul=0.45, low=(("float8", 0.40, 0.10),), attention=(FLASH, 0.25), link=0.70, link_spread=0.05
    ),
    ("MI355X",): _values(
        matmul=0.50,
        low=(("float8", 0.45, 0.10), ("float4", 0.40, 0.15)),
        attention=(FLASH, 0.28),
        link=0.70,
        link_spread=0.05,
    ),
}
"""Chips with rows. What else is assumed for them, and for all others, stands in their tables."""


@dataclass
class Rows:
    """Of one chip."""

    questions: list[Question]
    measured_s: Array
    noise: Array
    sources: list[str]
    devices: tuple[str, ...]
    values: tuple[Value, ...]

    def residuals(self, x: Array) -> Array:
        """log(predicted / measured) at the logarithms `x` of the values."""
        figures = self.figures(x)
        tables = {device: with_figures(load_table(device), figures) for device in self.devices}
        predicted = [price(q, tables[q.flavor.device]).step_time_s for q in self.questions]
        return np.log(np.array(predicted)) - np.log(self.measured_s)

    def figures(self, x: Array) -> dict[str, Any]:
        """By path in the table; a matmul's efficiency is a curve of one point."""
        found: dict[str, Any] = {}
        for value, log in zip(self.values, x, strict=True):
            number = float(f"{min(max(math.exp(log), value.least), value.most):.4g}")
            is_curve = value.path.startswith("matmul_efficiency.")
            found[value.path + (".points" if is_curve else "")] = [[1e6, number]] if is_curve else number
        return found

    @property
    def prior(self) -> Array:
        return np.log([value.prior for value in self.values])

    @property
    def spread(self) -> Array:
        """Of the priors."""
        return np.array([value.spread for value in self.values])

    def step(self, x: Array, residuals: Array, jacobian: Array, weights: Array) -> Array:
        """Gauss-Newton with Huber's weights; returns the next logarithms."""
        w, normal = self.normal(residuals, jacobian, weights)
        gradient = jacobian.T @ (w * residuals) + (x - self.prior) / self.spread**2
        moved = x - np.linalg.solve(normal, gradient)
        limits = np.log([(value.least, value.most) for value in self.values])
        clipped: Array = np.clip(moved, limits[:, 0], limits[:, 1])
        return clipped

    def normal(self, residuals: Array, jacobian: Array, weights: Array) -> tuple[Array, Array]:
        """What each row counts after Huber, and the normal matrix: the inverse of the values' covariance."""
        w = weights * np.minimum(1.0, HUBER / np.maximum(np.abs(residuals), 1e-12)) / self.noise**2
        return w, jacobian.T @ (w[:, None] * jacobian) + np.diag(self.spread**-2)

    def weights(self, *, without: str = "") -> Array:
        """A source weighs as its rows, and as four at most."""
        counts = Counter(self.sources)
        return np.array([0.0 if s == without else min(4, counts[s]) / counts[s] for s in self.sources])

    def jacobian(self, x: Array, residuals: Array) -> Array:
        columns = []
        for i in range(len(x)):
            moved = x.copy()
            moved[i] -= STEP
            columns.append((residuals - self.residuals(moved)) / STEP)
        return np.array(columns).T


def gather(*paths: Path) -> list[Rows]:
    """The rows of each chip that state a speed."""
    found: dict[tuple[str, ...], Rows] = {}
    for run in [run for path in paths for run in read_runs(path)[0]]:
        try:
            question = question_of(run)
        except Unexpressed:
            continue
        measured = step_time(run, question)
        chip = next((names for names in CHIPS if question.flavor.device in names), None)
        if measured is None or chip is None or run.quality not in NOISE:
            continue
        rows = found.setdefault(chip, Rows([], np.empty(0), np.empty(0), [], chip, CHIPS[chip]))
        rows.questions.append(question)
        rows.measured_s = np.append(rows.measured_s, measured.seconds)
        rows.noise = np.append(rows.noise, NOISE[run.quality])
        rows.sources.append(run.source.name)
    return sorted(found.values(), key=lambda rows: -len(rows.questions))


def fit(rows: Rows) -> tuple[Array, dict[str, Array], list[bool]]:
    """The optimum, for each source the optimum without it, and which values the rows do tell."""
    x, weights = rows.prior, rows.weights()
    for number in range(ROUNDS):
        residuals = rows.residuals(x)
        jacobian = rows.jacobian(x, residuals)
        error = np.average(np.abs(np.expm1(residuals)), weights=weights)
        print(f"{rows.devices[0]}, round {number}: mean error {error:.1%} {rows.figures(x)}", file=sys.stderr)
        x = rows.step(x, residuals, jacobian, weights)
    residuals = rows.residuals(x)
    without = {s: rows.step(x, residuals, jacobian, rows.weights(without=s)) for s in sorted(set(rows.sources))}
    _, normal = rows.normal(residuals, jacobian, weights)
    after = np.sqrt(np.diag(np.linalg.inv(normal)))
    return x, without, (after < TOLD * rows.spread).tolist()


def left_out(rows: Rows, without: dict[str, Array]) -> list[tuple[float, float]]:
    """Of each row the absolute residual by the fit without its source, and its weight: every source weighs the same."""
    found, counts = [], Counter(rows.sources)
    for source, x in without.items():
        mine = [i for i, name in enumerate(rows.sources) if name == source]
        part = Rows(
            [rows.questions[i] for i in mine],
            rows.measured_s[mine],
            rows.noise[mine],
            [source] * len(mine),
            rows.devices,
            rows.values,
        )
        found += [(abs(residual), 1 / counts[source]) for residual in part.residuals(x)]
    return found


def spread_of(found: Sequence[tuple[float, float]]) -> float:
    """The factor, less one, within which four of five rows lie."""
    ordered = sorted(found)
    shares = np.cumsum([weight for _, weight in ordered])
    index = int(np.searchsorted(shares, 0.8 * shares[-1]))
    return math.expm1(float(ordered[index][0]))


def write_table(device: str, rows: Rows, x: Array, told_of: Sequence[bool], *, spread: float) -> None:
    """Put the values into the device's file, a figure a line."""
    path = TABLES / f"{device}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(set(rows.sources))
    source = f"fit of {len(rows.sources)} published runs, {len(names)} sources (benchmarks/fit.py)"
    for value, is_told, (figure, number) in zip(rows.values, told_of, rows.figures(x).items(), strict=True):
        *parents, last = figure.removesuffix(".points").split(".")
        place = content
        for part in parents:
            place = place[part]
        told = {"kind": "fitted", "source": f"{value.meaning}: {source}"}
        if not is_told:
            told = {
                "kind": "assumed",
                "source": f"{value.meaning}: what other chips reach; no run tells it of this one",
            }
        if figure.endswith(".points"):
            place[last] = {"points": number, **told}
        else:
            place[last] = {"value": number, "unit": _unit(place, last), **told}
    told = {"kind": "fitted", "source": f"of these runs, each by the {source}, its own source left out"}
    if len(names) < ENOUGH_SOURCES:
        told = {"kind": "assumed", "source": "that of the runs of all chips, each by the fit without its own source"}
    content["step_time_spread"] = {"value": round(spread, 3), "unit": "fraction", **told}
    path.write_text(lines(content) + "\n", encoding="utf-8")


def _unit(place: dict[str, Any], last: str) -> str:
    known: str = place[last]["unit"] if last in place else "fraction"
    return known


def lines(content: dict[str, Any], indent: int = 0) -> str:
    """JSON with one figure a line."""
    pad = "  " * (indent + 1)
    parts = []
    for key, item in content.items():
        nested = isinstance(item, dict) and not {"value", "points"} & set(item)
        parts.append(f"{pad}{json.dumps(key)}: {lines(item, indent + 1) if nested else json.dumps(item)}")
    return "{\n" + ",\n".join(parts) + "\n" + "  " * indent + "}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fits every chip and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[PUBLISHED / "runs.json", PUBLISHED / "more.json"])
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    options = parser.parse_args(arguments)
    held_out: dict[str, dict[str, dict[str, Any]]] = {}
    gathered = gather(*options.runs)
    fits = [fit(rows) for rows in gathered]
    residuals = [left_out(rows, without) for rows, (_, without, _) in zip(gathered, fits, strict=True)]
    of_all = spread_of([one for found in residuals for one in found])
    for rows, (best, without, told_of), found in zip(gathered, fits, residuals, strict=True):
        spread = spread_of(found) if len(without) >= ENOUGH_SOURCES else of_all
        print(rows.devices, rows.figures(best), f"spread {spread:.3f}")
        for device in rows.devices:
            if not options.dry:
                write_table(device, rows, best, told_of, spread=spread)
            for source, x in without.items():
                held_out.setdefault(source, {})[device] = rows.figures(x)
    if not options.dry:
        (PUBLISHED / "held_out.json").write_text(json.dumps(held_out, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
