"""A judge that is a model on this machine: any image-text-to-text model of transformers that has a chat template.

Legend of shapes: B pairs of a batch, L tokens of the longest, H columns of a hidden state, A spellings of both answers.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from quarterlight.errors import CheckpointError, ImageError
from quarterlight.mining.judges import Pair, Verdict, shown, spelling
from quarterlight.models.backbones import our_model_type
from quarterlight.models.checkpoint import load_backbone, resolve_checkpoint
from quarterlight.models.device import find_device
from quarterlight.models.embedder import best_dtype

_AHEAD = 32  # pairs that are prepared while the model computes

_CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' ~ message.role ~ '\n' }}"
    "{%- for part in message.content -%}"
    "{{ '<IMG_CONTEXT>' if part.type == 'image' else part.text }}"
    "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}{{ '<|im_start|>assistant\n' }}"
)
"""How models of our families are asked, which need no torchvision when we open them: the template that lies beside our
checkpoints writes prompts for embedding."""


@dataclass(frozen=True)
class _Prepared:
    """A pair as the model reads it; one row, not padded."""

    pair: Pair
    inputs: Mapping[str, Tensor]

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


class TransformersJudge:
    """Compares the logits of the answers at the last token of the prompt, and computes no others.

    The language head is replaced by its few rows for the spellings of yes and no that are one token; of each answer the
    likeliest counts.  Prompts are padded on the right, which changes nothing under causal attention, so that neither
    does how they are batched.

    model: a folder, bundled name or hub id.  tokens_per_batch: visual and text tokens, padding included; a longer
    prompt is a batch of its own.  max_pixels: of a picture as it is shown.  dtype, device: as for ``Embedder``.
    Raises CheckpointError when there is no such model, it has no language head, or no spelling of an answer is a token.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokens_per_batch: int = 16_384,
        max_pixels: int = 1_048_576,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name = str(model)
        self.tokens_per_batch = tokens_per_batch
        self.max_pixels = max_pixels
        self.device = find_device(device)
        folder = resolve_checkpoint(model)
        self._model, self.processor, self._template = _load(folder, dtype or best_dtype(self.device), self.device)
        yes, no = answer_tokens(self.processor.tokenizer, folder)
        self._num_yes = len(yes)
        _narrow(self._model, [*yes, *no])

    def judge(self, pairs: Iterable[Pair]) -> Iterator[Sequence[Verdict]]:
        """A group of verdicts for each batch."""
        for batch in self._batches(pairs):
            if isinstance(batch, Verdict):
                yield [batch]
                continue
            logits_BA = self._answer(batch)
            yes_B, no_B = (part.amax(1).tolist() for part in logits_BA.tensor_split([self._num_yes], dim=1))
            yield [self._verdict(one.pair, yes, no) for one, yes, no in zip(batch, yes_B, no_B, strict=True)]

    def _verdict(self, pair: Pair, yes: float, no: float) -> Verdict:
        ids = pair.query.qid, pair.candidate.did
        if yes != yes or no != no:
            return Verdict(*ids, failed="the model computed NaN")
        return Verdict(*ids, yes=yes, no=no, judge=self.name)

    def _batches(self, pairs: Iterable[Pair]) -> Iterator[list[_Prepared] | Verdict]:
        """Runs of pairs that fit the budget and can be put into one tensor; and those that cannot be shown."""
        batch: list[_Prepared] = []
        for pair, future in self._prepared(pairs):
            try:
                one = _Prepared(pair, future.result())
            except ImageError as error:
                yield Verdict(pair.query.qid, pair.candidate.did, failed=str(error))
                continue
            longest = max(one.length, *(other.length for other in batch)) if batch else one.length
            if batch and ((len(batch) + 1) * longest > self.tokens_per_batch or not _fits(one.inputs, batch[0].inputs)):
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch

    def _prepared(self, pairs: Iterable[Pair]) -> Iterator[tuple[Pair, Future[Mapping[str, Tensor]]]]:
        """Pairs in order, each with its inputs, made ahead by one thread: tokenizers are not safe in several."""
        waiting: deque[tuple[Pair, Future[Mapping[str, Tensor]]]] = deque()
        with ThreadPoolExecutor(1) as thread:
            try:
                for pair in pairs:
                    waiting.append((pair, thread.submit(self.inputs, pair)))
                    if len(waiting) > _AHEAD:
                        yield waiting.popleft()
                while waiting:
                    yield waiting.popleft()
            finally:
                thread.shutdown(cancel_futures=True)

    def inputs(self, pair: Pair) -> Mapping[str, Tensor]:
        """What the model reads of a pair. Raises ImageError when a picture cannot be read."""
        content: list[dict[str, Any]] = []
        for words, picture in pair.prompt():
            content.append({"type": "text", "text": words})
            if picture is not None:
                content.append({"type": "image", "image": shown(picture, self.max_pixels)})
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,  # special tokens that a text spells stay text
        )

    @torch.inference_mode()
    def _answer(self, batch: Sequence[_Prepared]) -> Tensor:
        """float32 [B, A]."""
        last_B = torch.tensor([one.length - 1 for one in batch], device=self.device)
        inputs = {name: value.to(self.device) for name, value in _stack([one.inputs for one in batch]).items()}
        pixels = inputs.get("pixel_values")
        if pixels is not None:
            inputs["pixel_values"] = pixels.to(self._model.dtype)
        logits_BLA = self._model(**inputs, use_cache=False).logits
        return logits_BLA[torch.arange(len(batch), device=self.device), last_B].float().cpu()


