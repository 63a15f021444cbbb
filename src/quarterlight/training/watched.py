"""What every stage wants of ``Trainer`` beyond its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from quarterlight.training.trouble import stop_at


class WatchedTrainer(Trainer):
    """``Trainer`` that says how busy the model is, and lets no gradient that is not finite reach a weight."""

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
