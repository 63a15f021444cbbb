"""Model folders: finding, loading, saving and naming them.

A trained embedder is a folder that ``transformers`` loads as a backbone, ``SentenceTransformer(path)`` as an embedder
(once quarterlight is imported) and :class:`quarterlight.Embedder` with everything:

    config.json, model.safetensors, tokenizer.json, tokenizer_config.json, processor_config.json, chat_template.jinja
    modules.json, sentence_bert_config.json, config_sentence_transformers.json, 1_Pooling/config.json, 2_Normalize/
    quarterlight.json    format, settings (:class:`EmbedderSettings`), s, templates, weights hash, training manifest,
                         temperature
    embedder/            where LoRA was kept: adapter_config.json, adapter_model.safetensors (peft's)

A folder with ``embedder/`` has in ``model.safetensors`` the weights that the adapter was trained on.  transformers,
peft and sentence-transformers look for an adapter in the folder itself, and sentence-transformers then for the base
under the path that the adapter names, which breaks when a folder is moved; so ours is below it, and
``sentence_bert_config.json`` says so (``adapter_kwargs``).  Bare transformers need the same hint:
``AutoModel.from_pretrained(folder, adapter_kwargs={"subfolder": "embedder"})``; without it they open the base.

The configuration of a bidirectional model says so where transformers looks, and that of a model with mean pooling has
the markers of the instruction, whose hidden states then are zero: see :mod:`quarterlight.models.masked_instruction`.

What sentence-transformers cannot do for us: it leaves the instruction out of a mean but not the frame (such a model is
saved without the files of the second line); it does not cut texts at ``text_max_tokens``; ``max_tiles`` is an argument
of a call (``processing_kwargs={"image": {"max_patches": 4}}``), not of an item, and does not change the instruction; a
string that is the path or URL of a picture is taken for that picture.  Special tokens in texts are plain text there too
(our processor's ``apply_chat_template``).

A trained reranker is such a folder too, which ``CrossEncoder(path)`` opens; it keeps its adapter in ``adapter/``.  An
embedder's folder can have one inside, in ``reranker/``: see :mod:`quarterlight.models.pair`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_peft_available

from quarterlight.errors import CheckpointError
from quarterlight.files import replacing
from quarterlight.models.adapter import has_adapter, merge_lora, weights_without_adapter
from quarterlight.models.backbones import FAMILIES, backbone_named, backbone_of, family_of, our_model_type
from quarterlight.models.backbones.backbone import Backbone
from quarterlight.models.inputs import check_markers
from quarterlight.models.masked_instruction import MASKED_INSTRUCTION
from quarterlight.models.merging import MERGING
from quarterlight.models.pooling import Attention, PoolingMode
from quarterlight.models.processor import VTCProcessor
from quarterlight.models.quantized import Quantization, named_tensors, quantization_of, quantize
from quarterlight.models.rerank_inputs import AnswerTokens
from quarterlight.models.settings import EmbedderSettings, RerankerSettings
from quarterlight.prompts import (
    INSTRUCTION_END,
    INSTRUCTION_START,
    LABELS,
    Prompt,
    RerankPart,
    RerankPrompt,
    chat_template,
    rerank_chat_template,
)

SETTINGS_FILE = "quarterlight.json"
ADAPTER = "embedder"
"""Folder, in that of a model, of the adapter that makes an embedder of it."""

RERANKER = "reranker"
"""Folder, in that of an embedder, of the reranker that shares its vision tower and connector."""

RERANKER_ADAPTER = "adapter"
"""Folder, in that of a reranker, of the adapter that makes a reranker of the weights."""

PEFT_PREFIX = "base_model.model."
"""Of the names in adapter files, for those who wrap a model rather than change it."""

_READ_WITH_WEIGHTS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("preprocessor_config.json", "processor_config.json"),
)
"""Files of a folder that change what its weights make of an item."""

FORMAT = 1
"""Version of the layout above; a higher one cannot be read by this program."""


def resolve_checkpoint(model: str | os.PathLike[str]) -> Path:
    """The folder of a model: a path, the name of a bundled model (``nano``), or a hub id, which is downloaded.

    Raises CheckpointError when there is none.
    """
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is not a model folder: it has no config.json.")
    bundled = Path(str(files("quarterlight"))) / "checkpoints"
    names = sorted(one.parent.name for one in bundled.glob("*/config.json"))
    if str(model) in names:
        return bundled / str(model)
    if isinstance(model, str) and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _download(model)
    raise CheckpointError(
        f"There is no model {str(model)!r}: it is neither a folder, nor a hub id such as 'owner/name', nor one of the "
        f"bundled models ({', '.join(names) or 'none in this installation'})."
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.md"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{hub_id!r} is not a folder here and cannot be fetched from the hub ({type(error).__name__}): check the "
            "spelling, or download it elsewhere and give its folder."
        ) from error


def load_config(
    folder: Path,
    visual_token_compression: int | None = None,
    tower: Mapping[str, Any] | None = None,
    vision_token_merging: float | None = None,
) -> Any:
    """The configuration, with compression, of a folder of a known family, with s replaced if one is given.

    tower: settings of the vision tower that replace those of the folder.
    vision_token_merging: replaces the saved one.
    Raises CheckpointError for another kind of model, an impossible s, or merging where the family has none.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable config.json: {error}") from error
    model_type = our_model_type(config.model_type)
    if model_type is None:
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise CheckpointError(f"{folder} holds a {config.model_type!r} model: expected an {titles}.")
    values = config.to_dict()
    values.pop("model_type")
    if visual_token_compression is not None:
        values["visual_token_compression"] = visual_token_compression
    if vision_token_merging is not None:
        values[MERGING] = vision_token_merging
    if tower:
        values["vision_config"] = values["vision_config"] | dict(tower)
    family = FAMILIES[model_type]
    try:
        return family.load(family.config).from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error


