"""The ordered steps of a run: what is done, what is stale, what comes next.

    01-corpus → 02-tokenizer → 03-embeddings → 04-stage-1-… → … → model/
                     each model folder → scores/<folder>/ → scoreboard.json, report.html

A step's key is a hash of its recipe section and of its inputs' keys. A published folder with the same key is done
and is skipped; a changed section changes the keys of the steps that depend on it, and of no others.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lingraft.artifact import Hashes, key_of, publish, read_manifest, write_json, write_text
from lingraft.errors import GateFailed, RecipeError, RunError
from lingraft.evaluation.scoreboard import alarms, gate_checks
from lingraft.model.load import is_tied, read_config
from lingraft.presets import collapse
from lingraft.progress import say
from lingraft.recipe import Recipe, Stage
from lingraft.recipe_file import dump, load
from lingraft.report import write as write_report
from lingraft.steps import corpus, embeddings, final, new_base, probe, scores, stage, tokenizer
from lingraft.steps.base import Base, HubUnreachable, cache_folder, from_folder_or_hub, pin_base
from lingraft.steps.base import check as check_base
from lingraft.steps.context import Context, stage_folder
from lingraft.steps.new_base import make_config
from lingraft.steps.report import report_data
from lingraft.version import VERSION

RESULTS_VERSION = 1  # raise it when a step's results change for the same recipe and inputs
HARMLESS_SETTINGS = frozenset({"checkpoint_seconds", "micro_batch"})  # they don't change what a stage learns

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


# ------------------------------------------------------------------------------------------------ running


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
    for line in _summary(step, results, time.monotonic() - begin):
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


def _summary(step: Step, results: dict[str, Any], seconds: float) -> list[str]:
    """What a finished step says about itself."""
    if step.name == "01-corpus":
        lines = []
        for name, counts in results["sources"].items():
            dropped = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items())
            lines.append(
                f"  {name}: {counts['train']['documents']:,} documents, {counts['held_out']['documents']:,} held out"
                + (f", dropped {dropped}" if dropped else "")
            )
        return lines
    if step.name == "02-tokenizer":
        return [
            f"  {results['new_tokens']:,} new tokens, {results['reused_slots']:,} in unused slots, "
            f"{results['appended']:,} appended",
            *(
                f"  {language}: {gain['before']['tokens_per_character']:.2f} → "
                f"{gain['after']['tokens_per_character']:.2f} tokens a character"
                for language, gain in results["fertility"].items()
            ),
        ]
    if step.name == "03-embeddings":
        lines = ["  " + ", ".join(f"{count:,} rows {method}" for method, count in results["input"].items())]
        if distilled := results.get("distillation"):
            before, after = (distilled[when]["hidden_state_error"] for when in ("before", "after"))
            lines.append(f"  token distillation: hidden-state error {before:.3f} → {after:.3f} on held-out text")
        return lines
    if "tokens_per_second" in results:
        return [
            f"  {results['trains']}: loss {results['first_loss']:.3f} → {results['last_loss']:.3f}, "
            f"{results['tokens']:,} tokens in {seconds:.0f} s ({results['tokens_per_second']:,.0f}/s); "
            f"{results['unchanged_tensors']} tensors proven unchanged",
            *(
                [f"  {results['chats_left_out']:,} chats left out: longer than sequence_length"]
                if results["chats_left_out"]
                else []
            ),
        ]
    return []


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


def headline(entry: dict[str, Any]) -> str:
    """One line for a scoreboard entry."""
    parts = [
        f"{lang} {m['bits_per_byte']:.3f} bits/byte (unigram {m['unigram_bits_per_byte']:.3f})"
        for lang, m in entry["languages"].items()
    ]
    parts += [f"{name} {q['accuracy']:.1%} [{q['low']:.1%}–{q['high']:.1%}]" for name, q in entry["questions"].items()]
    return "  ".join(parts)


def scoreboard(plan: Plan) -> list[dict[str, Any]]:
    """All measurements so far, in order, each with its stage's gate judged by the recipe as it stands."""
    entries: list[dict[str, Any]] = []
    trained = 0
    for step in plan.steps:
        if plan.state(step) != "done":
            continue
        manifest = plan.manifest(step.name)
        assert manifest is not None
        if step.stage and not step.name.startswith("scores/"):
            trained += manifest["results"]["tokens"]
        if step.name.startswith("scores/"):
            entry = json.loads((plan.run / step.name / "scores.json").read_text(encoding="utf-8"))
            entry["tokens_trained"] = trained
            if step.stage and step.stage.gate and entries:
                checks = gate_checks(entry, entries[0], step.stage.gate)
                entry["gate"] = {"passed": all(c["passed"] for c in checks), "checks": checks}
            entries.append(entry)
    return entries


def publish_results(plan: Plan, state: str, command: str) -> list[dict[str, Any]]:
    """Write scoreboard.json and report.html from what is done so far."""
    entries = scoreboard(plan)
    write_json(
        plan.run / "scoreboard.json",
        {"name": plan.recipe.name, "miniature": plan.recipe.miniature, "entries": entries},
    )
    write_report(report_data(plan, entries, state, command), plan.run / "report.html")
    return entries


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


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "sentencepiece", "peft", "accelerate", "numpy")
    return {"lingraft": VERSION, "python": platform.python_version()} | {p: version(p) for p in packages}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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


def stage_entries(steps: Sequence[Step]) -> list[Step]:
    """The training stages among the steps."""
    return [step for step in steps if step.stage is not None and not step.name.startswith("scores/")]
