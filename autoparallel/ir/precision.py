"""The dtypes of one training step: what the program computes in, what the optimizer steps, what gradients are summed in
(Micikevicius et al., arXiv 1710.03740).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from autoparallel.errors import ConfigError
from autoparallel.ir.flavor import Flavor
from autoparallel.ir.graph import DTYPE_BYTES
from autoparallel.ir.schema import Schema

HALVES = ("bfloat16", "float16")
COMPUTE_DTYPES = ("bfloat16", "float16", "float32", "float64")
_Dtype = Annotated[str, Field(pattern=f"^({'|'.join(COMPUTE_DTYPES)})$")]


class Precision(Schema):
    """Parameters rest as masters and are read as compute copies; where the two agree there is one copy."""

    compute_dtype: _Dtype
    """Of parameters as the program reads them, of activations and of their gradients."""
    master_dtype: _Dtype
    """Of parameters as the user loaded them, the optimizer steps them and checkpoints hold them."""
    gradient_dtype: _Dtype
    """In which gradients are summed over micro-batches and over ranks."""
    optimizer_state_bytes: int = Field(ge=0)
    """Of one trainable element."""

    @classmethod
    def of(cls, compute_dtype: str, master_dtype: str) -> Precision:
        """Sums in at least fp32; AdamW, which keeps two moments in the masters' dtype."""
        gradient_dtype = "float32" if compute_dtype in HALVES else compute_dtype
        return cls(
            compute_dtype=compute_dtype,
            master_dtype=master_dtype,
            gradient_dtype=gradient_dtype,
            optimizer_state_bytes=2 * DTYPE_BYTES[master_dtype],
        )

    def varied(self, *, optimizer: str, gradient_dtype: str | None, master_dtype: str | None) -> Precision:
        """With other dtypes, and the states of another optimizer: two moments in fp32 of AdamW, none of SGD."""
        master = master_dtype or self.master_dtype
        moments = {"adamw": 2 * DTYPE_BYTES[master], "sgd": 0}
        return Precision(
            compute_dtype=self.compute_dtype,
            master_dtype=master,
            gradient_dtype=gradient_dtype or self.gradient_dtype,
            optimizer_state_bytes=moments[optimizer],
        )

    @property
    def compute_bytes(self) -> int:
        return DTYPE_BYTES[self.compute_dtype]

    @property
    def master_bytes(self) -> int:
        return DTYPE_BYTES[self.master_dtype]

    @property
    def gradient_bytes(self) -> int:
        return DTYPE_BYTES[self.gradient_dtype]

    @property
    def separate_compute_copy(self) -> bool:
        """Whether both copies exist."""
        return self.compute_dtype != self.master_dtype


def choose_precision(
    flavor: Flavor, *, dtype: str, model_dtype: str, mixed_precision: bool | str = "auto"
) -> Precision:
    """bf16 compute with fp32 masters on GPUs, the model's own dtype on CPU and for a model that is loaded in another
    dtype than fp32; `dtype` names the compute dtype, `mixed_precision` decides for a model in fp32. Raises ConfigError.
    """
    if dtype not in ("auto", *COMPUTE_DTYPES):
        raise ConfigError(
            f"unknown dtype {dtype!r}", why='a compute dtype is "auto", "bfloat16", "float16", "float32" or "float64"'
        )
    asked = mixed_precision if isinstance(mixed_precision, bool) else None
    wants_half = dtype in HALVES or (dtype == "auto" and model_dtype in HALVES)
    if asked is False and wants_half and model_dtype != dtype != "auto":
        raise ConfigError(
            f"mixed_precision=False and dtype={dtype!r} contradict each other",
            why=f"the model is {model_dtype}, so that computing in {dtype} needs a second copy of its parameters",
            remedy=f"leave one out, or load the model with dtype=torch.{dtype}",
        )
    if dtype == "auto":
        mixed = model_dtype == "float32" and (asked if asked is not None else not flavor.is_cpu)
        return Precision.of("bfloat16" if mixed else model_dtype, model_dtype)
    return Precision.of(dtype, "float32" if dtype in HALVES and model_dtype == "float32" else dtype)
