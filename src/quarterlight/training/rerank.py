"""Training of a reranker: the answers of the language model to pairs and lists, on a vision tower that stays as it is.

Magic-MM-Embedding, section 3.4.  A pair of a query with its right candidate is answered Yes, one with a hard negative
No (eq. 5), a list of several by the number of the right one (eq. 6).  Most of the work is shared or left out:

- What all rows of a batch begin with, the template, goes through the language model once.
- The two pairs of a row are one sequence: its query, then both candidates, which do not see each other.
- Only the last token of a prompt meets the language head.
- The tower is frozen, so that the visual tokens of a picture are worked out once and kept.  For that reason pictures
  are not augmented here; and the embedder, whose tower it is, has them stored for pictures as they are.

Legend of shapes: B rows of a group, L tokens of the longest, P tokens in common, N answers of a batch, D columns,
T tiles, V vocabulary, A words that are answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from quarterlight.data.contrastive import TaskMixture
from quarterlight.data.rerank import RerankRow, RerankSampler
from quarterlight.errors import RecipeError, check_least, check_share
from quarterlight.models.backbones import backbone_of
from quarterlight.models.inputs import TokenizedPrompt
from quarterlight.models.processor import VTCProcessor
from quarterlight.models.rerank_inputs import MAX_LIST, AnswerTokens, RerankFormatter
from quarterlight.models.settings import RerankerSettings
from quarterlight.models.shared_prefix import repeated
from quarterlight.models.tiles import Grid
from quarterlight.records import Item
from quarterlight.training.batches import Batches, BatchTrainer
from quarterlight.training.collate import Pictures
from quarterlight.training.distributed import share, world_size
from quarterlight.training.eyes import FrozenEyes, PictureKey, VisualTokens, picture_keys, show
from quarterlight.training.optimizer import OptimizerRecipe, recompute_activations
from quarterlight.training.writer import Writer

_YES, _NO, _LIST = _KINDS = range(3)  # what is answered
_GROUPED = 0.85  # of the longest row of a group, how long the others are at least: what is missing is padding
_PROMPTS_KEPT = 1 << 17


@dataclass(frozen=True, kw_only=True)
class RerankRecipe:
    """What the stage does beyond its optimiser."""

    batch_size: int = 12
    """queries of a batch on each device, each with two pairs and a list (paper: 12 for 2B, 16 for 8B)"""
    min_negatives: int = 2
    """hard negatives of a list, at least; a query with fewer is trained on in pairs alone (paper: 2)"""
    max_negatives: int = 5
    """hard negatives of a list, at most (paper: 5)"""
    pointwise_weight: float = 1.0
    """of the loss of pairs (paper: 1)"""
    listwise_weight: float = 1.0
    """of the loss of lists (paper: 1)"""
    visual_tokens_bytes: int = 1 << 30
    """visual tokens of pictures that are kept in main memory; others are worked out whenever they are used"""
    eval_every: int = 1000
    """steps between validations; 0 for none"""
    eval_queries: int = 500
    """training queries that are held out for it, at most a tenth of all: those of validation splits are not judged"""
    max_unreadable: float = 0.01
    """share of unreadable pictures above which training stops; up to it, their rows are left out of the loss"""

    def __post_init__(self) -> None:
        check_least(self, batch_size=1, min_negatives=1, eval_every=0, eval_queries=0, visual_tokens_bytes=0)
        check_share(self, "max_unreadable")
        if not self.min_negatives <= self.max_negatives < MAX_LIST:
            raise RecipeError(
                f"max_negatives must be at least min_negatives ({self.min_negatives}) and at most {MAX_LIST - 1}, for "
                f"the number of the best of a list is one digit; got {self.max_negatives}."
            )
        for name in ("pointwise_weight", "listwise_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name} must not be below 0, got {getattr(self, name)}.")
        if not self.pointwise_weight + self.listwise_weight:
            raise RecipeError("pointwise_weight and listwise_weight must not both be 0.")


@dataclass(frozen=True)
class _Sequence:
    """What one row makes of a prompt: a trunk, and branches that do not see each other, each with its answer.

    positions: of the tokens of trunk and branches, int64 [axes, L]; all branches start behind the trunk.
    pictures: keys of those in the trunk and the branches, in order.  answers: (what is answered, token, choices).
    """

    row: int
    trunk: list[int]
    branches: list[list[int]]
    positions: Tensor
    pictures: list[PictureKey]
    answers: list[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))


class RerankCollator:
    """Rows to the tensors that :class:`AnswerWriter` reads; pictures without known visual tokens are decoded here.

    pointwise, listwise: whether there are pairs, and lists.
    A picture that cannot be read becomes a white tile, and its row has no part in the loss.
    """

    def __init__(
        self,
        formatter: RerankFormatter,
        pictures: Pictures,
        known: VisualTokens,
        *,
        pointwise: bool = True,
        listwise: bool = True,
    ) -> None:
        self.formatter = formatter
        self.pictures = pictures
        self.known = known
        self.pointwise = pointwise
        self.listwise = listwise
        self.answers = AnswerTokens.of(formatter.processor.tokenizer, "the model to train")
        self._prompts: dict[Hashable, TokenizedPrompt] = {}

    def __call__(self, rows: Sequence[RerankRow]) -> dict[str, Any]:
        """A batch.

        parts: the pairs, then the lists.  Each has ``opening``, int64 [P], the tokens that all of its rows begin with,
            and ``groups`` of sequences of similar lengths, without the opening and padded on the right: ``input_ids``,
            int64 [B, L]; ``position_ids``, the same or, where positions have several axes, [axes, B, L]; ``branch``,
            int64 [B, L], 0 in the trunk, if there are several; ``answers``, int64 [n], where in the flattened [B, L]
            the next token is an answer; ``pictures``, keys.
        fresh: key -> uint8 tiles [T, H, W, 3] of each picture whose visual tokens are not known.
        cut: key -> how it was cut, of the same.
        labels: int64 [N], the answers of all groups.  kinds: int64 [N], what is answered.
        choices: int64 [N], candidates to choose from.  rows: int64 [N], which row asks.
        weights: float32 [N], 0 for a row with a picture that cannot be read, 1 for others.
        qids, dids: what the rows show.  num_pictures, unreadable: how many, and why those that cannot be read cannot.
        """
        fresh: dict[PictureKey, Tensor] = {}
        cut: dict[PictureKey, Grid] = {}
        sequences: list[list[_Sequence]] = [[], []]
        unreadable: list[str] = []
        weight_R = torch.ones(len(rows))
        num_pictures = 0
        for number, row in enumerate(rows):
            shown = list({id(one): one for one in (row.positive, row.negative, *row.listed)}.values())
            tiles: dict[PictureKey, Grid] = {}
            for item in (row.query.item, *(one.item for one in shown)):
                for key, grid, whys in self._look(item, fresh, cut):
                    tiles[key] = grid
                    num_pictures += 1
                    unreadable += whys
                    weight_R[number] *= not whys
            if self.pointwise:
                sequences[0].append(self._pairs(number, row, tiles))
            if self.listwise and row.slot is not None:
                sequences[1].append(self._list(number, row, tiles))
        parts = [self._part(some) for some in sequences if some]
        ordered = [one for part in parts for group in part["groups"] for one in group.pop("sequences")]
        answered = [(one.row, *answer) for one in ordered for answer in one.answers]
        row_N, kinds_N, labels_N, choices_N = torch.tensor(answered, dtype=torch.int64).reshape(-1, 4).unbind(1)
        return {
            "parts": parts,
            "fresh": fresh,
            "cut": {key: cut[key] for key in fresh},
            "labels": labels_N,
            "kinds": kinds_N,
            "choices": choices_N,
            "rows": row_N,
            "weights": weight_R[row_N],
            "qids": [row.query.qid for row in rows],
            "dids": [one.did for row in rows for one in (row.positive, row.negative, *row.listed)],
            "num_pictures": num_pictures,
            "unreadable": unreadable,
        }

    def _look(
        self, item: Item, fresh: dict[PictureKey, Tensor], cut: dict[PictureKey, Grid]
    ) -> Iterator[tuple[PictureKey, Grid, list[str]]]:
        """For each picture of an item its key, how it was cut, and why it cannot be read if so."""
        most = self.formatter.max_tiles(item)
        found = show(item, most, self.pictures, self.known, fresh, cut)
        for source, (key, grid) in zip(item.images, found, strict=True):
            yield key, grid, self.pictures.whys(Item(image=source, max_tiles=most))

    def _pairs(self, number: int, row: RerankRow, tiles: Mapping[PictureKey, Grid]) -> _Sequence:
        items = [row.positive.item, row.negative.item]
        return self._sequence(
            number,
            (self._prompt("prefix", row.query.item), [row.query.item]),
            [(self._prompt("tail", item), [item]) for item in items],
            [(_YES, self.answers.yes, 2), (_NO, self.answers.no, 2)],
            tiles,
        )

    def _list(self, number: int, row: RerankRow, tiles: Mapping[PictureKey, Grid]) -> _Sequence:
        assert row.slot is not None
        items = [one.item for one in row.listed]
        return self._sequence(
            number,
            (self._prompt("list prefix", row.query.item), [row.query.item]),
            [(self._prompt("list tail", *items), items)],
            [(_LIST, self.answers.numbers[row.slot], len(items))],
            tiles,
        )

    def _sequence(
        self,
        row: int,
        trunk: tuple[TokenizedPrompt, Sequence[Item]],
        branches: Sequence[tuple[TokenizedPrompt, Sequence[Item]]],
        answers: list[tuple[int, int, int]],
        tiles: Mapping[PictureKey, Grid],
    ) -> _Sequence:
        """trunk, branches: prompts, and the items in them."""
        parts: list[list[int]] = []
        positions: list[Tensor] = []
        for prompt, items in (trunk, *branches):
            grids = [tiles[key] for key in self._keys(items)]
            ids, _ = self.formatter.tokenize.expand(prompt, grids)
            start = int(positions[0].max()) + 1 if positions else 0
            settings = self.formatter.settings
            positions.append(self.formatter.processor.positions(ids, grids, settings.positions, start))
            parts.append(ids)
        return _Sequence(
            row=row,
            trunk=parts[0],
            branches=parts[1:],
            positions=torch.cat(positions, dim=1),
            pictures=self._keys([item for _, items in (trunk, *branches) for item in items]),
            answers=answers,
        )

    def _prompt(self, kind: str, *items: Item) -> TokenizedPrompt:
        """A part of a prompt; those of single items are kept, since the same list hardly comes again."""
        if len(items) > 1:
            return self._tokenized(kind, items)
        key = (kind, items[0].text, items[0].instruction, len(items[0].images))
        prompt = self._prompts.get(key)
        if prompt is None:
            prompt = self._tokenized(kind, items)
            if len(self._prompts) > _PROMPTS_KEPT:
                self._prompts.clear()
            self._prompts[key] = prompt
        return prompt

    def _tokenized(self, kind: str, items: Sequence[Item]) -> TokenizedPrompt:
        if kind == "tail":
            return self.formatter.tails(items)[0]
        if kind == "list tail":
            return self.formatter.list_tail(items)
        return self.formatter.prefix(items[0], listwise=kind == "list prefix")

    def _keys(self, items: Sequence[Item]) -> list[PictureKey]:
        return [key for item in items for key in picture_keys(item, self.formatter.max_tiles(item))]

    def _part(self, sequences: list[_Sequence]) -> dict[str, Any]:
        opening = _opening([one.trunk for one in sequences], self.formatter.processor.image_token_id)
        return {
            "opening": torch.tensor(opening, dtype=torch.int64),
            "groups": [self._group(some, len(opening)) for some in _grouped(sequences, len(opening))],
        }

    def _group(self, sequences: list[_Sequence], skipped: int) -> dict[str, Any]:
        """The tensors of some sequences without the tokens that all begin with."""
        shape = len(sequences), max(map(len, sequences)) - skipped
        input_ids = torch.full(shape, self.formatter.processor.tokenizer.pad_token_id)
        axes = self.formatter.processor.num_axes
        # padding goes on counting: where numbers fall, transformers would see another sequence begin
        positions = torch.arange(skipped, skipped + shape[1]).repeat(axes, shape[0], 1)
        branch = torch.zeros(shape, dtype=torch.int64)
        answers = []
        for row, one in enumerate(sequences):
            start = len(one.trunk) - skipped
            positions[:, row, : len(one) - skipped] = one.positions[:, skipped:]
            input_ids[row, :start] = torch.tensor(one.trunk[skipped:], dtype=torch.int64)
            for number, ids in enumerate(one.branches, start=1):
                stop = start + len(ids)
                input_ids[row, start:stop] = torch.tensor(ids)
                branch[row, start:] = number  # padding sees what the last branch does
                answers.append(row * shape[1] + stop - 1)
                start = stop
        group = {
            "input_ids": input_ids,
            "position_ids": positions if axes > 1 else positions[0],
            "answers": torch.tensor(answers),
            "pictures": [key for one in sequences for key in one.pictures],
            "sequences": sequences,
        }
        return group | ({"branch": branch} if len(sequences[0].branches) > 1 else {})


def _grouped(sequences: list[_Sequence], skipped: int) -> Iterator[list[_Sequence]]:
    """The sequences, the longest first, cut where one would have too much padding; ``skipped`` tokens do not count."""
    longest_first = sorted(sequences, key=len, reverse=True)
    start = 0
    for place, one in enumerate(longest_first):
        if len(one) - skipped < _GROUPED * (len(longest_first[start]) - skipped):
            yield longest_first[start:place]
            start = place
    yield longest_first[start:]


def _opening(trunks: Sequence[Sequence[int]], image_token_id: int) -> list[int]:
    """The tokens that all begin with, up to the first picture."""
    opening: list[int] = []
    for ids in zip(*trunks, strict=False):
        if ids[0] == image_token_id or any(one != ids[0] for one in ids):
            break
        opening.append(ids[0])
    return opening


class AnswerWriter(Writer):
    """A reranker as training sees it: a batch in, what it answers out.

    Vision tower and connector are frozen, and in use as if they were not in training.
    known: visual tokens of pictures.  answers: the words that are compared.
    shared_prefix: reads what all rows of a batch begin with once.  Not possible under gradient checkpointing, which
        allows no cache of keys and values.
    """

    accepts_loss_kwargs = False  # Trainer averages over accumulated batches

    def __init__(
        self,
        model: Any,
        processor: VTCProcessor,
        known: VisualTokens,
        answers: AnswerTokens,
        *,
        shared_prefix: bool = True,
    ) -> None:
        super().__init__(model)
        self.eyes = FrozenEyes(model, processor.image_processor, known)
        self._backbone = backbone_of(model.config)
        self.words = [answers.yes, answers.no, *answers.numbers]
        self.shared_prefix = shared_prefix

    def train(self, mode: bool = True) -> AnswerWriter:
        """Of the language model only: what the tower sees must not depend on when it looks."""
        super().train(mode)
        self.eyes.rest()
        return self

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each answer over the whole vocabulary, in nats, ``[N]``, and the logits of all words that
        are answers, ``[N, A]``; both float32.

        batch: what :class:`RerankCollator` makes, on the model's device.
        """
        seen = self.eyes.look(batch["fresh"], batch["cut"])
        hidden_ND = torch.cat([one for part in batch["parts"] for one in self._read(part, seen)])
        logits_NV = self.model.lm_head(hidden_ND).float()
        return F.cross_entropy(logits_NV, batch["labels"], reduction="none"), logits_NV[:, self.words].detach()

    def _read(self, part: Mapping[str, Any], seen: Mapping[PictureKey, Tensor]) -> Iterator[Tensor]:
        """For each group the hidden states from which its answers come, [n, D]."""
        embed = self.model.get_input_embeddings()
        language_model = self.model.model.language_model
        P = len(part["opening"])
        opened: Any = None
        if self.shared_prefix and P:
            opened = DynamicCache(config=self.model.config.text_config)
            language_model(inputs_embeds=embed(part["opening"])[None], past_key_values=opened, use_cache=True)
        for group in part["groups"]:
            input_ids, branch_BL, position_ids = group["input_ids"], group.get("branch"), group["position_ids"]
            rows = len(input_ids)
            if opened is None:
                input_ids = torch.cat([part["opening"].expand(rows, -1), input_ids], dim=1)
                places = torch.arange(P, device=input_ids.device).expand(*position_ids.shape[:-1], -1)
                position_ids = torch.cat([places, position_ids], dim=-1)
                branch_BL = None if branch_BL is None else F.pad(branch_BL, (P, 0))
            embeds_BLD = embed(input_ids)
            more: dict[str, Any] = {}
            if group["pictures"]:
                tokens = self.eyes.tokens(group["pictures"], seen, embeds_BLD)
                embeds_BLD, more = self._backbone.place(self.model.model, input_ids, embeds_BLD, tokens)
            mask = None if branch_BL is None else self._mask(branch_BL, 0 if opened is None else P)
            hidden_BLD = language_model(
                inputs_embeds=embeds_BLD,
                attention_mask=mask,  # without one it is causal: nothing real comes after the padding
                position_ids=position_ids,
                past_key_values=None if opened is None else repeated(opened, rows),
                use_cache=opened is not None,
                **more,
            ).last_hidden_state
            if opened is None:
                hidden_BLD = hidden_BLD[:, P:]
            yield hidden_BLD.flatten(0, 1)[group["answers"]]

    def _mask(self, branch_BL: Tensor, seen: int) -> Tensor:
        """Which tokens a token may look at, [B, 1, L, seen + L]: those before it, in the trunk or its own branch.

        seen: tokens before the L of the row, which all may look at.
        """
        _, L = branch_BL.shape
        earlier_LL = torch.ones(L, L, dtype=torch.bool, device=branch_BL.device).tril()
        trunk_B1L, own_BLL = (branch_BL == 0)[:, None], branch_BL[:, :, None] == branch_BL[:, None]
        allowed_B1LL = F.pad((trunk_B1L | own_BLL) & earlier_LL, (seen, 0), value=True)[:, None]
        if self.model.config.text_config._attn_implementation != "eager":
            return allowed_B1LL
        return torch.zeros(allowed_B1LL.shape, device=branch_BL.device).masked_fill(
            ~allowed_B1LL, torch.finfo(torch.float32).min
        )


