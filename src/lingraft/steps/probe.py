"""The probe: start from each initialisation rule, train the new rows for some fifty steps, and see which does best.

What a rule gives at step 0 does not predict how it trains (arXiv 2608.03494), so it is tried. One choice after
another: input rules under the recipe's output rule, then norm calibration, output rules and output calibration under
the best so far, at last token distillation on top. Every candidate reads the same batches in the same order.

A finished candidate is a file in `probe/results/`, named by a hash of all that it depends on; a killed probe goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingraft.artifact import Hashes, key_of, read_manifest
from lingraft.atomic import write_json
from lingraft.embeddings.rules import RULES
from lingraft.errors import LingraftError
from lingraft.evaluation.bits_per_byte import bits_per_byte
from lingraft.model.load import (
    DTYPES,
    input_matrix,
    is_tied,
    load,
    load_tokenizer,
    output_matrix,
    read_config,
    to_device,
)
from lingraft.model.surgery import open_checkpoint, vocabulary_rows
from lingraft.progress import say
from lingraft.recipe import HARMLESS_SETTINGS, Distillation, Embeddings, Recipe, Stage, Trains
from lingraft.report.comparison import write as write_page
from lingraft.steps import embeddings
from lingraft.steps.batches import make_batches
from lingraft.steps.context import Context, grafted_pieces
from lingraft.steps.distillation import TokenDistillation
from lingraft.steps.rows import initial_rows, plain_rows
from lingraft.steps.scores import BATCH_TOKENS
from lingraft.steps.stage import stage_seed, stage_settings
from lingraft.training.batches import Batches
from lingraft.training.settings import StageSettings
from lingraft.training.stage import train_rows

STEPS = 50
CONTROLS = ("random", "gaussian")  # measured to know what a rule is worth, never chosen
SHARES = (0.1, 0.01)  # of the probability of old text that new output rows may take, for `calibrate_output`


def run(context: Context, out: Path, work: Path) -> dict[str, Any]:
    """The embeddings step of a recipe with `method: probe`: compare, then graft with the winner."""
    found = compare(context, context.run / "probe")
    chosen = Embeddings.model_validate(found["winner"]["embeddings"])
    results = embeddings.run(with_embeddings(context, chosen), out, work)
    return results | {"probe": found}


def compare(context: Context, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Run every candidate that is not done; write `comparison.json` and `index.html` into `folder`.

    Returns:
        Plain data: `results` with the best first, `not_run` with the reasons, `winner`.
    Raises:
        LingraftError: not one rule can run.
    """
    bench = _Bench(context, folder, steps)
    results: dict[str, dict[str, Any]] = {}
    not_run: dict[str, str] = {}
    best: dict[str, Any] | None = None
    chosen = context.recipe.embeddings.model_copy(update={"method": "rules", "distillation": None})
    for options in _rounds(context.recipe, bench.tied):
        for change in options:
            candidate = chosen.model_copy(update=change)
            name = candidate_name(candidate, bench.tied)
            if name in results:
                continue
            try:
                results[name] = bench.result(name, candidate)
            except LingraftError as error:
                not_run[name] = str(error)
                say(f"  {name}: not run: {error}", style="yellow")
        allowed = [r for r in results.values() if not r["control"]]
        if not allowed:
            raise LingraftError("\n".join(f"{name}: {reason}" for name, reason in not_run.items()))
        best = min(allowed, key=lambda result: bench.score(result))
        chosen = Embeddings.model_validate(best["embeddings"])
    assert best is not None
    data = {
        "name": context.recipe.name,
        "miniature": context.recipe.miniature,
        "target": context.recipe.languages.target,
        "languages": context.languages(),
        "steps": best["steps"],
        "tokens": best["tokens"],
        "tied": bench.tied,
        "results": sorted(results.values(), key=bench.score),
        "not_run": not_run,
        "winner": best,
    }
    write_json(folder / "comparison.json", data)
    write_page(data, folder / "index.html")
    shutil.rmtree(folder / ".work", ignore_errors=True)
    return data


