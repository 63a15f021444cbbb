"""Recipes: YAML files parsed into frozen dataclasses, in which a misspelt key is an error."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from transformers import InternVLVisionConfig, Qwen2Config

from quarterlight.data.registry import find
from quarterlight.errors import InputError, RecipeError, check_least, check_share, did_you_mean
from quarterlight.mining.judge import JudgeRecipe
from quarterlight.mining.negatives import MineRecipe
from quarterlight.mining.teaching import TeachRecipe
from quarterlight.models.backbones import backbone_of
from quarterlight.models.compression import FACTORS
from quarterlight.models.merging import MASKED_ATTENTION
from quarterlight.training.augment import AugmentRecipe
from quarterlight.training.contrast import ContrastRecipe
from quarterlight.training.distill import DistillRecipe
from quarterlight.training.embedder import EmbedRecipe
from quarterlight.training.lora import LoraRecipe
from quarterlight.training.optimizer import OptimizerRecipe
from quarterlight.training.rerank import RerankRecipe
from quarterlight.training.restore import RestoreRecipe
from quarterlight.training.teacher import TeacherRecipe
from quarterlight.training.tower import TowerRecipe

STAGES = (
    "start",
    "teacher",
    "tower",
    "restore",
    "text_pairs",
    "caption_pairs",
    "warmup",
    "mine",
    "hard_negatives",
    "retrieve",
    "judge",
    "finetune",
    "rerank",
    "teach",
    "distill",
    "continue_hard",
)
"""The stages in the order in which they run.

``start`` makes a model of random weights, ``teacher`` and ``tower`` stand in for its pretraining.  In the paper,
``restore`` is stage 1, ``warmup`` to ``hard_negatives`` are stage 2, ``retrieve`` to ``finetune`` are stage 3;
``rerank`` trains a second model, which looks through the vision tower of the embedder where it can.

