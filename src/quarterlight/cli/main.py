"""``quarterlight``: a table of commands, each imported only when it is called, so that ``--help`` answers at once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from quarterlight import __version__
from quarterlight.cli import allocator
from quarterlight.errors import QuarterlightError

COMMANDS = {
    "index": ("quarterlight.cli.index:index", "Index pictures, PDF pages and texts of folders and files."),
    "search": ("quarterlight.cli.search:search", "Search an index with words, with a picture, or with both."),
    "embed": ("quarterlight.cli.embed:embed", "Embed files and lists of items in bulk, into shards."),
    "demo": ("quarterlight.cli.demo:demo", "Index and search the example files; write demo.html."),
    "train": ("quarterlight.cli.train:train", "Train a model by a recipe."),
    "mine": ("quarterlight.cli.mine:mine", "Find hard negatives for the queries of datasets."),
    "judge": ("quarterlight.cli.judge:judge", "Tell retrieved candidates apart into relevant and not."),
    "data": {
        "convert": ("quarterlight.cli.data:convert", "Turn usual layouts into conversations, without duplicates."),
        "check": ("quarterlight.cli.data:check", "List what is wrong with conversations or retrieval datasets."),
    },
    "evaluate": ("quarterlight.cli.evaluate:evaluate", "Measure how well a model retrieves on datasets."),
    "tune-fusion": (
        "quarterlight.cli.tune_fusion:tune_fusion_command",
        "Choose a reranker's weight for each task, on validation splits.",
    ),
    "bench": {
        "index": ("quarterlight.cli.bench_index:bench_index", "Speed and memory of indexing."),
        "search": ("quarterlight.cli.bench_search:bench_search", "Latency and recall of searching."),
        "evaluate": ("quarterlight.cli.bench_evaluate:bench_evaluate", "Ranking against a plain FAISS search."),
        "mine": ("quarterlight.cli.bench_mine:bench_mine", "Time and memory of exact nearest neighbours."),
        "rerank": ("quarterlight.cli.bench_rerank:bench_rerank", "Reranking with shared work against pair by pair."),
        "train": ("quarterlight.cli.bench_train:bench_train", "Speed and memory of training steps."),
        "latency": ("quarterlight.cli.bench_infer:bench_latency", "Embedding one at a time, next to other libraries."),
        "throughput": ("quarterlight.cli.bench_infer:bench_throughput", "Embedding many, next to other libraries."),
        "ray": ("quarterlight.cli.bench_ray:bench_ray", "Bulk embedding by more and more workers."),
        "parts": ("quarterlight.cli.bench_parts:bench_parts", "Where the time of embedding goes, as a picture."),
        "memory": ("quarterlight.cli.bench_memory:bench_memory", "Whether embedding more items takes more memory."),
        "cost": ("quarterlight.cli.bench_cost:bench_cost", "Visual tokens and latency next to the paper's Table 6."),
        "vtc": ("quarterlight.cli.bench_vtc:bench_vtc", "Visual token compression against none, by model shape."),
    },
}
"""Name -> (``module:function``, summary), or a group of them.  The function is what typer makes a command of."""

GROUP_HELP = {"bench": "Measure speed and memory.", "data": "Convert and check training data."}

HELP = """Universal multimodal retrieval: find pictures and document pages with words, pictures, or both.

    \b
    quarterlight index examples
    quarterlight search "woman astronaut"
    quarterlight COMMAND --help      options and an example of each command
"""

EXTRAS = {
    **dict.fromkeys(("accelerate", "faiss", "httpx2", "matplotlib", "peft", "tensorboard"), "train"),
    **dict.fromkeys(("datasets", "mteb"), "eval"),
    "ray": "ray",
}
"""Module -> the extra that brings it, named after what needs it."""

BROKEN_PIPE = 128 + 13  # what a shell reports for a program ended by SIGPIPE
INTERRUPTED = 128 + 2  # and by SIGINT


class LazyCommand(TyperCommand):
    """A command known by name and summary; its module is imported when the command line reaches it."""

    def __init__(self, name: str, target: str, summary: str) -> None:
        super().__init__(name=name, callback=None, help=summary, rich_markup_mode=None)
        self.target = target

    def load(self) -> Any:
        """The real command, built from the function that ``target`` names."""
        module, _, function = self.target.partition(":")
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(self.name)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(app)

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **kwargs: Any) -> Any:
        command = self.load()
        if any(one.startswith("--rerank") for one in args):
            from quarterlight.cli.models import K, with_number

            args = with_number(args, [name for one in command.params if one.metavar == K for name in one.opts])
        return command.make_context(info_name, args, *more, **kwargs)


class Program(TyperGroup):
    """The top group: turns what went wrong into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe shows here rather than after main() has returned
            return result
        except QuarterlightError as error:
            raise _stop(f"Error: {' '.join(str(error).split())}", 1) from None
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            raise _stop(f"Error: This needs {error.name}: pip install -e '.[{extra}]'", 1) from None
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends the process at once, and without a word
            raise _stop("Stopped.", INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
            raise typer.Exit(BROKEN_PIPE) from None


def program() -> TyperGroup:
    """The ``quarterlight`` command with everything below it, nothing imported yet."""
    app = typer.Typer(cls=Program, help=HELP, no_args_is_help=True, rich_markup_mode=None)
    app.callback()(_root)
    group = typer.main.get_group(app)
    _fill(group, COMMANDS)
    return group


def main() -> None:
    """Entry point of the console script; leaves with 0 only on success, 1 on an error, 2 on wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that no encoding knows
    if allocator.embeds(sys.argv[1:]):
        allocator.keep_freed_memory()
    program()(prog_name="quarterlight")


def _fill(group: TyperGroup, commands: dict[str, Any]) -> None:
    for name, entry in commands.items():
        if isinstance(entry, dict):
            below = TyperGroup(name=name, help=GROUP_HELP[name], no_args_is_help=True, rich_markup_mode=None)
            _fill(below, entry)
            group.add_command(below, name)
        else:
            group.add_command(LazyCommand(name, *entry), name)


def _stop(line: str, code: int) -> typer.Exit:
    typer.secho(line, err=True, fg=typer.colors.RED)
    return typer.Exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quarterlight {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
