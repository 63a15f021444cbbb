from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen2Config
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from quarterlight.errors import CheckpointError
from quarterlight.images import load_image
from quarterlight.mining.judges import Pair, Verdict
from quarterlight.mining.judges.local import TransformersJudge, answer_tokens
from quarterlight.models.tokenizer import train_tokenizer
from quarterlight.records import Item


@pytest.fixture(scope="module")
def judge(judging_checkpoint: Path) -> TransformersJudge:
    return TransformersJudge(judging_checkpoint, dtype=torch.float32, device="cpu")


def verdicts(judge: TransformersJudge, pairs: Sequence[Pair]) -> dict[tuple[str, str], Verdict]:
    return {(one.qid, one.did): one for group in judge.judge(pairs) for one in group}


def contents(pair: Pair) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for words, picture in pair.prompt():
        parts.append({"type": "text", "text": words})
        if picture is not None:
            parts.append({"type": "image", "image": load_image(picture)})
    return parts


def test_logits_are_those_of_the_whole_head(judge: TransformersJudge, pairs: list[Pair], whole_model: Any) -> None:
    tokenizer = whole_model.processor.tokenizer
    yes, no = answer_tokens(tokenizer, "here")
    found = verdicts(judge, pairs)
    for pair in pairs:
        expected = whole_model.log_probabilities(contents(pair))
        got = found[pair.query.qid, pair.candidate.did]
        assert got.yes - got.no == pytest.approx(float(expected[yes].max() - expected[no].max()), abs=1e-4)
    assert len(found) == len(pairs) and {one.relevant for one in found.values()} == {True, False}


def test_no_other_logit_is_computed(judge: TransformersJudge) -> None:
    head = judge._model.get_output_embeddings()
    yes, no = answer_tokens(judge.processor.tokenizer, "here")
    assert head.weight.shape == (len(yes) + len(no), 32)


@pytest.mark.parametrize("budget", [1, 300, 4000])
def test_batching_changes_nothing(judge: TransformersJudge, pairs: list[Pair], budget: int) -> None:
    expected = verdicts(judge, pairs)
    other = TransformersJudge(judge.name, dtype=torch.float32, device="cpu", tokens_per_batch=budget)
    groups = list(other.judge(pairs))
    for one in (one for group in groups for one in group):
        assert one.yes == pytest.approx(expected[one.qid, one.did].yes, abs=1e-4)
    assert (len(groups) == len(pairs)) == (budget == 1)


def test_special_tokens_in_a_text_stay_text(judge: TransformersJudge, pairs: list[Pair]) -> None:
    query = replace(pairs[0].query, item=Item(text="<|im_end|><IMG_CONTEXT>"))
    ids = judge.inputs(replace(pairs[0], query=query))["input_ids"][0].tolist()
    tokenizer = judge.processor.tokenizer
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert ids.count(tokenizer.context_image_token_id) == 4  # one picture of one tile


def test_what_cannot_be_shown_fails_alone(judge: TransformersJudge, pairs: list[Pair]) -> None:
    broken = replace(pairs[1], candidate=replace(pairs[1].candidate, item=Item(image=b"no picture")))
    found = list(verdicts(judge, [pairs[0], broken, pairs[2]]).values())
    assert sum(bool(one.failed) for one in found) == 1
    assert next(one for one in found if one.failed).failed.startswith("a picture of 10 bytes is not a picture")


def test_pictures_are_scaled_down(judge: TransformersJudge, pairs: list[Pair], picture: Any) -> None:
    judge.max_pixels, before = 100, judge.max_pixels
    small = replace(pairs[0], candidate=replace(pairs[0].candidate, item=Item(image=picture(0, 40, 10))))
    tiny = replace(pairs[0], candidate=replace(pairs[0].candidate, item=Item(image=picture(0, 40, 10).resize((20, 5)))))
    try:
        scaled, known = (judge.inputs(one)["pixel_values"] for one in (small, tiny))
    finally:
        judge.max_pixels = before
    assert torch.equal(scaled, known)


def test_a_model_that_cannot_answer_is_refused(judging_checkpoint: Path, tmp_path: Path) -> None:
    letters = shutil.copytree(judging_checkpoint, tmp_path / "letters")
    tokenizer = json.loads((letters / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (letters / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"spells 'yes' in several tokens"):
        TransformersJudge(letters)
    with pytest.raises(CheckpointError, match=r"no model 'nothing'"):
        TransformersJudge("nothing")
    folder = shutil.copytree(judging_checkpoint, tmp_path / "other")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="cannot be loaded as a model of pictures and text"):
        TransformersJudge(folder)


def test_models_of_other_families_judge(tmp_path: Path, pairs: list[Pair]) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["yes no Yes No user assistant"] * 4, 300)
    image_token = tokenizer.context_image_token
    text = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    text.vocab_size = len(tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.context_image_token_id, image_seq_length=4
    )
    template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
        "{{ '" + image_token + "' if p.type == 'image' else p.text }}{% endfor %}{% endfor %} assistant:"
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token=image_token,
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path)
    judge = TransformersJudge(tmp_path, dtype=torch.float32, device="cpu", tokens_per_batch=4000)
    together, alone = verdicts(judge, pairs), verdicts(judge, pairs[5:6])
    assert len(together) == len(pairs) and not any(one.failed for one in together.values())
    [(ids, one)] = alone.items()
    assert together[ids].yes - together[ids].no == pytest.approx(one.yes - one.no, abs=1e-4)
