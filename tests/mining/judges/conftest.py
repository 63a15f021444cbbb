"""A tiny model with a language head that says yes to some pairs of the fixture and no to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quarterlight.data.retrieval import RetrievalDataset
from quarterlight.mining.judges import QUESTION, Pair
from quarterlight.mining.judges.local import _CHATML, TransformersJudge
from quarterlight.models.checkpoint import load_backbone, save_checkpoint
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCForConditionalGeneration
from quarterlight.models.internvl_vtc.processing import InternVLVTCProcessor
from quarterlight.models.settings import EmbedderSettings
from quarterlight.models.tokenizer import train_tokenizer

FIXTURE = Path(__file__).parents[2] / "fixtures" / "retrieval"
TEXTS = [f"Determine whether it is relevant.\nQuery: \nTarget: \n{QUESTION}", "yes no Yes No", "user\nassistant\n"]


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    """Pairs of words and pictures: three queries of each of three tasks with four candidates each."""
    chosen = []
    for dataset, name in (("emoji", "t2i"), ("emoji", "it2i"), ("easy_vqa", "it2t")):
        task = RetrievalDataset(FIXTURE / dataset).load(name, "train")
        for number, query in enumerate(task.queries[:3]):
            for candidate in task.candidates[number : number + 4]:
                what = {"task": f"{dataset}/{name}", "instruction": "Determine whether it is relevant."}
                chosen.append(Pair(query=query, candidate=candidate, **what))
    return chosen


@pytest.fixture(scope="session")
def judging_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any], image_processor: Any, pairs: list[Pair]
) -> Path:
    """Its head answers yes or no along the direction in which its hidden states of the pairs differ most."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 4, 500)
    text = {**tiny_values["text_config"], "vocab_size": len(tokenizer), "tie_word_embeddings": False}
    values = {**tiny_values, "text_config": text, "tie_word_embeddings": False}
    config = InternVLVTCConfig(**values, visual_token_compression=2)
    processor = InternVLVTCProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    model = InternVLVTCForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("models") / "judging"

    def save() -> Path:
        return save_checkpoint(folder, model, processor, EmbedderSettings(), language_head=True)

    judge = TransformersJudge(save(), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        hidden = torch.cat([model.model(**judge.inputs(one)).last_hidden_state[:, -1] for one in pairs])
        mean = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        rest = hidden - hidden @ mean[:, None] * mean
        apart = torch.linalg.svd(rest - rest.mean(0)).Vh[0]
        apart -= (rest.mean(0) @ apart) / (hidden @ mean).mean() * mean  # so that the answers are balanced
        model.lm_head.weight.mul_(0.01)
        # both are always the likeliest tokens by far, in either spelling
        for spelt in ("yes", "Yes"):
            model.lm_head.weight[tokenizer.encode(spelt)] = 40 * mean + 5 * apart
        for spelt in ("no", "No"):
            model.lm_head.weight[tokenizer.encode(spelt)] = 40 * mean - 5 * apart
    return save()


class WholeModel:
    """The same model, with all of its head, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.model, self.processor = load_backbone(folder, language_head=True)

    @torch.inference_mode()
    def log_probabilities(self, content: list[dict[str, Any]]) -> torch.Tensor:
        """Of every token of the vocabulary after a user's turn."""
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=_CHATML,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
        )
        return self.model(**inputs).logits[0, -1].log_softmax(0)


@pytest.fixture(scope="session")
def whole_model(judging_checkpoint: Path) -> WholeModel:
    return WholeModel(judging_checkpoint)
