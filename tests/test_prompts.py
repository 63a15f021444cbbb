"""Prompts as they are read, word for word, and the chat template that says the same."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from quarterlight.errors import InputError
from quarterlight.prompts import (
    MARKERS,
    QUERY_INSTRUCTIONS,
    TARGET_INSTRUCTIONS,
    Prompt,
    PromptStyle,
    RerankPart,
    RerankPrompt,
    Role,
    as_sentence,
    chat_template,
    query_instruction,
    rerank_chat_template,
    target_instruction,
)

START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "golden"),
    [
        (
            Prompt(role="query", instruction="Find it.", text="a red apple"),
            "Instruct: Find it. Query: a red apple",
        ),
        (
            Prompt(role="document", instruction="Represent the given text.", text="An apple."),
            "Instruct: Represent the given text. Text: An apple.",
        ),
        (Prompt(role="query", instruction="Find it.", num_images=1), "Instruct: Find it. <image>"),
        (
            Prompt(role="query", instruction="Find it.", num_images=1, text="but sliced"),
            "Instruct: Find it. <image> Query: but sliced",
        ),
        (
            Prompt(role="document", instruction="Represent it.", num_images=3, text="three"),
            "Instruct: Represent it. <image> <image> <image> Text: three",
        ),
        (
            Prompt(role="document", instruction="Represent it.", num_images=1, text="  \n "),
            "Instruct: Represent it. <image>",
        ),
        (Prompt(role="query", num_images=1, text="what?"), "<image> Query: what?"),
        (Prompt(role="query", text="no instruction"), "Query: no instruction"),
        (
            Prompt(role="query", instruction=" Find it. ", text="\tblanks  inside \n"),
            "Instruct: Find it. Query: blanks  inside",
        ),
    ],
)
def test_golden(prompt: Prompt, golden: str) -> None:
    assert prompt.render() == START + golden + END


def test_golden_with_system_prompt() -> None:
    prompt = Prompt(role="query", instruction="Find it.", text="x", system="Be brief.\n")
    assert prompt.render() == f"<|im_start|>system\nBe brief.<|im_end|>\n{START}Instruct: Find it. Query: x{END}"


@pytest.mark.parametrize(
    ("parts", "golden"),
    [
        (
            {"role": "query", "instruction": "find it", "text": 'a "red apple"'},
            '<instruction_start>Find it.<instruction_end> a "red apple.',
        ),
        (
            {"role": "query", "instruction": "Find it?", "num_images": 2, "text": "sliced!"},
            "<image><image><instruction_start>Find it?<instruction_end> sliced!",
        ),
        (
            {"role": "query", "instruction": "Find it.", "num_images": 1},
            "<image><instruction_start>Find it.<instruction_end>.",
        ),
        ({"role": "query", "num_images": 1}, "<image>"),
        ({"role": "query", "text": "no instruction"}, "No instruction."),
        ({"role": "document", "instruction": "Represent it.", "num_images": 1, "text": '"a cat"'}, "<image>A cat."),
        ({"role": "document", "instruction": "Represent it.", "num_images": 1}, "<image>"),
    ],
)
def test_golden_u_marvel(parts: dict[str, Any], golden: str) -> None:
    """As the released code has them."""
    prompt = Prompt(**parts, system="You are a helpful assistant.", style=PromptStyle.U_MARVEL)
    assert prompt.render() == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{golden}<|im_end|>\n<|im_start|>assistant\n<emb>.<|im_end|>\n"
    )


def test_golden_marked() -> None:
    prompt = Prompt(role="query", instruction="Find it.", num_images=1, text="x", marked=True)
    said = "<instruction_start>Instruct: Find it.<instruction_end> <image> Query: x"
    assert prompt.render() == START + said + END


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a cat", "A cat."),
        ("  A cat?\n", "A cat?"),
        ('"quoted"', "Quoted."),
        ("a\r\nb\rc\r", "A\nb c."),
        ("éa!", "Éa!"),
        ("ß", "SS."),
        ("北京", "北京."),
        (" ", ""),
        ('""', ""),
        ("...", "..."),
    ],
)
def test_sentences(text: str, sentence: str) -> None:
    assert as_sentence(text) == sentence
    assert as_sentence(sentence) == sentence


@pytest.fixture(scope="module")
def marked_tokenizer(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    return tokenizer


STYLES = [(PromptStyle.MAGIC, False), (PromptStyle.MAGIC, True), (PromptStyle.U_MARVEL, True)]

PARTS: list[dict[str, Any]] = [
    {"role": role, "instruction": instruction, "num_images": images, "text": text}
    for role, instruction, images, text in itertools.product(
        ("query", "document"),
        ("", "Find it.", "'s odd: 7"),
        (0, 1, 2),
        ("", "a b", "'ll", "42", "(x)", "héllo  wörld\n\n北京", "-", '"q"', "a\r\nb\rc?"),
    )
]


@pytest.mark.parametrize(("style", "marked"), STYLES)
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_tokens_of_segments_are_tokens_of_the_whole(
    parts: dict[str, Any], style: PromptStyle, marked: bool, marked_tokenizer: Any
) -> None:
    tokenizer = marked_tokenizer
    prompt = Prompt(**parts, system="Be brief.", style=style, marked=marked)
    image = "<img><IMG_CONTEXT></img>"
    texts = [image if segment.kind == "image" else segment.text for segment in prompt.segments()]
    by_segment = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert by_segment == tokenizer(prompt.render(image))["input_ids"]


@pytest.mark.parametrize("parts", [parts for parts in PARTS if parts["instruction"]], ids=str)
@pytest.mark.parametrize("how", ["task", "prefix"])
@pytest.mark.parametrize(("style", "marked"), STYLES)
def test_chat_template_renders_the_same(
    parts: dict[str, Any], how: str, style: PromptStyle, marked: bool, tokenizer: Any
) -> None:
    role, instruction = parts["role"], parts["instruction"]
    system = f"{role}: {instruction}" if how == "prefix" else instruction
    content = [{"type": "text", "text": parts["text"]}] if parts["text"] else []
    content += [{"type": "image", "image": None}] * parts["num_images"]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": content},
    ]
    template = chat_template(
        image="<image>", defaults={"query": {}, "document": {}}, system="Be brief.", style=style, marked=marked
    )
    task = {"task": role} if how == "task" else {}
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **task)
    assert rendered == Prompt(**parts, system="Be brief.", style=style, marked=marked).render()


@pytest.mark.parametrize("role", ["query", "document"])
@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("style", PromptStyle)
def test_chat_template_defaults_follow_role_and_modality(
    role: Role, images: int, style: PromptStyle, tokenizer: Any
) -> None:
    defaults: dict[Role, dict[str, str]] = {
        one: {modality: f"{one} {modality}" for modality in ("text", "image", "image,text")}
        for one in ("query", "document")
    }
    template = chat_template(image="<image>", defaults=defaults, style=style)
    message = {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": "x"}]}
    rendered = tokenizer.apply_chat_template([message], chat_template=template, tokenize=False, task=role)
    modality = "image,text" if images else "text"
    prompt = Prompt(role=role, instruction=f"{role} {modality}", num_images=images, text="x", style=style)
    assert rendered == prompt.render()


def test_chat_template_takes_a_bare_string_for_a_document(tokenizer: Any) -> None:
    template = chat_template(image="<image>", defaults={"query": {}, "document": {"text": "Represent it."}})
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template, tokenize=False)
    assert rendered == Prompt(role="document", instruction="Represent it.", text="x").render()


def test_instructions() -> None:
    assert query_instruction("t2i") == "Retrieve relevant images based on a given query."
    assert query_instruction(None, "image,text") == QUERY_INSTRUCTIONS["it2i"]
    assert target_instruction("image") == "Represent the given image."
    assert target_instruction("image", page=True) == "Represent the given visual documents."
    assert target_instruction("text", page=True) == TARGET_INSTRUCTIONS["text"]
    assert set(QUERY_INSTRUCTIONS) == {"t2t", "t2i", "t2it", "t2vd", "i2t", "i2i", "it2t", "it2i", "it2it"}
    with pytest.raises(InputError, match="no direction 'x2i'"):
        query_instruction("x2i")


POINTWISE = (
    "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the requirements of "
    "the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'."
)
LISTWISE = (
    "I will provide you with a query followed by multiple candidates in the format: (1) cand1 (2) cand2, etc. Each "
    "candidate is independent of the others. Evaluate each candidate against the query, and respond with the number "
    "corresponding to the candidate that best meets the requirements of the query."
)
QUERY = RerankPart(instruction="Find it.", num_images=1, text=" a cat ")


@pytest.mark.parametrize(
    ("prompt", "golden"),
    [
        (
            RerankPrompt(query=QUERY, candidates=(RerankPart(num_images=1, text="grey"),)),
            f"{POINTWISE} Query: Find it. <image> a cat Candidate: <image> grey",
        ),
        (
            RerankPrompt(query=RerankPart(instruction="Find it.", text="a cat"), candidates=(RerankPart(text="Tom"),)),
            f"{POINTWISE} Query: Find it. a cat Candidate: Tom",
        ),
        (
            RerankPrompt(
                query=RerankPart(instruction="Find it.", text="a cat"),
                candidates=(RerankPart(num_images=1), RerankPart(text="Tom"), RerankPart(num_images=2, text="two")),
                listwise=True,
            ),
            f"{LISTWISE} Query: Find it. a cat Candidates: (1) <image> (2) Tom (3) <image> <image> two",
        ),
    ],
)
def test_golden_rerank(prompt: RerankPrompt, golden: str) -> None:
    """Magic-MM-Embedding, section 3.4."""
    assert prompt.render() == START + golden + END


def test_rerank_segments_are_tokenised_as_the_whole(tokenizer: Any) -> None:
    """Whatever a query ends with, the tokens of its prefix do not depend on the candidate."""
    for text, other in itertools.product(["a cat", "end.", "1,5 %", "don't", "naïve 北京"], ["Tom", "(x)", "7", "..."]):
        parts = (RerankPart(text=other), RerankPart(text=text))
        for prompt in (
            RerankPrompt(query=RerankPart(instruction="Find it.", text=text), candidates=parts[:1]),
            RerankPrompt(query=RerankPart(instruction="Find it.", text=text), candidates=parts, listwise=True),
        ):
            pieces = [tokenizer(one.text)["input_ids"] for one in (*prompt.prefix(), *prompt.tail())]
            assert [token for piece in pieces for token in piece] == tokenizer(prompt.render())["input_ids"]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("text", ["", "a cat"])
@pytest.mark.parametrize("system", ["", "You rank."])
@pytest.mark.parametrize("instruction", ["", "Find it."])
def test_rerank_chat_template_renders_the_same(
    tokenizer: Any, images: int, text: str, system: str, instruction: str
) -> None:
    if not images and not text:
        return
    defaults = {"text": "By text.", "image": "By image.", "image,text": "By both."}
    modality = "text" if not images else "image,text" if text else "image"
    prompt = RerankPrompt(
        query=RerankPart(instruction=instruction or defaults[modality], num_images=images, text=text),
        candidates=(RerankPart(num_images=1, text="x"),),
        system=system,
    )
    content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "text", "text": text}] * bool(text)
    messages = [
        *[{"role": "system", "content": instruction}] * bool(instruction),
        {"role": "query", "content": content},
        {"role": "document", "content": [{"type": "image"}, {"type": "text", "text": "x"}]},
    ]
    template = rerank_chat_template(image="<image>", instructions=defaults, system=system)
    assert tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False) == prompt.render()