def load_backbone(
    folder: str | os.PathLike[str],
    *,
    visual_token_compression: int | None = None,
    vision_token_merging: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    language_head: bool = False,
    merge: bool = True,
    tower: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
) -> tuple[Any, VTCProcessor]:
    """Model (in ``eval`` mode) and processor of a folder, which agree on the tokens of a tile.

    Plain folders (``InternVL3-*-hf``, ``Qwen2-VL-*``, ...) load as well as our own: compression has no weights.
    visual_token_compression: replaces the saved s.
    vision_token_merging: replaces the saved share of patches that are merged in the vision tower.
    language_head: adds the head that writes words.  It belongs to the weights without a kept adapter of an embedder,
        so that one is left out; without a head, and in a reranker, it is merged.  Words are written one after the
        other, so attention is causal and nothing is masked, whatever the folder says of its embeddings.
    merge: ``False`` leaves every adapter out.
    tower: settings of the vision tower that replace those of the folder, see :mod:`quarterlight.models.presets`.
    quantization: how the weights of layers are kept, see :mod:`quarterlight.models.quantized`; adapters are merged
        before.
    Raises CheckpointError when the folder is of another kind, or lacks weights that the model needs.
    """
    folder = resolve_checkpoint(folder)
    config = load_config(folder, visual_token_compression, tower, vision_token_merging)
    if language_head:
        _say(config, causal=True, masked=None)
    family = family_of(config)
    kind = family.load(family.generation if language_head else family.model)
    with _quietly():
        try:
            model, report = kind.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
            missing = {*report["missing_keys"]}
            description = read_description(folder)  # also where its adapter was lost
            if merge and description.get("adapter") and (not language_head or description["kind"] == "reranker"):
                missing |= load_adapter(model.base_model, folder / description["adapter"])
                merge_lora(model)
            processor = load_processor(folder, config)
            processor.agree_with(config)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of the model's weights, {min(missing)} among them.")
    model = model.to(device).eval()
    if quantization is not None:
        quantize(model, quantization)
    return model, processor


