"""What stages that train an embedder have in common, whatever their loss, on ``transformers.Trainer``.

Every process embeds its share of a batch and sees the embeddings of all.  Each works out the whole loss, takes the
gradient of its own rows and goes backwards through them: what the processes add to the weights sums to the gradient of
the loss, whatever their number.

Q queries and C candidates of a batch, U of them distinct, over all processes; R rows of one process, its queries first;
B rows of a chunk; D columns of an embedding, E of a teacher's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from quarterlight.data.contrastive import Batch
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import RecipeError, check_least, check_share
from quarterlight.metrics.ranking import hit
from quarterlight.metrics.search import rank_embeddings
from quarterlight.prompts import Role
from quarterlight.records import Candidate, Item, Query
from quarterlight.training.collate import ContrastiveSteps, EncodedChunk, ItemEncoder, Sampler, StepPlan, StepStream
from quarterlight.training.distributed import gather, gather_objects, largest, share, share_of, world_size
from quarterlight.training.gradcache import GradCache
from quarterlight.training.optimizer import OptimizerRecipe, recompute_activations
from quarterlight.training.prompt_embedder import PromptEmbedder
from quarterlight.training.temperature import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    NAME,
    Temperature,
    check_temperature,
    remove_temperature,
)
from quarterlight.training.watched import WatchedTrainer


@dataclass(frozen=True, kw_only=True)
class EmbedRecipe:
    """What every stage that trains an embedder does beyond its optimiser, whatever its loss."""

    batch_size: int = 256
    """queries of a batch on each device"""
    temperature: float = 0.03
    """divides the scores (Magic-MM-Embedding: 0.03, U-MARVEL: 0.05 at the start)"""
    learn_temperature: bool = False
    """trains it with the weights, from there on"""
    inherit_temperature: bool = False
    """begins with, or keeps, what the model of the stage before was trained with, where that is known"""
    min_temperature: float = MIN_TEMPERATURE
    """below which a learnt one does not fall"""
    max_temperature: float = MAX_TEMPERATURE
    """above which a learnt one does not rise"""
    temperature_learning_rate: float | None = None
    """of its logarithm, at the peak; without it, that of the weights"""
    chunk_tokens: int | None = None
    """tokens, padding included, that go through the model at once; without it, the whole batch of a device does"""
    visual_tokens_bytes: int = 1 << 30
    """visual tokens of pictures that are kept in main memory where tower and connector are frozen and pictures are not
    augmented; others are worked out whenever they are used"""
    max_pixels: int | None = None
    """for Qwen-VL: the most pixels of a picture in this stage; without it, as the model that is made has them"""
    max_unreadable: float = 0.01
    """share of unreadable pictures above which training stops; up to it they are left out of the loss"""
    eval_every: int = 1000
    """steps between validations; 0 for none"""
    eval_queries: int = 500
    """queries of a validation task that are tried, and as many candidates besides their positives"""

    def __post_init__(self) -> None:
        check_least(self, batch_size=1, chunk_tokens=1, max_pixels=1, eval_queries=1, eval_every=0)
        check_least(self, visual_tokens_bytes=0)
        check_share(self, "max_unreadable")
        check_temperature(self.temperature, self.min_temperature, self.max_temperature, self.learn_temperature)
        if self.temperature_learning_rate is not None and not (
            self.learn_temperature and self.temperature_learning_rate > 0
        ):
            raise RecipeError(
                "temperature_learning_rate must be above 0, and is of no use without learn_temperature; got "
                f"{self.temperature_learning_rate}."
            )


class _StepNumbers(Dataset[dict[str, int]]):
    """The numbers of a run's batches, so that ``Trainer`` resumes by skipping numbers instead of reading data."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, step: int) -> dict[str, int]:
        return {"step": step}


