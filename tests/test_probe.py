"""The probe: rounds and ranking, kept results, the verb, and a recipe that lets it choose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

import lingraft
from lingraft import terminal
from lingraft.cli import app
from lingraft.errors import RecipeError
from lingraft.recipe import Embeddings
from lingraft.report.comparison import render
from lingraft.steps import probe

STEPS = 2
STAGES = [
    {"name": "input", "train": {"input_rows": "new"}, "learning_rate": 0.5, "tokens": 300},
    {"name": "both", "train": {"input_rows": "new", "output_rows": "new"}, "learning_rate": 5e-3, "tokens": 300},
]


def write_recipe(folder: Path, model: Path, **embeddings: Any) -> Path:
    plain = {"output": "first_subword", "calibrate_norm": False}
    settings = plain | {"distillation": {"tokens": 600, "learning_rate": 2e-3}} | embeddings
    return tiny.write_recipe(folder, model, stages=STAGES, embeddings=settings)


def files(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (folder / "probe" / "results").iterdir()}


@dataclass(frozen=True)
class Compared:
    """A comparison that was killed at its third candidate and given again."""

    recipe: Path
    run: Path
    tried: list[str]
    kept: dict[str, int]
    data: dict[str, Any]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path) -> Iterator[Compared]:
    folder = tmp_path_factory.mktemp("compared")
    path, run = write_recipe(folder, tiny_gemma), folder / "run"
    measured = probe._Bench._measured
    tried: list[str] = []

    def killed(bench: Any, candidate: Embeddings, work: Path) -> dict[str, Any]:
        tried.append(probe.candidate_name(candidate, bench.tied))
        if len(tried) == 3:
            raise KeyboardInterrupt
        return measured(bench, candidate, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "RULES", dict.fromkeys(("subword_mean", "first_subword", "omp", "random")))
        patch.setattr(probe, "SHARES", (0.1,))
        patch.setattr(probe._Bench, "_measured", killed)
        with pytest.raises(KeyboardInterrupt):
            lingraft.compare_embeddings(path, run, steps=STEPS)
        kept = files(run)
        yield Compared(path, run, tried, kept, lingraft.compare_embeddings(path, run, steps=STEPS))


def test_candidates_are_ranked_by_what_they_end_in(compared: Compared) -> None:
    ends = [result["end"]["ko"]["bits_per_byte"] for result in compared.data["results"]]
    assert ends == sorted(ends)
    names = {result["name"] for result in compared.data["results"]}
    assert {"subword_mean → first_subword", "random → first_subword, control", "random → random, control"} <= names
    assert "embeddings.donor" in compared.data["not_run"]["omp → first_subword"]
    assert compared.data == json.loads((compared.run / "probe" / "comparison.json").read_text())
    assert not (compared.run / "probe" / ".work").exists()
    assert not (compared.run / "03-embeddings").exists()


def test_a_control_never_wins(compared: Compared) -> None:
    winner = compared.data["winner"]
    assert not winner["control"]
    assert winner == next(result for result in compared.data["results"] if "random" not in result["name"])


def test_finished_candidates_are_kept(compared: Compared) -> None:
    assert len(compared.kept) == 2
    assert compared.kept.items() <= files(compared.run).items()
    assert len(compared.tried) == len(set(compared.tried)) + 1  # the killed one alone was tried twice


def test_distillation_beats_its_own_start(compared: Compared) -> None:
    figures = next(r["distillation"] for r in compared.data["results"] if r["distillation"])
    assert figures["after"]["hidden_state_error"] < figures["before"]["hidden_state_error"]


def test_the_verb_prints_a_table_and_makes_a_page(compared: Compared) -> None:
    """Given for a finished comparison, it shows it again and measures nothing."""
    before = files(compared.run)
    arguments = ["embeddings", "compare", str(compared.recipe), "--run-dir", str(compared.run), "--steps", str(STEPS)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert terminal.comparison(compared.data) in shown.stdout
    assert files(compared.run) == before
    page = (compared.run / "probe" / "index.html").read_text()
    assert page.count("<svg") == len(compared.data["winner"]["end"])
    assert "<script" not in page


def test_a_recipe_may_let_the_probe_choose(tmp_path: Path, tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step makes the very rows that won, distilled ones too, and manifest and report say who won."""
    monkeypatch.setattr(probe, "STEPS", STEPS)
    monkeypatch.setattr(probe, "RULES", dict.fromkeys(("subword_mean",)))
    monkeypatch.setattr(probe, "SHARES", ())
    path, run = write_recipe(tmp_path, tiny_gemma, method="probe", output="subword_mean"), tmp_path / "run"
    result = lingraft.run(path, run)
    found = json.loads((run / "03-embeddings" / "manifest.json").read_text())["results"]["probe"]
    graft = next(entry for entry in result.scoreboard if entry["step"] == "03-embeddings")
    for language, start in found["winner"]["start"].items():
        assert graft["languages"][language]["bits_per_byte"] == pytest.approx(start["bits_per_byte"], rel=1e-5)
    assert found["winner"]["name"] in (run / "report.html").read_text()


