"""autoparallel: compile a plain PyTorch training script into an optimally parallel program for any cluster.

Names are loaded when they are first used: opening a saved plan imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoparallel.api import compile, enable_advanced_parallelization, estimate, plan, program
    from autoparallel.errors import AutoParallelError
    from autoparallel.ir.flavor import Flavor
    from autoparallel.plan.candidate import Candidate
    from autoparallel.plan.estimate import Estimate
    from autoparallel.plan.plan import Plan
    from autoparallel.plan.strategy import Constraints, StagePlan, Strategy
    from autoparallel.runtime.module import ParallelModule

__version__ = "0.1.0"

_HOME = {
    "compile": "api",
    "enable_advanced_parallelization": "api",
    "estimate": "api",
    "plan": "api",
    "program": "api",
    "AutoParallelError": "errors",
    "Candidate": "plan.candidate",
    "Constraints": "plan.strategy",
    "Estimate": "plan.estimate",
    "Flavor": "ir.flavor",
    "ParallelModule": "runtime.module",
    "Plan": "plan.plan",
    "StagePlan": "plan.strategy",
    "Strategy": "plan.strategy",
}

__all__ = [
    "AutoParallelError",
    "Candidate",
    "Constraints",
    "Estimate",
    "Flavor",
    "ParallelModule",
    "Plan",
    "StagePlan",
    "Strategy",
    "compile",
    "enable_advanced_parallelization",
    "estimate",
    "plan",
    "program",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'autoparallel' has no attribute {name!r}")
    return getattr(import_module(f"autoparallel.{_HOME[name]}"), name)