def _rounds(recipe: Recipe, tied: bool) -> Iterator[list[dict[str, Any]]]:
    """The changes that are tried in each round; in a tied model the output rows are the input rows."""
    rules = list(RULES)
    yield [*({"input": rule} for rule in rules), {"input": "random", "output": "random"}]
    yield [{"calibrate_norm": choice} for choice in (False, True)]
    if not tied:
        yield [{"output": rule} for rule in rules]
        yield [{"calibrate_output": share} for share in (None, *SHARES)]
    yield [{"distillation": recipe.embeddings.distillation or Distillation()}]


def candidate_name(settings: Embeddings, tied: bool) -> str:
    """A candidate in a few words: `subword_mean → first_subword, calibrated norm`."""
    parts = [settings.input if tied else f"{settings.input} → {settings.output}"]
    if settings.calibrate_norm:
        parts.append("calibrated norm")
    if settings.calibrate_output:
        parts.append(f"output share {settings.calibrate_output:g}")
    if settings.distillation:
        parts.append("token distillation")
    if is_control(settings, tied):
        parts.append("control")
    return ", ".join(parts)


def is_control(settings: Embeddings, tied: bool) -> bool:
    """Whether a rule that is only measured has made the rows."""
    return settings.input in CONTROLS or (not tied and settings.output in CONTROLS)


def probe_stage(recipe: Recipe, steps: int) -> Stage:
    """The short training: the recipe's own settings for new rows, on both ends, for about `steps` steps.

    They are those of the first stage that trains new rows on both ends, else of the first that trains any.
    """

    def ends(stage: Stage) -> int:
        return (stage.train.input_rows, stage.train.output_rows).count("new")

    model = max(recipe.stages, key=ends)
    rows = model.batch_size * model.gradient_accumulation_steps
    return model.model_copy(
        update={
            "name": "probe",
            "train": Trains(input_rows="new", output_rows="new"),
            "lora": None,
            "gate": {},
            "epochs": None,
            "keep": "last",
            "validate_every": None,
            "tokens": steps * rows * model.sequence_length,
        }
    )


def with_embeddings(context: Context, settings: Embeddings) -> Context:
    """The same run with other embeddings settings."""
    return Context(context.recipe.model_copy(update={"embeddings": settings}), context.run, context.base)


