"""Running the steps of a recipe in order, one run at a time in a folder."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lingraft.artifact import publish
from lingraft.atomic import write_text
from lingraft.errors import GateFailed, RecipeError, RunError
from lingraft.evaluation.scoreboard import alarms
from lingraft.layout import Plan, Step, make_plan
from lingraft.processes import launched
from lingraft.progress import say
from lingraft.recipe import Recipe
from lingraft.recipe_file import dump
from lingraft.results import headline, publish_results, scoreboard, summary
from lingraft.steps import probe
from lingraft.steps.base import check as check_base
from lingraft.steps.base import pin_base
from lingraft.steps.context import Context
from lingraft.version import versions


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the final model's folder, and the scoreboard's entries."""

    run: Path
    model: Path
    scoreboard: list[dict[str, Any]]

    @property
    def report(self) -> Path:
        return self.run / "report.html"


def run_recipe(recipe: Recipe, run: Path, command: str = "") -> RunResult:
    """Run every step that is not done, in order; then publish scoreboard and report.

    Raises:
        GateFailed: a stage cost more than its gate allows. LingraftError: anything else that a user can mend.
    """
    with _locked(run):
        plan = _begin(recipe, run)
        for number, step in enumerate(plan.steps, 1):
            _run_step(plan, step, number, command)
            if step.name.startswith("scores/"):
                _after_measuring(plan, step)
        shutil.rmtree(run / ".work", ignore_errors=True)
        entries = publish_results(plan, "finished", command)
        return RunResult(run, run / "model", entries)


def compare_embeddings(recipe: Recipe, run: Path, steps: int, command: str = "") -> dict[str, Any]:
    """Compare the initialisation rules (`steps.probe`) in the run's folder, after the steps that this needs.

    Raises:
        RecipeError: the recipe grafts nothing. LingraftError: anything else that a user can mend.
    """
    if recipe.tokenizer is None:
        raise RecipeError("tokenizer: the recipe has no tokenizer section, so there are no new rows to compare")
    with _locked(run):
        plan = _begin(recipe, run)
        for number, step in enumerate(plan.steps, 1):
            if step.name in ("01-corpus", "02-tokenizer"):
                _run_step(plan, step, number, command)
        return probe.compare(Context(recipe, run, plan.base), run / "probe", steps)


def _begin(recipe: Recipe, run: Path) -> Plan:
    """Lay the run out, note its recipe in its folder, and see that its base is there."""
    plan = make_plan(recipe, run)
    write_text(run / "recipe.yaml", dump(recipe))
    pin_base(run, recipe, plan.base)
    if plan.base_plan is not None:
        _run_base(plan.base_plan, recipe)
    if not recipe.base.scratch:
        check_base(plan.base.folder)
    _announce(plan)
    return plan


def _run_base(plan: Plan, recipe: Recipe) -> None:
    """Make the base that another recipe describes, unless an earlier run left it in the cache."""
    if all(plan.state(step) == "done" for step in plan.steps):
        say(f"base: {recipe.base.recipe}, from the cache {plan.run}")
        return
    say(f"base: {recipe.base.recipe} is made first and kept in {plan.run}")
    run_recipe(plan.recipe, plan.run)


def _announce(plan: Plan) -> None:
    recipe = plan.recipe
    miniature = " (a miniature world: its numbers say nothing about real medicine)" if recipe.miniature else ""
    say(f"{recipe.name}{miniature}", style="bold")
    say(f"  base {plan.base.label}, {recipe.languages.old} → {recipe.languages.target}, run folder {plan.run}")
    if (count := launched()) > 1:
        say(f"  {count} processes train together")
    for line in plan.collapsed:
        say(f"  {line}")


def _run_step(plan: Plan, step: Step, number: int, command: str) -> None:
    label = f"[{number}/{len(plan.steps)}] {step.title}"
    if plan.state(step) == "done":
        say(f"{label}: done before", style="dim")
        return
    say(f"{label}", style="bold" if not step.name.startswith("scores/") else "")
    begin = time.monotonic()
    started = _now()
    scratch = _scratch(plan.run, step)
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    results = step.work(out, scratch)
    manifest = {
        "step": step.name,
        "title": step.title,
        "key": step.key,
        "section": step.section,
        "inputs": step.inputs,
        "started": started,
        "seconds": round(time.monotonic() - begin, 3),
        "command": command,
        "seed": plan.recipe.seed,
        "versions": versions(),
        "results": results,
    }
    publish(out, plan.run / step.name, manifest)
    shutil.rmtree(scratch, ignore_errors=True)
    for line in summary(step, results):
        say(line)


def _scratch(run: Path, step: Step) -> Path:
    """The step's work folder; emptied when it was left by another version of the step."""
    scratch = run / ".work" / step.name
    marker = scratch / "key"
    if not marker.is_file() or marker.read_text() != step.key:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        write_text(marker, step.key)
    return scratch


def _after_measuring(plan: Plan, step: Step) -> None:
    """Show the new entry, judge the stage's gate, and bring scoreboard and report up to date."""
    entries = scoreboard(plan)
    entry = next(e for e in entries if f"scores/{e['step']}" == step.name)
    say("  " + headline(entry))
    if entry["step"] == "00-base":
        for line in alarms(entry, plan.recipe.languages.old):
            say(f"  {line}", style="bold red" if line.startswith("alarm") else "yellow")
    gate = entry["gate"]
    if gate and not gate["passed"]:
        publish_results(plan, "stopped by a gate", "")
        failed = "; ".join(
            f"{c['name']} is {c['value']:+.4f}, allowed {c['limit']:+.4f}" for c in gate["checks"] if not c["passed"]
        )
        assert step.stage is not None
        raise GateFailed(
            f"gate: stage {step.stage_index} {step.stage.name} cost too much: {failed}. Everything is kept in "
            f"{plan.run}. Change this stage in the recipe (a lower learning_rate, fewer tokens, more old text) "
            f"or its gate, and give the same command again: it goes on from stage {step.stage_index}"
        )
    publish_results(plan, "unfinished", "")


@contextmanager
def _locked(run: Path) -> Any:
    """Make the run folder and hold its lock: one run at a time in a folder."""
    from filelock import FileLock, Timeout

    try:
        run.mkdir(parents=True, exist_ok=True)
        if not os.access(run, os.W_OK):
            raise PermissionError(13, "Permission denied")
        lock = FileLock(run / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"{run}: another run is at work in this folder; wait for it, or give another --run-dir"
        ) from error
    except OSError as error:
        raise RunError(f"{run}: can't write the run folder: {error.strerror}; give another --run-dir") from error
    try:
        yield
    finally:
        lock.release()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
