"""One item, one embedding: whatever else is in the batch, in whatever order, from wherever it comes."""

from __future__ import annotations

import dataclasses
import io
import pickle
import random
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import quarterlight
from quarterlight import Embedder as PublicEmbedder
from quarterlight import Item
from quarterlight.errors import CheckpointError, ImageError, InputError, NotFiniteError
from quarterlight.models.embedder import Embedder, Work, best_dtype, tokens_of_a_pass
from quarterlight.models.pooling import Attention
from quarterlight.models.readable import encode_readable
from quarterlight.models.settings import EmbedderSettings
from quarterlight.prompts import query_instruction
from quarterlight.records import ArchiveMember
from quarterlight.search.encoder import encode_each

Pictures = Callable[..., Image.Image]


@pytest.fixture
def items(picture: Pictures) -> list[Any]:
    """Texts, one tile, five tiles, two pictures, both together."""
    return [
        "a red apple",
        picture(0),
        Item(image=picture(1, 256, 64), max_tiles=4),
        {"image": [picture(2), picture(3)]},
        {"text": "the same, but blue and much, much longer than before", "image": picture(4)},
        "x",
        Item(image=[picture(5, 64, 200), picture(6, 128, 128)], text="two pages", max_tiles=4),
        "a somewhat longer text about fruit, vegetables and other things",
    ]


class Counting:
    """Counts the tiles and rows that reach a model."""

    def __init__(self, embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles = self.rows = 0
        see, forward = embedder.model.get_image_features, embedder.model.forward

        def counted_see(pixels: torch.Tensor, **kwargs: Any) -> Any:
            self.tiles += len(pixels)
            return see(pixels, **kwargs)

        def counted_forward(**kwargs: Any) -> Any:
            self.rows += len(kwargs["input_ids"])
            return forward(**kwargs)

        monkeypatch.setattr(embedder.model, "get_image_features", counted_see)
        monkeypatch.setattr(embedder.model, "forward", counted_forward)


@pytest.fixture
def fresh(tiny_checkpoint: Path) -> Embedder:
    return Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu")


def test_single_is_padded_is_any_order(tiny_embedder: Embedder, items: list[Any]) -> None:
    together = tiny_embedder.encode_query(items)
    assert together.dtype == np.float32
    assert together.shape == (len(items), 32)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert (together @ together.T - np.eye(len(items))).max() < 0.99  # a model that tells them apart
    alone = np.concatenate([tiny_embedder.encode_query(item) for item in items])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(items))
    shuffled = tiny_embedder.encode_query([items[index] for index in order])
    np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=1e-5)


def mixed(seed: int, picture: Pictures) -> list[Item]:
    """Texts of many lengths, pictures, pages, both together, several instructions, some of it twice."""
    draw = random.Random(seed)
    words = ["a", "red", "apple", "and", "the", "same", "but", "blue"]
    shown = [picture(10 * seed + n, draw.randint(20, 120), draw.randint(20, 120)) for n in range(5)]
    wide = [picture(10 * seed + n, draw.randint(150, 260), draw.randint(30, 80)) for n in range(5, 7)]

    def item() -> Item:
        text = " ".join(draw.choices(words, k=int(40 ** draw.random())))
        kind = draw.choice(["text", "text", "picture", "both", "two", "page"])
        images: Any = {"text": None, "two": draw.sample(shown, 2), "page": draw.choice(wide)}
        return Item(
            text=text if kind in ("text", "both") else None,
            image=images.get(kind, draw.choice(shown)),
            max_tiles=4 if kind == "page" else None,
            instruction=draw.choice([None, None, "Find what looks like it in every way.", ""]),
        )

    items = [item() for _ in range(16)]
    copies = [dataclasses.replace(one, image=one.image.copy()) for one in items if isinstance(one.image, Image.Image)]
    items += draw.sample(items, 3) + copies[:2]
    draw.shuffle(items)
    return items


