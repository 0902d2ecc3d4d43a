"""The command line: arguments in, text or pure JSON on stdout, everything else on stderr; no logic of its own.

Imports stay inside the commands, so that `--help`, `flavors` and `explain` never load torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from autoparallel.errors import AutoParallelError, ConfigError

if TYPE_CHECKING:
    from autoparallel.plans.plan import Plan

GIB = 2**30
PACKAGES = ("autoparallel", "torch", "transformers", "numpy", "pydantic", "networkx", "safetensors", "typer")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


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


app = typer.Typer(cls=_Group, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="AUTOPARALLEL_DEBUG", help="Show tracebacks.")] = False,
) -> None:
    """Plan how a Hugging Face causal LM trains in parallel, and read such plans."""


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face config or model; no weights are read.")],
    flavor: Annotated[str, typer.Option(help="Hardware: a name from `flavors`, 8xGPU, NODESx8xGPU or cpu:N.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step, over all devices.")],
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens a row.")],
    dtype: Annotated[str, typer.Option(help="Compute dtype; auto takes what the hardware does best.")] = "auto",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search for the fastest way to train MODEL, and explain it."""
    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):
        remedy = "name a file in a writable folder"
        raise ConfigError(f"{output} cannot be written.", why="it, or its folder, is not writable", remedy=remedy)
    from autoparallel.api import plan

    found: Plan = plan(model, flavor, batch_size=batch_size, seq_len=seq_len, dtype=dtype)
    if output is not None:
        found.save(output)
    _print_plan(found, as_json=as_json)


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="A plan that was saved as JSON.")],
    as_json: AsJson = False,
) -> None:
    """Say what a saved plan chose, what it is predicted to cost, and why not the others."""
    from autoparallel.plans.plan import Plan

    _print_plan(Plan.load(plan), as_json=as_json)


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