U-MARVEL's progressive transition is ``text_pairs``, ``caption_pairs`` and ``warmup``; its reranker teaches the embedder
in ``teach`` and ``distill``, of which ``continue_hard`` is the control: more hard negatives in place of a teacher.
"""

WITHOUT_MODEL = ("teacher", "mine", "retrieve", "judge", "rerank", "teach")
"""Stages that leave no model with which another stage begins."""


NO_HEAD_SAVED = (
    "rerank would begin with {checkpoint}, an embedder that was saved without the language head with which a reranker "
    "answers: name the model that it was made from as rerank.checkpoint."
)

NO_HEAD = (
    "rerank.initial is finetune, but an embedder has no language head of its own, and this model does not use the "
    "embeddings of its words as one (tie_word_embeddings): say rerank.initial: restore."
)


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """One entry of a mixture."""

    dataset: str
    """name of a folder below the data directory"""
    task: str
    """direction, such as t2i"""
    weight: float = 1.0
    """share of the batches, relative to the other entries"""
    where: Mapping[str, str] = field(default_factory=dict)
    """only queries whose fields have these values, such as lang: en"""
    max_tiles: int | None = None
    """tiles of a picture at most; without it, 4 for the pages of a dataset that has a task t2vd, 1 for pictures"""
    registry: str | None = None
    """name of the published dataset in ``quarterlight.data.registry``"""
    samples: int | None = None
    """how many queries it has, for planning before the data is there"""
    instruction: str | None = None
    """of its queries, in place of those of the dataset or the usual one of the direction; an empty one is none"""

    def __post_init__(self) -> None:
        _check_entry(self.registry, self.weight)
        check_least(self, max_tiles=1)

    @property
    def label(self) -> str:
        """``dataset/task``."""
        return f"{self.dataset}/{self.task}"

    @property
    def instructions(self) -> tuple[str | tuple[str, ...] | None, str | None]:
        """(query, candidate) as in the paper's Tables 11 and 12 for the published dataset, or all that M-BEIR has for a
        query of its own; ``None`` for the usual."""
        if self.instruction is not None:
            return self.instruction, None
        for entry in find(self.registry) if self.registry else ():
            if entry.task == self.task and len(entry.query_instructions) > 1:
                return entry.query_instructions, None
            if entry.task == self.task and entry.instructions is not None:
                return entry.instructions
        return None, None


@dataclass(frozen=True, kw_only=True)
class SourceRecipe:
    """One entry of the data of ``restore``: a file of conversations, or the rows of a retrieval task as questions."""

    file: str | None = None
    """JSONL of conversations, relative to the data directory"""
    dataset: str | None = None
    """folder of a retrieval dataset, in place of ``file``"""
    task: str | None = None
    """one of its tasks, i2t or it2t"""
    question: str = "What does the picture show?"
    """what is asked of a row that has no words of its own"""
    where: Mapping[str, str] = field(default_factory=dict)
    """only queries whose fields have these values"""
    weight: float = 1.0
    """share of the conversations drawn, relative to the other entries"""
    registry: str | None = None
    """name of the published dataset in ``quarterlight.data.registry``"""
    samples: int | None = None
    """how many conversations it has, for planning before the data is there"""

    def __post_init__(self) -> None:
        if (self.file is None) == (self.dataset is None) or (self.dataset is None) != (self.task is None):
            raise RecipeError(
                f"An entry of restore.data names either a file, or a dataset and its task; got file={self.file!r}, "
                f"dataset={self.dataset!r}, task={self.task!r}."
            )
        _check_entry(self.registry, self.weight)

    @property
    def label(self) -> str:
        """The file, or ``dataset/task``."""
        return self.file or f"{self.dataset}/{self.task}"


def _check_entry(registry: str | None, weight: float) -> None:
    if weight <= 0:
        raise RecipeError(f"The weight of a dataset must be above 0, got {weight}.")
    if registry is not None:
        try:
            find(registry)
        except InputError as error:
            raise RecipeError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """What is trained: a checkpoint, or a new model of the InternVL3-VTC architecture from random weights."""

    checkpoint: str | None = None
    """folder or hub id, such as OpenGVLab/InternVL3-2B-hf; without it, the three below say what is made"""
    vision: Mapping[str, Any] = field(default_factory=dict)
    """settings of transformers' InternVLVisionConfig"""
    text: Mapping[str, Any] = field(default_factory=dict)
    """settings of transformers' Qwen2Config"""
    vocab_size: int | None = None
    """entries of the tokenizer, which is trained on the texts of the mixture"""
    visual_token_compression: int = 2
    """s of the paper"""
    vision_token_merging: float | None = None
    """for InternVL: share of the patches that are merged inside the vision tower; without it, as in the checkpoint (a
    new one: 0)"""
    preset: str | None = None
    """for weights that others released, what their folder leaves out: a name of ``quarterlight.models.presets``;
    without it, the one of the checkpoint's name, if there is one"""
    text_max_tokens: int | None = None
    """tokens of an item's text above which its end is cut off, in training and in the checkpoint; without it, as in the
    checkpoint (a new one: 512)"""
    attn_implementation: str = "sdpa"
    """of training only; on CPUs the backward pass of fused attention costs more than everything else together"""
    position_columns: int = 0
    """columns of a new tower that start as positions, for structured attention; 0 starts it at random"""
    system_prompt: str | None = None
    """a system turn before the user's, saved with the checkpoint, empty for none; without it, as in the checkpoint (a
    new one: none)"""
    pooling: Literal["last_token", "mean"] | None = None
    """which hidden states become the embedding; without it, as in the checkpoint (a new model: last_token)"""
    attention: Literal["causal", "bidirectional"] | None = None
    """what a token sees; without it, as in the checkpoint (a new model: causal)"""
    prompt_style: Literal["magic", "u_marvel"] | None = None
    """whose template; without it, as in the checkpoint (a new model: magic)"""
    positions: Literal["mrope", "sequential"] | None = None
    """for Qwen-VL: where visual tokens stand; without it, as in the checkpoint (a new one: mrope)"""
    max_pixels: int | None = None
    """for Qwen-VL: the most pixels of a picture; without it, as in the checkpoint (a new one: 300 visual tokens)"""

    def __post_init__(self) -> None:
        if self.visual_token_compression not in FACTORS:
            raise RecipeError(
                f"model.visual_token_compression must be one of {FACTORS}, got {self.visual_token_compression}."
            )
        if self.vision_token_merging is not None and not 0 <= self.vision_token_merging < 1:
            raise RecipeError(
                f"model.vision_token_merging must be a share from 0 to below 1, got {self.vision_token_merging}."
            )
        new = {"vision": self.vision, "text": self.text, "vocab_size": self.vocab_size}
        given = [name for name, value in new.items() if value]
        if self.checkpoint is None and self.preset is not None:
            raise RecipeError(
                f"model.preset is {self.preset!r}, but there is no model.checkpoint whose folder it could complete."
            )
        if self.checkpoint is not None and given:
            raise RecipeError(f"model.checkpoint brings its own sizes, so model.{given[0]} cannot be given beside it.")
        if self.vision_token_merging and self.attn_implementation not in MASKED_ATTENTION:
            raise RecipeError(
                f"model.vision_token_merging needs model.attn_implementation {' or '.join(MASKED_ATTENTION)}, got "
                f"{self.attn_implementation!r}."
            )
        if self.checkpoint is None and len(given) < len(new):
            lacking = next(name for name in new if name not in given)
            raise RecipeError(f"model needs checkpoint, or all of vision, text and vocab_size; it lacks {lacking!r}.")
        # transformers takes any key and ignores those it does not know
        for name, kind in {"vision": InternVLVisionConfig, "text": Qwen2Config}.items():
            known = {one.name for one in dataclasses.fields(kind)} - {"vocab_size"}
            for key in getattr(self, name):
                if key not in known:
                    raise RecipeError(f"model.{name} has an unknown key {key!r}. {did_you_mean(key, known)}")


