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
    from autoparallel.plans.candidate import Candidate
    from autoparallel.plans.estimate import Estimate
    from autoparallel.plans.plan import Plan
    from autoparallel.plans.strategy import Constraints, StagePlan, Strategy
    from autoparallel.questions import scaling, which_flavor
    from autoparallel.runtime.module import ParallelModule

__version__ = "0.1.0"

_HOME = {
    "compile": "api",
    "enable_advanced_parallelization": "api",
    "estimate": "api",
    "plan": "api",
    "program": "api",
    "AutoParallelError": "errors",
    "Candidate": "plans.candidate",
    "Constraints": "plans.strategy",
    "Estimate": "plans.estimate",
    "Flavor": "ir.flavor",
    "ParallelModule": "runtime.module",
    "Plan": "plans.plan",
    "StagePlan": "plans.strategy",
    "Strategy": "plans.strategy",
    "scaling": "questions",
    "which_flavor": "questions",
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
    "scaling",
    "which_flavor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'autoparallel' has no attribute {name!r}")
    return getattr(import_module(f"autoparallel.{_HOME[name]}"), name)