def backbone_in(folder: Path) -> Backbone:
    """The adapter for the model of a folder, of whose configuration only the model type is read.

    Raises CheckpointError when it is of no known family.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no readable config.json: {error}") from error
    model_type = our_model_type(found)
    if model_type is None:
        raise CheckpointError(f"{folder} holds a {found!r} model: expected one of {', '.join(FAMILIES)}.")
    return backbone_named(model_type)


def load_processor(folder: Path, config: Any = None) -> VTCProcessor:
    """The processor of a folder. config: that of its model, if it has been read."""
    family = family_of(load_config(folder) if config is None else config)
    processor: VTCProcessor = family.load(family.processor).from_pretrained(folder)
    return processor


def read_description(folder: Path) -> dict[str, Any]:
    """What ``quarterlight.json`` of a folder says; empty for one that is not ours.

    Raises CheckpointError when it cannot be read or is of a later format.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {content.get('format')!r}, not {FORMAT}: update quarterlight.")
    return content


def load_adapter(model: Any, folder: Path) -> set[str]:
    """Puts the adapter of a folder into the model; returns the names of the weights that it lacks."""
    if not is_peft_available():
        raise CheckpointError(f"{folder} holds an adapter, which needs peft: pip install -e '.[train]'.")
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    # Not model.load_adapter: after it, transformers saves the model's own weights under names that it cannot read.
    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), model)
    weights = load_file(folder / "adapter_model.safetensors")
    # a reranker's layers are called as in the model with a language head
    names = {name: name.removeprefix(PEFT_PREFIX).removeprefix("model.") for name in weights}
    report: Any = set_peft_model_state_dict(model, {names[name]: one for name, one in weights.items()})
    return {name for name in report.missing_keys if ".lora_" in name}


def load_settings(folder: Path) -> EmbedderSettings:
    """The settings of an embedder's folder; the defaults for a backbone that was never trained as one."""
    content = read_description(folder)
    if not content:
        return EmbedderSettings()
    if content.get("kind") == "reranker":
        raise CheckpointError(f"{folder} holds a reranker, not an embedder.")
    return EmbedderSettings.from_dict(content["settings"])


def load_temperature(folder: Path, weight: str | None = None) -> float | None:
    """The temperature that the embedder in a folder was trained with; ``None`` where that is not known.

    weight: name of the one that holds it, in a folder of others.  Raises CheckpointError if that is no single number.
    """
    value = read_description(folder).get("temperature")
    if value is None and weight is not None:
        found = [tensor for name, tensor in saved_tensors(folder, (weight,)) if name == weight]
        if found and found[0].numel() != 1:
            raise CheckpointError(
                f"The weight {weight!r} of {folder} is to be a temperature, one number; it has the shape "
                f"{list(found[0].shape)}. Is it another model? Then leave the preset out."
            )
        value = found[0].item() if found else None
    return None if value is None else float(value)