def test_tied_rows_are_compared_as_one(tmp_path: Path, tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "RULES", dict.fromkeys(("subword_mean", "random")))
    path = write_recipe(tmp_path, tiny_gemma, tie="keep")
    data = lingraft.compare_embeddings(path, tmp_path / "run", steps=STEPS)
    assert data["tied"]
    assert not any("→" in result["name"] for result in data["results"])
    assert {"subword_mean", "random, control"} <= {result["name"] for result in data["results"]}


def test_a_recipe_without_a_graft_has_nothing_to_compare(tmp_path: Path, tiny_gemma: Path) -> None:
    stages = [{"name": "all", "train": {"layers": "all"}}]
    path = tiny.write_recipe(tmp_path, tiny_gemma, tokenizer=None, stages=stages)
    with pytest.raises(RecipeError, match="no tokenizer section, so there are no new rows to compare"):
        lingraft.compare_embeddings(path, tmp_path / "run")


def test_the_short_training_is_that_of_the_stage_that_trains_both_ends(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = lingraft.load_recipe(write_recipe(tmp_path, tiny_gemma))
    stage = probe.probe_stage(recipe, steps=50)
    assert stage.learning_rate == 5e-3
    assert stage.tokens == 50 * 2 * 2 * 128
    assert (stage.train.input_rows, stage.train.output_rows) == ("new", "new")


RESULT = {
    "name": "focus → <b>",
    "start": {"ko": {"bits_per_byte": 4.0, "low": 3.5, "high": 4.5}},
    "end": {"ko": {"bits_per_byte": 2.0, "low": None, "high": None}},
    "distillation": None,
    "seconds": 3.0,
}
DATA = {
    "name": "tiny",
    "languages": ["ko", "en"],
    "steps": 50,
    "tokens": 51_200,
    "results": [RESULT],
    "not_run": {"omp": "embeddings: the rule omp needs a donor"},
    "winner": RESULT,
}


def test_table_shows_what_was_not_measured_as_a_dash() -> None:
    lines = terminal.comparison(DATA).splitlines()
    assert lines[0] == "held-out bits per byte at step 0 and after 50 steps of training new rows (51,200 tokens)"
    assert lines[2].split() == ["1", "focus", "→", "<b>", "4.000", "2.000", "–", "–"]
    assert lines[3:] == ["not run: omp: embeddings: the rule omp needs a donor", "best: focus → <b>"]


def test_page_draws_a_bar_for_each_measurement_and_escapes_names() -> None:
    page = render(DATA)
    assert page.count('class="bar"') == 2
    assert "focus → &lt;b&gt;, step 0: 4.000 bits per byte 3.500–4.500" in page
    assert "focus → <b>" not in page
    # the axis runs from 0 to 5: a bar of 4 ends at four fifths of its length
    assert 'width="273.6"' in page
