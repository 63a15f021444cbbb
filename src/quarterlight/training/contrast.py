"""Contrastive training on ``transformers.Trainer``: InfoNCE over all processes, validation while it runs.

Every process embeds its share of a batch and sees the embeddings of all.  Each works out the whole loss, takes the
gradient of its own rows and goes backwards through them: what the processes add to the weights sums to the gradient of
the loss, whatever their number.

Q queries and C candidates of a batch, U of them distinct, over all processes; R rows of one process, its queries first;
B rows of a chunk; D columns of an embedding, E of a teacher's.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from quarterlight.data.contrastive import BatchSampler, TaskMixture
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import RecipeError
from quarterlight.losses.info_nce import info_nce
from quarterlight.metrics.ranking import hit
from quarterlight.metrics.search import rank_embeddings
from quarterlight.models.backbones import backbone_of
from quarterlight.models.pooling import Attention, PoolingMode, embed
from quarterlight.models.shared_prefix import embed_shared_prefix
from quarterlight.prompts import Role
from quarterlight.records import Candidate, Item, Query
from quarterlight.training.collate import ContrastiveSteps, EncodedChunk, ItemEncoder, StepPlan, StepStream
from quarterlight.training.distributed import gather, gather_objects, largest, share, share_of, world_size
from quarterlight.training.gradcache import GradCache
from quarterlight.training.optimizer import OptimizerRecipe, last_checkpoint, recompute_activations, tensorboard
from quarterlight.training.trouble import PictureLog, stop_at
from quarterlight.training.watched import WatchedTrainer


class PromptEmbedder(nn.Module):
    """A backbone as training sees it: inputs of sides of a batch in, embeddings of norm 1 of all rows out, ``[B, D]``.

    shared_prefix: reads what the rows of a side have in common once.  Not possible under gradient checkpointing, which
        allows no cache of keys and values, nor where weights are sharded: they are gathered for the backward pass of
        what a layer returns, and a cache is nothing that it returns.

    ``Trainer`` saves a transformers model under the names of its published weights, but resumes it without translating
    them back: the language model of an InternVL would start anew without a word.  In here it keeps its names.
    """

    def __init__(self, backbone: nn.Module, shared_prefix: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.shared_prefix = shared_prefix
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)  # where FSDP cuts

    def forward(self, *sides: Mapping[str, Any]) -> Tensor:
        return torch.cat([self._embed(inputs) for inputs in sides])

    def _embed(self, inputs: Mapping[str, Any]) -> Tensor:
        nothing = None
        if world_size() > 1 and "pixel_values" not in inputs:
            nothing = backbone_of(self.backbone.config).blank(self.backbone)
        if self.shared_prefix:
            embedding_BD = embed_shared_prefix(self.backbone, inputs)
        else:
            names = ("input_ids", "attention_mask", "instruction_mask", "position_ids", "pixel_values", "grids")
            plain = {name: inputs[name] for name in names if name in inputs}
            embedding_BD = embed(self.backbone, plain, pooling=PoolingMode.LAST_TOKEN, attention=Attention.CAUSAL)
        return embedding_BD if nothing is None else embedding_BD + nothing


@dataclass(frozen=True, kw_only=True)
class ContrastRecipe:
    """What a contrastive stage does beyond its optimiser."""

    batch_size: int = 256
    """queries of a batch on each device"""
    sub_batch_size: int | None = None
    """the batch of all devices is made of runs of so many queries, each of one task; without it, it is of one task"""
    num_negatives: int = 0
    """hard negatives per query, at most"""
    fill: Literal["none", "repeat"] = "none"
    """a query with fewer negatives has fewer (none), or has some of them twice (repeat)"""
    temperature: float = 0.03
    """divides the scores (paper: 0.03)"""
    symmetric: bool = False
    """also ask each target for its query"""
    hardness_weight: float = 0.0
    """adds so much of its score to the logit of each negative, without gradient (LLaVE, arXiv:2503.04812)"""
    dimensions: Sequence[int] | None = None
    """the loss is the mean over so many first columns of the embeddings (Matryoshka); without them, it is of all"""
    chunk_tokens: int | None = None
    """tokens, padding included, that go through the model at once; without it, the whole batch of a device does"""
    max_unreadable: float = 0.01
    """share of unreadable pictures above which training stops; up to it they are left out of the loss"""
    eval_every: int = 1000
    """steps between validations; 0 for none"""
    eval_queries: int = 500
    """queries of a validation task that are tried, and as many candidates besides their positives"""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "sub_batch_size": 1, "chunk_tokens": 1, "eval_queries": 1}
        for name, lowest in {**least, "num_negatives": 0, "hardness_weight": 0, "eval_every": 0}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise RecipeError(f"{name} must be at least {lowest}, got {value}.")
        if self.temperature <= 0:
            raise RecipeError(f"temperature must be above 0, got {self.temperature}.")
        if self.fill not in ("none", "repeat"):
            raise RecipeError(f"fill must be none or repeat, got {self.fill!r}.")
        if self.dimensions is not None and (not self.dimensions or min(self.dimensions) < 1):
            raise RecipeError(f"dimensions must be a list of numbers of columns, got {self.dimensions}.")
        if not 0 <= self.max_unreadable <= 1:
            raise RecipeError(f"max_unreadable must be a share from 0 to 1, got {self.max_unreadable}.")


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


class ContrastiveTrainer(WatchedTrainer):
    """``Trainer`` with InfoNCE between two sides, and P@1 on validation tasks as its evaluation.

    steps: what each batch holds.  num_threads: that prepare inputs ahead of the model.
    teacher, teacher_weight: as in :func:`train_contrastive`.
    """

    def __init__(
        self,
        *,
        steps: ContrastiveSteps,
        recipe: ContrastRecipe,
        validation: Sequence[RetrievalTask],
        num_threads: int = 0,
        teacher: nn.Module | None = None,
        teacher_weight: float = 0.0,
        **more: Any,
    ) -> None:
        more["eval_dataset"] = list(validation)  # Trainer asks for one, though evaluate() is ours
        super().__init__(**more)
        self.steps = steps
        self.recipe = recipe
        self.num_threads = num_threads
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        self.teacher_weight = teacher_weight
        self._folder = Path(str(self.args.output_dir))
        self._stream: StepStream | None = None
        self._started = time.monotonic()
        self._waited = 0.0
        self._pictures = PictureLog(self._folder, recipe.max_unreadable)

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
        """InfoNCE of one batch (paper, eq. 2), whose gradients are added to those of the weights.

        Raises RecipeError on a loss that is not finite, DatasetError when too many pictures cannot be read.
        """
        if self._stream is None:
            self._started, self._waited = time.monotonic(), 0.0
            total = len(self.train_dataset)  # type: ignore[arg-type]
            self._stream = StepStream(self.steps, inputs["step"], total, num_threads=self.num_threads)
        model.train()
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
        loss, gradient_RD = self._loss(plan, rows, reasons)
        steps = self.current_gradient_accumulation_steps
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

    def _loss(self, plan: StepPlan, rows: _Rows, reasons: list[str]) -> tuple[Tensor, Tensor]:
        """The loss of the whole batch, and its gradient with respect to this process's rows, ``[R, D]``."""
        num_queries, own_queries = len(plan.batch.queries), len(share(plan.batch.queries))
        query = rows.gathered(0, own_queries, num_queries)
        candidate = rows.gathered(own_queries, plan.num_rows, plan.num_distinct)
        index_C = plan.candidate_index.to(self.args.device)
        masks: dict[str, Any] = {}
        if not (query.readable_R.all() and candidate.readable_R.all()):
            readable_C = candidate.readable_R[index_C]
            masks = {"row_mask_Q": query.readable_R & readable_C[:num_queries], "candidate_mask_C": readable_C}
            reasons = gather_objects(reasons)
        self._pictures.add(plan.num_pictures, reasons)
        self._check_width(rows.embedding_RD.shape[1])
        query_QD, candidate_UD = query.embedding_RD.requires_grad_(), candidate.embedding_RD.requires_grad_()
        loss = info_nce(
            query_QD,
            candidate_UD[index_C],
            temperature=self.recipe.temperature,
            known_positive_QC=torch.from_numpy(plan.batch.known_positive).to(self.args.device),
            symmetric=self.recipe.symmetric,
            hardness_weight=self.recipe.hardness_weight,
            dimensions=self.recipe.dimensions,
            **masks,
        )
        if query.wanted_RE is not None and candidate.wanted_RE is not None:
            step = plan.step // self.args.gradient_accumulation_steps
            weight = self.teacher_weight * (1 - step / self.state.max_steps)
            loss = loss + weight * (
                _distance(query_QD, query.wanted_RE, query.readable_R)
                + _distance(candidate_UD, candidate.wanted_RE, candidate.readable_R)
            )
        if not torch.isfinite(loss):
            stop_at(self._folder, plan.step, loss.item(), what="loss", **self._batch_ids)
        gradient_QD, gradient_UD = torch.autograd.grad(loss, [query_QD, candidate_UD])
        return loss.detach(), torch.cat([share_of(gradient_QD), share_of(gradient_UD)])

    def _check_width(self, width: int) -> None:
        if self.recipe.dimensions is not None and max(self.recipe.dimensions) > width:
            raise RecipeError(
                f"dimensions must not be above the {width} columns of the model's embeddings, got "
                f"{list(self.recipe.dimensions)}."
            )

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
        start = time.monotonic()
        tasks: Any = self.eval_dataset
        metrics = {f"eval_p1_{task.dataset}_{task.task}": self._precision(task) for task in tasks}
        metrics["eval_p1_mean"] = float(np.mean(list(metrics.values())))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._started += time.monotonic() - start
        return metrics

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


