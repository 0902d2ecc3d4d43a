"""No test reads or writes the plans that somebody keeps."""

from __future__ import annotations

import os

os.environ["AUTOPARALLEL_CACHE"] = "0"
