"""`python -m autoparallel` is the command line."""

from __future__ import annotations

from autoparallel.cli import main

if __name__ == "__main__":
    main()