@dataclass(frozen=True, kw_only=True)
class TeacherStage:
    """Trains the convolutional teacher on the mixture."""

    optimizer: OptimizerRecipe
    loss: ContrastRecipe = ContrastRecipe()
    network: TeacherRecipe = TeacherRecipe()


@dataclass(frozen=True, kw_only=True)
class TowerStage:
    """The vision tower imitates the teacher on all pictures of the mixture."""

    optimizer: OptimizerRecipe
    imitation: TowerRecipe = TowerRecipe()


@dataclass(frozen=True, kw_only=True)
class RestoreStage:
    """Stage 1 of the paper: next-token prediction on conversations, all weights."""

    optimizer: OptimizerRecipe
    loss: RestoreRecipe = RestoreRecipe()
    data: Sequence[SourceRecipe]


@dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """What stages have in common that train a model on tasks of a mixture."""

    optimizer: OptimizerRecipe
    lora: LoraRecipe | None = None
    """trains adapters of the language model; without it, all weights are trained (``rerank``: but for those of vision
    tower and connector)"""
    mixture: Sequence[TaskRecipe] | None = None
    """of this stage, in place of that of the recipe (``rerank``, ``distill``: of finetune)"""
    weights: Mapping[str, float] = field(default_factory=dict)
    """dataset/task -> weight in this stage, in place of that in the mixture"""


