"""A search worker: JSON lines on stdin in, JSON lines on stdout out. Run as `python -m autoparallel.search.worker`.

In: one line with the workload, then lines of jobs `{"polished": ..., "jobs": [[index, within_s, strategy], ...]}`.
Out: one line `{"pid": ..., "torch_loaded": ...}`, then for every job `{"index": ..., "candidate": ...}`, or
`{"index": ..., "error": ...}` with a traceback; strategies and candidates are JSON texts of their own. A worker ends at
the end of stdin, so it never outlives its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import IO

from autoparallel.cost.workload import Workload
from autoparallel.plans.strategy import Strategy
from autoparallel.search.price import solve
from autoparallel.search.problem import Problem


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer until the requests end."""

    def reply(message: str) -> None:
        replies.write(message + "\n")
        replies.flush()

    reply(json.dumps({"pid": os.getpid(), "torch_loaded": "torch" in sys.modules}))
    first = requests.readline()
    if not first:
        return
    problem = Problem(Workload.model_validate_json(first))
    for line in requests:
        message = json.loads(line)
        for index, within_s, strategy in message["jobs"]:
            try:
                asked = Strategy.model_validate_json(strategy)
                candidate = solve(problem, asked, within_s, polished=message["polished"])
            except Exception:
                reply(json.dumps({"index": index, "error": traceback.format_exc()}))
            else:
                reply(json.dumps({"index": index, "candidate": candidate.model_dump_json()}))


def main() -> None:
    # The parent decides when to stop; a terminal's ctrl-C goes to the whole foreground group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve(sys.stdin, sys.stdout)
    except BrokenPipeError:
        # The parent is gone; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