FAST: dict[str, dict[str, Any]] = {
    "small batches": {"tokens_per_batch": 150},
    "large batches": {"tokens_per_batch": 100_000},
    "nothing shared": {"tokens_per_batch": 700, "shared_prefix": False},
    "packed": {"tokens_per_batch": 700, "packed": True},
    "threads": {"tokens_per_batch": 300, "num_workers": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_fast_path_gives_what_one_by_one_gives(
    tiny_checkpoint: Path, picture: Pictures, monkeypatch: pytest.MonkeyPatch, seed: int, dtype: torch.dtype
) -> None:
    loaded = Embedder(tiny_checkpoint, dtype=dtype, device="cpu", num_workers=0)

    def embedder(**options: Any) -> Embedder:
        return Embedder.from_model(loaded.model, loaded.processor, loaded.settings, **{"num_workers": 0, **options})

    items = mixed(seed, picture)
    plain = embedder(shared_prefix=False)
    expected = np.concatenate([plain.encode_query(item) for item in items])
    work: dict[str, Work] = {}

    def check(name: str, **options: Any) -> None:
        fast = embedder(**options)
        found = fast.encode_query(items)
        if dtype is torch.float32:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)
        else:
            assert (found * expected).sum(axis=1).min() > 0.9995, name
        work[name] = fast.work

    for name, options in FAST.items():
        check(name, **options)
    monkeypatch.setattr("quarterlight.models.embedder.FEATURE_CACHE_BYTES", 1100)  # two tiles of the tiny model
    check("few pictures kept", **FAST["small batches"])

    # and each of them did what its name says
    assert {one.rows for one in work.values()} == {work["packed"].rows_packed} and work["packed"].rows < len(items)
    assert work["large batches"].batches < work["small batches"].batches
    assert work["large batches"].rows_sharing > work["nothing shared"].rows_sharing == work["packed"].rows_sharing == 0
    assert work["few pictures kept"].pictures_spared < work["small batches"].pictures_spared


def test_mean_pooling_and_bidirectional_attention(fresh: Embedder, marked: tuple[Any, Any], items: list[Any]) -> None:
    settings = EmbedderSettings(method="u-marvel", pooling="mean", attention="bidirectional")  # type: ignore[arg-type]
    embedder = Embedder.from_model(*marked, settings)
    together = embedder.encode_query(items)
    alone = np.concatenate([embedder.encode_query(item) for item in items])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)
    assert np.abs(together - fresh.encode_query(items)).max() > 0.1


def test_roles_and_instructions_matter(tiny_embedder: Embedder) -> None:
    query, document = tiny_embedder.encode_query("x"), tiny_embedder.encode_document("x")
    assert np.abs(query - document).max() > 1e-3
    assert np.array_equal(tiny_embedder.encode_query("x", instruction=query_instruction(None)), query)
    other = tiny_embedder.encode_query("x", instruction="Retrieve relevant texts based on a given query.")
    assert np.abs(query - other).max() > 1e-3
    own = tiny_embedder.encode_query(
        Item(text="x", instruction="Retrieve relevant texts based on a given query."), instruction="Another."
    )
    assert np.array_equal(own, other)