def load_reranker_settings(folder: Path) -> RerankerSettings:
    """The settings of a reranker's folder. Raises CheckpointError when it holds something else."""
    content = read_description(folder)
    if content.get("kind") != "reranker":
        raise CheckpointError(
            f"{folder} holds no reranker but {content.get('kind') or 'another kind of model'}: train one with the "
            "stage rerank of a recipe, or name the folder of another."
        )
    return RerankerSettings.from_dict(content["settings"])


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    processor: VTCProcessor,
    settings: EmbedderSettings,
    *,
    dtype: torch.dtype | None = None,
    manifest: Mapping[str, Any] | None = None,
    language_head: bool = False,
    adapter: bool = False,
    temperature: float | None = None,
) -> Path:
    """Writes an embedder's folder under a temporary name and renames it; an older checkpoint there is replaced.

    model: of one of the families; a language head, if it has one, is left out unless ``language_head`` is set.
    dtype: of the saved weights; ``None`` keeps that of the model.  manifest: how the model was made.
    adapter: saves the LoRA adapter that the model has beside the weights that it was trained on.
    temperature: that it was trained with; changes no embedding, but another stage may begin with it.
    Raises CheckpointError when the folder exists and is not a model's, or the model lacks the head or the adapter, or
        has an adapter that is neither merged nor to be saved, or its tokenizer lacks markers that its prompts need.
    """
    backbone: Any = model.base_model
    if language_head and backbone is model:
        raise CheckpointError("The model has no language head to save: load it with language_head=True.")
    check_markers(processor.tokenizer, settings)
    mean = settings.pooling is PoolingMode.MEAN
    with _draft(Path(folder)) as draft:
        processor.image_processor.set_limits(settings.max_tiles, settings.max_pixels)
        backbone_of(backbone.config).configure(backbone.config, settings)
        processor.chat_template = chat_template(
            image=processor.picture,
            defaults=settings.instructions,
            system=settings.system_prompt,
            style=settings.prompt_style,
            marked=settings.marked,
        )
        kept = model if language_head else backbone
        markers = processor.tokenizer.convert_tokens_to_ids([INSTRUCTION_START, INSTRUCTION_END]) if mean else None
        with _saying(backbone.config, causal=settings.attention is Attention.CAUSAL, masked=markers):
            _save_weights(draft, kept, processor, dtype=dtype, adapter=ADAPTER if adapter else None)
        if settings.pool_frame or not mean:  # no stock module leaves the frame out of a mean
            dimension = backbone.config.text_config.hidden_size
            _write_sentence_transformers_files(draft, dimension, "mean" if mean else "lasttoken", adapter)
        templates: dict[str, str] = {
            role: Prompt(
                role=role,
                instruction="{instruction}",
                num_images=1,
                text="{text}",
                system=settings.system_prompt,
                style=settings.prompt_style,
                marked=settings.marked,
            ).render()
            for role in LABELS
        }
        description = _describe("embedder", draft, backbone.config, settings, templates, manifest)
        description |= {"language_head": language_head, "adapter": ADAPTER if adapter else None}
        if temperature is not None:
            description["temperature"] = temperature
        _write_json(draft / SETTINGS_FILE, description)
    return Path(folder)


def save_reranker(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    processor: VTCProcessor,
    settings: RerankerSettings,
    *,
    dtype: torch.dtype | None = None,
    manifest: Mapping[str, Any] | None = None,
    adapter: bool = False,
) -> Path:
    """Writes a reranker's folder, which ``CrossEncoder(folder)`` opens, as :func:`save_checkpoint` does an embedder's.

    model: with a language head.  The other arguments and errors are as there.
    Raises CheckpointError also when the tokenizer spells an answer in several tokens.
    """
    if model.base_model is model:
        raise CheckpointError("The model has no language head, with which a reranker answers.")
    answers = AnswerTokens.of(processor.tokenizer, folder)
    with _draft(Path(folder)) as draft:
        processor.image_processor.set_limits(settings.max_tiles, settings.max_pixels)
        backbone_of(model.config).configure(model.config, settings)
        template = rerank_chat_template(
            image=processor.picture, instructions=settings.instructions, system=settings.system_prompt
        )
        processor.chat_template = template
        with _saying(model.config, causal=True, masked=None):
            _save_weights(draft, model, processor, dtype=dtype, adapter=RERANKER_ADAPTER if adapter else None)
        _write_cross_encoder_files(draft, answers, adapter)
        parts = (RerankPart(num_images=1, text="{text}"),)
        query = RerankPart(instruction="{instruction}", num_images=1, text="{text}")
        templates = {
            name: RerankPrompt(
                query=query, candidates=parts * many, listwise=many > 1, system=settings.system_prompt
            ).render()
            for name, many in {"pointwise": 1, "listwise": 2}.items()
        }
        description = _describe("reranker", draft, model.config, settings, templates, manifest)
        _write_json(draft / SETTINGS_FILE, description | {"adapter": RERANKER_ADAPTER if adapter else None})
    return Path(folder)