@dataclass
class _Rows:
    """What is known of rows: embeddings ``[R, D]``, whether their pictures could be read ``[R]``, and the teacher's
    embeddings ``[R, E]`` if there is one; no column of any of them has a graph."""

    embedding_RD: Tensor
    readable_R: Tensor
    wanted_RE: Tensor | None

    def gathered(self, start: int, stop: int, total: int) -> _Rows:
        """The rows from ``start`` to ``stop`` of all processes, which are ``total`` together."""
        D = self.embedding_RD.shape[1]
        wanted = [] if self.wanted_RE is None else [self.wanted_RE]
        columns = torch.cat([self.embedding_RD, self.readable_R[:, None], *wanted], dim=1)
        columns = gather(columns[start:stop], total)
        return _Rows(columns[:, :D], columns[:, D].bool(), columns[:, D + 1 :] if wanted else None)


@dataclass(frozen=True, kw_only=True)
class EmbeddedBatch:
    """A batch with the embeddings of all its rows, on all processes.

    candidate_UD: distinct candidates.  index_C: which of them each candidate of the batch is.
    readable_Q, readable_C: bool, False for rows with a picture that cannot be read.
    """

    batch: Batch
    query_QD: Tensor
    candidate_UD: Tensor
    index_C: Tensor
    temperature: float | Tensor
    readable_Q: Tensor
    readable_C: Tensor


