"""``quarterlight bench latency | throughput``: embedding files with this package against others on the same weights."""

from __future__ import annotations

import copy
import functools
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

import typer

from quarterlight.cli import console
from quarterlight.cli.measure import MemoryPeak, ceiling_of, find_dtype, rounds, spread, times_faster
from quarterlight.errors import CheckpointError, InputError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from quarterlight.models.embedder import Embedder
    from quarterlight.models.inputs import TokenizedPrompt
    from quarterlight.records import Item

Group: TypeAlias = "tuple[str, list[Item]]"
"""Items of one kind: "text", "image" or "page"."""

OURS, UNSHARED, COMPILED, INT8, OURS_1, TRANSFORMERS, SENTENCE_TRANSFORMERS = (
    "quarterlight",
    "quarterlight, nothing shared",
    "quarterlight, compiled",
    "quarterlight, int8",
    "quarterlight, s = 1",
    "transformers",
    "sentence-transformers",
)

MIXTURES: Mapping[str, Mapping[str, float]] = {
    "MMEB-like": {"text": 0.5, "image": 0.5},
    "VisDoc-like": {"text": 0.5, "page": 0.5},
    "mixed": {"text": 0.4, "image": 0.4, "page": 0.2},
    "queries": {},
}
"""Workload -> shares of the kinds of items; that of queries is made by :func:`_queries`."""

QUERIES, PREFIX_TOKENS, QUERY_TOKENS = 16, 60, 20
"""Texts in the workload of queries, tokens that they have in common, and tokens of their own."""

WORDS = (1, 2, 3, 5, 6, 9, 13, 20, 37, 40)
"""Words of texts: the middles of the tenths of the candidates in eight retrieval datasets, from names to paragraphs.

The last would be 87, but nano cuts such texts, which only our own engine knows."""

PICTURE_PIXELS = (448, 640)
"""Least and most pixels of a side of a picture."""

PAGE_PIXELS = (896, 896)
"""Cut into four tiles and a thumbnail (Magic-MM-Embedding, section 5.3)."""

PAGE_TILES = 4
BATCH = {"text": 32, "image": 16, "page": 4}
"""Items that plain transformers is given together."""

TOLERANCE = 1e-5
"""Of the entries of embeddings of norm 1 that have to be the same, in float32."""

LEAST_COSINE = 0.9995
"""Of two that have to be the same, in bfloat16."""


ASKED_FOR = (COMPILED, INT8)
"""Systems that run only when they are named: one compiles for a minute, one needs torchao."""

OTHERS = (UNSHARED, COMPILED, INT8, OURS_1, TRANSFORMERS, SENTENCE_TRANSFORMERS)
SYSTEMS_HELP = f"What ours is compared with; may be repeated: {', '.join(map(repr, OTHERS))}."


class System(NamedTuple):
    """What embeds. encode: groups of items -> embeddings in that order.  compression: its s.  ours: of our systems.

    exact: whether it ought to give the same embeddings as others with the same s.
    """

    encode: Callable[[Sequence[Group]], npt.NDArray[np.float32]]
    compression: int
    ours: Embedder | None = None
    exact: bool = True


