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

What sentence-transformers cannot do for us: it does not cut texts at ``text_max_tokens``; ``max_tiles`` is an argument
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
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_peft_available

from quarterlight.errors import CheckpointError
from quarterlight.models.adapter import has_adapter, merge_lora, weights_without_adapter
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCForConditionalGeneration, InternVLVTCModel
from quarterlight.models.internvl_vtc.processing import InternVLVTCProcessor
from quarterlight.models.pooling import Attention, PoolingMode
from quarterlight.models.rerank_inputs import AnswerTokens
from quarterlight.models.settings import EmbedderSettings, RerankerSettings
from quarterlight.prompts import LABELS, Prompt, RerankPart, RerankPrompt, chat_template, rerank_chat_template

SETTINGS_FILE = "quarterlight.json"
ADAPTER = "embedder"
"""Folder, in that of a model, of the adapter that makes an embedder of it."""

RERANKER = "reranker"
"""Folder, in that of an embedder, of the reranker that shares its vision tower and connector."""

RERANKER_ADAPTER = "adapter"
"""Folder, in that of a reranker, of the adapter that makes a reranker of the weights."""

VISION = ("vision_tower.", "multi_modal_projector.")
"""How the names of weights begin, after the name of the model, that are the eyes of embedder and reranker."""

_CONNECTOR = (
    "visual_token_compression",
    "downsample_ratio",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)
_TOWER = ("num_attention_heads", "hidden_act", "layer_norm_eps", "norm_type", "use_qk_norm", "image_size", "patch_size")
"""Settings that change visual tokens and are not seen in the shapes of weights."""

PEFT_PREFIX = "base_model.model."
"""Of the names in adapter files, for those who wrap a model rather than change it."""

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


