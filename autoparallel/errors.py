"""The error tree. Every error says what happened, why, and what to do; the command line maps each to an exit code.

AutoParallelError
├── ConfigError            2   a flavor, option, batch or environment setting that cannot be used
├── CaptureError           2   the model's training forward cannot become a graph
├── CostTableError         2   a cost table that is missing, unreadable or implausible
├── PlanFormatError        2   a plan file that is not a plan
├── LaunchError            2   the processes cannot be started, or not from here
├── ContractError          2   the training loop asks for something a parallel program cannot give
├── NoFeasiblePlanError    3   no candidate fits
├── PlanMismatchError      4   a good plan, for another model, cluster or world size
├── WorkerError            5   a process of ours died
├── CheckpointError        7   weights that are damaged, incomplete or not the same on every rank
└── StorageError           8   a folder that cannot be written: full, read-only, gone
"""

from __future__ import annotations


class AutoParallelError(Exception):
    """One line what, one line why, one line what to do."""

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        lines = [what]
        if why:
            lines.append(f"  why: {why}")
        if remedy:
            lines.append(f"  try: {remedy}")
        super().__init__("\n".join(lines))


class ConfigError(AutoParallelError):
    """A flavor, option, batch or environment setting that cannot be used."""


class CaptureError(AutoParallelError):
    """The model's training forward cannot become a graph."""


class CostTableError(AutoParallelError):
    """A cost table that is missing, unreadable or implausible."""


class PlanFormatError(AutoParallelError):
    """A plan file that is not a plan."""


class LaunchError(AutoParallelError):
    """The processes cannot be started, or not from here."""


class ContractError(AutoParallelError):
    """The training loop asks for something a parallel program cannot give."""


class NoFeasiblePlanError(AutoParallelError):
    """No candidate fits: the message holds the shortfall and the cheapest change that would fit."""

    exit_code = 3


class PlanMismatchError(AutoParallelError):
    """A good plan, for another model, cluster or world size."""

    exit_code = 4


class WorkerError(AutoParallelError):
    """A process of ours died."""

    exit_code = 5


class CheckpointError(AutoParallelError):
    """Weights that are damaged, incomplete or not the same on every rank."""

    exit_code = 7


class StorageError(AutoParallelError):
    """A folder that cannot be written: full, read-only, gone."""

    exit_code = 8
