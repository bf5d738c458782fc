"""The command line: verbs only. What a verb does lives in `lingraft.api`; heavy imports happen there, when called."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from lingraft import processes, terminal
from lingraft.errors import LingraftError
from lingraft.version import VERSION

# Threads wait for each other by spinning. The default, long spin costs a factor of a hundred where other programs need
# the cores; sleeping at once costs as much as the second core is worth. A short spin has neither fault.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class _Verbs(TyperGroup):
    """Every error that a user can mend becomes its line and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LingraftError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; finished steps are kept, and the same command goes on from there", 130)
        except Exception as error:
            if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):  # torch's own is not imported here
                _fail(
                    "out of memory; finished steps are kept: set micro_batch: 1, optimizer: adamw_8bit, quantise: nf4 "
                    "or a smaller sequence_length under training in the recipe (lingraft plan shows what each saves), "
                    "and give the same command again",
                    2,
                )
            number = _system_errno(error)
            if number is None:
                if not processes.speaks():
                    sys.exit(1)
                raise
            where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            _fail(f"{where}{os.strerror(number)}{_cure(number)}", 2)


class _Lists(TyperCommand):
    """Options that may be given several times also take several values at once, as a shell's globs give them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        repeated: list[str] = []
        option = ""
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in several else ""
            elif option and repeated[-1] != option:
                repeated.append(option)
            repeated.append(arg)
        return super().parse_args(ctx, repeated)


app = typer.Typer(
    cls=_Verbs,
    help="Graft a language and a field onto an open language model, without harming what it already knows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
embeddings_app = typer.Typer(help="Look at the initial rows of new tokens.", no_args_is_help=True)
app.add_typer(embeddings_app, name="embeddings")
tokenizer_app = typer.Typer(help="Graft a tokenizer, or look at one.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a built-in recipe such as quickstart.")
]
RunArgument = Annotated[Path, typer.Argument(help="The folder of a run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the recipe, for example training.precision=fp32.",
    ),
]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", help="The run's folder (default: runs/NAME).")]
ShapeOption = Annotated[
    str | None,
    typer.Option("--shape", metavar="NAME", help="A known model's shape in place of the base's, such as gemma-3-4b."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TextOption = Annotated[
    list[str],
    typer.Option("--text", metavar="FILE…", help="Text: files, folders or globs, of any kind a recipe reads."),
]
ColumnOption = Annotated[
    str | None, typer.Option("--column", help="The column that holds the text (default: text, or the only one).")
]
OutOption = Annotated[Path, typer.Option("--out", help="The folder to write; never one that holds anything.")]


@app.command()
def run(recipe: RecipeArgument, set_: SetOption = None, run_dir: RunDirOption = None) -> None:
    """Run a recipe from corpus to report; the same command goes on after a stop."""
    from lingraft import api

    result = api.run(recipe, run_dir, set_ or [], command=shlex.join(["lingraft", *sys.argv[1:]]))
    if processes.rank():
        return
    typer.echo("")
    typer.echo(terminal.before_after(result.scoreboard))
    typer.echo(f"model   {result.model}")
    typer.echo(f"report  {result.report}")


@app.command(cls=_Lists)
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    shape: ShapeOption = None,
    device: Annotated[
        str | None, typer.Option(help="Whose speed to count with, for example a6000 (default: this machine's).")
    ] = None,
    memory: Annotated[
        list[float] | None, typer.Option(metavar="GB…", help="Cards to judge by (default: 16 24 48 80).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run would do, what each stage trains, and its memory, time and disk, before any work."""
    from lingraft import api

    with _progress_aside(as_json):
        data = api.plan(recipe, run_dir, set_ or [], shape=shape, device=device, memory_gb=memory)
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1) if as_json else terminal.plan(data))


@app.command()
def status(run_folder: RunArgument, as_json: JsonOption = False) -> None:
    """Show how far a run has come."""
    from lingraft import api

    data = api.status(run_folder)
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1) if as_json else terminal.status(data))