def train_contrastive(
    model: nn.Module,
    *,
    encode: ItemEncoder,
    mixture: TaskMixture,
    validation: Sequence[RetrievalTask],
    recipe: ContrastRecipe,
    optimizer: OptimizerRecipe,
    folder: Path,
    seed: int,
    teacher: nn.Module | None = None,
    teacher_weight: float = 0.0,
) -> ContrastiveTrainer:
    """Trains ``model``, a :class:`PromptEmbedder` or a teacher, in place, and returns its trainer.

    teacher, teacher_weight: adds 1 - cosine to the teacher's embedding of the same item, so weighted at the first step
        and falling linearly to zero; ``encode`` must then make the teacher's inputs too.
    Under a launcher of several processes (torchrun, accelerate launch) they train together.  Where the weights are
    sharded, the first process's model has them whole in the end.
    Resumes from ``folder`` if a run was stopped there.
    """
    sampler = BatchSampler(
        mixture,
        batch_size=recipe.batch_size * world_size(),
        num_negatives=recipe.num_negatives,
        seed=seed,
        sub_batch_size=recipe.sub_batch_size,
        fill=recipe.fill,
    )
    accumulated = optimizer.gradient_accumulation_steps
    num_steps = optimizer.steps(sampler.steps_per_epoch, accumulated)
    evaluating = recipe.eval_every > 0 and len(validation) > 0
    arguments = optimizer.arguments(
        folder,
        seed=seed,
        num_steps=num_steps,
        dataloader_num_workers=0,  # the loader only counts; threads prepare the inputs
        dataloader_multiprocessing_context=None,
        eval_strategy="steps" if evaluating else "no",
        eval_steps=recipe.eval_every if evaluating else None,
    )
    assert arguments.world_size * recipe.batch_size == sampler.batch_size, "met the other processes too late"
    if optimizer.gradient_checkpointing:
        recompute_activations(getattr(model, "backbone", model))
    trainer = ContrastiveTrainer(
        model=model,
        args=arguments,
        train_dataset=_StepNumbers(num_steps * accumulated),
        steps=ContrastiveSteps(sampler, encode, seed=seed, chunk_tokens=recipe.chunk_tokens),
        recipe=recipe,
        validation=validation,
        num_threads=optimizer.num_workers,
        teacher=teacher,
        teacher_weight=teacher_weight,
        callbacks=[tensorboard(folder)],
    )
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded:  # which changes the modules for good
        trainer.model = trainer.model_wrapped = copy.deepcopy(model)
        if isinstance(trainer.model, PromptEmbedder):
            trainer.model.shared_prefix = False
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if sharded:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            model.load_state_dict(state)
    return trainer
