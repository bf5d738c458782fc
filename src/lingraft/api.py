"""The calls behind the command line, for notebooks and scripts. Heavy imports happen inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingraft.doctor.examine import Diagnosis
    from lingraft.pipeline import RunResult
    from lingraft.recipe import Recipe


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe: a YAML file or a built-in name, with `a.b=value` overrides.

    Raises:
        RecipeError: one line for every fault.
    """
    from lingraft.recipe_file import load

    return load(recipe, overrides)


def check(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe and that its local inputs exist; nothing is run.

    Raises:
        LingraftError: the recipe or an input is wrong.
    """
    from lingraft.planning import check_inputs

    loaded = load_recipe(recipe, overrides)
    check_inputs(loaded)
    return loaded


def run(
    recipe: str | Path,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    command: str = "",
) -> RunResult:
    """Run a recipe to the end, going on from whatever an earlier run of it finished.

    Args:
        recipe: a YAML file, or a built-in name such as `quickstart`.
        run_dir: the run's folder, by default `runs/<name>` in the current folder.
        overrides: `a.b=value` assignments over the recipe.
        command: what to record as the command; nothing else depends on it.
    Returns:
        The run's folder, the final model's folder and the scoreboard's entries.
    Raises:
        GateFailed: a stage cost more than its gate allows. LingraftError: anything else a user can mend.
    """
    from lingraft.layout import default_run_folder
    from lingraft.pipeline import run_recipe
    from lingraft.processes import led

    def work() -> RunResult:
        loaded = load_recipe(recipe, overrides)
        folder = Path(run_dir).absolute() if run_dir else default_run_folder(loaded)
        return run_recipe(loaded, folder, command)

    return led(work)


def plan(
    recipe: str | Path,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    shape: str | None = None,
    device: str | None = None,
    memory_gb: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What a run would do: every step with its state, what each stage trains and what it takes, before any work.

    Args:
        shape: a known model's shape in place of the base's own, such as `gemma-3-4b`.
        device: whose speed to count with, such as `a6000`; by default this machine's.
        memory_gb: sizes of cards to judge by.
    Returns:
        Plain data, the same as `lingraft plan --json` prints.
    Raises:
        LingraftError: the recipe or an input is wrong, or no shape or device has that name.
    """
    from lingraft.forecast import CARDS_GB
    from lingraft.layout import default_run_folder
    from lingraft.planning import describe

    loaded = load_recipe(recipe, overrides)
    folder = Path(run_dir).absolute() if run_dir else default_run_folder(loaded)
    return describe(loaded, folder, shape_name=shape, device=device, memory_gb=memory_gb or CARDS_GB)


def status(run_dir: str | Path) -> dict[str, Any]:
    """How far a run has come: every step's state and the scoreboard so far.

    Raises:
        RunError: not a run folder.
    """
    from lingraft.planning import run_status

    return run_status(Path(run_dir).absolute())


def bench(shape: str, **options: Any) -> list[dict[str, Any]]:
    """Run some steps of each of EEVE's stages at a known model's shape with random weights, and measure them.

    Options and results: `lingraft.bench.bench`. A script that calls it needs the usual `if __name__ == "__main__":`.

    Raises:
        LingraftError: no such shape or stage, or too little memory.
    """
    from lingraft import bench

    return bench.bench(shape, **options)


def compare_embeddings(
    recipe: str | Path,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    steps: int = 50,
    command: str = "",
) -> dict[str, Any]:
    """Train shortly from each initialisation rule that the recipe has the material for, and rank them.

    Args:
        steps: optimiser steps of each short training, about.
    Returns:
        Plain data, the same as in the run's `probe/comparison.json`: `results`, the best first, `not_run`, `winner`.
    Raises:
        LingraftError: the recipe or an input is wrong.
    """
    from lingraft.layout import default_run_folder
    from lingraft.pipeline import compare_embeddings

    loaded = load_recipe(recipe, overrides)
    folder = Path(run_dir).absolute() if run_dir else default_run_folder(loaded)
    return compare_embeddings(loaded, folder, steps, command)


def write_report(run_dir: str | Path) -> Path:
    """Write the run's `report.html` again from what is there, and return its path.

    Raises:
        RunError: not a run folder.
    """
    from lingraft.planning import rewrite_report

    return rewrite_report(Path(run_dir).absolute())


def diagnose(model: str | Path, base: str | Path | None = None, texts: Sequence[str | Path] = ()) -> Diagnosis:
    """Examine a model folder, anyone's, and name everything that is wrong with it.

    Args:
        base: the folder of the model it was made from, for what must not have changed.
        texts: UTF-8 files whose lines to try; a few built-in lines if there are none.
    Raises:
        ModelError: no model or tokenizer in the folder. CorpusError: a text file cannot be used.
    """
    from lingraft.doctor.examine import examine
    from lingraft.doctor.lines import BUILT_IN, read_lines

    lines = read_lines([Path(file) for file in texts]) if texts else BUILT_IN
    return examine(Path(model), Path(base) if base else None, lines)


def graft_tokenizer(
    base: str | Path, texts: Sequence[str], out: str | Path, *, new_tokens: int, **options: Any
) -> dict[str, Any]:
    """Learn new tokens from text files and write the base's tokenizer with them to `out`, proven harmless.

    Options and results: `lingraft.direct.graft_tokenizer`.

    Raises:
        LingraftError: text or tokenizer can't be used, the slots don't suffice, or `out` is not empty.
    """
    from lingraft import direct

    return direct.graft_tokenizer(Path(base), texts, Path(out), new_tokens=new_tokens, **options)


def report_tokenizer(
    grafted: str | Path, base: str | Path, texts: Sequence[str], column: str | None = None
) -> dict[str, Any]:
    """How a tokenizer cuts text against its base, as plain data.

    Raises:
        LingraftError: a tokenizer or the text can't be used.
    """
    from lingraft import direct

    return direct.report_tokenizer(Path(grafted), Path(base), texts, column)


def graft_model(model: str | Path, tokenizer: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Write a model with a row for each token of a grafted tokenizer to `out`, streamed and proven harmless.

    Options and results: `lingraft.direct.graft_model`.

    Raises:
        LingraftError: the weights, the tokenizer or the two together can't be used, or `out` is not empty.
    """
    from lingraft import direct

    return direct.graft_model(Path(model), Path(tokenizer), Path(out), **options)
