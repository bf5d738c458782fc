"""The calls behind the command line, for notebooks and scripts. Heavy imports happen inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from lingraft.pipeline import default_run_folder, run_recipe

    loaded = load_recipe(recipe, overrides)
    folder = Path(run_dir).absolute() if run_dir else default_run_folder(loaded)
    return run_recipe(loaded, folder, command)


def plan(recipe: str | Path, run_dir: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a run would do: every step with its state, and what each stage trains, before any work.

    Returns:
        Plain data, the same as `lingraft plan --json` prints.
    """
    from lingraft.pipeline import default_run_folder
    from lingraft.planning import describe

    loaded = load_recipe(recipe, overrides)
    return describe(loaded, Path(run_dir).absolute() if run_dir else default_run_folder(loaded))


def status(run_dir: str | Path) -> dict[str, Any]:
    """How far a run has come: every step's state and the scoreboard so far.

    Raises:
        RunError: not a run folder.
    """
    from lingraft.planning import run_status

    return run_status(Path(run_dir).absolute())


def write_report(run_dir: str | Path) -> Path:
    """Write the run's `report.html` again from what is there, and return its path.

    Raises:
        RunError: not a run folder.
    """
    from lingraft.planning import rewrite_report

    return rewrite_report(Path(run_dir).absolute())
