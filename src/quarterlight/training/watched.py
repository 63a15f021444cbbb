"""What every stage wants of ``Trainer`` beyond its loss."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from quarterlight.errors import RecipeError
from quarterlight.training.optimizer import last_checkpoint, tensorboard
from quarterlight.training.trouble import PictureLog, stop_at


class WatchedTrainer(Trainer):
    """``Trainer`` that says how busy the model is, and lets no gradient that is not finite reach a weight.

    Its checkpoints hold no weights that are not trained.
    max_unreadable: share of the pictures above which training stops.
    """

    _batch_ids: Mapping[str, Sequence[str]]
    """what the last batch held, kind -> ids; set with every batch"""

    def __init__(self, *, max_unreadable: float, **more: Any) -> None:
        super().__init__(callbacks=[tensorboard(Path(str(more["args"].output_dir)))], **more)
        self._folder = Path(str(self.args.output_dir))
        self._pictures = PictureLog(self._folder, max_unreadable)
        self._started = time.monotonic()

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of the weights only."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def run(self, model: nn.Module) -> None:
        """Trains from the last checkpoint of a run that was stopped in the folder, or from the beginning.

        model: what is trained; where the weights are sharded, the first process has them whole in it in the end.
        """
        if sharded := self.is_sharded:  # which changes the modules for good
            self.model = self.model_wrapped = copy.deepcopy(model)
        self.train(resume_from_checkpoint=last_checkpoint(self._folder))
        if sharded:
            state = self.accelerator.get_state_dict(self.model_wrapped)
            if self.is_world_process_zero():
                model.load_state_dict(state)

    @property
    def utilisation(self) -> float:
        """The share of the training time, validation aside, in which the model did not wait for its inputs."""
        raise NotImplementedError

    def _check(self, loss: Tensor, step: int) -> None:
        """Raises RecipeError on a loss that is not finite, after it has saved what the batch held."""
        if not torch.isfinite(loss):
            stop_at(self._folder, step, loss.item(), what="loss", **self._batch_ids)

    def _validated(self, metrics: dict[str, float], started: float) -> dict[str, float]:
        """The metrics, after they are told; the time since validation began is none of training."""
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._started += time.monotonic() - started
        return metrics

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As ``Trainer`` does. On a norm that is not finite it saves the last batch's ids and raises RecipeError."""
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(norm):
            stop_at(self._folder, self.state.global_step, float(norm), what="gradient", **self._batch_ids)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the utilisation to what is said about training."""
        if "loss" in logs or "train_loss" in logs:
            logs["utilisation"] = round(self.utilisation, 3)
        super().log(logs, start_time)

    def _frozen(self) -> set[str]:
        model: Any = self.model
        names = (name for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad)
        return {name.replace("_fsdp_wrapped_module.", "") for name in names}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Leaves out what training does not change; all of it would be written every time."""
        if frozen := self._frozen():
            model: Any = self.model
            state = model.state_dict() if state_dict is None else state_dict
            state_dict = {name: one for name, one in state.items() if name not in frozen}
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        wrong = [*load_result.unexpected_keys, *sorted(set(load_result.missing_keys) - self._frozen())]
        if wrong:
            raise RecipeError(
                f"The checkpoint in {self.args.output_dir} is of another model ({wrong[0]} differs): remove the folder."
            )
