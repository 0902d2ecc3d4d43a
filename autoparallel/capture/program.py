"""A captured model: the fx program that the emitter cuts, beside the Graph that the planner prices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from autoparallel.capture.annotate import annotate, canonical_parameter_names, dtype_name
from autoparallel.capture.export import Exported, export_training_forward, load_config
from autoparallel.capture.repeats import UnlikeBlocks
from autoparallel.capture.segments import Segments, assign_segments
from autoparallel.errors import CaptureError
from autoparallel.ir.graph import Graph

TRIES = 3
"""Of capture with blocks left out; each learns from the last one which blocks are called in their own way."""


@dataclass(frozen=True)
class Program:
    """One training forward, cut nowhere yet."""

    exported: Exported

    @property
    def num_traced_blocks(self) -> int | None:
        """How many blocks stand in the module; None if all do."""
        repeats = self.exported.repeats
        return None if repeats is None else sum(call.template is None for call in repeats.calls)

    @property
    def module(self) -> fx.GraphModule:
        return self.exported.module

    @cached_property
    def graph(self) -> Graph:
        return annotate(self.exported, self.segments, self.parameter_names)

    @cached_property
    def segments(self) -> Segments:
        """The segment of every node; None for free ones."""
        return assign_segments(self.module, self.exported.twin)

    @cached_property
    def parameter_names(self) -> dict[str, str]:
        """From the program's attribute names to `named_parameters()` of the model; tied parameters share one."""
        return canonical_parameter_names(self.exported)

    def buffer_name(self, attribute: str) -> str | None:
        """The name in `named_buffers()` of the model, or None for a constant of the program itself."""
        name = attribute.removeprefix("model.")
        return name if name in self._buffer_names else None

    @cached_property
    def _buffer_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.exported.twin.named_buffers(remove_duplicate=False))


def capture(model: Any, *, dtype: torch.dtype | None = None) -> Program:
    """Trace an HF causal LM (object, config or path); `dtype` is the compute dtype, None keeps the model's."""
    return Program(export_training_forward(model, dtype=dtype))


def capture_for_planning(model: Any, *, dtype: torch.dtype | None = None) -> Program:
    """The same graph in the time that a shallow model takes: of blocks that are alike, one is traced. The program's
    module is not the whole model's then, so it can be planned for but not emitted.
    """
    traced: frozenset[int] = frozenset()
    for _ in range(TRIES):
        try:
            program = Program(export_training_forward(model, dtype=dtype, traced=traced))
            assert program.graph
        except UnlikeBlocks as found:
            if not found.traced:
                break
            traced |= found.traced
        except CaptureError:
            break
        else:
            return program
    return capture(model, dtype=dtype)


def model_dtype(model: Any) -> str:
    """The dtype of a model's parameters, or the one that its config says it loads with."""
    if isinstance(model, torch.nn.Module):
        floating = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
        return dtype_name(floating[0] if floating else torch.float32)
    config = load_config(model) if isinstance(model, (str, os.PathLike)) else model
    return dtype_name(getattr(config, "dtype", None) or torch.float32)