class EmbeddingTrainer(WatchedTrainer):
    """``Trainer`` with a loss of the embeddings of a whole batch, and P@1 on validation tasks as its evaluation.

    steps: what each batch holds.  num_threads: that prepare inputs ahead of the model.
    teacher, teacher_weight: as in :func:`quarterlight.training.contrast.train_contrastive`.
    """

    recipe: EmbedRecipe

    def __init__(
        self,
        *,
        steps: ContrastiveSteps,
        recipe: Any,
        validation: Sequence[RetrievalTask],
        num_threads: int = 0,
        teacher: nn.Module | None = None,
        teacher_weight: float = 0.0,
        **more: Any,
    ) -> None:
        more["eval_dataset"] = list(validation)  # Trainer asks for one, though evaluate() is ours
        self._learnt: Temperature | None = None
        if recipe.learn_temperature:  # before Trainer counts what it trains
            bounds = recipe.min_temperature, recipe.max_temperature
            self._learnt = Temperature(more["model"], recipe.temperature, *bounds)
        super().__init__(max_unreadable=recipe.max_unreadable, **more)
        self.steps = steps
        self.recipe = recipe
        self.num_threads = num_threads
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        self.teacher_weight = teacher_weight
        self._stream: StepStream | None = None
        self._waited = 0.0

    @property
    def temperature(self) -> float:
        """What the scores are divided by, after the last step."""
        return self.recipe.temperature if self._learnt is None else self._learnt.value

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As ``Trainer`` does; a temperature does not decay."""
        return [name for name in super().get_decay_parameter_names(model) if name.rpartition(".")[2] != NAME]

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """As ``Trainer`` does; a temperature with a learning rate of its own is a group of its own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*arguments, **options)
        rate = self.recipe.temperature_learning_rate
        if made and self._learnt is not None and rate is not None:
            one = self._learnt.parameter
            for group in optimizer.param_groups:
                group["params"] = [other for other in group["params"] if other is not one]
            optimizer.add_param_group({"params": [one], "weight_decay": 0.0, "lr": rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the temperature to what is said about training."""
        if "loss" in logs and self._learnt is not None:
            logs["temperature"] = self._learnt.value
        super().log(logs, start_time)

    @property
    def utilisation(self) -> float:
        """The share of the training time, validation aside, in which the model did not wait for its inputs."""
        return 1 - self._waited / max(time.monotonic() - self._started, 1e-9)

    def get_train_dataloader(self) -> DataLoader[dict[str, int]]:
        """The numbers of all batches on every process: each finds out for itself what it has to do with them."""
        return DataLoader(self.train_dataset, collate_fn=lambda batch: batch[0])  # type: ignore[arg-type]

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Ends the threads when training ends, however it ends."""
        try:
            return super().train(*arguments, **options)
        finally:
            if self._stream is not None:
                self._stream.close()
                self._stream = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss of one batch, whose gradients are added to those of the weights.

        Raises RecipeError on a loss that is not finite, DatasetError when too many pictures cannot be read.
        """
        if self._stream is None:
            self._started, self._waited = time.monotonic(), 0.0
            total = len(self.train_dataset)  # type: ignore[arg-type]
            self._stream = StepStream(self.steps, inputs["step"], total, num_threads=self.num_threads)
        model.train()
        if self._learnt is not None:
            self._learnt.clamp()
        with self._waiting():
            plan = self._stream.plan()
        assert plan.step == inputs["step"], "the stream and Trainer disagree about the step"
        self._batch_ids = dict(zip(("qids", "dids"), plan.batch.ids, strict=True))
        num_chunks = largest(len(plan.chunks), self.args.device)
        cache = GradCache[list[Any]](
            lambda sides: model(*sides), self._backward, num_chunks=num_chunks, device=self.args.device
        )
        # the stream gives a single chunk once, several twice
        kept = list(self._chunks(plan, num_chunks)) if len(plan.chunks) < 2 else None
        rows, reasons = self._embed_rows(plan, cache, kept or self._chunks(plan, num_chunks))
        steps = self.current_gradient_accumulation_steps
        loss, gradient_RD = self._loss(plan, rows, reasons, steps)
        gradient_RD *= world_size() / steps  # the processes' gradients will be averaged
        for index, chunk in enumerate(kept or self._chunks(plan, num_chunks)):
            gradient_BD = gradient_RD[chunk.rows] if chunk.rows else gradient_RD.new_zeros(1, gradient_RD.shape[1])
            with contextlib.nullcontext() if index == num_chunks - 1 else self._unfinished(model):
                cache.backward(self._on_device(chunk), gradient_BD)
        return loss / steps

    def _backward(self, scalar: Tensor) -> None:
        deepspeed = self.accelerator.distributed_type is DistributedType.DEEPSPEED
        # the gradient has been divided by the accumulated batches already, which DeepSpeed would do once more
        self.accelerator.backward(scalar, **({"scale_wrt_gas": False} if deepspeed else {}))

    def _chunks(self, plan: StepPlan, num_chunks: int) -> Iterator[EncodedChunk]:
        """As many chunks as the process with the most has; in place of those that this one lacks, rows without part in
        the loss."""
        assert self._stream is not None
        for _ in plan.chunks:
            with self._waiting():
                chunk = self._stream.chunk()
            yield chunk
        for _ in range(num_chunks - len(plan.chunks)):
            yield self.steps.encoded(plan.dummy)

    def _on_device(self, chunk: EncodedChunk) -> list[Any]:
        sides: Any = self._prepare_input(chunk.inputs)
        return sides

    def _embed_rows(
        self, plan: StepPlan, cache: GradCache[list[Any]], chunks: Iterator[EncodedChunk] | list[EncodedChunk]
    ) -> tuple[_Rows, list[str]]:
        """This process's rows, and why pictures of theirs could not be read."""
        rows: _Rows | None = None
        reasons: list[str] = []
        for chunk in chunks:
            sides = self._on_device(chunk)
            embedding_BD = cache.embed(sides).float()
            wanted_BE = self._teach(sides)
            if rows is None:
                rows = _Rows(
                    embedding_BD.new_empty(plan.num_rows, embedding_BD.shape[1]),
                    torch.ones(plan.num_rows, dtype=torch.bool, device=embedding_BD.device),
                    None if wanted_BE is None else wanted_BE.new_empty(plan.num_rows, wanted_BE.shape[1]),
                )
            if chunk.rows:
                rows.embedding_RD[chunk.rows] = embedding_BD
                rows.readable_R[list(chunk.unreadable)] = False
                reasons += [reason for one in chunk.unreadable.values() for reason in one]
                if wanted_BE is not None and rows.wanted_RE is not None:
                    rows.wanted_RE[chunk.rows] = wanted_BE
        assert rows is not None, "a step has at least one chunk"
        return rows, reasons

    @torch.no_grad()
    def _teach(self, sides: Sequence[Mapping[str, Any]]) -> Tensor | None:
        return None if self.teacher is None else self.teacher(*[side["teacher"] for side in sides]).float()

    def _loss(self, plan: StepPlan, rows: _Rows, reasons: list[str], steps: int) -> tuple[Tensor, Tensor]:
        """The loss of the whole batch, and its gradient with respect to this process's rows, ``[R, D]``.

        steps: accumulated batches, whose mean is wanted.  A learnt temperature gets its gradient here, which is the
        same on all processes: each has the loss of all rows.
        """
        num_queries, own_queries = len(plan.batch.queries), len(share(plan.batch.queries))
        query = rows.gathered(0, own_queries, num_queries)
        candidate = rows.gathered(own_queries, plan.num_rows, plan.num_distinct)
        index_C = plan.candidate_index.to(self.args.device)
        if not (query.readable_R.all() and candidate.readable_R.all()):
            reasons = gather_objects(reasons)
        self._pictures.add(plan.num_pictures, reasons)
        query_QD, candidate_UD = query.embedding_RD.requires_grad_(), candidate.embedding_RD.requires_grad_()
        wanted = [query_QD, candidate_UD, *([] if self._learnt is None else [self._learnt.parameter])]
        embedded = EmbeddedBatch(
            batch=plan.batch,
            query_QD=query_QD,
            candidate_UD=candidate_UD,
            index_C=index_C,
            temperature=self.recipe.temperature if self._learnt is None else self._learnt.tensor(),
            readable_Q=query.readable_R,
            readable_C=candidate.readable_R[index_C],
        )
        loss = self._batch_loss(embedded)
        if query.wanted_RE is not None and candidate.wanted_RE is not None:
            step = plan.step // self.args.gradient_accumulation_steps
            weight = self.teacher_weight * (1 - step / self.state.max_steps)
            loss = loss + weight * (
                _distance(query_QD, query.wanted_RE, query.readable_R)
                + _distance(candidate_UD, candidate.wanted_RE, candidate.readable_R)
            )
        self._check(loss, plan.step)
        gradient_QD, gradient_UD, *warmth = torch.autograd.grad(loss, wanted)
        if self._learnt is not None:
            self._learnt.add_gradient(warmth[0] / steps)
        return loss.detach(), torch.cat([share_of(gradient_QD), share_of(gradient_UD)])

    def _batch_loss(self, one: EmbeddedBatch) -> Tensor:
        """The loss of all rows of a batch."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _unfinished(self, model: nn.Module) -> Iterator[None]:
        """For all but the last backward pass of a step: gradients are not exchanged yet.

        FSDP exchanges them all the same, for what waits would not be sharded.
        """
        kind = self.accelerator.distributed_type
        if kind is DistributedType.DEEPSPEED:
            state = self.accelerator.gradient_state
            before = state.sync_gradients
            state._set_sync_gradients(False)
            yield
            state._set_sync_gradients(before)
        elif kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            with self.accelerator.no_sync(model):
                yield
        else:
            yield

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """P@1 per validation task, on a fixed part of it, and their mean."""
        started = time.monotonic()
        tasks: Any = self.eval_dataset
        metrics = {f"eval_p1_{task.dataset}_{task.task}": self._precision(task) for task in tasks}
        metrics["eval_p1_mean"] = float(np.mean(list(metrics.values())))
        return self._validated(metrics, started)

    def _precision(self, task: RetrievalTask) -> float:
        queries = _evenly(task.queries, self.recipe.eval_queries)
        wanted = {did for query in queries for did in query.positives}
        others = [candidate for candidate in task.candidates if candidate.did not in wanted]
        candidates = [candidate for candidate in task.candidates if candidate.did in wanted]
        candidates += _evenly(others, self.recipe.eval_queries)
        column = {candidate.did: index for index, candidate in enumerate(candidates)}
        ranks = rank_embeddings(
            self._embed_all([query.item for query in queries], "query"),
            self._embed_all([candidate.item for candidate in candidates], "document"),
            [[column[did] for did in query.positives] for query in queries],
        )
        return float(hit(ranks, k=1).mean())

    @torch.no_grad()
    def _embed_all(self, items: Sequence[Item], role: Role) -> npt.NDArray[np.float32]:
        model: Any = self.model
        model.eval()
        own = list(share(items))
        groups = self.steps.groups(own, role, most=self.recipe.batch_size)
        part: Tensor | None = None
        for index in range(largest(len(groups), self.args.device)):
            group = groups[index] if index < len(groups) else []
            batch = [own[n] for n in group] or items[:1]  # every process must use the model equally often
            embedding_BD = model(self._prepare_input(self.encode(batch, role))).float()
            if part is None:
                part = embedding_BD.new_empty(len(own), embedding_BD.shape[1])
            part[group] = embedding_BD[: len(group)]
        model.train()
        assert part is not None, "there is always something to embed"
        return gather(part, len(items)).cpu().numpy()

    @property
    def encode(self) -> ItemEncoder:
        """Makes the inputs of the model."""
        return self.steps.encode


def _distance(embedding_BD: Tensor, wanted_BD: Tensor, readable_B: Tensor) -> Tensor:
    """1 - cosine to the teacher's embeddings, averaged over the readable rows."""
    cosine_B = (embedding_BD * wanted_BD).sum(dim=1)
    return ((1 - cosine_B) * readable_B).sum() / readable_B.sum().clamp(min=1)


_Record = TypeVar("_Record", Query, Candidate)


def _evenly(records: Sequence[_Record], limit: int) -> list[_Record]:
    """At most ``limit`` of the records, spread over all of them."""
    return [records[index] for index in np.linspace(0, len(records) - 1, min(limit, len(records))).astype(int)]


@contextlib.contextmanager
def _in_step(model: Any, encode: Any) -> Iterator[None]:
    """All processes use all parts of the model equally often: ones that look at different pictures would wait for each
    other where weights are sharded.  Afterwards model and encoder are as they were."""
    before = model.shared_prefix, model.eyes, encode.known
    model.shared_prefix, model.eyes, encode.known = False, None, None
    try:
        yield
    finally:
        model.shared_prefix, model.eyes, encode.known = before


_Trainer = TypeVar("_Trainer", bound=EmbeddingTrainer)


def fit(
    kind: type[_Trainer],
    model: nn.Module,
    *,
    sampler: Sampler,
    steps_per_epoch: int,
    encode: ItemEncoder,
    validation: Sequence[RetrievalTask],
    recipe: EmbedRecipe,
    optimizer: OptimizerRecipe,
    folder: Path,
    seed: int,
    **more: Any,
) -> _Trainer:
    """Trains ``model`` in place by a kind of trainer, on what the sampler draws; see
    :func:`quarterlight.training.contrast.train_contrastive`.

    steps_per_epoch: batches that draw as many rows as there are.  more: of the trainer.
    Raises RecipeError for a learnt temperature beside sharded weights.
    """
    accumulated = optimizer.gradient_accumulation_steps
    num_steps = optimizer.steps(steps_per_epoch, accumulated)
    arguments = optimizer.threaded(
        folder, seed=seed, num_steps=num_steps, eval_every=recipe.eval_every if validation else 0
    )
    assert arguments.world_size == world_size(), "met the other processes too late"
    if optimizer.gradient_checkpointing:
        recompute_activations(getattr(model, "backbone", model))
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=_StepNumbers(num_steps * accumulated),
        steps=ContrastiveSteps(sampler, encode, seed=seed, chunk_tokens=recipe.chunk_tokens),
        recipe=recipe,
        validation=validation,
        num_threads=optimizer.num_workers,
        **more,
    )
    if trainer.is_sharded and recipe.learn_temperature:
        raise RecipeError(
            "learn_temperature does not go with sharded weights: start it without FSDP and DeepSpeed, with lora if the "
            "whole model does not fit."
        )
    is_prompted = isinstance(model, PromptEmbedder)  # and no teacher of vision towers
    with _in_step(model, encode) if trainer.is_sharded and is_prompted else contextlib.nullcontext():
        trainer.run(model)
    remove_temperature(model)
    return trainer