def save_fusion_weights(folder: Path, weights: Mapping[str, float], found: Mapping[str, Any]) -> RerankerSettings:
    """Puts the weights of tasks among the settings of a reranker's folder, over older ones of the same tasks.

    weights: as in :class:`RerankerSettings`.  found: how they were; kept beside them as ``fusion``.
    ``quarterlight.json`` is written under a temporary name and renamed.  Returns the new settings.
    Raises CheckpointError when the folder holds no reranker, or a weight is impossible.
    """
    settings = load_reranker_settings(folder)
    values = settings.to_dict() | {"fusion_weights": {**settings.fusion_weights, **weights}}
    new = RerankerSettings.from_dict(values)
    with replacing(folder / SETTINGS_FILE) as draft:
        _write_json(draft, read_description(folder) | {"settings": new.to_dict(), "fusion": dict(found)})
    return new


def _say(config: Any, *, causal: bool, masked: list[int] | None) -> None:
    """Writes into the configuration of a backbone what its tokens see, and which of them a mean leaves out."""
    for one in (config, config.text_config):  # vLLM reads the first, transformers the second
        one.is_causal = causal
    setattr(config, MASKED_INSTRUCTION, masked)


@contextmanager
def _saying(config: Any, *, causal: bool, masked: list[int] | None) -> Iterator[None]:
    """The same for a while: a model in memory is told with every call, and may be saved as several things."""
    # as they are, not as getattr fills them in: transformers takes an is_causal of None for False
    before = [(one, dict(vars(one))) for one in (config, config.text_config)]
    _say(config, causal=causal, masked=masked)
    try:
        yield
    finally:
        for one, values in before:
            for name in ("is_causal", MASKED_INSTRUCTION):
                if name in values:
                    setattr(one, name, values[name])
                elif name in vars(one):
                    delattr(one, name)


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A folder to write into, which then takes the place of ``target``."""
    if target.exists() and any(target.iterdir()) and not (target / SETTINGS_FILE).is_file():
        raise CheckpointError(f"{target} holds something else than a model: choose another folder to save to.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch, _quietly():
        draft = Path(scratch) / "draft"
        yield draft
        if target.exists():
            shutil.rmtree(target)
        draft.replace(target)


def _save_weights(
    draft: Path,
    model: Any,
    processor: VTCProcessor,
    *,
    dtype: torch.dtype | None,
    adapter: str | None,
) -> None:
    """Weights, configuration, tokenizer and processor. adapter: folder for the one that the model has."""
    backbone = model.base_model
    if quantization_of(model) is not None:
        raise CheckpointError("The weights of the model are quantised: save it without, and quantise it when loading.")
    if adapter and not has_adapter(backbone):
        raise CheckpointError("The model has no LoRA adapter to save: add one with add_lora, and do not merge it.")
    if has_adapter(backbone) and not adapter:
        raise CheckpointError("The model has a LoRA adapter inside: call merge_lora first, or save with adapter=True.")
    processor.agree_with(backbone.config)
    _shell(model).save_pretrained(draft, state_dict=_cast(weights_without_adapter(model), dtype))
    if dtype:
        _edit_json(draft / "config.json", dtype=str(dtype).removeprefix("torch."))
    if adapter:
        backbone.save_pretrained(draft / adapter, state_dict=_cast(backbone.state_dict(), dtype))
        # where the base lay when it was loaded is of no use elsewhere
        _edit_json(draft / adapter / "adapter_config.json", base_model_name_or_path=None, inference_mode=True)
        if model is not backbone and adapter == RERANKER_ADAPTER:
            _name_for_head(draft / adapter)
    processor.save_pretrained(draft)


def _name_for_head(folder: Path) -> None:
    """Names the layers of an adapter as they are called in a model with a language head, where others put it."""
    file = folder / "adapter_config.json"
    targets = json.loads(file.read_text(encoding="utf-8"))["target_modules"]
    if isinstance(targets, str):  # a pattern of whole names; a list is of last names
        _edit_json(file, target_modules=rf"(model\.)?{targets}")
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(PEFT_PREFIX, f"{PEFT_PREFIX}model.", 1): one.clone() for name, one in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _shell(model: Any) -> Any:
    """The model itself or, since transformers saves nothing but the adapter of one that has an adapter, one without."""
    if not has_adapter(model):
        return model
    with torch.device("meta"):
        shell = type(model)(model.config).to(model.dtype)  # which goes into config.json
    if model.can_generate():
        shell.generation_config = model.generation_config
    return shell


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights in a dtype; what was one tensor under two names still is, so that it is saved once."""
    if dtype is None:
        return dict(weights)
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for weight in weights.values():
        copies.setdefault((weight.data_ptr(), weight.shape), weight.to(dtype))
    return {name: copies[weight.data_ptr(), weight.shape] for name, weight in weights.items()}


