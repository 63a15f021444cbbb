"""Recipes: YAML files parsed into frozen dataclasses, in which a misspelt key is an error."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from quarterlight.errors import RecipeError, did_you_mean
from quarterlight.training.augment import AugmentRecipe
from quarterlight.training.contrast import ContrastRecipe, OptimizerRecipe
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


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with overrides such as ``contrast.loss.temperature=0.05`` put in.

    Raises RecipeError naming the key for an unknown key, a value of the wrong type, or a missing one.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"There is no recipe {path}: give the path of a YAML file such as recipes/nano.yaml."
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"--set takes path.to.key=value, got {override!r}.")
        *parents, last = key.strip().split(".")
        level = values
        for parent in parents:
            level = _child(level, parent, key)
        if isinstance(level, list):
            level[_position(level, last, key)] = yaml.safe_load(value)
        else:
            level[last] = yaml.safe_load(value)
    return parse(Recipe, values, where=path.name)


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
