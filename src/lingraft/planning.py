"""What a run will do and how far it has come, as plain data: the verbs `plan`, `status`, `report`, `recipe check`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lingraft.forecast import CARDS_GB, disk_gb, forecast, rates
from lingraft.layout import Step, make_plan, open_run
from lingraft.recipe import Recipe
from lingraft.results import publish_results, scoreboard
from lingraft.steps.economics import economics, published
from lingraft.steps.shape import shape_if_known


def check_inputs(recipe: Recipe) -> None:
    """Raise where a local input of the recipe is missing or unreadable."""
    make_plan(recipe, Path("runs").absolute() / recipe.name, download=False)


def describe(
    recipe: Recipe,
    run: Path,
    *,
    shape_name: str | None = None,
    device: str | None = None,
    memory_gb: Sequence[float] = CARDS_GB,
) -> dict[str, Any]:
    """The plan as plain data: steps with their states, and per stage what trains and what it takes.

    Args:
        shape_name: a named shape in place of the base's configuration; device: whose rates to count with (`rates`);
        memory_gb: sizes of cards to judge by.
    Raises:
        LingraftError: no such shape or device, or an input is missing.
    """
    plan = make_plan(recipe, run, download=False)
    shape, unknown = shape_if_known(plan, shape_name)
    tokens = economics(plan, shape)
    added = _added_rows(recipe, tokens)
    stages = [_stage(recipe, step) for step in plan.training_steps]
    described: dict[str, Any] = {
        "name": recipe.name,
        "run": str(run),
        "base": {"model": plan.base.label, **(shape.as_dict(added) if shape else {"unknown": unknown})},
        "tokens": tokens,
        "steps": [{"step": s.name, "title": s.title, "state": plan.state(s)} for s in plan.steps],
        "stages": stages,
        "notes": plan.collapsed,
    }
    if shape is not None:
        at = rates(device)
        for stage, step in zip(stages, plan.training_steps, strict=True):
            stage |= forecast(plan, step, shape, added, tokens, at, memory_gb)
        described["disk_gb"] = disk_gb(stages, grafts=recipe.tokenizer is not None)
    return described


def _added_rows(recipe: Recipe, tokens: dict[str, Any] | None) -> int:
    """Rows that the graft adds: those found, else as many as the recipe asks to append."""
    if tokens and tokens.get("rows"):
        return tokens["rows"]["added_rows"]
    return recipe.tokenizer.new_tokens if recipe.tokenizer and recipe.tokenizer.slots == "append" else 0


def _stage(recipe: Recipe, step: Step) -> dict[str, Any]:
    """What a stage is to do."""
    stage = step.stage
    assert stage is not None
    return {
        "step": step.name,
        "name": stage.name,
        "train": stage.train.model_dump(),
        "learning_rate": stage.learning_rate,
        "epochs": stage.epochs or (None if stage.tokens else 1),
        "tokens": stage.tokens,
        "data": recipe.stage_data(stage),
        "rows_per_step": stage.batch_size * stage.gradient_accumulation_steps,
    }


def run_status(run: Path) -> dict[str, Any]:
    """Every step of an existing run with its state and time, and the scoreboard so far."""
    plan = open_run(run)
    steps = []
    for step in plan.steps:
        manifest = plan.manifest(step.name)
        steps.append(
            {
                "step": step.name,
                "title": step.title,
                "state": plan.state(step),
                "seconds": manifest["seconds"] if manifest else None,
            }
        )
    entries = scoreboard(plan)
    finished = all(step["state"] == "done" for step in steps) and not gate_stopped(entries)
    tokens = published(plan, shape_if_known(plan)[0])
    return {
        "name": plan.recipe.name,
        "run": str(run),
        "finished": finished,
        "steps": steps,
        "tokens": tokens,
        "scoreboard": entries,
    }


def gate_stopped(entries: list[dict[str, Any]]) -> bool:
    """Whether a stage's gate, as the recipe now has it, has failed."""
    return any(entry["gate"] and not entry["gate"]["passed"] for entry in entries)


def rewrite_report(run: Path) -> Path:
    """Write report.html and scoreboard.json again."""
    plan = open_run(run)
    entries = scoreboard(plan)
    finished = all(plan.state(step) == "done" for step in plan.steps)
    state = "stopped by a gate" if gate_stopped(entries) else "finished" if finished else "unfinished"
    publish_results(plan, state, "")
    return run / "report.html"
