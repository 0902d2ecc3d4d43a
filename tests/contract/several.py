"""Runs scripts of this folder one after the other in one process, which imports once: NAME MODEL NAME MODEL ... with
the options that each of them takes. `--lazy` goes before them all: models are then loaded without their weights.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

options = sys.argv[sys.argv.index("--") + 1 :]
if "--lazy" in options:
    import autoparallel

    options.remove("--lazy")
    autoparallel.enable_advanced_parallelization()
pairs = iter(sys.argv[1 : sys.argv.index("--")])
for name, model in zip(pairs, pairs, strict=True):
    out = Path(options[0]) / name
    out.mkdir(parents=True, exist_ok=True)
    sys.argv = [f"{name}.py", model, "--out", str(out), *options[1:]]
    runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