def bench_throughput(
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    shape: Annotated[str | None, typer.Option(help="InternVL3 shape with random weights instead: 1B or 2B.")] = None,
    workloads: Annotated[
        list[str] | None,
        typer.Option("--workload", help="MMEB-like, VisDoc-like, mixed or queries.", show_default="all"),
    ] = None,
    items: Annotated[int, typer.Option(min=3, help="Items of a workload.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every system once. One more warms up.")] = 5,
    systems: Annotated[
        list[str] | None, typer.Option("--system", help=SYSTEMS_HELP, show_default="all but compiled and int8")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the faster here.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Embed generated files all at once, with this package and with others, on the same weights in one run.

    Ours gets the items in no order, the others sorted by kind.  sentence-transformers opens the same folder; plain
    transformers is InternVLModel, which has no compression, in batches of one kind, texts sorted by length.  Systems
    that ought to give the same embeddings are checked to do so.  The workload of queries is 16 texts of 20 tokens
    behind a system prompt and an instruction of 60, which ours reads once; compared with reading them 16 times.

    \b
    quarterlight bench throughput --workload mixed --out benchmarks/results/throughput-nano.json
    quarterlight bench throughput --shape 1B --items 20 --repeats 2
    """
    chosen = _chosen(workloads, MIXTURES, "workload")
    run = _Run(model=model, shape=shape, repeats=repeats, dtype=dtype, device=device, one_by_one=False)
    run("throughput", {name: MIXTURES[name] for name in chosen}, items, systems, out)


def bench_latency(
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    shape: Annotated[str | None, typer.Option(help="InternVL3 shape with random weights instead: 1B or 2B.")] = None,
    items: Annotated[int, typer.Option(min=1, help="Texts, pictures and pages, of each so many.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every system once. One more warms up.")] = 5,
    systems: Annotated[
        list[str] | None, typer.Option("--system", help=SYSTEMS_HELP, show_default="all but compiled and int8")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the faster here.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Embed texts, pictures and pages one at a time, with this package and with others, as `bench throughput` does.

    \b
    quarterlight bench latency --out benchmarks/results/latency-nano.json
    """
    run = _Run(model=model, shape=shape, repeats=repeats, dtype=dtype, device=device, one_by_one=True)
    run("latency", {kind: {kind: 1.0} for kind in BATCH}, items, systems, out)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One of the two benches."""

    model: str
    shape: str | None
    repeats: int
    dtype: str | None
    device: str
    one_by_one: bool

    def __call__(
        self,
        benchmark: str,
        mixtures: Mapping[str, Mapping[str, float]],
        number: int,
        wanted: Sequence[str] | None,
        out: Path | None,
    ) -> None:
        import torch

        others = [one for one in _chosen(wanted, OTHERS, "system") if wanted or one not in ASKED_FOR]
        dtype = find_dtype(self.dtype, self.device)
        name_of_dtype = str(dtype).removeprefix("torch.")
        with torch.inference_mode(), console.progress("runs") as bar, tempfile.TemporaryDirectory() as scratch:
            waiting = bar.add_task("Building", total=None)
            ceiling = ceiling_of(self.device, dtype)
            folder = _checkpoint(Path(scratch), self.shape, dtype) if self.shape else self.model
            systems, embedders = _systems(folder, dtype, self.device, (OURS, *others))
            ours = embedders[systems[OURS].compression]
            loads = {
                name: _items(Path(scratch) / name, mixture, number) if mixture else _queries(ours)
                for name, mixture in mixtures.items()
            }
            of_queries = {one: systems[one] for one in (OURS, UNSHARED, *ASKED_FOR) if one in systems}
            fitting = {name: systems if mixture else of_queries for name, mixture in mixtures.items()}
            bar.remove_task(waiting)
            line = bar.add_task("Timing", total=(1 + self.repeats) * sum(map(len, fitting.values())))
            recorded = [
                self._workload(
                    name, groups, fitting[name], embedders, ceiling, name_of_dtype, lambda: bar.advance(line)
                )
                for name, groups in loads.items()
            ]
        title = f"{self.shape or self.model}, {name_of_dtype}, {self.device}" + (", one at a time" * self.one_by_one)
        _print(recorded, title)
        paths = _fast_paths(ours, recorded, systems)
        console.out.print(
            f"Ceiling: {ceiling['matmul_tflops']:.2f} TFLOP/s ({name_of_dtype}, 4096^3). Ours used: "
            + (", ".join(f"{name} ({how})" for name, how in paths.items()) or "nothing beyond one item after the other")
            + ".\n",
            soft_wrap=True,
        )
        record = {
            "benchmark": benchmark,
            "settings": {
                "model": self.shape or self.model,
                "dtype": name_of_dtype,
                "device": self.device,
                "items": number,
                "repeats": self.repeats,
                "words": WORDS,
                "picture_pixels": PICTURE_PIXELS,
                "page_pixels": PAGE_PIXELS,
            },
            "ceiling": {name: round(value, 3) for name, value in ceiling.items()},
            "fast_paths": paths,
            "workloads": recorded,
        }
        console.print_record(record, out)

    def _workload(
        self,
        name: str,
        groups: Sequence[Group],
        systems: Mapping[str, System],
        embedders: Mapping[int, Embedder],
        ceiling: Mapping[str, float],
        dtype: str,
        on_run: Callable[[], None],
    ) -> dict[str, Any]:
        from quarterlight.models.flops import text_flop

        number = sum(len(items) for _, items in groups)
        found: dict[str, npt.NDArray[np.float32]] = {}
        peaks: dict[str, float | None] = {}
        runs = {
            one: functools.partial(self._encode, one, system, groups, found, peaks) for one, system in systems.items()
        }
        counted = {one: system.ours for one, system in systems.items() if system.ours is not None}
        for embedder in counted.values():
            embedder.work = type(embedder.work)()
        times = rounds(runs, self.repeats, self.device, on_run)
        work = {
            one: {key: value // (1 + self.repeats) for key, value in asdict(embedder.work).items()}
            for one, embedder in counted.items()
        }
        cells = {}
        for one, system in systems.items():
            tokens, flop = _work(embedders[system.compression], groups)
            if one in work:
                flop -= work[one]["tokens_spared"] * text_flop(embedders[system.compression].model.config, 1)
            ms = spread([1e3 * taken / number for taken in times[one]])
            tflops = flop / number / ms["median"] / 1e9
            cells[one] = {
                "tokens": tokens,
                "ms_per_item": ms,
                "items_per_s": round(1e3 / ms["median"], 2),
                "peak_mb": peaks[one],
                "tflops": round(tflops, 4),
                "of_ceiling": round(tflops / ceiling["matmul_tflops"], 3),
                "ours_times_faster": times_faster(times[one], times[OURS]),
            }
        return {
            "workload": name,
            "items": {kind: len(items) for kind, items in groups},
            "systems": cells,
            "work": work[OURS],
            "layers_compiled": sum(one["layers_compiled"] for one in work.values()),
            "largest_difference": _differences(found, systems, dtype),
        }

    def _encode(
        self,
        name: str,
        system: System,
        groups: Sequence[Group],
        found: dict[str, npt.NDArray[np.float32]],
        peaks: dict[str, float | None],
    ) -> None:
        if name not in peaks:  # the round that warms up: what a peak begins with would cost the others time
            with MemoryPeak(self.device) as peak:
                self._rows(system, groups)
            peaks[name] = peak.mb
            return
        found[name] = self._rows(system, groups)

    def _rows(self, system: System, groups: Sequence[Group]) -> npt.NDArray[np.float32]:
        import numpy as np

        if not self.one_by_one:
            return system.encode(groups)
        return np.concatenate([system.encode([(kind, [item])]) for kind, items in groups for item in items])


def _chosen(wanted: Sequence[str] | None, known: Sequence[str] | Mapping[str, Any], what: str) -> list[str]:
    for name in wanted or ():
        if name not in known:
            raise InputError(f"There is no {what} {name!r}. {did_you_mean(name, known)}")
    return [name for name in known if not wanted or name in wanted]


def _items(folder: Path, mixture: Mapping[str, float], number: int) -> list[Group]:
    """Texts, and pictures and pages as files, in the shares of a mixture; the same for the same arguments.

    What the shares leave over is of the last kind.
    """
    import numpy as np

    from quarterlight.cli.generated import page, write_picture
    from quarterlight.prompts import QUERY_INSTRUCTIONS, TARGET_INSTRUCTIONS
    from quarterlight.records import Item

    # of real words, most of which every tokenizer has as one token
    vocabulary = " ".join([*QUERY_INSTRUCTIONS.values(), *TARGET_INSTRUCTIONS.values()]).split()
    folder.mkdir(parents=True)
    groups: list[Group] = []
    counts = [int(share * number + 1e-9) for share in mixture.values()]
    counts[-1] = number - sum(counts[:-1])
    for kind, count in zip(mixture, counts, strict=True):
        items = []
        for place in range(count):
            if kind == "text":
                length = WORDS[place * len(WORDS) // count]
                items.append(Item(text=" ".join(np.random.default_rng(place).choice(vocabulary, length))))
            elif kind == "image":
                write_picture(folder / f"{place}.jpg", place, *PICTURE_PIXELS)
                items.append(Item(image=str(folder / f"{place}.jpg"), max_tiles=1))
            else:
                page(PAGE_PIXELS, (place, 0)).save(folder / f"{place}.png")
                items.append(Item(image=str(folder / f"{place}.png"), max_tiles=PAGE_TILES))
        random.Random(0).shuffle(items)
        groups.append((kind, items))
    return groups


def _queries(embedder: Embedder) -> list[Group]:
    """Texts behind one instruction, with as many tokens as the words of the embedder's tokenizer allow."""
    from quarterlight.models.inputs import InputFormatter
    from quarterlight.prompts import QUERY_INSTRUCTIONS
    from quarterlight.records import Item

    vocabulary = " ".join(QUERY_INSTRUCTIONS.values()).split()
    formatter = InputFormatter(embedder.processor, embedder.settings)

    def prompt_of(text: str, instruction: str) -> TokenizedPrompt:
        return formatter.tokenize([formatter.prompt(Item(text=text, instruction=instruction), "document")])[0]

    def words(seed: int, most: int, count: Callable[[str], int]) -> str:
        found = ""
        for word in random.Random(seed).choices(vocabulary, k=4 * most):
            longer = f"{found} {word}".strip()
            if count(longer) <= most:
                found = longer
        return found

    shared = words(0, PREFIX_TOKENS, lambda text: len(prompt_of("text", text).opening))
    own = [
        words(n, QUERY_TOKENS, lambda text: len(dict(prompt_of(text, "").runs)["text"])) for n in range(1, QUERIES + 1)
    ]
    return [("text", [Item(text=text, instruction=shared) for text in own])]


def _checkpoint(folder: Path, shape: str, dtype: Any) -> Path:
    """The folder of a model of a shape with random weights and a small tokenizer."""
    from quarterlight.models.checkpoint import save_checkpoint
    from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor, InternVLVTCProcessor
    from quarterlight.models.settings import EmbedderSettings
    from quarterlight.models.shapes import build_random
    from quarterlight.models.tokenizer import train_tokenizer
    from quarterlight.prompts import QUERY_INSTRUCTIONS, TARGET_INSTRUCTIONS

    model = build_random(shape, dtype=dtype, visual_token_compression=2)
    texts = [*QUERY_INSTRUCTIONS.values(), *TARGET_INSTRUCTIONS.values(), "Instruct: Query: Text: user assistant"]
    tokenizer = train_tokenizer(texts * 4, 1000)
    model.config.image_token_id = tokenizer.context_image_token_id
    processor = InternVLVTCProcessor(
        InternVLVTCImageProcessor(max_patches=1), tokenizer, image_seq_length=model.config.image_seq_length
    )
    return save_checkpoint(folder / "model", model, processor, EmbedderSettings())


def _systems(
    folder: Any, dtype: Any, device: str, wanted: Sequence[str]
) -> tuple[dict[str, System], dict[int, Embedder]]:
    """The systems by name, and our embedders by s."""
    from quarterlight.models.embedder import Embedder

    ours = Embedder(folder, dtype=dtype, device=device)
    for weight in ours.model.parameters():
        weight.sum()  # reads it from the file, or the memory of all would be charged to the system that runs first
    plain = Embedder(folder, dtype=dtype, device=device, visual_token_compression=1)
    plain.model.load_state_dict(ours.model.state_dict(), assign=True)  # one set of weights in memory
    unshared = Embedder.from_model(ours.model, ours.processor, ours.settings, shared_prefix=False)

    def changed(*, exact: bool, **options: Any) -> System:  # with weights of its own
        embedder = Embedder(folder, dtype=dtype, device=device, **options)
        return System(functools.partial(_encode_ours, embedder), compression, embedder, exact)

    compression = ours.model.config.visual_token_compression
    build: dict[str, Callable[[], System]] = {
        OURS: lambda: System(functools.partial(_encode_ours, ours), compression, ours),
        UNSHARED: lambda: System(functools.partial(_encode_ours, unshared), compression, unshared),
        COMPILED: lambda: changed(compile=True, exact=True),
        INT8: lambda: changed(quantization="int8", exact=False),
        OURS_1: lambda: System(functools.partial(_encode_ours, plain), 1, plain),
        TRANSFORMERS: lambda: System(_plain_transformers(plain), 1),
        SENTENCE_TRANSFORMERS: lambda: System(_sentence_transformers(ours, dtype, device), compression),
    }
    return {name: build[name]() for name in wanted}, {1: plain, compression: ours}


def _encode_ours(embedder: Embedder, groups: Sequence[Group]) -> npt.NDArray[np.float32]:
    """All items in one call and in no order; the rows in the order of the groups."""
    import numpy as np

    items = [item for _, some in groups for item in some]
    order = np.random.default_rng(0).permutation(len(items))
    rows = np.empty((len(items), embedder.dimension), np.float32)
    rows[order] = embedder.encode_document([items[place] for place in order])
    return rows


def _plain_transformers(embedder: Embedder) -> Callable[[Sequence[Group]], npt.NDArray[np.float32]]:
    """InternVLModel on the same weights with its processor, one kind at a time, texts by length."""
    import numpy as np
    import torch
    from transformers import InternVLConfig, InternVLModel

    from quarterlight.prompts import Prompt

    config = embedder.model.config
    with torch.device("meta"):
        model = InternVLModel._from_config(
            InternVLConfig(
                **{key: value for key, value in config.to_dict().items() if key in _INTERNVL},
                vision_config=copy.deepcopy(config.vision_config),
                text_config=copy.deepcopy(config.text_config),
            ),
            dtype=embedder.model.dtype,
        )
    model.load_state_dict(embedder.model.state_dict(), assign=True)
    for name, value in embedder.model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, value, persistent=False)
    model = model.eval()
    processor = embedder.processor

    def prompt(item: Item, kind: str) -> str:
        instruction = embedder.settings.instructions["document"][kind]
        one = Prompt(
            role="document",
            instruction=instruction,
            num_images=len(item.images),
            text=item.text or "",
            system=embedder.settings.system_prompt,
        )
        return one.render(image=processor.image_token)

    def encode(groups: Sequence[Group]) -> npt.NDArray[np.float32]:
        rows = []
        for kind, items in groups:
            texts = [prompt(item, kind) for item in items]
            found = np.empty((len(items), config.text_config.hidden_size), np.float32)
            order = sorted(range(len(items)), key=lambda place: len(texts[place]))
            for start in range(0, len(items), BATCH[kind]):
                some = order[start : start + BATCH[kind]]
                pictures = [source for place in some for source in items[place].images] or None
                inputs = processor(
                    text=[texts[place] for place in some],
                    images=pictures,
                    padding=True,
                    padding_side="right",
                    add_special_tokens=False,
                    return_tensors="pt",
                    **({"images_kwargs": {"max_patches": PAGE_TILES if kind == "page" else 1}} if pictures else {}),
                ).to(model.device)
                if pictures:
                    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
                hidden = model(**inputs, use_cache=False).last_hidden_state
                last = inputs["attention_mask"].sum(dim=1) - 1
                pooled = hidden[torch.arange(len(some), device=hidden.device), last].float()
                found[some] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
            rows.append(found)
        return np.concatenate(rows)

    return encode


_INTERNVL = (
    "image_token_id",
    "image_seq_length",
    "downsample_ratio",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "tie_word_embeddings",
)
"""Fields of InternVLConfig that ours takes over."""


def _sentence_transformers(
    embedder: Embedder, dtype: Any, device: str
) -> Callable[[Sequence[Group]], npt.NDArray[np.float32]]:
    """``SentenceTransformer.encode`` of the same folder, one call for each kind, since tiles belong to a call."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(embedder._folder), device=device, model_kwargs={"dtype": dtype})
    model[0].model.load_state_dict(embedder.model.state_dict(), assign=True)

    def encode(groups: Sequence[Group]) -> npt.NDArray[np.float32]:
        rows = []
        for kind, items in groups:
            more: dict[str, Any] = {}
            if kind == "page":
                more["processing_kwargs"] = {"image": {"max_patches": PAGE_TILES}}
            given = [
                {key: value for key, value in (("text", one.text), ("image", one.image)) if value is not None}
                for one in items
            ]
            prompt = f"document: {embedder.settings.instructions['document'][kind]}"
            rows.append(model.encode(given, prompt=prompt, show_progress_bar=False, **more))
        return np.concatenate(rows)

    return encode


def _work(embedder: Embedder, groups: Sequence[Group]) -> tuple[int, float]:
    """Tokens of all items, padding left out, and operations."""
    from quarterlight.models import flops
    from quarterlight.models.inputs import InputFormatter

    formatter, config = InputFormatter(embedder.processor, embedder.settings), embedder.model.config
    tokens, flop = 0, 0.0
    for kind, items in groups:
        prompts = formatter.tokenize([formatter.prompt(item, "document") for item in items])
        tiles = {"text": 0, "image": 1, "page": PAGE_TILES + 1}[kind]
        for prompt in prompts:
            length = prompt.num_tokens + (formatter.num_image_tokens(tiles) if tiles else 0)
            tokens += length
            flop += flops.text_flop(config, length) + flops.vision_flop(config, tiles)
    return tokens, flop


def _differences(
    found: Mapping[str, npt.NDArray[np.float32]], systems: Mapping[str, System], dtype: str
) -> dict[str, float]:
    """The largest difference of each system's embeddings from those of the first with the same s."""
    import numpy as np

    differences = {}
    for name, system in systems.items():
        base = next(one for one, other in systems.items() if other.compression == system.compression)
        differences[name] = float(np.abs(found[name] - found[base]).max())
        cosine = float((found[name] * found[base]).sum(axis=1).min())
        if system.exact and not (differences[name] < TOLERANCE if dtype == "float32" else cosine > LEAST_COSINE):
            raise CheckpointError(
                f"{name} and {base} disagree: their embeddings of the same items differ by {differences[name]:.1e}, "
                f"and their lowest cosine is {cosine:.4f}."
            )
    return differences


def _fast_paths(
    embedder: Embedder, recorded: Sequence[Mapping[str, Any]], systems: Mapping[str, System] | None = None
) -> dict[str, str]:
    """What our engine did beyond one item after the other, as it was counted; what it did not do is not named.

    systems: those that were compared, of which some are our engine with compiled layers or other weights.
    """
    from quarterlight.models.quantized import quantization_of

    done = {key: sum(load["work"][key] for load in recorded) for key in recorded[0]["work"]}
    rows, pictures = f"of {done['rows']:,} rows", f"of {done['pictures']:,}"
    counted = {
        "batches by tokens": (
            done["rows"] - done["batches"],
            f"{done['rows']:,} rows in {done['batches']:,}, up to {embedder.tokens_per_batch:,} tokens each, with "
            f"{done['padding']:,} of padding",
        ),
        "pictures decoded meanwhile": (
            done["pictures_ahead"],
            f"{done['pictures_ahead']:,} {pictures} by {getattr(embedder._workers, '_max_workers', 0)} threads",
        ),
        "beginnings read once": (
            done["rows_sharing"],
            f"for {done['rows_sharing']:,} {rows}, which spared {done['tokens_spared']:,} of {done['tokens']:,} tokens",
        ),
        "same picture once": (done["pictures_spared"], f"{done['pictures_spared']:,} {pictures} spared"),
        "rows without padding": (done["rows_packed"], f"{done['rows_packed']:,} {rows}"),
    }
    paths = {name: how for name, (times, how) in counted.items() if times > 0}
    others = {name: system.ours for name, system in (systems or {}).items() if system.ours is not None}
    if (ours := others.get(COMPILED)) is not None and ours.compiled is not None:
        if calls := sum(load["layers_compiled"] for load in recorded):
            paths[COMPILED] = f"{calls:,} calls of layers, after {ours.compiled.seconds:.0f} s of compiling"
        if ours.compiled.failure:
            paths["not compiled"] = ours.compiled.failure
    if (ours := others.get(INT8)) is not None and (kept := quantization_of(ours.model)) is not None:
        paths[INT8] = f"weights of layers as {kept}"
    return paths


def _print(recorded: Sequence[Mapping[str, Any]], title: str) -> None:
    numbers = ("tokens", "ms per item", "items/s", "peak MB", "of ceiling", "ours times faster")
    table = console.table("workload", "system", *numbers, title=title, right=numbers)
    for load in recorded:
        for name, cell in load["systems"].items():
            ratio = cell["ours_times_faster"]
            table.add_row(
                load["workload"],
                name,
                f"{cell['tokens']:,}",
                f"{cell['ms_per_item']['median']:,.2f}",
                f"{cell['items_per_s']:,.1f}",
                "" if cell["peak_mb"] is None else f"{cell['peak_mb']:,.0f}",
                f"{cell['of_ceiling']:.2f}",
                "" if name == OURS else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            )
    console.out.print(table)
