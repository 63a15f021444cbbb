"""The models that a command is told to use."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from quarterlight.errors import CheckpointError
from quarterlight.metrics.fusion import RERANK
from quarterlight.models.quantized import Quantization

if TYPE_CHECKING:
    from quarterlight.models.embedder import Embedder
    from quarterlight.models.reranker import Reranker

K = "[K]"
"""The metavar of an option that takes a number of candidates, or stands alone for :data:`RERANK` of them."""

RerankerOption = Annotated[
    str | None, typer.Option("--reranker", help="A reranker's folder or hub id.", show_default="the one inside --model")
]
FusionOption = Annotated[
    float | None,
    typer.Option(
        "--fusion",
        min=0,
        max=1,
        help="Weight of the reranker's score beside the cosine; 1 is the reranker alone.",
        show_default="the reranker's own",
    ),
]

QuantizationOption = Annotated[
    Quantization | None,
    typer.Option(
        "--quantization",
        help="Keep the weights of the model's layers as int8, in a quarter of the memory. What searches an index needs "
        "the same setting as what made it.",
        show_default="as loaded",
    ),
]


def with_number(args: Sequence[str], options: Collection[str]) -> list[str]:
    """The arguments of a command, with a number behind those options that stand alone.

    A whole number that follows belongs to the option; anything else does not.  Behind ``--`` nothing is an option.

    >>> with_number(["--rerank", "cats"], ["--rerank"]), with_number(["--rerank", "10", "cats"], ["--rerank"])
    (['--rerank=5', 'cats'], ['--rerank', '10', 'cats'])
    """
    end = args.index("--") if "--" in args else len(args)
    filled = list(args)
    for place, one in enumerate(args[:end]):
        follows = args[place + 1] if place + 1 < len(args) else ""
        if one in options and not follows.removeprefix("-").isdecimal():
            filled[place] = f"{one}={RERANK}"
    return filled


def check_rerank(rerank: int, reranker: str | None, fusion: float | None) -> None:
    """Raises BadParameter for options that do nothing without ``--rerank``."""
    for name, value in (("--reranker", reranker), ("--fusion", fusion)):
        if value is not None and not rerank:
            raise typer.BadParameter(f"{name} does nothing without --rerank.")


def open_pair(
    model: str, reranker: str | None, *, device: str | None = None, quantization: Quantization | None = None
) -> tuple[Embedder, Reranker]:
    """An embedder with a reranker: the one inside its folder, over the same weights, unless another is named.

    quantization: of the embedder, which then has weights of its own.
    Raises CheckpointError when there is no such model, or it has no reranker.
    """
    from quarterlight.models.embedder import Embedder
    from quarterlight.models.pair import load_pair
    from quarterlight.models.reranker import Reranker, has_reranker, reranker_folder

    if reranker is not None and reranker_folder(reranker).resolve() != reranker_folder(model).resolve():
        return Embedder(model, device=device, quantization=quantization), Reranker(reranker, device=device)
    if not has_reranker(model):
        raise CheckpointError(
            f"The model {model!r} has no reranker inside: name one with --reranker, train one with the stage `rerank` "
            "of a recipe, or leave out --rerank."
        )
    if quantization is not None:
        return Embedder(model, device=device, quantization=quantization), Reranker(model, device=device)
    return load_pair(model, device=device)