@app.command()
def bench(
    shape: Annotated[
        str, typer.Option(metavar="NAME", help="A known model's shape, such as gemma-3-270m, or a model's folder.")
    ],
    stage: Annotated[str | None, typer.Option(help="Number or name of one stage (default: EEVE's seven).")] = None,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of weights and products.")] = "bf16",
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of an optimiser step.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured, after one that is not.")] = 5,
    new_rows: Annotated[int, typer.Option(min=1, help="How many of the shape's rows are new ones.")] = 6143,
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw_8bit"], typer.Option(help="Of the stage, as in a recipe.")
    ] = "adamw",
    quantise: Annotated[
        Literal["none", "nf4"] | None, typer.Option(help="Hold frozen layers in 4 bits (default: as EEVE's stages do).")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows at a time (default: as many as fit).")] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(help="Make activations again in the backward pass, as EEVE's stages do: slower, less memory."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a few steps of each stage on random weights: tokens/s, peak memory, utilisation, where the time goes."""
    from lingraft import api

    chosen = {"optimizer": optimizer, "quantise": quantise, "micro_batch": micro_batch}
    settings = {key: value for key, value in chosen.items() if value is not None}
    with _progress_aside(as_json):
        data = api.bench(
            shape,
            stage=stage,
            dtype=dtype,
            tokens=tokens,
            steps=steps,
            new_rows=new_rows,
            settings={**settings, "gradient_checkpointing": gradient_checkpointing},
        )
    shown = data[0] if stage else {"stages": data}
    typer.echo(json.dumps(shown, ensure_ascii=False, indent=1) if as_json else terminal.bench(data))


@app.command()
def report(run_folder: RunArgument) -> None:
    """Write a run's report.html again."""
    from lingraft import api

    typer.echo(api.write_report(run_folder))


@recipe_app.command("check")
def recipe_check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe and that its inputs exist; all faults are listed at once."""
    from lingraft import api

    loaded = api.check(recipe, set_ or [])
    typer.echo(f"{loaded.name}: {len(loaded.stages)} stages, {len(loaded.corpus.sources)} sources; no faults")


@recipe_app.command("show")
def recipe_show(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Print a recipe with presets expanded and every default written out."""
    from lingraft.recipe_file import dump, load

    typer.echo(dump(load(recipe, set_ or [])), nl=False)


@recipe_app.command("list")
def recipe_list() -> None:
    """Name the built-in recipes."""
    from lingraft.recipe_file import built_in_names, load

    for name in built_in_names():
        typer.echo(f"{name:<24} {load(name).description}")


@embeddings_app.command("compare")
def embeddings_compare(
    recipe: RecipeArgument,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps of each short training.")] = 50,
    as_json: JsonOption = False,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Train shortly from each initialisation rule and rank them; the same command goes on after a stop."""
    from lingraft import api

    command = shlex.join(["lingraft", *sys.argv[1:]])
    data = api.compare_embeddings(recipe, run_dir, set_ or [], steps=steps, command=command)
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1) if as_json else terminal.comparison(data))


@app.command(cls=_Lists)
def doctor(
    model: Annotated[Path, typer.Argument(help="A model's folder, anyone's; a tokenizer alone will do.")],
    base: Annotated[Path | None, typer.Option("--base", help="The folder of the model it was made from.")] = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text files whose lines to try.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find what is wrong with a model folder: exit code 0 if healthy, 1 if not."""
    from lingraft import api

    with _progress_aside(as_json):
        diagnosis = api.diagnose(model, base, text or [])
    data = diagnosis.as_json()
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1) if as_json else terminal.doctor(data))
    raise typer.Exit(0 if diagnosis.healthy else 1)


@tokenizer_app.command("graft", cls=_Lists)
def tokenizer_graft(
    base: Annotated[Path, typer.Option("--base", help="The folder of the model or tokenizer to start from.")],
    text: TextOption,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="How many tokens to learn at most.")],
    out: OutOption,
    slots: Annotated[
        Literal["auto", "unused", "append"], typer.Option(help="Take unused ids, append new ones, or first one.")
    ] = "auto",
    min_frequency: Annotated[int, typer.Option(min=1, help="How often a new token must occur in the text.")] = 2,
    scripts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME…", help="Scripts of new tokens, such as Hangul (default: that of the text)."),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE…", help="Text to measure the gain on (default: every 20th document of the text)."),
    ] = None,
    column: ColumnOption = None,
    as_json: JsonOption = False,
) -> None:
    """Learn new tokens from text and put them into a tokenizer, with proof that old text keeps its ids."""
    from lingraft import api

    with _progress_aside(as_json):
        data = api.graft_tokenizer(
            base,
            text,
            out,
            new_tokens=new_tokens,
            slots=slots,
            min_frequency=min_frequency,
            scripts=scripts or [],
            held_out=held_out or [],
            column=column,
        )
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1) if as_json else terminal.grafted_tokenizer(data))


@tokenizer_app.command("report", cls=_Lists)
def tokenizer_report(
    tokenizer: Annotated[Path, typer.Argument(help="The folder of the tokenizer, grafted here or elsewhere.")],
    base: Annotated[Path, typer.Option("--base", help="The folder of the model or tokenizer it was made from.")],
    text: TextOption,
    column: ColumnOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a tokenizer cuts text against its base: tokens per character, word and byte, use of new tokens."""
    from lingraft import api

    with _progress_aside(as_json):
        data = api.report_tokenizer(tokenizer, base, text, column)
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1) if as_json else terminal.compared_tokenizers(data))


@app.command()
def graft(
    base: Annotated[Path, typer.Option("--base", help="The folder of the model.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="The folder of its grafted tokenizer.")],
    out: OutOption,
    input_rule: Annotated[str, typer.Option("--input", help="How a new token's input row begins.")] = "subword_mean",
    output_rule: Annotated[str, typer.Option("--output", help="How its output row begins.")] = "length_weighted",
    tie: Annotated[Literal["untie", "keep"], typer.Option(help="Part tied matrices, or keep them one.")] = "untie",
    as_json: JsonOption = False,
) -> None:
    """Give a model's weights a row for each new token of a grafted tokenizer; nothing else changes."""
    from lingraft import api

    with _progress_aside(as_json):
        data = api.graft_model(base, tokenizer, out, input_rule=input_rule, output_rule=output_rule, tie=tie)
    typer.echo(json.dumps(data, ensure_ascii=False, indent=1) if as_json else terminal.grafted_model(data))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


def main() -> None:
    """Entry point of the console script. SIGTERM, with which schedulers end a job, is taken as Ctrl-C is."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


def _progress_aside(as_json: bool) -> AbstractContextManager[Any]:
    """Keep standard output for the JSON object alone: bars and remarks go to standard error meanwhile."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _system_errno(error: BaseException) -> int | None:
    """The system's error number behind an exception; safetensors gives it in its message only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _cure(number: int) -> str:
    cures = {
        errno.ENOSPC: "; the disk is full: make room and give the same command again, finished steps are kept",
        errno.EDQUOT: "; your disk quota is used up: make room and give the same command again",
        errno.EFBIG: "; the file is larger than this system allows: raise the limit or choose another --run-dir",
        errno.EROFS: "; the file system is read-only: choose another --run-dir",
        errno.EACCES: "; you may not read or write there: change its permissions or choose another --run-dir",
    }
    return cures.get(number, "")


def _fail(message: str, code: int) -> NoReturn:
    for line in message.split("\n") if processes.speaks() else ():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