@dataclass(frozen=True, kw_only=True)
class EmbedStage(MixtureStage):
    """Of these, the ones that train the embedder."""

    loss: EmbedRecipe
    freeze_eyes: bool = False
    """leaves vision tower and connector as they are, as adapters do, and pictures without augmentation, so that what is
    seen can be kept"""
    initial_weight: float = 0.0
    """share of the weights that the stage began with in those that it leaves, the average of these and the trained ones
    (WiSE-FT, arXiv:2109.01903); validation during training is of the trained ones alone"""

    def __post_init__(self) -> None:
        check_share(self, "initial_weight")
        if self.initial_weight and self.lora is not None and self.lora.keep:
            raise RecipeError(
                f"initial_weight is {self.initial_weight}, but an adapter that is kept (lora.keep) leaves the initial "
                "weights as they are: give one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class ContrastStage(EmbedStage):
    """Contrastive training of the model that the stage before left."""

    loss: ContrastRecipe = ContrastRecipe()
    keep_labelled: bool = False
    """mined negatives come beside the labelled ones of the dataset, rather than in their place"""
    fill_from_mined: bool = False
    """a query with fewer judged negatives than ``loss.num_negatives`` gets mined ones; ``loss.fill`` repeats instead"""
    teacher_weight: float = 0.0
    """of 1 - cosine to the teacher's embedding of the same item, at the first step; falls linearly to zero"""

    @property
    def num_negatives(self) -> int:
        """Hard negatives of a query, at most."""
        return self.loss.num_negatives


@dataclass(frozen=True, kw_only=True)
class DistillStage(EmbedStage):
    """The embedder learns to rank the lists of ``teach`` as the reranker and itself do together (U-MARVEL, stage 3)."""

    loss: DistillRecipe = DistillRecipe()


@dataclass(frozen=True, kw_only=True)
class RerankStage(MixtureStage):
    """Training of the reranker on the negatives, and the augmented positives, of stage 3 (paper, section 3.4)."""

    loss: RerankRecipe = RerankRecipe()
    initial: Literal["restore", "finetune"] = "restore"
    """the model that it begins with: the trunk of stage 1, which writes (paper), or the embedder; without a stage that
    leaves such a model, the checkpoint.  A kept adapter of the embedder (``lora.keep``) is left out"""
    checkpoint: str | None = None
    """folder or hub id that it begins with, in place of what ``initial`` says: of the family and sizes of
    ``model.checkpoint``, such as the model that writes from which that embedder was made"""
    fusion_weight: float = 1.0
    """saved with the reranker: its weight in a search, the cosine having the rest (paper: the reranker alone)"""
    keep_labelled: bool = False
    """mined negatives come beside the labelled ones of the dataset, rather than in their place"""
    fill_from_mined: bool = False
    """a query with fewer judged negatives than ``loss.max_negatives`` gets mined ones"""

    def __post_init__(self) -> None:
        check_share(self, "fusion_weight")

    @property
    def num_negatives(self) -> int:
        """Hard negatives of a query, at most."""
        return self.loss.max_negatives


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: what is trained, on what, in which stages."""

    name: str
    """of the checkpoint, for people"""
    seed: int = 0
    """of weights, order, augmentation"""
    devices: int = 1
    """that the batch sizes are meant for: a batch is so many times the batch of a device"""
    model: ModelRecipe
    mixture: Sequence[TaskRecipe]
    """the training tasks, of which the split ``train`` is used"""
    validation: str | None = "val"
    """split of the same tasks that is measured during training; none without one"""
    augment: AugmentRecipe | None = None
    """random changes of pictures; none without it"""
    teacher: TeacherStage | None = None
    tower: TowerStage | None = None
    restore: RestoreStage | None = None
    text_pairs: ContrastStage | None = None
    """pairs of texts first, with a mixture of their own (U-MARVEL: NLI)"""
    caption_pairs: ContrastStage | None = None
    """then pictures and what is said of them, likewise (U-MARVEL: CC3M)"""
    warmup: ContrastStage | None = None
    """a checkpoint that is an embedder already can do without"""
    mine: MineRecipe | None = None
    hard_negatives: ContrastStage | None = None
    retrieve: MineRecipe | None = None
    judge: JudgeRecipe | None = None
    finetune: ContrastStage | None = None
    """with the negatives of ``judge``; without that stage, all that ``retrieve`` found (rule-based ones, Table 8)"""
    rerank: RerankStage | None = None
    """with the same; without ``retrieve``, those of ``mine``, and without both, those that the datasets label"""
    teach: TeachRecipe | None = None
    """scores, by the reranker, what the last of the embedders above finds"""
    distill: DistillStage | None = None
    """the last embedder, taught"""
    continue_hard: ContrastStage | None = None
    """in its place: the same queries with the same candidates as hard negatives"""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}.")
        for name in ("teacher", "tower"):
            if (stage := getattr(self, name)) is not None and stage.optimizer.gradient_checkpointing:
                raise RecipeError(f"{name}.optimizer.gradient_checkpointing: this stage keeps its activations.")
        check_least(self, devices=1)
        if self.teacher is not None and self.teacher.loss.max_pixels is not None:
            raise RecipeError(
                "teacher.loss.max_pixels has no effect, as the teacher reads every picture as one small tile: leave it "
                "out."
            )
        guided = self.tower is not None or any(one.teacher_weight for one in self.contrast.values())
        if self.teacher is None and guided:
            raise RecipeError("The recipe has no teacher stage, which its tower or a teacher_weight asks for.")
        for needed, by in {"mine": "hard_negatives", "retrieve": "judge"}.items():
            if getattr(self, by) is not None and getattr(self, needed) is None:
                raise RecipeError(f"The recipe has no stage {needed}, which its stage {by} asks for.")
        for by in ("distill", "continue_hard"):
            if getattr(self, by) is not None and self.teach is None:
                raise RecipeError(f"The recipe has no stage teach, which its stage {by} asks for.")
        if self.distill is not None and self.continue_hard is not None:
            raise RecipeError("distill and continue_hard begin with the same model: a recipe has one of them.")
        if self.teach is not None and self.teach.reranker is None and self.rerank is None:
            raise RecipeError("teach needs a reranker: add the stage rerank, or name one as teach.reranker.")
        for stage, one in self.trained.items():
            judged = stage in ("finetune", "rerank") and self.mine is not None and self.retrieve is not None
            if not isinstance(one, DistillStage) and one.fill_from_mined and not judged:
                raise RecipeError(
                    f"{stage}.fill_from_mined is for finetune and rerank, in a recipe with mine and retrieve."
                )
            names = [task.label for task in self.tasks(stage)]
            for name in one.weights:
                if names.count(name) != 1:
                    trouble = "names more than once" if name in names else "does not name"
                    raise RecipeError(
                        f"{stage}.weights has {name!r}, which its mixture {trouble}. {did_you_mean(name, set(names))}"
                    )

        if self.rerank is not None and self.model.checkpoint is None and self.rerank.checkpoint is None:
            if self.rerank.initial == "restore" and self.restore is None:
                raise RecipeError(
                    "rerank.initial is restore, but the recipe has neither a stage restore nor a checkpoint: add one, "
                    "or say rerank.initial: finetune."
                )
            if self.rerank.initial == "finetune" and self.contrast and not self.model.text.get("tie_word_embeddings"):
                raise RecipeError(NO_HEAD)
        if self.judge is not None:
            if self.judge.truth and self.retrieve is not None and self.retrieve.pool == "global":
                raise RecipeError(
                    "judge.truth knows the candidates of each task alone, so retrieve.pool cannot be global beside it."
                )
            names = [task.label for task in self.tasks("judge")]
            for name in (*self.judge.exempt, *self.judge.instructions):
                if name not in names:
                    raise RecipeError(f"judge names {name!r}, which is not judged. {did_you_mean(name, set(names))}")

    @property
    def stages(self) -> list[str]:
        """The stages that the recipe has, in order."""
        new = self.model.checkpoint is None
        return [one for one in STAGES if (new if one == "start" else getattr(self, one) is not None)]

    @property
    def contrast(self) -> dict[str, ContrastStage]:
        """The contrastive stages that the recipe has, by name, in order."""
        names = [name for name in STAGES if isinstance(getattr(self, name, None), ContrastStage)]
        return {name: getattr(self, name) for name in names}

    @property
    def embedders(self) -> list[str]:
        """The stages that leave an embedder, in order: the contrastive ones, and ``distill``."""
        return [name for name in self.stages if name in self.contrast or name == "distill"]

    @property
    def paired(self) -> str | None:
        """The stage that leaves the embedder that ``rerank`` may share its vision tower with."""
        before = self.stages[: self.stages.index("rerank")]
        return next((name for name in reversed(self.embedders) if name in before), None)

    @property
    def trained(self) -> dict[str, ContrastStage | RerankStage | DistillStage]:
        """The stages that train on queries and candidates, by name, in order."""
        return {name: getattr(self, name) for name in STAGES if isinstance(getattr(self, name, None), MixtureStage)}

    def tasks(self, stage: str) -> Sequence[TaskRecipe]:
        """The mixture of a stage: its own, or that of the recipe; of ``rerank`` and later, that of ``finetune``.

        Mining, judging and teaching look at the tasks of the stage that uses them.
        """
        taught = "distill" if self.distill is not None else "continue_hard"
        users = {"mine": "hard_negatives", "retrieve": "finetune", "judge": "finetune", "teach": taught}
        user = users.get(stage, stage)
        one = self.trained.get(user)
        if one is not None and one.mixture is not None:
            return one.mixture
        return self.tasks("finetune") if user in ("rerank", "distill", "continue_hard") else self.mixture

    def first_model(self, stage: str) -> str | None:
        """The stage that leaves the model that a stage begins with; ``None`` for the checkpoint, or that of
        ``rerank``."""
        if stage == "rerank" and self.rerank is not None and self.rerank.checkpoint is not None:
            return None
        earlier = self.stages[: self.stages.index(stage)]
        models = [one for one in earlier if one not in WITHOUT_MODEL]
        if stage == "rerank" and self.rerank is not None and self.rerank.initial == "restore":
            models = [one for one in models if one == "restore"]
        return models[-1] if models else None


def check_heeded(recipe: Recipe, config: Any) -> None:
    """Raises RecipeError for a key that a model of this configuration would ignore."""
    trained: dict[str, object] = {name: one.loss for name, one in recipe.trained.items()}
    if recipe.restore is not None:
        trained["restore"] = recipe.restore.loss
    sections = {"model": recipe.model, **{f"{name}.loss": loss for name, loss in trained.items()}}
    for key in backbone_of(config).unheeded:
        for section, one in sections.items():
            if getattr(one, key, None) is not None:
                raise RecipeError(
                    f"{section}.{key} has no effect on a model of the type {config.model_type!r}, such as this recipe "
                    "trains: leave it out."
                )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with overrides such as ``warmup.loss.temperature=0.05`` put in.

    A file may name another beside it, ``base: other.yaml``, and give only what is different: mappings are put over
    those of the base key by key, lists and single values replace them.
    Raises RecipeError naming the key for an unknown key, a value of the wrong type, or a missing one.
    """
    values = _read(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"--set takes path.to.key=value, got {override!r}.")
        *parents, last = key.strip().split(".")
        level = values
        for parent in parents:
            level = _child(level, parent, key)
        if isinstance(level, list):
            level[_position(level, last, key)] = _load_yaml(value, f"--set {key}")
        else:
            level[last] = _load_yaml(value, f"--set {key}")
    return parse(Recipe, values, where=path.name)


def _read(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """The values of a file, over those of its base. above: the files that have this one as their base."""
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise RecipeError(f"{path} is no recipe ({reason}): give a YAML file such as recipes/nano.yaml.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must be a mapping of keys to values, got {values!r}.")
    if "base" not in values:
        return values
    base = path.parent / str(values.pop("base"))
    if base in (*above, path):
        raise RecipeError(f"{path} has {base.name} as its base, which is itself made from it.")
    return _over(_read(base, (*above, path)), values)


def _over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    both = [key for key, value in values.items() if isinstance(value, dict) and isinstance(base.get(key), dict)]
    return base | values | {key: _over(base[key], values[key]) for key in both}


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's idea of a number (1e-3 is one), and no key given twice but to replace one of a mapping merged in
    (``<<: *anchor``)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=deep) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}") from error


