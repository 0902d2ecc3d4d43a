"""Libraries around the loop (HF Trainer and accelerate, peft) see one process with one device, and of the many that run
alike only rank 0 writes, logs and shows progress.

How they decide: accelerate's PartialState counts processes by the rank variables, which launch.py hides, and Trainer
asks TrainingArguments who saves and who logs. Saving gathers, so the other ranks come along and write nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, wraps
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils.import_utils import is_accelerate_available, is_peft_available

from autoparallel.errors import ContractError
from autoparallel.runtime.launch import is_main
from autoparallel.runtime.module import ParallelModule, inner
from autoparallel.runtime.one_writer import mend_saving


@cache
def see_one_process(device: torch.device) -> None:
    """Make it so in this rank, which drives `device`; once, after the ranks have met."""
    if dist.get_world_size() == 1:
        return
    mend_saving()
    if is_accelerate_available():
        _reset_accelerate()
        _mend_trainer(device)
    if is_peft_available():
        _mend_peft()


def _reset_accelerate() -> None:
    """Accelerate that was set up under torchrun before the line has counted the ranks already."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    one = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0, "local_process_index": 0}
    for state in (PartialState, AcceleratorState):
        if state._shared_state:
            state._shared_state.update(one)


def _mend_trainer(device: torch.device) -> None:
    from transformers import Trainer, TrainingArguments

    _mend(TrainingArguments, "_setup_devices", lambda found: _only(device, found))
    for name in ("should_save", "should_log"):
        _mend(TrainingArguments, name, lambda found: property(_on_rank_0(found.fget)))
    for name in ("is_world_process_zero", "is_local_process_zero"):
        _mend(Trainer, name, _on_rank_0)
    _mend(Trainer, "_save", lambda save: _with(save, _gather_model))
    _mend(Trainer, "_save_optimizer_and_scheduler", lambda save: _with(save, _gather_optimizer))
    _mend(Trainer, "_save_checkpoint", lambda save: _with(save, None))


def _mend(kind: type, name: str, how: Callable[[Any], Any]) -> None:
    setattr(kind, name, how(getattr(kind, name)))


def _only(device: torch.device, original: Any) -> Any:
    """TrainingArguments' device is this rank's, though more may be visible."""

    def setup(self: Any) -> torch.device:
        original.func(self)
        self._n_gpu = min(self._n_gpu, 1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    found = cached_property(setup)
    found.__set_name__(object, "_setup_devices")
    return found


def _on_rank_0(ask: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A question with the answer of one process on rank 0, and no on the others."""

    @wraps(ask)
    def answer(self: Any) -> bool:
        return ask(self) and is_main()

    return answer


def _with(save: Callable[..., None], gather: Callable[..., Any] | None) -> Callable[..., None]:
    """A method of Trainer that only the writing rank carries out: the others gather with it, and all wait for the
    files, which Trainer looks for soon.
    """

    @wraps(save)
    def together(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        if gather is not None and not is_main():
            gather(self, *args, **kwargs)
        dist.barrier()

    return together


def _gather_model(trainer: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
    """The collectives of `Trainer._save`."""
    model = trainer.model
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(output_dir or trainer.args.output_dir, state_dict=state_dict, is_main_process=False)
    elif state_dict is None:
        model.state_dict()


def _gather_optimizer(trainer: Any, output_dir: str) -> None:
    trainer.optimizer.state_dict()


def _mend_peft() -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    _mend(PeftModel, "save_pretrained", _adapter_written_once)
    for name in ("merge_and_unload", "unload", "merge_adapter", "unmerge_adapter"):
        _mend(BaseTuner, name, _before_the_first_step)


def _adapter_written_once(save: Callable[..., None]) -> Callable[..., None]:
    @wraps(save)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
        kwargs["is_main_process"] = kwargs.get("is_main_process", True) and is_main()
        save(self, save_directory, *args, **kwargs)
        if isinstance(inner(self), ParallelModule):
            dist.barrier()

    return save_pretrained


def _before_the_first_step(change: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(change)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, ParallelModule) and self.model.is_placed:
            raise ContractError(
                f"{change.__name__}() after the first training step",
                why="this rank holds only pieces of the weights that adapters would be merged into",
                remedy="save_pretrained() the adapter, and merge it into a freshly loaded base model",
            )
        return change(self, *args, **kwargs)

    return changed
