"""An embedder and a reranker over one set of weights.

    config.json, model.safetensors, modules.json, ...   the embedder, see quarterlight.models.checkpoint
    embedder/                                            its LoRA adapter, where it was kept
    reranker/                                            the reranker: everything but the weights that both have
        model.safetensors.index.json                     weight -> ../model.safetensors, or the file below
        weights.safetensors                              those of its own, if there are any
        adapter/                                         its LoRA adapter, where it was kept

Each of the two opens alone: ``SentenceTransformer(folder)``, ``CrossEncoder(folder/"reranker")``.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quarterlight.errors import CheckpointError
from quarterlight.models.checkpoint import (
    RERANKER,
    SETTINGS_FILE,
    backbone_in,
    load_adapter,
    load_backbone,
    load_processor,
    load_reranker_settings,
    load_settings,
    read_description,
    resolve_checkpoint,
    saved_tensors,
    weight_files,
)
from quarterlight.models.device import find_device
from quarterlight.models.embedder import Embedder, best_dtype
from quarterlight.models.reranker import Reranker

_OWN = "weights.safetensors"
_INDEX = "model.safetensors.index.json"


def same_eyes(embedder: Path, reranker: Path) -> bool:
    """Whether two folders have the same weights of vision tower and connector, to the bit."""
    ours, theirs = _tensors(embedder), _tensors(reranker)
    eyes = [f"{part}." for part in backbone_in(embedder).eyes]
    names = {name for name in (*ours, *theirs) if any(part in name for part in eyes)}
    return all(_equal(name, ours, theirs) for name in names)


def save_pair(folder: str | os.PathLike[str], embedder: Path, reranker: Path) -> Path:
    """Writes the folder of an embedder with a reranker inside, of which the weights that both have are saved once.

    folder: an older model there is replaced; it may be that of the embedder.
    Raises CheckpointError when the two do not share vision tower, connector and tokenizer.
    """
    target = Path(folder)
    load_reranker_settings(reranker)
    if target.exists() and any(target.iterdir()) and not (target / SETTINGS_FILE).is_file():
        raise CheckpointError(f"{target} holds something else than a model: choose another folder to save to.")
    if not same_eyes(embedder, reranker):
        raise CheckpointError(
            f"{embedder} and {reranker} differ in vision tower or connector, so that they cannot share them: train the "
            "reranker from the embedder (rerank.initial: finetune), or the embedder with LoRA."
        )
    if not _same_shapes(embedder, reranker):
        raise CheckpointError(f"{embedder} and {reranker} have language models of different sizes.")
    if _spelling(embedder) != _spelling(reranker):
        raise CheckpointError(f"{embedder} and {reranker} have different tokenizers.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        draft = Path(scratch) / "draft"
        shutil.copytree(embedder, draft, ignore=lambda where, _: {RERANKER} if Path(where) == embedder else set())
        inside = draft / RERANKER
        shutil.copytree(
            reranker, inside, ignore=lambda where, names: _weights(names) if Path(where) == reranker else ()
        )
        shared, others = _tensors(embedder), _tensors(reranker)
        # under the names that the embedder's files have for them: of two names for one weight, either might count
        place = {name: shared.get(name, one) for name, one in others.items()}
        own = {place[name].name: _read(name, others) for name in others if not _equal(name, shared, others)}
        if own:
            save_file(own, inside / _OWN, metadata={"format": "pt"})
        files = {one.name: _OWN if one.name in own else f"../{one.file.name}" for one in place.values()}
        size = sum(_read(name, others).nbytes for name in others)
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (inside / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        draft.replace(target)
    return target


def load_pair(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Embedder, Reranker]:
    """Embedder and reranker of a folder, over one set of the weights that both have.

    Adapters are kept beside the weights rather than merged into them; weights of the reranker's own are loaded beside
    those of the embedder.  The two may be used in several threads at once.
    model, device, dtype: as for :class:`Embedder`.  options: of both constructors, such as ``tokens_per_batch``.
    Raises CheckpointError when there is no such model, or no reranker inside.
    """
    folder = resolve_checkpoint(model)
    inside = folder / RERANKER
    if not (inside / "config.json").is_file():
        raise CheckpointError(f"{folder} has no reranker inside: train one with the stage rerank of a recipe.")
    place = find_device(device)
    settings, reranker_settings = load_settings(folder), load_reranker_settings(inside)
    dtype = dtype or best_dtype(place)
    loading: dict[str, Any] = {"dtype": dtype, "device": place, "merge": False}
    if (inside / _OWN).is_file():
        trunk, _ = load_backbone(folder, **loading)
        head, _ = load_backbone(inside, language_head=True, **loading)
        _share(trunk, head)
    else:
        head, _ = load_backbone(inside, language_head=True, **loading)
        # modules of its own, for an adapter of its own, over the same weights
        trunk = copy.deepcopy(head.base_model, {id(one): one for one in head.parameters()})
    for one, path in ((trunk, folder), (head, inside)):
        if name := read_description(path).get("adapter"):
            load_adapter(one.base_model, path / name)
        one.eval().requires_grad_(False)
    processors = [load_processor(path) for path in (folder, inside)]
    options["name"] = str(model)
    embedder = Embedder.from_model(trunk, processors[0], settings, folder=folder, **options)
    reranker = Reranker.from_model(head, processors[1], reranker_settings, folder=inside, **options)
    return embedder, reranker


def _share(trunk: Any, head: Any) -> None:
    """Puts the trunk's weights in place of those of ``head.base_model`` that equal them."""
    theirs = dict(head.base_model.named_parameters())
    for name, weight in trunk.named_parameters():
        if theirs[name].shape == weight.shape and torch.equal(theirs[name], weight):
            parent, _, last = name.rpartition(".")
            setattr(head.base_model.get_submodule(parent), last, weight)
    head.tie_weights()


def _same_shapes(embedder: Path, reranker: Path) -> bool:
    """Whether both have the same weights but for a language head, whatever their values."""
    ours, theirs = ({name for name in _tensors(one) if "lm_head" not in name} for one in (embedder, reranker))
    if ours != theirs:
        return False
    shapes = []
    for folder in (embedder, reranker):
        backbone = backbone_in(folder)
        named = ((backbone.base_name(name), one) for name, one in saved_tensors(folder))
        shapes.append({name: one.shape for name, one in named if name in ours})
    return shapes[0] == shapes[1]


def _spelling(folder: Path) -> list[Any]:
    """What decides the tokens of a text; how a file says what means nothing may differ."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    return [model["vocab"], model["merges"], content["added_tokens"], content["normalizer"], content["pre_tokenizer"]]


class _Saved(NamedTuple):
    """A weight in a file, and its name there."""

    file: Path
    name: str


def _tensors(folder: Path) -> dict[str, _Saved]:
    """Name that a weight has without a language head -> where it is."""
    backbone = backbone_in(folder)
    place: dict[str, _Saved] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        place.update({backbone.base_name(name): _Saved(file, name) for name in names})
    return place


def _equal(name: str, ours: Mapping[str, _Saved], theirs: Mapping[str, _Saved]) -> bool:
    if name not in ours or name not in theirs:
        return False
    one, other = _read(name, ours), _read(name, theirs)
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _read(name: str, place: Mapping[str, _Saved]) -> Tensor:
    with safe_open(place[name].file, framework="pt") as tensors:
        weight: Tensor = tensors.get_tensor(place[name].name)
    return weight


def _weights(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors") or name == _INDEX}
