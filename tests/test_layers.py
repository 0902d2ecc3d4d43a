"""The two laws of the layout: steps import only what stands before them, and torch stays where it belongs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import autoparallel

PACKAGE = Path(autoparallel.__file__).parent
ORDER = [
    "ir",
    "plans",
    "capture",
    "tensor_parallel",
    "schedule",
    "cost",
    "space",
    "search",
    "emit",
    "runtime",
    "measure",
]
SEE_EVERYTHING = {"api.py", "cli.py", "__init__.py", "__main__.py"}
WITH_TORCH = {"capture", "emit", "runtime", "measure"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports at any level, type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            skipped.update(ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_a_step_imports_only_earlier_steps() -> None:
    for index, folder in enumerate(ORDER):
        allowed = set(ORDER[: index + 1]) | {"errors", "settings", "progress"}
        for path in (PACKAGE / folder).glob("*.py"):
            used = {m.split(".")[1] for m in imports(path) if m.startswith("autoparallel.")}
            # A plan explains itself, lazily: the one arrow that points forward.
            used -= {"report"} if path.name == "plan.py" else set()
            assert used <= allowed, f"{path.relative_to(PACKAGE)} imports {sorted(used - allowed)}"


def test_torch_is_imported_in_its_folders_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).parts[0]
        if place in WITH_TORCH or path.name in SEE_EVERYTHING:
            continue
        assert not {m for m in imports(path) if m.split(".")[0] in ("torch", "transformers")}, path


def test_opening_a_plan_and_importing_the_package_need_no_torch() -> None:
    code = "import sys, autoparallel as ap; ap.Plan; ap.Strategy; ap.Flavor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_survive_their_sub_packages() -> None:
    """Importing a sub-module binds its name on the package; no public function may share one."""
    code = "import autoparallel as ap; ap.Plan; import autoparallel.cli; print(callable(ap.plan), callable(ap.compile))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "True True"