class _Bench:
    """One grafted model in memory, in which candidate after candidate is tried. Loaded when first needed."""

    def __init__(self, context: Context, folder: Path, steps: int) -> None:
        self.context, self.folder = context, folder
        self.recipe = context.recipe
        self.stage = probe_stage(context.recipe, steps)
        self.tokens = grafted_pieces(context.tokenizer)
        self.ids = [token.id for token in self.tokens]
        (folder / "results").mkdir(parents=True, exist_ok=True)
        tokenizer = read_manifest(context.tokenizer)
        assert tokenizer is not None, "the tokenizer step comes first"
        self.depends = {
            "tokenizer": tokenizer["key"],
            "stage": self.stage.model_dump(mode="json", exclude=set(HARMLESS_SETTINGS)),
            "data": self.recipe.stage_data(self.stage),
            "training": self.recipe.training.model_dump(mode="json", exclude=set(HARMLESS_SETTINGS)),
            "evaluate": self.recipe.evaluate.model_dump(mode="json", exclude={"questions", "generation"}),
            "files": embeddings.inputs(self.recipe, Hashes(None)),
            "seed": self.recipe.seed,
        }

    @cached_property
    def start(self) -> Path:
        """A grafted checkpoint, whose new rows each candidate replaces."""
        folder = self.folder / ".work" / key_of(**self.depends) / "start"
        if not folder.is_dir():
            making = folder.with_name("making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            base = self.context.base.folder
            embeddings.write_checkpoint(
                base,
                self.context.tokenizer,
                making,
                lambda input_VD, output_VD: plain_rows(Embeddings(), base, self.tokens, input_VD, output_VD),
                untie=not self.tied,
            )
            making.rename(folder)
        return folder

    @cached_property
    def model(self) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return to_device(load(self.start, DTYPES[self.stage.precision]), device)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.start)

    @cached_property
    def base_rows(self) -> tuple[Tensor, Tensor | None]:
        """The base's own matrices (V, D); the second is None where the graft is tied."""
        old = vocabulary_rows(open_checkpoint(self.context.base.folder))
        return old.input, None if self.tied else old.input if old.output is None else old.output

    @cached_property
    def tied(self) -> bool:
        return self.recipe.embeddings.tie == "keep" and is_tied(read_config(self.context.base.folder))

    @cached_property
    def settings(self) -> StageSettings:
        return stage_settings(self.stage, read_config(self.start).model_type, stage_seed(self.recipe, 0))

    @cached_property
    def batches(self) -> Batches:
        return make_batches(self.context, self.stage, self.settings, self.start)[0]

    @cached_property
    def held_out(self) -> dict[str, list[str]]:
        evaluate = self.recipe.evaluate
        texts = {
            language: [
                text[: evaluate.max_document_characters]
                for text in self.context.texts("held-out", language, evaluate.max_documents)
            ]
            for language in self.context.languages()
        }
        return {language: found for language, found in texts.items() if found}

    def score(self, result: dict[str, Any]) -> float:
        """What candidates are ranked by: the target's held-out bits per byte after the training."""
        return float(result["end"][self.recipe.languages.target]["bits_per_byte"])

    def result(self, name: str, candidate: Embeddings) -> dict[str, Any]:
        """The candidate's result, measured now unless it is there already."""
        settings = candidate.model_dump(mode="json", warnings=False)  # a control is no choice of a recipe
        key = key_of(embeddings=settings, **self.depends)
        path = self.folder / "results" / f"{key}.json"
        kept = path.is_file()
        if not kept:
            write_json(path, self._measured(candidate, self.folder / ".work" / key))
        found = json.loads(path.read_text(encoding="utf-8"))
        say(f"  {name}: {_line(found)}{' (done before)' if kept else ''}")
        named = {"name": name, "control": is_control(candidate, self.tied), "embeddings": settings}
        return found | named

    def _measured(self, candidate: Embeddings, work: Path) -> dict[str, Any]:
        begin = time.monotonic()
        context = with_embeddings(self.context, candidate)
        rows = initial_rows(context.recipe, context.base.folder, self.tokens, *self.base_rows, context)
        with torch.no_grad():
            matrices = [(input_matrix(self.model), rows.input), (output_matrix(self.model), rows.output)]
            for matrix, new in matrices:
                if new is not None:
                    matrix[self.ids] = new.to(matrix.device, matrix.dtype)
        distilled = self._distil(candidate.distillation, work / "distillation") if candidate.distillation else None
        start = self._bits()
        (work / "rows").mkdir(parents=True, exist_ok=True)
        trained = train_rows(self.model, self.settings, self.batches, self.ids, work / "rows")
        return {
            "distillation": distilled,
            "steps": trained.steps,
            "tokens": trained.tokens,
            "start": start,
            "end": self._bits(),
            "loss": [entry["loss"] for entry in trained.log],
            "seconds": time.monotonic() - begin,
        }

    def _distil(self, settings: Distillation, work: Path) -> dict[str, Any]:
        work.mkdir(parents=True, exist_ok=True)
        distillation = TokenDistillation(self.context, settings, self.start)
        before = distillation.figures(self.model)
        train_rows(self.model, distillation.settings, distillation.batches, self.ids, work, distillation.loss)
        after = distillation.figures(self.model)
        return {"tokens": distillation.batches.tokens, "before": before, "after": after}

    def _bits(self) -> dict[str, dict[str, float]]:
        device = input_matrix(self.model).device
        measured = {
            language: bits_per_byte(
                self.model,
                self.tokenizer,
                texts,
                span_bytes=self.recipe.evaluate.span_bytes,
                batch_tokens=BATCH_TOKENS,
                device=device,
            )
            for language, texts in self.held_out.items()
        }
        return {lang: {k: m[k] for k in ("bits_per_byte", "low", "high")} for lang, m in measured.items()}


def _line(result: dict[str, Any]) -> str:
    """Bits per byte before and after, by language."""
    return "  ".join(
        f"{language} {start['bits_per_byte']:.3f} → {result['end'][language]['bits_per_byte']:.3f} bits/byte"
        for language, start in result["start"].items()
    )
