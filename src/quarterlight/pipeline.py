"""Runs the stages of a recipe in order, each into its own folder; finished stages are not run again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLVisionConfig, Qwen2Config

from quarterlight.data.contrastive import TaskMixture
from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask, with_instructions
from quarterlight.errors import DatasetError, RecipeError, did_you_mean
from quarterlight.manifest import environment
from quarterlight.models.checkpoint import load_backbone, load_settings, save_checkpoint
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCModel
from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor, InternVLVTCProcessor
from quarterlight.models.settings import EmbedderSettings
from quarterlight.models.tokenizer import train_tokenizer
from quarterlight.prompts import QUERY_INSTRUCTIONS, TARGET_INSTRUCTIONS
from quarterlight.records import Item
from quarterlight.training.collate import Pictures, PromptEncoder
from quarterlight.training.contrast import PromptEmbedder, train_contrastive
from quarterlight.training.recipe import Recipe, TaskRecipe
from quarterlight.training.teacher import Teacher, TeacherEncoder
from quarterlight.training.tower import imitate, structure_attention

MANIFEST = "manifest.json"
STAGES = ("start", "teacher", "tower", "contrast")
"""Random model and tokenizer; convolutional teacher; warm start of the tower; contrastive training."""

_SCHEDULING = {"optimizer": {"save_every", "log_every", "num_workers"}, "loss": {"eval_every", "eval_queries"}}


def run(recipe: Recipe, data: Path, folder: Path, *, only: str | None = None, report: Callable[[str], None]) -> Path:
    """Runs every stage that is not finished, or one of them; returns the folder of the last.

    data: the directory of the datasets that the recipe names.  report: called with a line before and after each stage.
    Raises RecipeError for an unknown stage, DatasetError for data that is missing or broken.
    """
    stages = [stage for stage in STAGES if stage == "start" or getattr(recipe, stage) is not None]
    if only is not None and only not in stages:
        raise RecipeError(f"The recipe has no stage {only!r}. {did_you_mean(only, stages)}")
    pipeline = _Pipeline(recipe, data, folder)
    last = only or stages[-1]
    for stage in stages[: stages.index(last) + 1]:
        if pipeline.finished(stage):
            report(f"{stage}: finished before")
        elif only not in (None, stage):
            raise RecipeError(
                f"--only {only} needs the stage {stage}, which is not finished in {folder}: run it first."
            )
        else:
            report(f"{stage}: running")
            try:
                seconds = pipeline.run(stage)
            except OSError as error:
                raise RecipeError(
                    f"The stage {stage} cannot go on: {error.strerror or error} ({error.filename or folder}). What was "
                    "saved is kept; mend it and start the same command again."
                ) from error
            report(f"{stage}: finished in {seconds / 60:.1f} minutes")
    return folder / last


class _Pipeline:
    """The stages as methods of their names; each leaves its folder under its final name only when it is whole."""

    def __init__(self, recipe: Recipe, data: Path, folder: Path) -> None:
        self.recipe = recipe
        self.data = data
        self.folder = folder
        self._tasks: dict[tuple[str, str, str], RetrievalTask] = {}
        self._inputs: dict[str, str] = {}

    def finished(self, stage: str) -> bool:
        """Whether a stage's folder was written by this very recipe, as far as it matters to the stage."""
        file = self.folder / stage / MANIFEST
        return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["fingerprint"] == self.fingerprint(stage)

    def fingerprint(self, stage: str) -> str:
        """SHA-256, in hex, of the data and of what the recipe says for this stage and those before it.

        What changes no weight (how often to save, log and validate, how many workers) is left out.
        """
        ignored = {"name", *STAGES[STAGES.index(stage) + 1 :]}
        settings = {key: value for key, value in asdict(self.recipe).items() if key not in ignored}
        for one in (settings[name] for name in STAGES[1:] if settings.get(name)):
            for section, keys in _SCHEDULING.items():
                for key in keys & one.get(section, {}).keys():
                    del one[section][key]
        return hashlib.sha256(json.dumps([settings, self.inputs()], sort_keys=True).encode()).hexdigest()

    def inputs(self) -> dict[str, str]:
        """``dataset/task`` -> SHA-256, in hex, of its training files."""
        if not self._inputs:
            for one in self.recipe.mixture:
                dataset = RetrievalDataset(self.data / one.dataset)
                self._inputs[f"{one.dataset}/{one.task}"] = dataset.fingerprint(one.task, "train")
        return self._inputs

    def run(self, stage: str) -> float:
        """Runs a stage; returns the seconds it took since it was last started."""
        started = time.monotonic()
        random.seed(self.recipe.seed)
        np.random.seed(self.recipe.seed)
        torch.manual_seed(self.recipe.seed)
        target, work = self.folder / stage, self.folder / f"{stage}.running"
        if target.exists() and not (target / MANIFEST).is_file():
            raise RecipeError(f"{target} was not made by training and is not overwritten: choose another --out.")
        mark = work / "fingerprint"
        work.mkdir(parents=True, exist_ok=True)
        if not mark.is_file():
            mark.write_text(self.fingerprint(stage))
        elif mark.read_text() != self.fingerprint(stage):
            raise RecipeError(
                f"{work} holds half a run of another recipe or of other data: remove it, or choose another --out."
            )
        draft = work / "result"
        getattr(self, stage)(work, draft)
        seconds = time.monotonic() - started
        manifest = {
            "stage": stage,
            "fingerprint": self.fingerprint(stage),
            "recipe": asdict(self.recipe),
            "inputs_sha256": self.inputs(),
            "seconds": round(seconds),
            "environment": environment(),
        }
        log = sorted(work.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
        if log:
            shutil.copy(log[-1], draft / "trainer_state.json")
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        draft.replace(target)
        shutil.rmtree(work)
        return seconds

    def start(self, work: Path, draft: Path) -> None:
        """Tokenizer, processor and random weights."""
        recipe = self.recipe.model
        texts = [one for task in self.mixture("train").tasks for one in _texts(task)]
        words = [*QUERY_INSTRUCTIONS.values(), *TARGET_INSTRUCTIONS.values()]
        tokenizer = train_tokenizer([*dict.fromkeys(texts), *words * 20], recipe.vocab_size)
        vision = InternVLVisionConfig(**recipe.vision)
        height, width = vision.image_size
        config = InternVLVTCConfig(
            vision_config=vision,
            text_config=Qwen2Config(**recipe.text, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            visual_token_compression=recipe.visual_token_compression,
        )
        processor = InternVLVTCProcessor(
            image_processor=InternVLVTCImageProcessor(size={"height": height, "width": width}),
            tokenizer=tokenizer,
            image_seq_length=config.image_seq_length,
        )
        model = InternVLVTCModel(config)
        if recipe.position_columns:
            structure_attention(model.vision_tower, position_columns=recipe.position_columns)
        save_checkpoint(draft, model, processor, EmbedderSettings(text_max_tokens=recipe.text_max_tokens))

    def teacher(self, work: Path, draft: Path) -> None:
        """The convolutional teacher."""
        stage = self.recipe.teacher
        assert stage is not None
        teacher = Teacher(stage.network)
        train_contrastive(
            teacher,
            encode=TeacherEncoder(self._pictures(self._processor("start")), stage.network),
            mixture=self.mixture("train"),
            validation=self._validation() if stage.loss.eval_every else [],
            recipe=stage.loss,
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
        )
        draft.mkdir(exist_ok=True)
        save_file(teacher.state_dict(), draft / "teacher.safetensors")

    def tower(self, work: Path, draft: Path) -> None:
        """The model whose tower has imitated the teacher."""
        stage = self.recipe.tower
        assert stage is not None
        model, processor = self._backbone("start")
        imitate(
            model.vision_tower,
            self._teacher(),
            items=[Item(image=source, max_tiles=tiles) for source, tiles in self._distinct_pictures()],
            pictures=self._pictures(processor),
            recipe=stage.imitation,
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
        )
        save_checkpoint(draft, model, processor, load_settings(self.folder / "start"))

    def contrast(self, work: Path, draft: Path) -> None:
        """The embedder."""
        stage = self.recipe.contrast
        before = "tower" if self.recipe.tower else "start"
        model, processor = self._backbone(before)
        settings = load_settings(self.folder / before)
        pictures = self._pictures(processor)
        teacher, teacher_encoder = None, None
        if stage.teacher_weight:
            assert self.recipe.teacher is not None
            teacher, teacher_encoder = self._teacher(), TeacherEncoder(pictures, self.recipe.teacher.network)
        train_contrastive(
            PromptEmbedder(model),
            encode=PromptEncoder(InputFormatter(processor, settings), pictures, teacher_encoder),
            mixture=self.mixture("train", stage.weights),
            validation=self._validation() if stage.loss.eval_every else [],
            recipe=stage.loss,
            optimizer=stage.optimizer,
            folder=work,
            seed=self.recipe.seed,
            teacher=teacher,
            teacher_weight=stage.teacher_weight,
        )
        manifest = {"recipe": asdict(self.recipe), "inputs_sha256": self.inputs(), "environment": environment()}
        save_checkpoint(draft, model, processor, settings, dtype=torch.bfloat16, manifest=manifest)

    def mixture(self, split: str, weights: Mapping[str, float] | None = None) -> TaskMixture:
        """The recipe's tasks of one split. weights: of a stage, by ``dataset/task``; they replace the recipe's."""
        names = [f"{one.dataset}/{one.task}" for one in self.recipe.mixture]
        tasks = [self._task(one, split) for one in self.recipe.mixture]
        replaced = weights or {}
        shares = [replaced.get(name, one.weight) for name, one in zip(names, self.recipe.mixture, strict=True)]
        return TaskMixture(tasks=tasks, weights=shares)

    def _validation(self) -> list[RetrievalTask]:
        """Each task once, though the mixture may name it twice: as it is named first."""
        tasks: dict[str, RetrievalTask] = {}
        for task in self.mixture(self.recipe.validation).tasks:
            tasks.setdefault(task.label, task)
        return list(tasks.values())

    def _task(self, one: TaskRecipe, split: str) -> RetrievalTask:
        key = (one.dataset, one.task, split)
        if key not in self._tasks:
            self._tasks[key] = with_instructions(RetrievalDataset(self.data / one.dataset).load(one.task, split))
        task = self._tasks[key]
        if not one.where:
            return task
        chosen = [q for q in task.queries if all(q.fields.get(name) == value for name, value in one.where.items())]
        if not chosen:
            raise DatasetError(f"{task.label} has no query with {dict(one.where)}, which the recipe asks for.")
        return replace(task, queries=chosen)

    def _processor(self, stage: str) -> InternVLVTCProcessor:
        return InternVLVTCProcessor.from_pretrained(self.folder / stage)

    def _backbone(self, stage: str) -> tuple[Any, InternVLVTCProcessor]:
        model, processor = load_backbone(self.folder / stage)
        model.set_attn_implementation(self.recipe.model.attn_implementation)
        return model, processor

    def _pictures(self, processor: InternVLVTCProcessor) -> Pictures:
        return Pictures(processor.image_processor, self.recipe.augment)

    def _teacher(self) -> Teacher:
        assert self.recipe.teacher is not None
        teacher = Teacher(self.recipe.teacher.network)
        teacher.load_state_dict(load_file(self.folder / "teacher" / "teacher.safetensors"))
        return teacher

    def _distinct_pictures(self) -> list[tuple[Any, int]]:
        seen: dict[tuple[Any, int], None] = {}
        for task in self.mixture("train").tasks:
            for one in (*task.queries, *task.candidates):
                seen.update(dict.fromkeys((source, one.item.max_tiles or 1) for source in one.item.images))
        return list(seen)


def _texts(task: RetrievalTask) -> list[str]:
    return [one.item.text for one in (*task.queries, *task.candidates) if one.item.text]