def _child(level: Any, name: str, key: str) -> Any:
    if isinstance(level, list):
        return level[_position(level, name, key)]
    if level.get(name) is None:
        level[name] = {}
    if not isinstance(level[name], dict | list):
        raise RecipeError(f"--set {key}: {name} holds a single value, so nothing can be set below it.")
    return level[name]


def _position(level: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(level):
        raise RecipeError(f"--set {key}: {name!r} is not a position in a list of {len(level)} entries.")
    return int(name)


_T = TypeVar("_T")


def parse(kind: type[_T], values: Any, *, where: str) -> _T:
    """The dataclass ``kind`` from plain YAML values. Raises RecipeError, naming the key after ``where``."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} must be a mapping of keys to values, got {values!r}.")
    hints = typing.get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(typing.cast(Any, kind))}
    for key in values:
        if key not in fields:
            raise RecipeError(f"{where} has an unknown key {key!r}. {did_you_mean(str(key), fields)}")
    for name, one in fields.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise RecipeError(f"{where} lacks the key {name!r}.")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # the latter where one of them is a Literal
        if value is None and type(None) in arguments:
            return None
        return _convert(next(one for one in arguments if one is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise RecipeError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}.")
        return value
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where=where)
    if origin in (Sequence, tuple):
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where} must be a list, got {value!r}.")
        return tuple(_convert(arguments[0], one, f"{where}[{n}]") for n, one in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} must be a mapping, got {value!r}.")
        return {key: _convert(arguments[1], one, f"{where}.{key}") for key, one in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{where} must be of type {hint.__name__}, got {value!r}.")
    return value
