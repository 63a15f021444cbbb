"""Layers that run as ``torch.compile`` made them.

One function is compiled for all layers of the vision tower and one for all of the language model, so that it takes as
long for 28 layers as for one, and once more for each case that torch takes for another: a batch of one row or tile,
and, in bidirectional attention, rows that are all of one length and need no mask.  An embedder warms up with all that
its settings can bring.  Sizes of batches and lengths of rows stay open: they need no compiling again.  What torch
compiled before, on this machine, it finds in its cache on disk.

Two things run as they always do: layers that are given keys and values of a common beginning, each of which would need
a function of its own, and towers that see the pictures of a batch in one sequence (Qwen-VL), whose attention is cut in
places that only the numbers in it tell.
"""

from __future__ import annotations

import functools
import logging
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from quarterlight.errors import InputError, did_you_mean
from quarterlight.models.backbones import backbone_of
from quarterlight.models.quantized import layers_of

TILES = (3, 1)
"""Tiles that functions are compiled with; any other number above 1 would do as well as the first."""

TEXTS = (("one", "one two three four five", "one two"), ("one", "one", "one"), ("one",))
"""Texts of the batches that functions are compiled with: of several lengths, of one length, and a single one."""

NAMES = {"tower": "vision tower", "language_model": "language model"}

_log = logging.getLogger(__name__)


@dataclass
class Compiled:
    """What of a model was compiled.

    tower, language_model: layers that run compiled; 0 again where torch gave up later.
    seconds: that compiling took, or finding what was compiled before.
    failure: what torch could not compile, and so runs as it always does; empty where there was nothing.
    """

    tower: int = 0
    language_model: int = 0
    seconds: float = 0.0
    failure: str = ""


@torch.inference_mode()
def compile_layers(
    model: Any,
    read: Callable[[Sequence[str]], object],
    *,
    mode: str | None = None,
    on_call: Callable[[], None] = lambda: None,
) -> Compiled:
    """Compiles the layers of a model without a language head, in ``eval`` mode, and lets it use them.

    read: runs texts through the language model as one batch, in the very way it will be used.
    mode: of ``torch.compile``; ``None`` is its default.
    on_call: called whenever a compiled layer was used.
    Where torch cannot compile, or cannot go on with what it compiled, the model runs as before, and the log says why.
    Raises InputError for a mode that torch does not have.
    """
    if mode is not None and mode not in (modes := torch._inductor.list_mode_options()):
        raise InputError(f"torch.compile has no mode {mode!r}. {did_you_mean(mode, modes)}")
    compiled = Compiled()
    config, backbone = model.config, backbone_of(model.config)
    tower, language = (list(model.get_submodule(name)) for name in layers_of(model))
    started = time.monotonic()

    def see(tiles: int) -> None:
        grids = [backbone.smallest()] * tiles
        pixels = torch.zeros(backbone.pixels_shape(config, grids), dtype=model.dtype, device=model.device)
        backbone.see(model, pixels, grids)

    if backbone.tower(config).tiles_are_pictures:
        _compile("tower", tower, [functools.partial(see, tiles) for tiles in TILES], compiled, mode, on_call)
    _compile("language_model", language, [functools.partial(read, some) for some in TEXTS], compiled, mode, on_call)
    compiled.seconds = time.monotonic() - started
    return compiled


def _compile(
    part: Literal["tower", "language_model"],
    layers: list[nn.Module],
    uses: Sequence[Callable[[], object]],
    compiled: Compiled,
    mode: str | None,
    on_call: Callable[[], None],
) -> None:
    """Lets layers, which are of one class, run by one compiled function.

    uses: run them, in all the ways that have to be compiled.
    """
    plain = type(layers[0]).forward
    fast = torch.compile(_own(plain), dynamic=True, fullgraph=True, mode=mode)  # all of it compiled, or an error
    ready = False

    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            return plain(layer, *args, **kwargs)
        try:
            found = fast(layer, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # the latter is no kind of the former
            if not ready:
                raise
            give_up(error)
            return plain(layer, *args, **kwargs)
        if ready:
            on_call()
        return found

    def give_up(error: Exception) -> None:
        for layer in layers:
            vars(layer).pop("forward", None)
        setattr(compiled, part, 0)
        reason = next(iter(str(error).strip().splitlines()), "")
        failure = f"{NAMES[part]}: {type(error).__name__}: {reason}"
        compiled.failure = "; ".join(filter(None, (compiled.failure, failure)))
        _log.warning("Layers of the %s run as ever, since torch cannot compile them: %s", NAMES[part], reason)

    uses[-1]()  # upon which transformers adds its hooks
    _drop_capturing(layers)
    for layer in layers:
        layer.forward = functools.partial(run, layer)
    try:
        for use in uses:
            use()
    except Exception as error:  # whatever a compiler comes upon; the model works without
        give_up(error)
        return
    ready = True
    setattr(compiled, part, len(layers))


def _own(function: Any) -> Any:
    """The same function with code of its own: torch allows eight compiled ones for all functions that share their code,
    which are those of all models of a process, and by a wrapper of transformers even of all classes of layers."""
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__, own.__qualname__ = function.__kwdefaults__, function.__qualname__
    return own


def _drop_capturing(layers: list[nn.Module]) -> None:
    """Takes out the hooks by which transformers hands attention weights to whoever asks for them, which nobody here
    does: torch cannot compile them.  Those on the layers themselves, which hand out hidden states, stay."""
    for layer in layers:
        for part in layer.modules():
            for key, hook in list(part._forward_hooks.items()):
                if part is not layer and getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                    del part._forward_hooks[key]