def _describe(
    kind: str,
    draft: Path,
    config: Any,
    settings: EmbedderSettings | RerankerSettings,
    templates: Mapping[str, str],
    manifest: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """templates: for people; prompts.py is what is obeyed."""
    return {
        "format": FORMAT,
        "kind": kind,
        "dimension": config.text_config.hidden_size,
        "visual_token_compression": config.visual_token_compression,
        **what_merges(config),
        "tokens_per_tile": _whole(backbone_of(config).tokens_per_tile(config)),
        "settings": settings.to_dict(),
        "templates": dict(templates),
        "weights_hash": weights_hash(saved_tensors(draft)),
        "manifest": dict(manifest or {}),
    }


def _whole(number: float) -> float:
    """The number, without a point if it needs none."""
    return int(number) if number == int(number) else number


def _write_sentence_transformers_files(folder: Path, dimension: int, pooling: str, adapter: bool) -> None:
    """What makes ``SentenceTransformer(folder)`` assemble the same embedder from its stock modules.

    pooling: as they call it.
    """
    modules = {
        "": "sentence_transformers.base.modules.transformer.Transformer",
        "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "2_Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    }
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    _write_modules(folder, modules)
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": forward,
                "image": forward,
                "message": {**forward, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
            **({"model_kwargs": {"adapter_kwargs": {"subfolder": ADAPTER}}} if adapter else {}),
        },
    )
    _write_json(folder / "1_Pooling/config.json", {"embedding_dimension": dimension, "pooling_mode": pooling})
    _write_json(folder / "2_Normalize/config.json", {})
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {role: f"{role}:" for role in LABELS},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _write_modules(folder: Path, modules: Mapping[str, str]) -> None:
    """modules: folder of each module's settings -> its class, in the order in which they are called."""
    rows = [
        {"idx": index, "name": str(index), "path": path, "type": kind}
        for index, (path, kind) in enumerate(modules.items())
    ]
    _write_json(folder / "modules.json", rows)


def _write_cross_encoder_files(folder: Path, answers: AnswerTokens, adapter: bool) -> None:
    """What makes ``CrossEncoder(folder)`` assemble the same reranker from its stock modules."""
    modules = {
        "": "sentence_transformers.base.modules.transformer.Transformer",
        "1_LogitScore": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
    }
    forward = {"method": "forward", "method_output_name": "logits"}
    _write_modules(folder, modules)
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "any-to-any",
            "modality_config": {
                "text": forward,
                "image": forward,
                "message": {**forward, "format": "structured"},
            },
            "module_output_name": "causal_logits",
            **({"model_kwargs": {"adapter_kwargs": {"subfolder": RERANKER_ADAPTER}}} if adapter else {}),
        },
    )
    _write_json(folder / "1_LogitScore/config.json", {"true_token_id": answers.yes, "false_token_id": answers.no})
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "prompts": {},
            "default_prompt_name": None,
            "activation_fn": "torch.nn.modules.activation.Sigmoid",
        },
    )


