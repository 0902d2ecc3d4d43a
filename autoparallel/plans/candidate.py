"""A candidate is a strategy with its price, or with the reason why it is impossible."""

from __future__ import annotations

from autoparallel.ir.schema import Schema
from autoparallel.plans.estimate import Estimate, Rejection
from autoparallel.plans.strategy import Strategy


class Candidate(Schema):
    """Exactly one of `estimate` and `rejection` is set once the search is over."""

    strategy: Strategy
    estimate: Estimate | None = None
    rejection: Rejection | None = None
