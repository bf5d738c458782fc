"""The ordered steps of a run: what is done, what is stale, what comes next.

    01-corpus → 02-tokenizer → 03-embeddings → 04-stage-1-… → … → model/
                     each model folder → scores/<folder>/ → scoreboard.json, report.html

A step's key is a hash of its recipe section and of its inputs' keys. A published folder with the same key is done
and is skipped; a changed section changes the keys of the steps that depend on it, and of no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lingraft.artifact import Hashes, key_of, read_manifest
from lingraft.errors import RunError
from lingraft.model.load import is_tied, read_config
from lingraft.presets import collapse
from lingraft.recipe import HARMLESS_SETTINGS, Recipe, Stage
from lingraft.recipe_file import load
from lingraft.steps import corpus, embeddings, final, new_base, probe, scores, stage, tokenizer
from lingraft.steps.base import Base, HubUnreachable, cache_folder, from_folder_or_hub
from lingraft.steps.context import Context, stage_folder
from lingraft.steps.new_base import make_config

RESULTS_VERSION = 1  # raise it when a step's results change for the same recipe and inputs

State = Literal["done", "stale", "started", "pending"]
Work = Callable[[Path, Path], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One folder to make. `work(out, scratch)` fills `out`; `scratch` outlives a kill."""

    name: str
    title: str
    section: dict[str, Any]
    inputs: dict[str, str]
    work: Work = field(compare=False)
    stage: Stage | None = None
    stage_index: int = 0

    @property
    def key(self) -> str:
        return key_of(name=self.name, section=self.section, inputs=self.inputs, version=RESULTS_VERSION)


@dataclass(frozen=True)
class Plan:
    """A run before it runs: its base, its steps in order, and which folders hold models to measure."""

    recipe: Recipe
    run: Path
    base: Base
    base_plan: Plan | None
    steps: list[Step]
    collapsed: list[str]
    tied: bool
    unreachable: str = ""

    def state(self, step: Step) -> State:
        manifest = read_manifest(self.run / step.name)
        if manifest is not None:
            return "done" if manifest["key"] == step.key else "stale"
        return "started" if (self.run / ".work" / step.name).is_dir() else "pending"

    @property
    def training_steps(self) -> list[Step]:
        """The steps that train a stage, in order."""
        return [step for step in self.steps if step.stage is not None and not step.name.startswith("scores/")]

    def manifest(self, name: str) -> dict[str, Any] | None:
        return read_manifest(self.run / name)


def make_plan(recipe: Recipe, run: Path, download: bool = True) -> Plan:
    """Lay out the steps of a run and their keys. Reads and hashes inputs; writes nothing but a memory of hashes.

    Args:
        download: fetch a hub base's weights. Without, only its small files are fetched, and a hub that can't be
            reached is noted in the plan instead of raised.
    Raises:
        LingraftError: an input is missing or unreadable.
    """
    hashes = Hashes(run / ".hashes.json" if run.is_dir() else None)
    base_plan, unreachable = None, ""
    if recipe.base.recipe:
        base_plan = _base_plan(recipe)
        base = Base(base_plan.run / "model", base_plan.steps[-1].key, f"recipe {recipe.base.recipe}")
        tied = base_plan.tied
    elif recipe.base.scratch:
        base = Base(run / "02-new-base", "", "random weights")
        tied = is_tied(make_config(recipe.base.scratch))
    else:
        try:
            base = from_folder_or_hub(recipe, run, hashes, weights=download)
            tied = is_tied(read_config(base.folder))
        except HubUnreachable as error:
            if download:
                raise
            base, tied, unreachable = (
                Base(Path(recipe.base.model or ""), "unreachable", recipe.base.model or ""),
                True,
                str(error),
            )
    if recipe.tokenizer and recipe.embeddings.tie == "untie":
        tied = False
    stages, collapsed = collapse(recipe.stages) if tied else (list(recipe.stages), [])
    layout = _Layout(recipe, run, base, hashes, stages)
    layout.lay_out()
    if run.is_dir():
        hashes.save()
    return Plan(recipe, run, layout.base, base_plan, layout.steps, collapsed, tied, unreachable)


def _base_plan(recipe: Recipe) -> Plan:
    name = recipe.base.recipe or ""
    path = recipe.path(name)
    inner = load(path if path.is_file() else name)
    return make_plan(inner, cache_folder() / inner.name)