def load_config(folder: Path, visual_token_compression: int | None = None) -> InternVLVTCConfig:
    """The configuration of an InternVL or InternVL3-VTC folder, with s replaced if one is given.

    Raises CheckpointError for another kind of model or an impossible s.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable config.json: {error}") from error
    if not isinstance(config, InternVLConfig):
        raise CheckpointError(f"{folder} holds a {config.model_type!r} model: expected an InternVL in its -hf form.")
    values = config.to_dict()
    values.pop("model_type")
    if visual_token_compression is not None:
        values["visual_token_compression"] = visual_token_compression
    try:
        return InternVLVTCConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error


def load_backbone(
    folder: str | os.PathLike[str],
    *,
    visual_token_compression: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    language_head: bool = False,
    merge: bool = True,
) -> tuple[Any, InternVLVTCProcessor]:
    """Model (in ``eval`` mode) and processor of a folder, which agree on the tokens of a tile.

    Plain ``InternVL3-*-hf`` folders load as well as our own, since compression has no weights.
    visual_token_compression: replaces the saved s.
    language_head: adds the head that writes words.  It belongs to the weights without a kept adapter of an embedder,
        so that one is left out; without a head, and in a reranker, it is merged.
    merge: ``False`` leaves every adapter out.
    Raises CheckpointError when the folder is of another kind, or lacks weights that the model needs.
    """
    folder = resolve_checkpoint(folder)
    config = load_config(folder, visual_token_compression)
    kind: Any = InternVLVTCForConditionalGeneration if language_head else InternVLVTCModel
    with _quietly():
        try:
            model, report = kind.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
            missing = {*report["missing_keys"]}
            description = read_description(folder)  # also where its adapter was lost
            if merge and description.get("adapter") and (not language_head or description["kind"] == "reranker"):
                missing |= load_adapter(model.base_model, folder / description["adapter"])
                merge_lora(model)
            processor = InternVLVTCProcessor.from_pretrained(folder)
            processor.agree_with(config)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of the model's weights, {min(missing)} among them.")
    return model.to(device).eval(), processor


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
        raise CheckpointError(f"{folder} holds an adapter, which needs peft: pip install 'quarterlight[train]'.")
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


def load_temperature(folder: Path) -> float | None:
    """The temperature that the embedder in a folder was trained with; ``None`` where that is not known."""
    value = read_description(folder).get("temperature")
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
    processor: InternVLVTCProcessor,
    settings: EmbedderSettings,
    *,
    dtype: torch.dtype | None = None,
    manifest: Mapping[str, Any] | None = None,
    language_head: bool = False,
    adapter: bool = False,
    temperature: float | None = None,
) -> Path:
    """Writes an embedder's folder under a temporary name and renames it; an older checkpoint there is replaced.

    model: an ``InternVLVTCModel``, or one with a language head, which is left out unless ``language_head`` is set.
    dtype: of the saved weights; ``None`` keeps that of the model.  manifest: how the model was made.
    adapter: saves the LoRA adapter that the model has beside the weights that it was trained on.
    temperature: that it was trained with; changes no embedding, but another stage may begin with it.
    Raises CheckpointError when the folder exists and is not a model's, or the model lacks the head or the adapter, or
        has an adapter that is neither merged nor to be saved.
    """
    backbone: Any = model.base_model
    if language_head and backbone is model:
        raise CheckpointError("The model has no language head to save: load it with language_head=True.")
    causal = settings.attention is Attention.CAUSAL
    with _draft(Path(folder)) as draft:
        processor.image_processor.max_patches = settings.max_tiles
        processor.chat_template = chat_template(
            image=processor.image_token, defaults=settings.instructions, system=settings.system_prompt
        )
        kept = model if language_head else backbone
        _save_weights(draft, kept, processor, dtype=dtype, adapter=ADAPTER if adapter else None, causal=causal)
        if settings.pooling is PoolingMode.LAST_TOKEN:  # no stock module leaves an instruction out of a mean
            _write_sentence_transformers_files(draft, backbone.config.text_config.hidden_size, adapter)
        templates: dict[str, str] = {
            role: Prompt(
                role=role, instruction="{instruction}", num_images=1, text="{text}", system=settings.system_prompt
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
    processor: InternVLVTCProcessor,
    settings: RerankerSettings,
    *,
    dtype: torch.dtype | None = None,
    manifest: Mapping[str, Any] | None = None,
    adapter: bool = False,
) -> Path:
    """Writes a reranker's folder, which ``CrossEncoder(folder)`` opens, as :func:`save_checkpoint` does an embedder's.

    model: an ``InternVLVTCForConditionalGeneration``.  The other arguments and errors are as there.
    Raises CheckpointError also when the tokenizer spells an answer in several tokens.
    """
    if model.base_model is model:
        raise CheckpointError("The model has no language head, with which a reranker answers.")
    answers = AnswerTokens.of(processor.tokenizer, folder)
    with _draft(Path(folder)) as draft:
        processor.image_processor.max_patches = settings.max_tiles
        template = rerank_chat_template(
            image=processor.image_token, instructions=settings.instructions, system=settings.system_prompt
        )
        processor.chat_template = template
        _save_weights(draft, model, processor, dtype=dtype, adapter=RERANKER_ADAPTER if adapter else None, causal=True)
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
    draft = folder / f"{SETTINGS_FILE}.draft"
    _write_json(draft, read_description(folder) | {"settings": new.to_dict(), "fusion": dict(found)})
    draft.replace(folder / SETTINGS_FILE)
    return new


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
    processor: InternVLVTCProcessor,
    *,
    dtype: torch.dtype | None,
    adapter: str | None,
    causal: bool,
) -> None:
    """Weights, configuration, tokenizer and processor. adapter: folder for the one that the model has."""
    backbone = model.base_model
    if adapter and not has_adapter(backbone):
        raise CheckpointError("The model has no LoRA adapter to save: add one with add_lora, and do not merge it.")
    if has_adapter(backbone) and not adapter:
        raise CheckpointError("The model has a LoRA adapter inside: call merge_lora first, or save with adapter=True.")
    for config in (backbone.config, backbone.config.text_config):  # vLLM reads the first, transformers the second
        config.is_causal = causal
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
        "tokens_per_tile": config.image_seq_length,
        "settings": settings.to_dict(),
        "templates": dict(templates),
        "weights_hash": weights_hash(saved_tensors(draft)),
        "manifest": dict(manifest or {}),
    }


def _write_sentence_transformers_files(folder: Path, dimension: int, adapter: bool) -> None:
    """What makes ``SentenceTransformer(folder)`` assemble the same embedder from its stock modules."""
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
    _write_json(folder / "1_Pooling/config.json", {"embedding_dimension": dimension, "pooling_mode": "lasttoken"})
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


def vision_hash(folder: Path | None, model: Any, processor: InternVLVTCProcessor) -> str:
    """SHA-256, in hex, of all that changes a visual token: vision tower, connector, s, and how pictures become tiles.

    folder: of the saved weights; ``None`` takes those of the model in memory, whose dtype then counts.
    """
    weights = saved_tensors(folder, VISION) if folder else sorted(model.base_model.state_dict().items())
    eyes = {"".join(name.partition(part)[1:]): one for name, one in weights for part in VISION if part in name}
    image_processor = processor.image_processor.to_dict()
    image_processor.pop("max_patches")  # of the model; an item says its own
    config = model.config
    recipe = {
        "weights": weights_hash(sorted(eyes.items())),
        "image_processor": image_processor,
        "connector": {name: getattr(config, name, None) for name in _CONNECTOR},
        "vision_config": {name: getattr(config.vision_config, name, None) for name in _TOWER},
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


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
