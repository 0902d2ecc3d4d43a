"""A candidate is a strategy with its price, or with the reason why it is impossible."""

from __future__ import annotations

from pydantic import Field

from autoparallel.ir.schema import Schema
from autoparallel.plans.estimate import Estimate, Rejection
from autoparallel.plans.strategy import Strategy


class Candidate(Schema):
    """Exactly one of `estimate` and `rejection` is set once the search is over."""

    strategy: Strategy
    estimate: Estimate | None = None
    rejection: Rejection | None = None
    bound_s: float = Field(default=0.0, ge=0.0)
    """No step of the strategy is shorter, whatever its stages."""


class Pruned(Schema):
    """Strategies that were not looked at one by one, since none of them can be the fastest."""

    num_stages: int
    tensor_parallel: int
    data_parallel: int
    count: int = Field(ge=1)
    bound_s: float = Field(ge=0.0)
    """No step of any of them is shorter."""
    reason: str
