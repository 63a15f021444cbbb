"""Recipes: YAML files parsed into frozen dataclasses, in which a misspelt key is an error."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import InternVLVisionConfig, Qwen2Config

from quarterlight.errors import RecipeError, did_you_mean
from quarterlight.training.augment import AugmentRecipe
from quarterlight.training.contrast import ContrastRecipe
from quarterlight.training.optimizer import OptimizerRecipe
from quarterlight.training.teacher import TeacherRecipe
from quarterlight.training.tower import TowerRecipe


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """One entry of a mixture."""

    dataset: str
    """name of a folder below the data directory"""
    task: str
    """direction, such as t2i"""
    weight: float
    """share of the batches, relative to the other entries"""
    where: Mapping[str, str] = field(default_factory=dict)
    """only queries whose fields have these values, such as lang: en"""


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """A new model of the InternVL3-VTC architecture, from random weights."""

    vision: Mapping[str, Any]
    """settings of transformers' InternVLVisionConfig"""
    text: Mapping[str, Any]
    """settings of transformers' Qwen2Config"""
    vocab_size: int
    """entries of the tokenizer, which is trained on the texts of the mixture"""
    visual_token_compression: int = 2
    """s of the paper"""
    text_max_tokens: int = 512
    """tokens of an item's text above which its end is cut off, in training and in the checkpoint"""
    attn_implementation: str = "eager"
    """of training only; on CPUs the backward pass of fused attention costs more than everything else together"""
    position_columns: int = 64
    """columns of the tower that start as positions, for structured attention; 0 starts it at random"""

    def __post_init__(self) -> None:
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
class ContrastStage:
    """The whole model learns by contrast, at first beside the teacher's embeddings."""

    optimizer: OptimizerRecipe
    loss: ContrastRecipe = ContrastRecipe()
    teacher_weight: float = 0.0
    """of 1 - cosine to the teacher's embedding of the same item, at the first step; falls linearly to zero"""
    weights: Mapping[str, float] = field(default_factory=dict)
    """dataset/task -> weight in this stage, in place of that in the mixture"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: what is trained, on what, in which stages."""

    name: str
    """of the checkpoint, for people"""
    seed: int = 0
    """of weights, order, augmentation"""
    model: ModelRecipe
    mixture: Sequence[TaskRecipe]
    """the training tasks, of which the split ``train`` is used"""
    validation: str = "val"
    """split of the same tasks that is measured during training"""
    augment: AugmentRecipe | None = None
    """random changes of pictures; none without it"""
    teacher: TeacherStage | None = None
    tower: TowerStage | None = None
    contrast: ContrastStage

    def __post_init__(self) -> None:
        if self.teacher is None and (self.tower is not None or self.contrast.teacher_weight):
            raise RecipeError("The recipe has no teacher stage, which its tower or contrast.teacher_weight asks for.")
        names = [f"{one.dataset}/{one.task}" for one in self.mixture]
        for name in self.contrast.weights:
            if names.count(name) != 1:
                trouble = "names more than once" if name in names else "does not name"
                raise RecipeError(
                    f"contrast.weights has {name!r}, which the mixture {trouble}. {did_you_mean(name, set(names))}"
                )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with overrides such as ``contrast.loss.temperature=0.05`` put in.

    Raises RecipeError naming the key for an unknown key, a value of the wrong type, or a missing one.
    """
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise RecipeError(f"{path} is no recipe ({reason}): give a YAML file such as recipes/nano.yaml.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must be a mapping of keys to values, got {values!r}.")
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


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's idea of a number (1e-3 is one), and no key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
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
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _convert(next(one for one in arguments if one is not type(None)), value, where)
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