def test_same_picture_from_anywhere(tiny_embedder: Embedder, picture: Pictures, tmp_path: Path) -> None:
    image = picture(0)
    file = tmp_path / "a.png"
    image.save(file)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(file, "inside.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    sources = [image, file, str(file), buffer.getvalue(), ArchiveMember(str(tmp_path / "a.zip"), "inside.png")]
    embeddings = tiny_embedder.encode_document([Item(image=source) for source in sources])
    assert all(np.array_equal(embedding, embeddings[0]) for embedding in embeddings)
    assert np.array_equal(tiny_embedder.encode_document(file)[0], embeddings[0])


def test_string_is_text_also_when_it_is_a_path(tiny_embedder: Embedder, picture: Pictures, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture(0).save(file)
    as_text, as_image = tiny_embedder.encode_document([str(file), file])
    assert np.abs(as_text - as_image).max() > 1e-3


def test_same_picture_is_seen_once_and_same_item_embedded_once(
    fresh: Embedder, picture: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(fresh, monkeypatch)
    image, copy, other = picture(0), picture(0).copy(), picture(1)
    items: list[Any] = [{"image": image, "text": text} for text in ("a", "b", "a")] + [
        copy,
        image,
        other,
        "a",
        "a ",
        "b",
    ]
    embeddings = fresh.encode_query(items)
    assert counting.tiles == 2
    assert counting.rows == 6
    assert np.array_equal(embeddings[0], embeddings[2])
    assert np.array_equal(embeddings[3], embeddings[4])
    assert np.array_equal(embeddings[6], embeddings[7])


def test_tile_limit_is_the_items(fresh: Embedder, picture: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(fresh, monkeypatch)
    wide = picture(0, 256, 64)
    one, four = fresh.encode_document([wide, Item(image=wide, max_tiles=4)])
    assert counting.tiles == 1 + 5
    assert np.abs(one - four).max() > 1e-3


def test_truncate_dim(tiny_checkpoint: Path, tiny_embedder: Embedder, items: list[Any]) -> None:
    full, short = tiny_embedder.encode_query(items), tiny_embedder.encode_query(items, truncate_dim=8)
    expected = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, rtol=0, atol=1e-6)
    small = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", truncate_dim=8)
    assert small.dimension == 8
    np.testing.assert_allclose(small.encode_query(items), expected, rtol=0, atol=1e-5)
    for columns in (0, 33, -1):
        with pytest.raises(InputError, match=f"truncate_dim must be from 1 to 32, got {columns}"):
            tiny_embedder.encode_query("x", truncate_dim=columns)
        with pytest.raises(InputError, match="truncate_dim"):
            Embedder(tiny_checkpoint, truncate_dim=columns)


def test_no_items(tiny_embedder: Embedder) -> None:
    assert tiny_embedder.encode_query([]).shape == (0, 32)
    assert tiny_embedder.encode_document((), truncate_dim=4).shape == (0, 4)


def test_long_text_is_cut(tiny_embedder: Embedder) -> None:
    long = "word " * 500
    longer = tiny_embedder.encode_document(long + "and more")
    assert np.array_equal(tiny_embedder.encode_document(long), longer)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (Image.new("RGB", (5, 0)), ImageError, "Item 1: .*5 x 0 pixels is empty"),
        ("", InputError, "Item 1 has neither text nor image"),
        ({"image": [], "text": None}, InputError, "Item 1 has neither text nor image"),
        ({"txt": "x"}, InputError, "Item 1: An item has no field 'txt'"),
        (7, InputError, "Item 1: An item is text"),
        (Path("absent.jpg"), ImageError, r"Item 1: absent\.jpg"),
        (Item(image=b"not a picture"), ImageError, "Item 1: .*not a picture"),
    ],
)
def test_errors_name_the_position(tiny_embedder: Embedder, bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_embedder.encode_query(["fine", bad])


@pytest.mark.parametrize("nothing", [None, 42])
def test_what_is_no_item_at_all(tiny_embedder: Embedder, nothing: Any) -> None:
    with pytest.raises(InputError, match=f"Expected an item .* or several, got {type(nothing).__name__}"):
        tiny_embedder.encode_query(nothing)


def test_an_instruction_is_a_string(tiny_embedder: Embedder) -> None:
    with pytest.raises(InputError, match="An instruction is a string, or None for the default one; got int"):
        tiny_embedder.encode_query("words", instruction=5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Item.instruction must be a string, got int"):
        Item(text="words", instruction=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [3, [3], [None], object()])
def test_an_image_is_a_source_of_one(image: Any) -> None:
    with pytest.raises(InputError, match=r"Item.image must be the name of a file, its bytes, a PIL image or several"):
        Item(image=image)


def test_a_device_that_is_not_there(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"The device 'gpu' cannot be used here: .*Give 'cpu'"):
        Embedder(tiny_checkpoint, device="gpu")
    with pytest.raises(InputError, match="The device 'cuda:99' cannot be used here"):
        Embedder(tiny_checkpoint, device="cuda:99")
    assert quarterlight.QuarterlightError in InputError.__mro__


def test_any_iterable_sequence_of_items(tiny_embedder: Embedder) -> None:
    def some() -> Iterator[str]:
        yield from ("a", "b")

    assert np.array_equal(tiny_embedder.encode_query(("a", "b")), tiny_embedder.encode_query(list(some())))


def test_similarity(tiny_embedder: Embedder) -> None:
    queries, documents = np.eye(3, 4, dtype=np.float32), np.eye(2, 4, dtype=np.float32)
    assert np.array_equal(tiny_embedder.similarity(queries, documents), np.eye(3, 2, dtype=np.float32))
    with pytest.raises(InputError, match="Queries have 4 columns, documents 2"):
        tiny_embedder.similarity(queries, documents[:, :2])


def test_broken_weights_are_not_passed_on(fresh: Embedder) -> None:
    with torch.no_grad():
        fresh.model.language_model.norm.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not numbers"):
        fresh.encode_query("x")


def test_items_that_give_no_numbers_are_named(fresh: Embedder) -> None:
    """Others, and what indexes or evaluates many, go on without them."""
    tokenizer = fresh.processor.tokenizer
    good, bad = ["a red apple", "a blue one"], ["% and more", "less than %"]
    (token,) = {*tokenizer("%")["input_ids"]} - {*tokenizer(" ".join(good))["input_ids"]}
    expected = fresh.encode_query(good)
    with torch.no_grad():
        fresh.model.get_input_embeddings().weight[token] = torch.nan
    items = [good[0], bad[0], bad[1], good[1]]
    with pytest.raises(NotFiniteError, match="not numbers for items 1, 2") as caught:
        fresh.encode_query(items)
    assert pickle.loads(pickle.dumps(caught.value)).positions == (1, 2)
    parsed = [Item(text=text) for text in items]
    vectors, problems = encode_readable(fresh.encode_query, [*parsed, Item(image=Path("absent.jpg"))])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    assert list(problems) == [4, 1, 2] and problems[1] == problems[2] != problems[4]
    each = encode_each(fresh.encode_query, [*parsed, Item(image=Path("absent.jpg"))])
    np.testing.assert_allclose([each[0], each[3]], expected, rtol=0, atol=1e-5)
    assert [isinstance(one, str) for one in each] == [False, True, True, False, True]
    with pytest.raises(CheckpointError, match="not numbers"):
        encode_each(fresh.encode_query, [parsed[1], Item(image=Path("absent.jpg"))])


def test_an_opened_picture_may_be_cut_in_two_ways_at_once(fresh: Embedder) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((700, 700), 80).convert("RGB").save(buffer, "PNG")
    expected = fresh.encode_document([Item(image=buffer.getvalue(), max_tiles=tiles) for tiles in (1, 4)])
    with Image.open(buffer) as opened:
        found = fresh.encode_document([Item(image=opened, max_tiles=tiles) for tiles in (1, 4)])
    np.testing.assert_array_equal(found, expected)


def test_after_an_error_nothing_is_left_to_decode(tiny_embedder: Embedder, picture: Pictures) -> None:
    embedder = Embedder.from_model(tiny_embedder.model, tiny_embedder.processor, tiny_embedder.settings, num_workers=1)
    gate = threading.Event()
    asked: list[Any] = []
    decode = embedder._picture

    def waits(source: Any, max_tiles: int) -> Any:
        asked.append(source)
        if source is images[1]:
            gate.wait()
        return decode(source, max_tiles)

    embedder._picture = waits  # type: ignore[method-assign]
    images = [b"no picture", *(picture(number) for number in range(20))]
    for encode in (embedder.encode_document, embedder.visual_tokens):
        gate.clear()
        asked.clear()
        try:
            with pytest.raises(ImageError, match="Item 0"):
                encode([Item(image=image) for image in images])
        finally:
            gate.set()
        after = picture(99)
        embedder.encode_document(after)
        assert asked in ([images[0], after], [*images[:2], after])


def test_a_call_keeps_no_embedding_but_its_result(fresh: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[np.ndarray]] = []
    compute = fresh._embed

    def counted(*arguments: Any) -> np.ndarray:
        assert sum(one() is not None for one in kept) <= 1  # that of the batch before, until it has a new value
        rows = compute(*arguments)
        kept.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(fresh, "_embed", counted)
    fresh.tokens_per_batch = 1
    texts = [f"number {number}" for number in range(8)]
    embeddings = fresh.encode_query(texts + texts, truncate_dim=8)
    assert len(kept) == 8
    np.testing.assert_array_equal(embeddings[:8], embeddings[8:])


def test_bfloat16_is_close(tiny_checkpoint: Path, tiny_embedder: Embedder, items: list[Any]) -> None:
    low = Embedder(tiny_checkpoint, dtype=torch.bfloat16, device="cpu").encode_query(items)
    assert low.dtype == np.float32
    assert (low * tiny_embedder.encode_query(items)).sum(axis=1).min() > 0.99


def test_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for capabilities, expected in (({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert best_dtype(cpu) is expected
    for multiplies, expected in ((True, torch.bfloat16), (False, torch.float32)):  # as a T4, which can only emulate it
        supported = lambda including_emulation, multiplies=multiplies: including_emulation or multiplies  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert best_dtype(torch.device("cuda")) is expected


def test_compression_can_be_overridden(tiny_checkpoint: Path, picture: Pictures) -> None:
    embedders = [
        Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", visual_token_compression=s) for s in (1, 2, 4)
    ]
    assert [embedder.processor.image_seq_length for embedder in embedders] == [16, 4, 1]
    embeddings = [embedder.encode_document(picture(0)) for embedder in embedders]
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3
    assert len({embedder.model_hash for embedder in embedders}) == 3


def test_public_name() -> None:
    assert PublicEmbedder is Embedder


def test_a_long_row_does_not_pad_short_ones(tiny_checkpoint: Path) -> None:
    """Padding never costs more than another pass would; counted at the language model itself."""
    options: dict[str, Any] = {"tokens_per_batch": 4000, "shared_prefix": False}
    embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", num_workers=0, **options)
    seen: list[tuple[int, int]] = []
    embedder.model.language_model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2]))
    words = [1, 1, 2, 2, 3, 150, 150, 80, 30, 31, 32] * 3
    texts = [f"number {index}" + " apple" * count for index, count in enumerate(words)]
    embedder.encode_document(texts)
    work = embedder.work
    assert 1 < work.batches == len(seen) < len(texts)
    assert sum(rows * length for rows, length in seen) == work.tokens + work.padding
    assert work.padding <= work.batches * tokens_of_a_pass(torch.device("cpu"))
    whole = max(length for _, length in seen) * len(texts) - work.tokens
    assert work.padding < whole / 10  # in one batch


def test_a_common_beginning_is_read_once(tiny_checkpoint: Path) -> None:
    """Counted at the language model itself, so that the fast path cannot be off without anybody noticing."""
    embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", num_workers=0, tokens_per_batch=400)
    lengths: list[tuple[int, int]] = []
    embedder.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, given: lengths.append(given[0].shape[:2])
    )
    instruction = "Find what is described in as many words as this."
    texts = [f"an apple, {number}" for number in range(40)]
    jobs = embedder._plan(texts, "query", instruction)
    opening, total = len(jobs[0].prompt.opening), sum(job.prompt.num_tokens for job in jobs)
    assert opening > 10

    embedder.encode_query(texts, instruction=instruction)
    assert lengths[0] == (1, opening)
    assert len(lengths) > 2  # and no other batch, nor window, reads it again
    rest = sum(rows * columns for rows, columns in lengths[1:])
    assert total - 40 * opening <= rest <= 1.2 * (total - 40 * opening)
    batches, padding = len(lengths) - 1, rest - (total - 40 * opening)
    sharing = {"rows_sharing": 40, "tokens_spared": 39 * opening}
    assert embedder.work == Work(rows=40, tokens=total, batches=batches, padding=padding, **sharing)

    lengths.clear()
    embedder.encode_query(texts[:2], instruction="")  # two rows, for which it does not pay
    assert len(lengths) == 1
    assert embedder.work.rows_sharing == 40


def test_where_beginnings_are_not_shared(tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(changed: dict[str, Any], **options: Any) -> bool:
        settings = dataclasses.replace(tiny_embedder.settings, **changed)
        embedder = Embedder.from_model(tiny_embedder.model, tiny_embedder.processor, settings, **options)
        return embedder.shares_prefixes

    assert shares({})
    assert not shares({}, shared_prefix=False)
    assert not shares({}, packed=True)
    assert not shares({"attention": Attention.BIDIRECTIONAL})
    windows = ["full_attention", "sliding_attention"]
    monkeypatch.setattr(tiny_embedder.model.config.text_config, "layer_types", windows)
    assert not shares({})


def test_pictures_decoded_to_a_part_of_their_size(
    tiny_checkpoint: Path, tiny_embedder: Embedder, tmp_path: Path
) -> None:
    smooth = np.linspace(0, 255, 700)[None, :, None] * np.linspace(1, 0.2, 600)[:, None, None] * np.ones(3)
    for ending in ("jpg", "png"):
        Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / f"large.{ending}")
    files = [Item(image=tmp_path / "large.jpg"), Item(image=tmp_path / "large.png")]
    pages = [Item(image=tmp_path / "large.jpg", max_tiles=4)]
    reduced = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", num_workers=0, decode_margin=4)
    whole = tiny_embedder._formatter.cut(files[0].image, 1).pixels
    part = reduced._formatter.cut(files[0].image, 1).pixels
    assert not np.array_equal(whole, part)  # so it was decoded otherwise
    assert np.abs(whole.astype(int) - part).mean() < 1
    cosines = (reduced.encode_document(files) * tiny_embedder.encode_document(files)).sum(axis=1)
    assert (cosines > 0.999).all()
    np.testing.assert_array_equal(  # more tiles than one: every pixel counts
        reduced._formatter.cut(pages[0].image, 4).pixels, tiny_embedder._formatter.cut(pages[0].image, 4).pixels
    )
    assert reduced.model_hash != tiny_embedder.model_hash
    with pytest.raises(InputError, match="at least 1, got 0"):
        Embedder(tiny_checkpoint, device="cpu", decode_margin=0)