class _Layout:
    """Lays out the steps of a recipe one after another."""

    def __init__(self, recipe: Recipe, run: Path, base: Base, hashes: Hashes, stages: list[Stage]) -> None:
        self.recipe, self.run, self.base, self.hashes, self.stages = recipe, run, base, hashes, stages
        self.steps: list[Step] = []

    def lay_out(self) -> None:
        recipe = self.recipe

        def context() -> Context:
            return Context(recipe, self.run, self.base)

        corpus_step = self._add(
            "01-corpus",
            "corpus",
            {"corpus": recipe.corpus, "languages": recipe.languages, "seed": recipe.seed},
            corpus.inputs(recipe, self.hashes, self.base.key),
            lambda out, work: corpus.run(context(), out, work),
        )
        before = self.base.folder
        key = self.base.key
        score_inputs = {"corpus": corpus_step.key, **scores.inputs(recipe, self.hashes)}

        def measure(folder: Path, step: str, title: str, model_key: str, stage: Stage | None, index: int) -> None:
            self._add(
                f"scores/{step}",
                f"measure {title}",
                {"evaluate": recipe.evaluate, "languages": recipe.languages},
                {"model": model_key, **score_inputs},
                lambda out, work: scores.run(context(), folder, step, title, out),
                stage,
                index,
            )

        if recipe.base.scratch:
            made = self._add(
                "02-new-base",
                "new base",
                {"scratch": recipe.base.scratch, "seed": recipe.seed},
                {"corpus": corpus_step.key},
                lambda out, work: new_base.run(context(), out, work),
            )
            key = made.key
            self.base = Base(self.run / made.name, key, "random weights")
        else:
            measure(before, "00-base", "base", key, None, 0)
        if recipe.tokenizer:
            probed = recipe.embeddings.method == "probe"
            tokenizer_step = self._add(
                "02-tokenizer",
                "tokenizer",
                {"tokenizer": recipe.tokenizer, "languages": recipe.languages},
                {"base": key, "corpus": corpus_step.key},
                lambda out, work: tokenizer.run(context(), out, work),
            )
            grafted = self._add(
                "03-embeddings",
                "embeddings",
                embeddings_section(recipe),
                {"tokenizer": tokenizer_step.key, "base": key} | embeddings.inputs(recipe, self.hashes),
                lambda out, work: (probe if probed else embeddings).run(context(), out, work),
            )
            before, key = self.run / grafted.name, grafted.key
            measure(before, grafted.name, "graft", key, None, 0)

        first = 4 if recipe.tokenizer else 3 if recipe.base.scratch else 2
        for index, entry in enumerate(self.stages, 1):
            name = stage_folder(index, entry, first)
            sources = {s.name: s.model_dump() for group in recipe.sources_for(entry).values() for s in group}
            trained = self._add(
                name,
                f"stage {index} {entry.name}",
                {
                    "stage": entry.model_dump(exclude={"gate", *HARMLESS_SETTINGS}),
                    "data": recipe.stage_data(entry),
                    "sources": sorted(sources),
                    "seed": recipe.seed,
                },
                {"model": key, "corpus": corpus_step.key},
                lambda out, work, e=entry, i=index, b=before: stage.run(context(), e, i, b, out, work),
                entry,
                index,
            )
            before, key = self.run / name, trained.key
            measure(before, name, f"stage {index} {entry.name}", key, entry, index)
        self._add("model", "final model", {}, {"model": key}, lambda out, work, b=before: final.run(b, out, work))

    def _add(
        self,
        name: str,
        title: str,
        section: dict[str, Any],
        inputs: dict[str, str],
        work: Any,
        stage: Stage | None = None,
        index: int = 0,
    ) -> Step:
        plain = {k: v.model_dump(mode="json") if hasattr(v, "model_dump") else v for k, v in section.items()}
        step = Step(name, title, plain, inputs, work, stage, index)
        self.steps.append(step)
        return step


def embeddings_section(recipe: Recipe) -> dict[str, Any]:
    """What the embeddings step depends on: its own section, and that of the training that it may do."""
    section: dict[str, Any] = {"embeddings": recipe.embeddings}
    if recipe.embeddings.distillation or recipe.embeddings.method == "probe":
        section |= {"training": recipe.training.model_dump(exclude=set(HARMLESS_SETTINGS)), "seed": recipe.seed}
    if recipe.embeddings.method == "probe":
        section |= {"probe": probe.probe_stage(recipe, probe.STEPS).model_dump(exclude=set(HARMLESS_SETTINGS))}
        section |= {"evaluate": recipe.evaluate.model_dump(exclude={"questions", "generation"})}
    return section


def default_run_folder(recipe: Recipe) -> Path:
    """`runs/<name>` in the current folder."""
    return Path("runs").absolute() / recipe.name


def open_run(run: Path) -> Plan:
    """The plan of an existing run folder, from the recipe it keeps.

    Raises:
        RunError: not a run folder.
    """
    if not (run / "recipe.yaml").is_file():
        raise RunError(f"{run}: not a run folder (no recipe.yaml in it); give the folder that `lingraft run` made")
    return make_plan(load(run / "recipe.yaml"), run, download=False)
