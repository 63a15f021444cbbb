"""What every stage wants of ``Trainer`` beyond its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from quarterlight.errors import RecipeError
from quarterlight.training.trouble import stop_at


class WatchedTrainer(Trainer):
    """``Trainer`` that says how busy the model is, and lets no gradient that is not finite reach a weight.

    Its checkpoints hold no weights that are not trained.
    """

    _batch_ids: Mapping[str, Sequence[str]]
    """what the last batch held, kind -> ids; set with every batch"""

    @property
    def utilisation(self) -> float:
        """The share of the training time, validation aside, in which the model did not wait for its inputs."""
        raise NotImplementedError

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As ``Trainer`` does. On a norm that is not finite it saves the last batch's ids and raises RecipeError."""
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(norm):
            folder = Path(str(self.args.output_dir))
            stop_at(folder, self.state.global_step, float(norm), what="gradient", **self._batch_ids)
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
