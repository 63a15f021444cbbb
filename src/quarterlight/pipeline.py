"""Runs the stages of a recipe in order, each into its own folder; finished stages are not run again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import InternVLVisionConfig, Qwen2Config

from quarterlight.data.contrastive import TaskMixture
from quarterlight.data.conversations import Conversations, from_task, load_conversations
from quarterlight.data.distill import ScoredList
from quarterlight.data.pools import with_foreign
from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask, with_instructions, with_negatives
from quarterlight.errors import DatasetError, RecipeError, did_you_mean
from quarterlight.manifest import environment
from quarterlight.mining.judge import judge, read_judged
from quarterlight.mining.negatives import MineRecipe, mine, read_mined
from quarterlight.mining.teaching import read_taught, teach
from quarterlight.models.backbones import backbone_of
from quarterlight.models.checkpoint import (
    folder_hash,
    load_backbone,
    load_config,
    load_processor,
    load_settings,
    load_temperature,
    read_description,
    resolve_checkpoint,
    save_checkpoint,
    save_reranker,
    saved_tensors,
)
from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCModel
from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor, InternVLVTCProcessor
from quarterlight.models.merging import MERGING
from quarterlight.models.pair import same_eyes, save_pair
from quarterlight.models.presets import Preset, preset_of
from quarterlight.models.processor import VTCProcessor
from quarterlight.models.reranker import Reranker, reranker_folder
from quarterlight.models.settings import MAX_PIXELS, TEXT_MAX_TOKENS, EmbedderSettings, RerankerSettings
from quarterlight.models.tokenizer import train_tokenizer, with_markers
from quarterlight.prompts import QUERY_INSTRUCTIONS, TARGET_INSTRUCTIONS
from quarterlight.recipe import (
    NO_HEAD,
    NO_HEAD_SAVED,
    DistillStage,
    EmbedStage,
    Recipe,
    SourceRecipe,
    TaskRecipe,
    check_heeded,
)
from quarterlight.records import Item
from quarterlight.training.augment import AugmentRecipe
from quarterlight.training.averaging import average
from quarterlight.training.collate import Pictures, PromptEncoder
from quarterlight.training.contrast import train_contrastive
from quarterlight.training.distill import train_distill
from quarterlight.training.distributed import processes
from quarterlight.training.embedder import EmbedRecipe
from quarterlight.training.eyes import FrozenEyes, VisualTokens
from quarterlight.training.lora import add_lora, merge_lora
from quarterlight.training.prompt_embedder import PromptEmbedder
from quarterlight.training.report import write_report
from quarterlight.training.rerank import train_rerank
from quarterlight.training.restore import train_restore
from quarterlight.training.teacher import Teacher, TeacherEncoder
from quarterlight.training.tower import imitate, structure_attention

MANIFEST = "manifest.json"

_WITHOUT_EFFECT = {
    "optimizer": {"save_every", "log_every", "num_workers", "gradient_checkpointing"},
    "loss": {
        "eval_every",
        "eval_queries",
        "eval_conversations",
        "max_unreadable",
        "chunk_tokens",
        "visual_tokens_bytes",
    },
    "mine": {"max_unreadable"},
    "retrieve": {"max_unreadable"},
    "teach": {"max_unreadable"},
    "judge": {"url", "concurrency", "timeout_s", "retries", "tokens_per_batch", "max_failed"},
}
"""Stage, or section of any stage -> settings that change how it is run, but, beyond rounding, not what comes of it."""


def run(
    recipe: Recipe,
    data: Path,
    folder: Path,
    *,
    first: str | None = None,
    last: str | None = None,
    report: Callable[[str], None],
) -> Path:
    """Runs every stage from ``first`` to ``last`` that is not finished; returns the folder of the last.

    data: the directory of the datasets that the recipe names.  report: called with a line before and after each stage.
    first: stages before it are taken as they are, also if this recipe would make them otherwise.
    Raises RecipeError for an unknown stage, DatasetError for data that is missing or broken.
    """
    chosen = _between(recipe.stages, first, last)
    if processes().num_processes != recipe.devices:
        raise RecipeError(
            f"The recipe is meant for {recipe.devices} devices, but {processes().num_processes} processes run it: say "
            f"--set devices={processes().num_processes} if batches may be of another size, or start another number."
        )
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = _Pipeline(recipe, data, folder)
    for stage in chosen:
        pipeline.inputs(stage)  # what is missing is missed before anything runs
    if "rerank" in chosen:
        pipeline.check_head()
    if not processes().is_main_process:
        report = _silent
    for stage in recipe.stages[: recipe.stages.index(chosen[0])]:
        if not pipeline.manifest(stage):
            raise RecipeError(f"{chosen[0]} needs the stage {stage}, which is not finished in {folder}: run it first.")
        report(f"{stage}: taken as it is")
    for stage in chosen:
        if pipeline.finished(stage):
            report(f"{stage}: finished before")
            continue
        report(f"{stage}: running")
        try:
            if processes().is_main_process:
                write_report(folder, [folder / one for one in recipe.stages])
            seconds = pipeline.run(stage)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise RecipeError(
                f"The stage {stage} cannot go on: {reason} ({getattr(error, 'filename', None) or folder}). What was "
                "saved is kept; mend it and start the same command again."
            ) from error
        report(f"{stage}: finished in {seconds / 60:.1f} minutes")
    if processes().is_main_process:
        write_report(folder, [folder / one for one in recipe.stages])
    return folder / chosen[-1]


def _between(stages: Sequence[str], first: str | None, last: str | None) -> Sequence[str]:
    for stage in (first, last):
        if stage is not None and stage not in stages:
            raise RecipeError(f"The recipe has no stage {stage!r}. {did_you_mean(stage, stages)}")
    start = stages.index(first) if first else 0
    stop = stages.index(last) + 1 if last else len(stages)
    if start >= stop:
        raise RecipeError(f"The stage {first} comes after {last}, so there is nothing to run.")
    return stages[start:stop]


def _silent(_: str) -> None:
    """What processes other than the first report."""


SAID = ("pooling", "attention", "prompt_style", "positions", "max_pixels", "text_max_tokens", "system_prompt")
"""Keys of ``model`` that replace the checkpoint's settings of the same names where they are given."""

