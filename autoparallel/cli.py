"""The command line: arguments in, text or pure JSON on stdout, everything else on stderr; no logic of its own.

Imports stay inside the commands, so that `--help`, `flavors` and `explain` never load torch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from typer.core import TyperGroup

from autoparallel.errors import AutoParallelError, ConfigError
from autoparallel.plans.strategy import Constraints
from autoparallel.plans.words import parse_constraints

if TYPE_CHECKING:
    from autoparallel.plans.plan import Plan

GIB = 2**30
PACKAGES = ("autoparallel", "torch", "transformers", "numpy", "pydantic", "networkx", "safetensors", "typer")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face config or model; no weights are read.")]
FlavorName = Annotated[str, typer.Option(help="Hardware: a name from `flavors`, 8xGPU, NODESx8xGPU or cpu:N.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows a step, over all devices.")]
SeqLen = Annotated[int, typer.Option(min=1, help="Tokens a row.")]
Dtype = Annotated[str, typer.Option(help="Compute dtype; auto takes what the hardware does best.")]
Budget = Annotated[float | None, typer.Option("--budget", min=0.0, help="Seconds to search for each plan, about.")]


class _Group(TyperGroup):
    """Ends with our exit codes, and shows a traceback only when asked."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # wherever it stands
            args = ["--debug", *(word for word in args if word != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AutoParallelError as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            else:
                typer.echo(str(error), err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _with_constraints(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for each field of `Constraints`, which it takes as `constraints`."""
    plain = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "constraints"]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None, typer.Option(help=field.description, rich_help_panel="Constraints", show_default=False)
            ],
        )
        for name, field in Constraints.model_fields.items()
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {name: value for name in Constraints.model_fields if (value := values.pop(name)) is not None}
        command(**values, constraints=parse_constraints(given))

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in plain] + options
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


app = typer.Typer(cls=_Group, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="AUTOPARALLEL_DEBUG", help="Show tracebacks.")] = False,
) -> None:
    """Plan how a Hugging Face causal LM trains in parallel, and read such plans."""


@app.command("plan")
@_with_constraints
def plan_command(
    model: Model,
    flavor: FlavorName,
    batch_size: BatchSize,
    seq_len: SeqLen,
    constraints: Constraints,
    dtype: Dtype = "auto",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search for the fastest way to train MODEL, and explain it."""
    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):
        remedy = "name a file in a writable folder"
        raise ConfigError(f"{output} cannot be written.", why="it, or its folder, is not writable", remedy=remedy)
    from autoparallel.api import plan

    found: Plan = plan(model, flavor, batch_size=batch_size, seq_len=seq_len, dtype=dtype, constraints=constraints)
    if output is not None:
        found.save(output)
    _print_plan(found, as_json=as_json)


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="A plan that was saved as JSON.")],
    why_not: Annotated[
        str | None, typer.Option(help="Ask about one other way instead, such as tensor_parallel=8; needs --model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder of the plan's model or its config.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a saved plan chose, what it is predicted to cost, and why not the others."""
    from autoparallel.plans.plan import Plan

    loaded = Plan.load(plan)
    if why_not is None:
        _print_plan(loaded, as_json=as_json)
    elif as_json:
        raise ConfigError("--why-not answers in words only", remedy="leave --json out")
    else:
        typer.echo(loaded.explain(why_not=why_not, model=model), nl=False)


@app.command()
@_with_constraints
def which(
    model: Model,
    batch_size: BatchSize,
    seq_len: SeqLen,
    constraints: Constraints,
    flavor: Annotated[
        list[str] | None, typer.Option(help="Look at this one; may be repeated. Default: MoAI's, and a host of each.")
    ] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="DEVICE=2.5 or FLAVOR=2.5: money for a device-hour; may be repeated.")
    ] = None,
    dtype: Dtype = "auto",
    budget: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Say which hardware trains MODEL at the least cost."""
    from autoparallel.questions import which_flavor
    from autoparallel.report.compare import which_text

    rows = which_flavor(
        model,
        flavor or None,
        batch_size=batch_size,
        seq_len=seq_len,
        dtype=dtype,
        constraints=constraints,
        prices=dict(map(_price, price or [])),
        budget_s=budget,
    )
    _print_rows(rows, which_text(rows), as_json=as_json)


@app.command()
@_with_constraints
def scale(
    model: Model,
    flavor: FlavorName,
    seq_len: SeqLen,
    constraints: Constraints,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a step, over all devices.")] = None,
    rows_per_device: Annotated[
        int | None, typer.Option(min=1, help="Rows a step of each device, instead of --batch-size.")
    ] = None,
    devices: Annotated[str, typer.Option(help="Numbers of devices.")] = "8,16,32,64,128,256,512,1024",
    dtype: Dtype = "auto",
    budget: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Say how fast MODEL trains on more and more devices of one kind."""
    from autoparallel.questions import scaling
    from autoparallel.report.compare import scaling_text

    rows = scaling(
        model,
        flavor,
        _counts(devices),
        batch_size=batch_size,
        rows_per_device=rows_per_device,
        seq_len=seq_len,
        dtype=dtype,
        constraints=constraints,
        budget_s=budget,
    )
    _print_rows(rows, scaling_text(rows), as_json=as_json)


@app.command()
def flavors(as_json: AsJson = False) -> None:
    """List the hardware that has a name."""
    from autoparallel.cost.flavors import list_flavors, resolve_flavor

    facts: dict[str, dict[str, Any]] = {}
    for name in list_flavors():
        try:
            flavor = resolve_flavor(name)
        except ConfigError as error:  # "local" on a machine whose GPU has no cost table
            facts[name] = {"error": error.what}
            continue
        facts[name] = flavor.model_dump(mode="json") | {"num_hosts": flavor.num_hosts}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(len(name) for name in facts)
    for name, fact in facts.items():
        typer.echo(f"{name:<{width}}  {_flavor_line(fact)}")


@app.command()
def profile(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (of AMD too); default: the GPU if there is one.")
    ] = None,
    budget: Annotated[float, typer.Option(min=1.0, help="Seconds to measure, about.")] = 90.0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write DEVICE.json into this folder.")] = None,
) -> None:
    """Measure this machine's device into a cost table, for AUTOPARALLEL_COST_MODELS."""
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{output} cannot be made.", why=str(error), remedy="name a writable folder") from error
    from autoparallel.measure.profile import profile as measured

    table = measured(device, budget_s=budget)
    text = table.model_dump_json(indent=1, exclude_none=True) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    path = output / f"{table.name}.json"
    path.write_text(text)
    typer.echo(f"Wrote {path}; use it with AUTOPARALLEL_COST_MODELS={output}", err=True)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print versions and settings, to paste into a bug report."""
    facts = {name: _version(name) for name in PACKAGES}
    facts |= {"python": platform.python_version(), "platform": platform.platform(), "cores": str(os.cpu_count())}
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("AUTOPARALLEL_")}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value}")


def main() -> None:
    """Entry point of `autoparallel` and of `python -m autoparallel`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a name that the terminal's encoding lacks is no reason to fail
    app(prog_name="autoparallel")


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    typer.echo(plan.to_json() if as_json else plan.explain(), nl=False)


def _print_rows(rows: Sequence[BaseModel], text: str, *, as_json: bool) -> None:
    if as_json:
        text = json.dumps([row.model_dump(mode="json") for row in rows], indent=1) + "\n"
    typer.echo(text, nl=False)


def _price(word: str) -> tuple[str, float]:
    name, _, amount = word.rpartition("=")
    try:
        return name, float(amount)
    except ValueError:
        raise ConfigError(f"{word!r} is no price", why="one is written NAME=MONEY, as H200=2.5") from None


def _counts(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"{words!r} are no numbers of devices", remedy="write them as 8,16,32") from None


def _flavor_line(fact: dict[str, Any]) -> str:
    if "error" in fact:
        return str(fact["error"])
    memory = f"{fact['num_devices'] * fact['memory_bytes'] / GIB:,.0f} GiB"
    hosts = f"{fact['num_hosts']} host{'s' if fact['num_hosts'] > 1 else ''}"
    return f"{fact['num_devices']:>5} x {fact['device']}, {hosts}, {memory}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
