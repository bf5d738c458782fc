"""What a run will do and how far it has come, as plain data: the verbs `plan`, `status`, `report`, `recipe check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingraft.errors import ModelError
from lingraft.pipeline import Plan, make_plan, open_run, publish_results, scoreboard, stage_entries
from lingraft.recipe import Recipe, Stage

BYTES = {"fp32": 4, "bf16": 2}
ADAM_BYTES = 16  # float32 value, gradient and two moments for each value that trains


def check_inputs(recipe: Recipe) -> None:
    """Raise where a local input of the recipe is missing or unreadable."""
    make_plan(recipe, Path("runs").absolute() / recipe.name, download=False)


def describe(recipe: Recipe, run: Path) -> dict[str, Any]:
    """The plan as plain data: steps with their states, and per stage what trains and what it needs at least."""
    plan = make_plan(recipe, run, download=False)
    try:
        shape: Shape | None = Shape.of(plan)
        unknown = ""
    except ModelError as error:
        shape, unknown = None, str(error)
    return {
        "name": recipe.name,
        "run": str(run),
        "base": {"model": plan.base.label, **(shape.as_dict() if shape else {"unknown": unknown})},
        "steps": [{"step": s.name, "title": s.title, "state": plan.state(s)} for s in plan.steps],
        "stages": [_stage(plan, s.stage, s.name, shape) for s in stage_entries(plan.steps) if s.stage],
        "notes": plan.collapsed,
    }


class Shape:
    """The model's dimensions that decide how much trains, from its configuration alone."""

    def __init__(self, model: Any, tied: bool, rows: int) -> None:
        from lingraft.model.fingerprint import body_parameters
        from lingraft.model.load import input_matrix

        self.model = model
        self.tied = tied
        self.rows = rows
        self.width = input_matrix(model).shape[1]
        self.body = sum(p.numel() for p in body_parameters(model).values())
        total = sum(p.numel() for p in model.parameters())
        matrices = 1 if _shares(model) else 2
        self.other = total - self.body - matrices * input_matrix(model).numel()

    @classmethod
    def of(cls, plan: Plan) -> Shape:
        """From the base's config, without loading weights.

        Raises:
            ModelError: the base can't be reached.
        """
        import torch
        import transformers

        recipe = plan.recipe
        config = base_config(plan)
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
        with torch.device("meta"):
            model = kind(config) if kind is not transformers.AutoModelForCausalLM else kind.from_config(config)
        rows = config.get_text_config().vocab_size
        appended = recipe.tokenizer.new_tokens if recipe.tokenizer and recipe.tokenizer.slots == "append" else 0
        return cls(model, plan.tied, rows + appended)

    @property
    def parameters(self) -> int:
        return self.body + self.other + self.rows * self.width * (1 if self.tied else 2)

    def as_dict(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "rows": self.rows, "width": self.width, "tied": self.tied}

    def lora(self, stage: Stage, model_type: str) -> int:
        """Values in the stage's adapters."""
        from lingraft.families import family
        from lingraft.model.lora import target_modules

        assert stage.lora is not None
        names = target_modules(self.model, stage.lora.targets or family(model_type).projections)
        return sum(sum(self.model.get_submodule(n).weight.shape) * stage.lora.r for n in names)


def _shares(model: Any) -> bool:
    from lingraft.model.load import input_matrix, output_matrix

    return output_matrix(model) is input_matrix(model)


def base_config(plan: Plan) -> Any:
    """The transformers configuration of the plan's base.

    Raises:
        ModelError: it can't be read or reached.
    """
    from lingraft.model.load import read_config
    from lingraft.steps.new_base import make_config

    if plan.recipe.base.scratch:
        return make_config(plan.recipe.base.scratch)
    if plan.base_plan and not (plan.base.folder / "config.json").is_file():
        return base_config(plan.base_plan)
    if plan.unreachable:
        raise ModelError(plan.unreachable)
    return read_config(plan.base.folder)


def _stage(plan: Plan, stage: Stage, step: str, shape: Shape | None) -> dict[str, Any]:
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
        rows = {"none": 0, "new": new, "all": shape.rows}
        sides = (stage.train.input_rows, stage.train.output_rows)
        trained_rows = max(rows[s] for s in sides) if shape.tied else sum(rows[s] for s in sides)
        trainable = trained_rows * shape.width
        if stage.train.layers == "all":
            trainable += shape.body
        elif stage.lora:
            trainable += shape.lora(stage, base_config(plan).model_type)
        quantised = stage.lora is not None and stage.lora.quantise == "nf4"
        weights = float(shape.parameters * BYTES[stage.precision])
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
    return {"name": plan.recipe.name, "run": str(run), "finished": finished, "steps": steps, "scoreboard": entries}


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
