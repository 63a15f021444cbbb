"""A model with a language head as ``Trainer`` sees it."""

from __future__ import annotations

from typing import Any

from torch import nn


class Writer(nn.Module):
    """What a loss is computed in; the loss is for others to say.

    ``Trainer`` saves a transformers model under the names of its published weights, but resumes it without translating
    them back: the language model of an InternVL would start anew without a word.  In here it keeps its names.  A head
    that shares the weights of the embeddings is saved as those alone, since safetensors does not save one tensor twice.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # where FSDP cuts
        self.register_state_dict_post_hook(_leave_out_tied)
        self.register_load_state_dict_pre_hook(_put_in_tied)


def _leave_out_tied(writer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in writer.model.all_tied_weights_keys:
        state.pop(f"{prefix}model.{name}", None)


def _put_in_tied(writer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, source in writer.model.all_tied_weights_keys.items():
        if f"{prefix}model.{source}" in state:
            state[f"{prefix}model.{name}"] = state[f"{prefix}model.{source}"]