class RerankTrainer(BatchTrainer):
    """``Trainer`` with the losses of pairs and lists, and both on held-out queries as its evaluation."""

    def __init__(
        self,
        *,
        batches: Batches,
        sampler: RerankSampler,
        recipe: RerankRecipe,
        collate: RerankCollator,
        **more: Any,
    ) -> None:
        self.held_out = sampler.held_out
        super().__init__(batches=batches, eval_dataset=self.held_out, max_unreadable=recipe.max_unreadable, **more)
        self.sampler = sampler
        self.recipe = recipe
        self.collate = collate

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean loss of a pair's two answers and of a list's, weighted, over the rows of all processes (eq. 5 and 6).

        Raises RecipeError on a loss that is not finite, DatasetError when too many pictures cannot be read.
        """
        self._begin(inputs, ["qids", "dids"])
        loss_N, _ = model(inputs)
        count_K = torch.bincount(inputs["kinds"], inputs["weights"], minlength=len(_KINDS))
        count_K = self.accelerator.reduce(count_K, "sum").clamp(min=1)
        weight_K = torch.tensor(
            [self.recipe.pointwise_weight, self.recipe.pointwise_weight, self.recipe.listwise_weight]
        ).to(count_K)
        loss = (loss_N * inputs["weights"] * (weight_K / count_K)[inputs["kinds"]]).sum()
        self._check(loss, self.state.global_step)
        return loss * world_size()  # processes average their gradients, where a sum is wanted

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """On the held-out rows: both losses, as weighted in training together, and two shares.

        ``eval_pair_accuracy``: of the rows whose right candidate is the likelier Yes.
        ``eval_list_accuracy``: of the lists of which the right number is the likeliest.
        """
        started = time.monotonic()
        totals = self._totals()
        metrics: dict[str, float] = {}
        if totals["rows"]:
            metrics["eval_pointwise_loss"] = totals["pointwise"] / totals["rows"]
            metrics["eval_pair_accuracy"] = totals["pairs_right"] / totals["rows"]
        if totals["lists"]:
            metrics["eval_listwise_loss"] = totals["listwise"] / totals["lists"]
            metrics["eval_list_accuracy"] = totals["lists_right"] / totals["lists"]
        metrics["eval_loss"] = self.recipe.pointwise_weight * metrics.get("eval_pointwise_loss", 0.0)
        metrics["eval_loss"] += self.recipe.listwise_weight * metrics.get("eval_listwise_loss", 0.0)
        return self._validated(metrics, started)

    @torch.no_grad()
    def _totals(self) -> dict[str, float]:
        """Sums over the held-out rows of all processes."""
        model: Any = self.model
        model.eval()
        names = ("rows", "pointwise", "pairs_right", "lists", "listwise", "lists_right")
        totals = dict.fromkeys(names, 0.0)
        own = share(self.held_out)
        for start in range(0, len(own), self.recipe.batch_size):
            rows = own[start : start + self.recipe.batch_size]
            batch: Any = self._prepare_input(self.collate(rows))
            loss_N, logits_NA = model(batch)
            kinds, counted = batch["kinds"], batch["weights"] > 0
            asked, yes, no = (counted & (kinds == kind) for kind in (_LIST, _YES, _NO))
            margin_RR = torch.full((2, len(rows)), math.nan, device=loss_N.device)  # of right and wrong candidates
            for place, some in enumerate((yes, no)):
                margin_RR[place, batch["rows"][some]] = logits_NA[some, 0] - logits_NA[some, 1]
            number_NA = logits_NA[:, 2:]
            beyond = torch.arange(number_NA.shape[1], device=loss_N.device) >= batch["choices"][:, None]
            chosen = number_NA.masked_fill(beyond, -math.inf).argmax(dim=1)
            words = torch.tensor(model.words[2:], device=loss_N.device)
            found = {
                "rows": yes.sum(),
                "pointwise": loss_N[yes | no].sum(),
                "pairs_right": (margin_RR[0] > margin_RR[1]).sum(),
                "lists": asked.sum(),
                "listwise": loss_N[asked].sum(),
                "lists_right": (words[chosen] == batch["labels"])[asked].sum(),
            }
            totals = {name: totals[name] + float(value) for name, value in found.items()}
        summed = self.accelerator.reduce(torch.tensor(list(totals.values()), device=self.args.device), "sum")
        model.train()
        return dict(zip(names, summed.tolist(), strict=True))


def train_rerank(
    model: Any,
    processor: VTCProcessor,
    *,
    settings: RerankerSettings,
    mixture: TaskMixture,
    recipe: RerankRecipe,
    optimizer: OptimizerRecipe,
    folder: Path,
    seed: int,
) -> RerankTrainer:
    """Trains the language model and its head in place, or the adapters that are in it, and returns the trainer.

    settings: how queries and candidates are written and tiled.
    mixture: tasks whose negatives are hard ones; ``also_relevant`` of their queries are positives too.
    Under a launcher of several processes they train together, each with all weights.  Resumes from ``folder`` if a run
    was stopped there.
    Raises RecipeError for flash attention and for sharded weights, DatasetError when no query has a negative.
    """
    text_config: Any = model.config.text_config
    if "flash" in str(text_config._attn_implementation):  # knows no mask, and candidates must not see each other
        raise RecipeError("The stage rerank does not work with flash attention: take sdpa.")
    sampler = RerankSampler(
        mixture,
        batch_size=recipe.batch_size * world_size(),
        min_negatives=recipe.min_negatives,
        max_negatives=recipe.max_negatives,
        seed=seed,
        held_out=recipe.eval_queries,
        only_lists=not recipe.pointwise_weight,
    )
    accumulated = optimizer.gradient_accumulation_steps
    num_steps = optimizer.steps(sampler.counts.trained, sampler.batch_size * accumulated)
    known = VisualTokens(recipe.visual_tokens_bytes)
    formatter = RerankFormatter(processor, settings)
    pictures = Pictures(
        processor.image_processor, max_tiles=settings.max_tiles, max_pixels=settings.max_pixels, max_bytes=0
    )
    collate = RerankCollator(
        formatter,
        pictures,
        known,
        pointwise=recipe.pointwise_weight > 0,
        listwise=recipe.listwise_weight > 0,
    )
    if optimizer.gradient_checkpointing:
        recompute_activations(model)
    writer = AnswerWriter(model, processor, known, collate.answers, shared_prefix=not optimizer.gradient_checkpointing)
    trainer = RerankTrainer(
        model=writer,
        args=optimizer.threaded(
            folder, seed=seed, num_steps=num_steps, eval_every=recipe.eval_every if sampler.held_out else 0
        ),
        batches=Batches(
            lambda step: collate(share(sampler.rows(step))), num_steps * accumulated, num_threads=optimizer.num_workers
        ),
        sampler=sampler,
        recipe=recipe,
        collate=RerankCollator(formatter, pictures, known),  # validation looks at both, whatever is trained
    )
    if trainer.is_sharded:
        raise RecipeError(
            "The stage rerank does not train sharded weights: start it without FSDP and DeepSpeed, with rerank.lora if "
            "the whole model does not fit."
        )
    trainer.run(writer)
    return trainer