_UNSAID = {"text_max_tokens": TEXT_MAX_TOKENS, "system_prompt": ""}
"""What fingerprints have for settings that a recipe leaves to the checkpoint, whose own are in the checkpoint's hash:
runs keep the fingerprints that they had when these were the defaults."""

_Loss = TypeVar("_Loss", bound=EmbedRecipe)


class _Pipeline:
    """The stages as methods of their names; each leaves its folder under its final name only when it is whole.

    Under a launcher every process runs every stage, and the first one writes.
    """

    def __init__(self, recipe: Recipe, data: Path, folder: Path) -> None:
        self.recipe = recipe
        self.data = data
        self.folder = folder
        self.state = processes()
        self._tasks: dict[tuple[Any, ...], RetrievalTask] = {}
        self._hashes: dict[tuple[Path, str], str] = {}

    def manifest(self, stage: str) -> dict[str, Any]:
        """What a stage that is finished says of itself; empty if it is not."""
        file = self.folder / stage / MANIFEST
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def finished(self, stage: str) -> bool:
        """Whether a stage's folder was written from the same inputs and settings."""
        return self.manifest(stage).get("fingerprint") == self.fingerprint(stage)

    def fingerprint(self, stage: str) -> str:
        """SHA-256, in hex, of all that decides the result of a stage: its settings, its data, and the stages it reads.

        What does not change it (how often to save, log and validate, how many workers) is left out.  A stage that is
        read counts as what lies in its folder, or as what this recipe would put there.
        """
        model = asdict(self.recipe.model)
        if model["preset"] is None:
            del model["preset"]
        if model[MERGING] is None or self._merges_nothing():
            del model[MERGING]
        for name, value in _UNSAID.items():
            model[name] = value if model[name] is None else model[name]
        settings: dict[str, Any] = {"seed": self.recipe.seed, "model": model}
        if stage != "start":
            one = settings[stage] = asdict(getattr(self.recipe, stage))
            for section, keys in _WITHOUT_EFFECT.items():
                where = one if section == stage else one.get(section, {})
                for key in keys & where.keys():
                    if (stage, key) != ("rerank", "eval_queries"):  # they are held out of the training queries
                        del where[key]
            if stage == "rerank" and one["checkpoint"] is None:
                del one["checkpoint"]
            if stage == "distill" and one["loss"]["instructions"] == "first":
                del one["loss"]["instructions"]
            if stage == "teach" and self.recipe.teach and self.recipe.teach.ranks == self.recipe.teach.depth:
                del one["search_depth"]
            if not one.get("initial_weight", True):
                del one["initial_weight"]
            if one.get("loss", {}).get("max_pixels", 0) is None:
                del one["loss"]["max_pixels"]
                if stage == "restore":
                    one["loss"]["max_pixels"] = MAX_PIXELS
            augment = self._augment(stage)
            settings |= {"augment": augment and asdict(augment), "devices": self.recipe.devices}
        if stage != "restore":
            settings["mixture"] = [asdict(task) for task in self.recipe.tasks(stage)]
        before = {one: self.manifest(one).get("fingerprint") or self.fingerprint(one) for one in self._reads(stage)}
        return hashlib.sha256(json.dumps([settings, before, self.inputs(stage)], sort_keys=True).encode()).hexdigest()

    def _merges_nothing(self) -> bool:
        """Whether the recipe asks for no merging, and the checkpoints that it begins with have none anyway."""
        if self.recipe.model.vision_token_merging != 0:
            return False
        begun = (self.recipe.model.checkpoint, self.recipe.rerank and self.recipe.rerank.checkpoint)
        return not any(getattr(load_config(resolve_checkpoint(one)), MERGING, 0) for one in begun if one)

    def _reads(self, stage: str) -> list[str]:
        """The stages whose folders a stage reads."""
        earlier = self.recipe.stages[: self.recipe.stages.index(stage)]
        wanted = {
            "start": [],
            "teacher": ["start"],
            "tower": ["start", "teacher"],
            "judge": ["retrieve"],
            "teach": ["rerank"] if self.recipe.teach and self.recipe.teach.reranker is None else [],
            "distill": ["teach"],
        }.get(stage, [])
        if stage == "rerank" and self.recipe.paired is not None:
            wanted = [self.recipe.paired]  # the embedder that it may share eyes with
        wanted = [*wanted, *self._found_by(stage)]
        contrast = self.recipe.contrast.get(stage)
        if contrast is not None and contrast.teacher_weight:
            wanted = [*wanted, "teacher"]
        if getattr(self.recipe.trained.get(stage), "fill_from_mined", False):
            wanted = [*wanted, "mine"]
        first = self.recipe.first_model(stage)
        if first is not None and stage not in ("teacher", "tower", "judge"):
            wanted = [*wanted, first]
        return [one for one in earlier if one in wanted]

    def _found_by(self, stage: str) -> list[str]:
        """The stage that found the hard negatives of a stage; none if those are what the datasets label."""
        known = {
            "hard_negatives": ("mine",),
            "finetune": ("judge", "retrieve"),
            "rerank": ("judge", "retrieve", "mine"),
            "continue_hard": ("teach",),
        }
        return [one for one in known.get(stage, ()) if one in self.recipe.stages][:1]

    def inputs(self, stage: str) -> dict[str, str]:
        """What a stage reads, besides other stages -> SHA-256, in hex; of datasets, the pictures are not in it."""
        if stage == "restore":
            assert self.recipe.restore is not None
            found = {one.label: self._file_hash(one) for one in self.recipe.restore.data}
        else:
            found = {one.label: self._task_hash(self.data, one.dataset, one.task) for one in self.recipe.tasks(stage)}
        if stage == "judge" and self.recipe.judge and self.recipe.judge.truth:
            truth = Path(self.recipe.judge.truth)
            tasks = self.recipe.tasks(stage)
            found |= {f"truth: {one.label}": self._task_hash(truth, one.dataset, one.task) for one in tasks}
        if self.recipe.model.checkpoint is not None and self.recipe.first_model(stage) is None:
            found[self.recipe.model.checkpoint] = self._checkpoint_hash
        if stage == "rerank" and self.recipe.rerank and self.recipe.rerank.checkpoint:
            found[self.recipe.rerank.checkpoint] = self._trunk_hash
        if stage == "teach" and self.recipe.teach and self.recipe.teach.reranker:
            found[self.recipe.teach.reranker] = self._teacher_hash
        return found

    @cached_property
    def _teacher_hash(self) -> str:
        assert self.recipe.teach is not None and self.recipe.teach.reranker is not None
        return folder_hash(reranker_folder(self.recipe.teach.reranker))

    @cached_property
    def _trunk_hash(self) -> str:
        assert self.recipe.rerank is not None and self.recipe.rerank.checkpoint is not None
        return folder_hash(resolve_checkpoint(self.recipe.rerank.checkpoint))

    @cached_property
    def _checkpoint_hash(self) -> str:
        assert self.recipe.model.checkpoint is not None
        folder = resolve_checkpoint(self.recipe.model.checkpoint)
        released = preset_of(self.recipe.model.checkpoint, folder, self.recipe.model.preset)
        content = [folder_hash(folder), *([asdict(released)] if released else [])]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_head(self) -> None:
        """Raises RecipeError when ``rerank`` would begin with an embedder that cannot write."""
        recipe = self.recipe
        assert recipe.rerank is not None
        checkpoint, first = recipe.model.checkpoint, recipe.first_model("rerank")
        if checkpoint is not None and first in recipe.contrast and not _is_tied(resolve_checkpoint(checkpoint)):
            raise RecipeError(NO_HEAD)
        if first is not None or not read_description(folder := self._before("rerank")):
            return
        if not _is_tied(folder) and next(saved_tensors(folder, ["lm_head."]), None) is None:
            raise RecipeError(NO_HEAD_SAVED.format(checkpoint=self._checkpoint("rerank")))

    def _file_hash(self, one: SourceRecipe) -> str:
        if one.file is None:
            return self._task_hash(self.data, str(one.dataset), str(one.task))
        path = self.data / one.file
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DatasetError(f"{path}, which restore.data names, cannot be read ({error.strerror}).") from error

    def _task_hash(self, data: Path, dataset: str, task: str) -> str:
        key = (data / dataset, task)
        if key not in self._hashes:
            self._hashes[key] = RetrievalDataset(data / dataset).fingerprint(task, "train")
        return self._hashes[key]

    def run(self, stage: str) -> float:
        """Runs a stage; returns the seconds it took since it was last started."""
        started = time.monotonic()
        random.seed(self.recipe.seed)
        np.random.seed(self.recipe.seed)
        torch.manual_seed(self.recipe.seed)
        target, work = self.folder / stage, self.folder / f"{stage}.running"
        if target.exists() and not (target / MANIFEST).is_file():
            raise RecipeError(f"{target} was not made by training and is not overwritten: choose another --out.")
        fingerprint = self.fingerprint(stage)
        if self.state.is_main_process:
            self._open(work, fingerprint)
        self.state.wait_for_everyone()
        draft = work / "result"
        getattr(self, stage, self._contrast)(work, draft, *[stage] * (stage in self.recipe.contrast))
        self.state.wait_for_everyone()
        seconds = time.monotonic() - started
        if self.state.is_main_process:
            self._close(stage, work, draft, target, fingerprint, seconds)
        self.state.wait_for_everyone()
        return seconds

    def _open(self, work: Path, fingerprint: str) -> None:
        mark = work / "fingerprint"
        work.mkdir(parents=True, exist_ok=True)
        if not any(work.iterdir()):
            mark.write_text(fingerprint)
        elif not mark.is_file() or mark.read_text() != fingerprint:
            raise RecipeError(
                f"{work} holds half a run of another recipe or of other data: remove it, or choose another --out."
            )

    def _close(self, stage: str, work: Path, draft: Path, target: Path, fingerprint: str, seconds: float) -> None:
        """Adds logs, recipe and manifest, and gives the folder its name."""
        log = sorted(work.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
        if log:
            shutil.copy(log[-1], draft / "trainer_state.json")
        if (work / "tensorboard").is_dir():
            shutil.copytree(work / "tensorboard", draft / "tensorboard", dirs_exist_ok=True)
        if (work / "unreadable.txt").is_file():
            shutil.copy(work / "unreadable.txt", draft)
        (draft / "recipe.yaml").write_text(yaml.safe_dump(_plain(self.recipe), sort_keys=False), encoding="utf-8")
        manifest = {
            "stage": stage,
            "fingerprint": fingerprint,
            "reads": {one: self.manifest(one)["fingerprint"] for one in self._reads(stage)},
            "inputs_sha256": self.inputs(stage),
            "recipe": asdict(self.recipe),
            "processes": self.state.num_processes,
            "seconds": round(seconds),
            "environment": environment(),
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        # renamed before they are removed: a folder that is half gone must not be taken for another
        _remove(target)
        draft.replace(target)
        _remove(work)

    def start(self, work: Path, draft: Path) -> None:
        """Tokenizer, processor and random weights."""
        recipe = self.recipe.model
        assert recipe.vocab_size is not None
        texts = [text for task in self.mixture("start").tasks for text in _texts(task)]
        words = [*QUERY_INSTRUCTIONS.values(), *TARGET_INSTRUCTIONS.values()]
        tokenizer = train_tokenizer([*dict.fromkeys(texts), *words * 20], recipe.vocab_size)
        vision = InternVLVisionConfig(**recipe.vision)
        height, width = vision.image_size
        try:
            config = InternVLVTCConfig(
                vision_config=vision,
                text_config=Qwen2Config(**recipe.text, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
                image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
                visual_token_compression=recipe.visual_token_compression,
                vision_token_merging=recipe.vision_token_merging or 0.0,
            )
        except ValueError as error:
            raise RecipeError(f"There is no such model as the recipe's: {error}") from error
        processor = InternVLVTCProcessor(
            image_processor=InternVLVTCImageProcessor(size={"height": height, "width": width}),
            tokenizer=tokenizer,
            image_seq_length=config.image_seq_length,
        )
        model = InternVLVTCModel(config)
        if self._settings("start").marked:
            with_markers(model, tokenizer, seed=self.recipe.seed)
        if recipe.position_columns:
            structure_attention(model.vision_tower, position_columns=recipe.position_columns)
        self._save(draft, model, processor)

    def teacher(self, work: Path, draft: Path) -> None:
        """The convolutional teacher."""
        stage = self.recipe.teacher
        assert stage is not None
        teacher = Teacher(stage.network)
        train_contrastive(
            teacher,
            encode=TeacherEncoder(self._pictures("teacher", self._processor("start")), stage.network),
            mixture=self.mixture("teacher"),
            validation=self._validation("teacher") if stage.loss.eval_every else [],
            recipe=stage.loss,
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
        )
        if self.state.is_main_process:
            draft.mkdir(exist_ok=True)
            save_file(teacher.state_dict(), draft / "teacher.safetensors")

    def tower(self, work: Path, draft: Path) -> None:
        """The model whose tower has imitated the teacher."""
        stage = self.recipe.tower
        assert stage is not None
        model, processor = self._backbone("tower")
        imitate(
            model.vision_tower,
            self._teacher(),
            items=[Item(image=source, max_tiles=tiles) for source, tiles in self._distinct_pictures()],
            pictures=self._pictures("tower", processor),
            recipe=stage.imitation,
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
        )
        self._save(draft, model, processor)

    def restore(self, work: Path, draft: Path) -> None:
        """Stage 1: the trunk, with its language head."""
        stage = self.recipe.restore
        assert stage is not None
        model, processor = self._backbone("restore", language_head=True)
        settings = self._settings("restore")
        split = self.recipe.validation if stage.loss.eval_every else None
        train_restore(
            model,
            processor,
            sources=[self._source(one, "train") for one in stage.data],
            validation=[self._source(one, split) for one in stage.data if one.file is None] if split else [],
            weights=[one.weight for one in stage.data],
            positions=settings.positions,
            recipe=replace(stage.loss, max_pixels=stage.loss.max_pixels or settings.max_pixels),
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
        )
        self._save(draft, model, processor, language_head=True)

    def _contrast(self, work: Path, draft: Path, name: str) -> None:
        """The embedder of a contrastive stage."""
        stage = self.recipe.contrast[name]
        teacher = None
        if stage.teacher_weight:
            assert self.recipe.teacher is not None
            teacher = self._teacher()
        model, processor, embedder, encode = self._embedding(name, stage, guided=teacher is not None)
        trainer = train_contrastive(
            embedder,
            encode=encode,
            mixture=self.mixture(name),
            validation=self._validation(name) if stage.loss.eval_every else [],
            recipe=self._loss(name, stage.loss),
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
            teacher=teacher,
            teacher_weight=stage.teacher_weight,
        )
        self._save_embedder(name, stage, draft, model, processor, trainer.temperature)

    def distill(self, work: Path, draft: Path) -> None:
        """The embedder, taught by the reranker."""
        stage = self.recipe.distill
        assert stage is not None
        model, processor, embedder, encode = self._embedding("distill", stage)
        mixture, lists = self._taught()
        trainer = train_distill(
            embedder,
            encode=encode,
            mixture=mixture,
            lists=lists,
            validation=self._validation("distill") if stage.loss.eval_every else [],
            recipe=self._loss("distill", stage.loss),
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
        )
        self._save_embedder("distill", stage, draft, model, processor, trainer.temperature)

    def _embedding(
        self, name: str, stage: EmbedStage, *, guided: bool = False
    ) -> tuple[Any, VTCProcessor, PromptEmbedder, PromptEncoder]:
        """Backbone and processor of a stage that trains an embedder, the same as a model to train, and its inputs.

        guided: inputs for the convolutional teacher are made too.
        """
        # weights that do not change need no more precision than they are used with
        frozen = stage.lora is not None and stage.optimizer.autocasts
        model, processor = self._backbone(name, dtype=torch.bfloat16 if frozen else torch.float32)
        if stage.lora is not None:
            add_lora(model, stage.lora, seed=self.recipe.seed)
        elif stage.freeze_eyes:
            for part in backbone_of(model.config).parts(model):
                part.requires_grad_(False)
        settings = self._settings(name)
        settings = replace(settings, max_pixels=stage.loss.max_pixels or settings.max_pixels)
        pictures = self._pictures(name, processor, settings.max_pixels)
        teacher_encoder = None
        if guided:
            assert self.recipe.teacher is not None
            teacher_encoder = TeacherEncoder(pictures, self.recipe.teacher.network)
        eyes = None
        if (stage.lora is not None or stage.freeze_eyes) and self._augment(name) is None and not guided:
            # what the tower sees is kept, so the tiles need not be
            pictures = Pictures(processor.image_processor, max_pixels=settings.max_pixels, max_bytes=0)
            eyes = FrozenEyes(model, processor.image_processor, VisualTokens(stage.loss.visual_tokens_bytes))
        embedder = PromptEmbedder(
            model,
            shared_prefix=not stage.optimizer.gradient_checkpointing,
            pooling=settings.pooling,
            attention=settings.attention,
            eyes=eyes,
        )
        known = None if eyes is None else eyes.known
        encode = PromptEncoder(InputFormatter(processor, settings), pictures, teacher_encoder, known)
        return model, processor, embedder, encode

    def _loss(self, name: str, loss: _Loss) -> _Loss:
        """What a stage says of its loss, with the temperature of the model that it begins with if it inherits that."""
        if not loss.inherit_temperature:
            return loss
        released = self._released(name)
        before = load_temperature(self._before(name), released.temperature if released else None)
        if before is None:
            return loss
        return replace(loss, temperature=min(loss.max_temperature, max(loss.min_temperature, before)))

    def _save_embedder(
        self,
        name: str,
        stage: EmbedStage,
        draft: Path,
        model: Any,
        processor: VTCProcessor,
        temperature: float,
    ) -> None:
        keep = stage.lora is not None and stage.lora.keep
        if stage.lora is not None and not keep:
            merge_lora(model)
        if stage.initial_weight and self.state.is_main_process:
            initial, _ = self._backbone(name, dtype=model.dtype)
            average(model, initial, stage.initial_weight)
        last = name == self.recipe.embedders[-1] and self.recipe.stages[-1] in (name, "rerank")
        dtype = torch.bfloat16 if last else None
        self._save(draft, model, processor, dtype=dtype, adapter=keep, temperature=temperature)

    def rerank(self, work: Path, draft: Path) -> None:
        """The reranker; inside the folder of the embedder, if both look through the same vision tower."""
        stage = self.recipe.rerank
        assert stage is not None
        frozen = stage.lora is not None and stage.optimizer.autocasts
        model, processor = self._backbone(
            "rerank", dtype=torch.bfloat16 if frozen else torch.float32, language_head=True
        )
        if "flash" in self.recipe.model.attn_implementation:
            model.set_attn_implementation("sdpa")  # which knows masks: the candidates of a pair must not see each other
        if stage.lora is not None:
            add_lora(model, stage.lora, seed=self.recipe.seed)
        settings = RerankerSettings(
            max_tiles=self._settings("rerank").max_tiles,
            max_pixels=self._settings("rerank").max_pixels,
            positions=self._settings("rerank").positions,
            text_max_tokens=self._settings("rerank").text_max_tokens,
            system_prompt=self._settings("rerank").system_prompt,
            fusion_weight=stage.fusion_weight,
        )
        trainer = train_rerank(
            model,
            processor,
            settings=settings,
            mixture=self.mixture("rerank"),
            recipe=stage.loss,
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
        )
        if not self.state.is_main_process:
            return
        keep = stage.lora is not None and stage.lora.keep
        if stage.lora is not None and not keep:
            merge_lora(model)
        embedder = self._embedder()
        dtype: Any = torch.bfloat16 if embedder is None else load_config(embedder).dtype  # or they would not be equal
        alone = save_reranker(
            work / "reranker",
            model,
            processor,
            settings,
            dtype=dtype,
            manifest=self._origin("rerank"),
            adapter=keep,
        )
        if embedder is not None and same_eyes(embedder, alone):
            save_pair(draft, embedder, alone)
        else:
            _remove(draft)
            alone.replace(draft)
        (draft / "rows.json").write_text(json.dumps(asdict(trainer.sampler.counts), indent=2), encoding="utf-8")

    def _embedder(self) -> Path | None:
        """The embedder that a reranker may share its vision tower with: the last before it, or the checkpoint."""
        if self.recipe.paired is not None:
            return self.folder / self.recipe.paired
        if self.recipe.model.checkpoint is None:
            return None
        folder = resolve_checkpoint(self.recipe.model.checkpoint)
        return folder if read_description(folder).get("kind") == "embedder" else None

    def mine(self, work: Path, draft: Path) -> None:
        """Hard negatives out of all candidates of each task."""
        self._retrieve("mine", self.recipe.mine, work, draft)

    def retrieve(self, work: Path, draft: Path) -> None:
        """What the model of stage 2 finds first, for the judge."""
        self._retrieve("retrieve", self.recipe.retrieve, work, draft)

    def _retrieve(self, stage: str, recipe: MineRecipe | None, work: Path, draft: Path) -> None:
        assert recipe is not None
        embedder = self._finder(stage)
        tasks = self._distinct_tasks(stage)
        mine(embedder, tasks, draft, recipe, seed=self.recipe.seed, cache=work / "embeddings", show_progress=True)

    def judge(self, work: Path, draft: Path) -> None:
        """What was retrieved, told apart into relevant and not."""
        assert self.recipe.judge is not None
        if self.state.is_main_process:  # the other processes have nothing to add to one server
            tasks = self._distinct_tasks("judge")
            tasks = [self._with_foreign("judge", task, read_mined(self.folder / "retrieve", task)) for task in tasks]
            judge(
                tasks,
                self.folder / "retrieve",
                draft,
                self.recipe.judge,
                api_key=os.environ.get("OPENAI_API_KEY"),
                show_progress=True,
            )

    def teach(self, work: Path, draft: Path) -> None:
        """What the embedder finds, scored by the reranker."""
        recipe = self.recipe.teach
        assert recipe is not None
        counts = teach(
            self._finder("teach"),
            Reranker(recipe.reranker or self.folder / "rerank"),
            self._distinct_tasks("teach"),
            draft,
            recipe,
            seed=self.recipe.seed,
            cache=work,
            show_progress=True,
        )
        if self.state.is_main_process:
            said = json.dumps([asdict(one) for one in counts], indent=2)
            (draft / "lists.json").write_text(said, encoding="utf-8")

    def mixture(self, stage: str) -> TaskMixture:
        """The training tasks of a stage, with the negatives that the stages before found for it."""
        tasks = [self._with_found(stage, self._task(task, "train")) for task in self.recipe.tasks(stage)]
        return self._mixture(stage, tasks)

    def _mixture(self, stage: str, tasks: Sequence[RetrievalTask]) -> TaskMixture:
        """The tasks of a stage's entries, with the queries and the weights that these ask for; one without queries of
        those that a teacher drew has no part in it."""
        one, entries = self.recipe.trained.get(stage), self.recipe.tasks(stage)
        chosen = [_where(task, entry) for task, entry in zip(tasks, entries, strict=True)]
        shares = [one.weights.get(entry.label, entry.weight) if one else entry.weight for entry in entries]
        if stage == "continue_hard":
            drawn = [replace(task, queries=[one for one in task.queries if one.negatives]) for task in chosen]
            shares = [share for task, share in zip(drawn, shares, strict=True) if task.queries]
            chosen = [task for task in drawn if task.queries]
        return TaskMixture(tasks=chosen, weights=shares)

    def _taught(self) -> tuple[TaskMixture, list[dict[str, ScoredList]]]:
        """The tasks of ``distill``, and for each of them the lists that ``teach`` scored."""
        tasks, lists = [], []
        for entry in self.recipe.tasks("distill"):
            task = self._task(entry, "train")
            lists.append(read_taught(self.folder / "teach", task))
            tasks.append(self._with_foreign("distill", task, {qid: one.dids for qid, one in lists[-1].items()}))
        return self._mixture("distill", tasks), lists

    def _with_foreign(self, stage: str, task: RetrievalTask, found: Mapping[str, Sequence[str]]) -> RetrievalTask:
        """The task with the candidates of others that were found for its queries in a global pool."""
        dids = [did for some in found.values() for did in some]
        known = {one.did for one in task.candidates}
        if all(did in known for did in dids):
            return task
        stages = [stage, *(one for one in ("mine", "retrieve", "teach") if one in self.recipe.stages)]
        return with_foreign(task, [one for name in stages for one in self._distinct_tasks(name)], dids)

    def _with_found(self, stage: str, task: RetrievalTask) -> RetrievalTask:
        """The task with mined or judged negatives, if the stage has any."""
        one, found_by = self.recipe.trained.get(stage), self._found_by(stage)
        if one is None or isinstance(one, DistillStage) or not one.num_negatives or not found_by:
            return task
        relevant: dict[str, list[str]] = {}
        if found_by == ["judge"]:
            asked = read_mined(self.folder / "retrieve", task)
            task = self._with_foreign(stage, task, asked)
            negatives, relevant = read_judged(self.folder / "judge", task)
        elif found_by == ["teach"]:
            right = {query.qid: {*query.positives, *query.also_relevant} for query in task.queries}
            taught = read_taught(self.folder / "teach", task)
            negatives = {qid: [did for did in one.dids if did not in right[qid]] for qid, one in taught.items()}
        else:
            negatives = read_mined(self.folder / found_by[0], task)
        if one.fill_from_mined:
            spare, wanted = read_mined(self.folder / "mine", task), one.num_negatives
            asked = read_mined(self.folder / "retrieve", task)
            for qid in (query.qid for query in task.queries):
                known = {*asked.get(qid, ()), *relevant.get(qid, ())}  # what nobody could decide is no negative either
                more = [did for did in spare.get(qid, ()) if did not in known]
                negatives[qid] = [*negatives.get(qid, ()), *more[: max(0, wanted - len(negatives.get(qid, ())))]]
        task = self._with_foreign(stage, task, negatives)
        return with_negatives(task, negatives, also_relevant=relevant, keep_labelled=one.keep_labelled)

    def _validation(self, stage: str) -> list[RetrievalTask]:
        """Each task once, though the mixture may name it twice: as it is named first."""
        tasks: dict[str, RetrievalTask] = {}
        for one in self.recipe.tasks(stage) if self.recipe.validation else ():
            task = _where(self._task(one, str(self.recipe.validation)), one)
            tasks.setdefault(task.label, task)
        return list(tasks.values())

    def _distinct_tasks(self, stage: str) -> list[RetrievalTask]:
        """The training tasks of a stage, each once, with every query that an entry of the mixture wants."""
        tasks: dict[str, RetrievalTask] = {}
        for one in self.recipe.tasks(stage):
            wanted = _where(self._task(one, "train"), one)
            if one.label in tasks:
                queries = {query.qid: query for query in (*tasks[one.label].queries, *wanted.queries)}
                wanted = replace(wanted, queries=list(queries.values()))
            tasks[one.label] = wanted
        return list(tasks.values())

    def _task(self, one: TaskRecipe, split: str) -> RetrievalTask:
        key = (one.dataset, one.task, split, one.max_tiles, one.registry, one.instruction)
        if key not in self._tasks:
            task = RetrievalDataset(self.data / one.dataset).load(one.task, split)
            query, document = one.instructions
            task = with_instructions(task, query=query, document=document)
            self._tasks[key] = task if one.max_tiles is None else _with_tiles(task, one.max_tiles)
        return self._tasks[key]

    def _source(self, one: SourceRecipe, split: str) -> Conversations:
        if one.file is not None:
            return load_conversations(self.data / one.file)
        task = TaskRecipe(dataset=str(one.dataset), task=str(one.task), where=one.where)
        return from_task(_where(self._task(task, split), task), question=one.question)

    def _before(self, stage: str) -> Path:
        """The folder of the model that a stage begins with."""
        if first := self.recipe.first_model(stage):
            return self.folder / first
        return resolve_checkpoint(self._checkpoint(stage))

    def _checkpoint(self, stage: str) -> str:
        """Folder or hub id of the checkpoint that a stage begins with, if it begins with none of the run's models."""
        own = self.recipe.rerank.checkpoint if stage == "rerank" and self.recipe.rerank else None
        checkpoint = own or self.recipe.model.checkpoint
        assert checkpoint is not None
        return checkpoint

    def _released(self, stage: str) -> Preset | None:
        """What the folder of the checkpoint leaves out, for a stage that begins with weights that others released."""
        if stage == "start" or self.recipe.first_model(stage) is not None:
            return None
        name = self._checkpoint(stage)
        given = self.recipe.model.preset if name == self.recipe.model.checkpoint else None
        return preset_of(name, resolve_checkpoint(name), given)

    def _finder(self, stage: str) -> Embedder:
        """The model that a stage looks for candidates with: that of a stage before it, or the checkpoint as this recipe
        reads it."""
        model = self.recipe.model
        if self.recipe.first_model(stage) is not None:
            return Embedder(self._before(stage))
        assert model.checkpoint is not None
        embedder = Embedder(
            model.checkpoint,
            visual_token_compression=model.visual_token_compression,
            vision_token_merging=model.vision_token_merging,
            preset=model.preset,
        )
        if (settings := self._settings(stage)) == embedder.settings:
            return embedder
        if settings.marked:
            with_markers(embedder.model, embedder.processor.tokenizer, seed=self.recipe.seed)
        # without a folder: what the recipe says otherwise may have changed the weights too
        return Embedder.from_model(embedder.model, embedder.processor, settings, name=model.checkpoint)

    def _settings(self, stage: str) -> EmbedderSettings:
        model = self.recipe.model
        if (released := self._released(stage)) is not None:
            before = released.settings
        else:
            before = EmbedderSettings() if stage == "start" else load_settings(self._before(stage))
        said = {name: value for name in SAID if (value := getattr(model, name)) is not None}
        return replace(before, **said)

    def _processor(self, stage: str) -> VTCProcessor:
        return load_processor(self.folder / stage)

    def _backbone(
        self, stage: str, *, dtype: torch.dtype = torch.float32, language_head: bool = False
    ) -> tuple[Any, VTCProcessor]:
        released = self._released(stage)
        model, processor = load_backbone(
            self._before(stage),
            visual_token_compression=self.recipe.model.visual_token_compression,
            vision_token_merging=self.recipe.model.vision_token_merging,
            dtype=dtype,
            language_head=language_head,
            tower=released.tower if released else None,
        )
        check_heeded(self.recipe, model.config)
        if self._settings(stage).marked:  # of all stages alike, so that they share a tokenizer
            with_markers(model, processor.tokenizer, seed=released.marker_seed if released else self.recipe.seed)
        model.set_attn_implementation(self.recipe.model.attn_implementation)
        return model, processor

    def _save(self, draft: Path, model: Any, processor: VTCProcessor, **options: Any) -> None:
        if self.state.is_main_process:
            stage = draft.parent.name.removesuffix(".running")
            manifest = self._origin(stage)
            save_checkpoint(draft, model, processor, self._settings(stage), manifest=manifest, **options)

    def _origin(self, stage: str) -> dict[str, Any]:
        """How the model of a stage was made."""
        return {"recipe": asdict(self.recipe), "inputs_sha256": self.inputs(stage)} | environment()

    def _pictures(self, stage: str, processor: VTCProcessor, max_pixels: int | None = None) -> Pictures:
        return Pictures(processor.image_processor, self._augment(stage), max_pixels=max_pixels)

    def _augment(self, stage: str) -> AugmentRecipe | None:
        """How the pictures of a stage are altered: where the eyes are frozen, not at all."""
        frozen = getattr(self.recipe.trained.get(stage), "freeze_eyes", False)
        return None if frozen else self.recipe.augment

    def _teacher(self) -> Teacher:
        assert self.recipe.teacher is not None
        teacher = Teacher(self.recipe.teacher.network)
        teacher.load_state_dict(load_file(self.folder / "teacher" / "teacher.safetensors"))
        return teacher

    def _distinct_pictures(self) -> list[tuple[Any, int]]:
        seen: dict[tuple[Any, int], None] = {}
        for task in self.mixture("tower").tasks:
            for one in (*task.queries, *task.candidates):
                seen.update(dict.fromkeys((source, one.item.max_tiles or 1) for source in one.item.images))
        return list(seen)


def _with_tiles(task: RetrievalTask, max_tiles: int) -> RetrievalTask:
    """The task with so many tiles at most for each of its pictures."""
    return replace(
        task,
        queries=[replace(one, item=replace(one.item, max_tiles=max_tiles)) for one in task.queries],
        candidates=[replace(one, item=replace(one.item, max_tiles=max_tiles)) for one in task.candidates],
    )


def _is_tied(folder: Path) -> bool:
    """Whether a model's language head is the embeddings of its words."""
    config: Any = load_config(folder)  # InternVL says it of its text model, Qwen-VL of the whole
    return bool(getattr(config.text_config, "tie_word_embeddings", config.tie_word_embeddings))


def _remove(folder: Path) -> None:
    if folder.exists():
        waste = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(waste, ignore_errors=True)
        folder.replace(waste)
        shutil.rmtree(waste)


def _where(task: RetrievalTask, one: TaskRecipe) -> RetrievalTask:
    """The task with the queries that the recipe wants of it."""
    if not one.where:
        return task
    chosen = [q for q in task.queries if all(q.fields.get(name) == value for name, value in one.where.items())]
    if not chosen:
        raise DatasetError(f"{task.label} has no query with {dict(one.where)}, which the recipe asks for.")
    return replace(task, queries=chosen)


def _texts(task: RetrievalTask) -> list[str]:
    return [one.item.text for one in (*task.queries, *task.candidates) if one.item.text]


def _plain(recipe: Recipe) -> Any:
    """The recipe as lists and dictionaries only, which YAML can say."""
    return json.loads(json.dumps(asdict(recipe)))