def answer_tokens(tokenizer: Any, where: object) -> tuple[list[int], list[int]]:
    """The ids that spell yes, and those that spell no, in one token each, in whatever case and with or without a blank.

    where: for the message.  Raises CheckpointError when either has no such spelling.
    """
    found: dict[str, set[int]] = {"yes": set(), "no": set()}
    for word, ids in found.items():
        for spelt in (word, word.capitalize(), word.upper()):
            for blank in ("", " "):
                one = tokenizer.encode(f"{blank}{spelt}", add_special_tokens=False)
                if len(one) == 1 and spelling(tokenizer.decode(one)) == word:
                    ids.add(one[0])
        if not ids:
            raise CheckpointError(f"The tokenizer of {where} spells {word!r} in several tokens: it cannot judge.")
    return sorted(found["yes"]), sorted(found["no"])


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, str | None]:
    """Model, processor, and a chat template in place of the processor's."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if our_model_type(str(kind)):
        model, processor = load_backbone(folder, dtype=dtype, device=device, language_head=True)
        return model, processor, _CHATML.replace("<IMG_CONTEXT>", processor.picture)
    auto: Any = AutoModelForImageTextToText
    try:
        model, report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        reader = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a model of pictures and text: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder} lacks {len(missing)} of the model's weights, {missing[0]} among them.")
    if getattr(reader, "chat_template", None) is None:
        raise CheckpointError(f"{folder} has no chat template, so that it cannot be asked.")
    return model.to(device).eval(), reader, None


def _narrow(model: Any, rows: list[int]) -> None:
    """Leaves nothing of the language head but some rows."""
    head = model.get_output_embeddings()
    narrow = nn.Linear(head.in_features, len(rows), bias=head.bias is not None, device="meta")
    narrow.weight = nn.Parameter(head.weight.detach()[rows].clone(), requires_grad=False)
    if head.bias is not None:
        narrow.bias = nn.Parameter(head.bias.detach()[rows].clone(), requires_grad=False)
    model.set_output_embeddings(narrow)


def _fits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two rows can be stacked: they have pictures or not, and those are of one shape."""
    return one.keys() == other.keys() and all(
        _is_tokens(name, one) or value.shape[1:] == other[name].shape[1:] for name, value in one.items()
    )


def _is_tokens(name: str, inputs: Mapping[str, Tensor]) -> bool:
    return inputs[name].shape == inputs["input_ids"].shape


def _stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch: what goes with tokens padded with zeros on the right, all else one after the other.

    The padding is behind the last token that is looked at, and hidden by the attention mask.
    """
    return {
        name: nn.utils.rnn.pad_sequence([row[name][0] for row in rows], batch_first=True)
        if _is_tokens(name, rows[0])
        else torch.cat([row[name] for row in rows])
        for name in rows[0]
    }
