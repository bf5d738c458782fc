"""What a run will do and how far it has come, as plain data: the verbs `plan`, `status`, `report`, `recipe check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingraft.pipeline import Plan, make_plan, open_run, publish_results, scoreboard, stage_entries
from lingraft.recipe import Recipe, Stage
from lingraft.steps.economics import economics, published
from lingraft.steps.shape import Shape, shape_if_known

BYTES = {"fp32": 4, "bf16": 2}
ADAM_BYTES = 16  # float32 value, gradient and two moments for each value that trains


def check_inputs(recipe: Recipe) -> None:
    """Raise where a local input of the recipe is missing or unreadable."""
    make_plan(recipe, Path("runs").absolute() / recipe.name, download=False)


def describe(recipe: Recipe, run: Path) -> dict[str, Any]:
    """The plan as plain data: steps with their states, and per stage what trains and what it needs at least."""
    plan = make_plan(recipe, run, download=False)
    shape, unknown = shape_if_known(plan)
    tokens = economics(plan, shape)
    added = _added_rows(recipe, tokens)
    size = shape.as_dict(added) if shape else {"unknown": unknown}
    return {
        "name": recipe.name,
        "run": str(run),
        "base": {"model": plan.base.label, **size},
        "tokens": tokens,
        "steps": [{"step": s.name, "title": s.title, "state": plan.state(s)} for s in plan.steps],
        "stages": [_stage(plan, s.stage, s.name, shape, added) for s in stage_entries(plan.steps) if s.stage],
        "notes": plan.collapsed,
    }


def _added_rows(recipe: Recipe, tokens: dict[str, Any] | None) -> int:
    """Rows that the graft adds: those found, else as many as the recipe asks to append."""
    if tokens and tokens.get("rows"):
        return tokens["rows"]["added_rows"]
    return recipe.tokenizer.new_tokens if recipe.tokenizer and recipe.tokenizer.slots == "append" else 0


def _stage(plan: Plan, stage: Stage, step: str, shape: Shape | None, added_rows: int) -> dict[str, Any]:
    """One stage's line of the plan."""
    recipe = plan.recipe
    described: dict[str, Any] = {
        "step": step,
        "name": stage.name,
        "train": stage.train.model_dump(),
        "learning_rate": stage.learning_rate,
        "epochs": stage.epochs or (None if stage.tokens else 1),
        "tokens": stage.tokens,
        "data": recipe.stage_data(stage),
        "rows_per_step": stage.batch_size * stage.gradient_accumulation_steps,
    }
    if shape is not None:
        new = recipe.tokenizer.new_tokens if recipe.tokenizer else 0
        rows = {"none": 0, "new": new, "all": shape.rows + added_rows}
        sides = (stage.train.input_rows, stage.train.output_rows)
        trained_rows = max(rows[s] for s in sides) if shape.tied else sum(rows[s] for s in sides)
        trainable = trained_rows * shape.width
        if stage.train.layers == "all":
            trainable += shape.body
        elif stage.lora:
            trainable += shape.lora(stage)
        quantised = stage.lora is not None and stage.lora.quantise == "nf4"
        weights = float(shape.parameters(added_rows) * BYTES[stage.precision])
        if quantised:
            weights -= shape.body * (BYTES[stage.precision] - 0.53)  # 4 bits and the double-quantised constants
        described |= {
            "trainable": trainable,
            "minimum_memory_gb": round((weights + trainable * ADAM_BYTES) / 1e9, 3),
        }
    return described


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