def saved_adapter(folder: Path, name: str = ADAPTER) -> dict[str, Any]:
    """What a folder says of its kept adapter, such as rank and alpha; empty if it has none."""
    file = folder / name / "adapter_config.json"
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    content.pop("peft_version")
    return content


def folder_hash(folder: Path) -> str:
    """SHA-256, in hex, of all in a folder that a model is made of: weights, adapters, settings, temperature, tokenizer,
    and how pictures are prepared.  How it was made is left out.  Reads all weights."""
    description = read_description(folder)
    recipe = {
        "weights": weights_hash(saved_tensors(folder)),
        "adapters": [saved_adapter(folder, name) for name in (ADAPTER, RERANKER_ADAPTER)],
        "says": {name: description.get(name) for name in ("kind", "settings", "temperature")},
        "files": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in _READ_WITH_WEIGHTS
            if (folder / name).is_file()
        },
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def saved_tensors(folder: Path, only: Sequence[str] = ("",)) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of a folder, a kept adapter's included, in the order of their names.

    only: parts, one of which a name must have.  Raises CheckpointError if the folder has no weights.
    """
    shards = weight_files(folder)
    for name in (ADAPTER, RERANKER_ADAPTER):
        shards += sorted((folder / name).glob("adapter_model.safetensors"))
    with ExitStack() as stack:
        owners: dict[str, Any] = {}
        for shard in shards:
            tensors = stack.enter_context(safe_open(shard, framework="pt"))
            owners.update(dict.fromkeys(tensors.keys(), tensors))
        for name in sorted(owners):
            if any(part in name for part in only):
                yield name, owners[name].get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's weights, or those that its index names, in the order in which they are read.

    Of weights that are in two files, those of the later one count.  Raises CheckpointError if there are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of weights: {error}") from error
        shards = [folder / name for name in sorted(names)]
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} has no weights in safetensors files.")
    return shards


def vision_hash(folder: Path | None, model: Any, processor: VTCProcessor) -> str:
    """SHA-256, in hex, of all that changes a visual token: vision tower, connector, s, and how pictures become tiles.

    folder: of the saved weights; ``None`` takes those of the model in memory, whose dtype then counts.
    """
    config = model.config
    backbone = backbone_of(config)
    parts = [f"{name}." for name in backbone.eyes]
    weights = saved_tensors(folder, parts) if folder else named_tensors(model.base_model)
    eyes = {"".join(name.partition(part)[1:]): one for name, one in weights for part in parts if part in name}
    recipe = {
        "weights": weights_hash(sorted(eyes.items())),
        "image_processor": backbone.picture_settings(processor.image_processor),
        "connector": {name: getattr(config, name, None) for name in backbone.connector_settings},
        "vision_config": {name: getattr(config.vision_config, name, None) for name in backbone.tower_settings},
        **what_merges(config),
    }
    if (quantization := quantization_of(model)) is not None:
        recipe["quantization"] = quantization
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


def what_merges(config: Any) -> dict[str, float]:
    """For hashes: the share of patches that are merged in the vision tower, where there is one, so that the hash of a
    model that merges none stays what it was."""
    share = getattr(config, MERGING, 0)
    return {MERGING: float(share)} if share else {}


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hex, of the names, dtypes, shapes and bytes of tensors; independent of files and metadata."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars of transformers: loading takes a moment, and a library does not print."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _edit_json(file: Path, **values: Any) -> None:
    _write_json(file, json.loads(file.read_text(encoding="utf-8")) | values)
