"""The recipe: values as people write them, presets, overrides, and every fault at once with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lingraft.errors import RecipeError
from lingraft.presets import EEVE, collapse
from lingraft.recipe import Recipe
from lingraft.recipe_file import built_in_names, dump, load

MINIMAL = """
name: small
languages: {target: ko}
base: {model: somewhere/model}
corpus:
  sources:
    - {name: texts, language: ko, path: a.txt}
tokenizer: {new_tokens: 10}
stages:
  - {name: one, train: {input_rows: new}, learning_rate: 1e-5}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(write(folder, text), overrides)
    return str(caught.value).split("\n")


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, MINIMAL), ["stages.one.tokens=1.5M", "tokenizer.new_tokens=6_143"])
    assert recipe.stages[0].learning_rate == 1e-5
    assert recipe.stages[0].tokens == 1_500_000
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.new_tokens == 6143


def test_all_faults_at_once_with_line_and_suggestion(tmp_path: Path) -> None:
    text = MINIMAL.replace("new_tokens: 10", "new_token: 10").replace("language: ko, path", "language: KO1, path")
    text = text.replace("learning_rate: 1e-5", "learning_rate: fast, gradient_acumulation_steps: 2")
    found = faults(tmp_path, text)
    assert "recipe.yaml:8: tokenizer.new_token: unknown key; did you mean 'new_tokens'?" in found
    assert "recipe.yaml:8: tokenizer.new_tokens: this key is missing; add it" in found
    assert any(line.startswith("recipe.yaml:7: corpus.sources[0].language") for line in found)
    assert any("stages[0].learning_rate" in line and "'fast'" in line for line in found)
    assert any(
        "gradient_acumulation_steps: unknown key; did you mean 'gradient_accumulation_steps'?" in x for x in found
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("path: a.txt", "path: a.txt, hub: x/y", "give exactly one of path, hub, miniature, replay"),
        ("model: somewhere/model", "model: a/b, recipe: quickstart", "exactly one of model, recipe, scratch"),
        ("train: {input_rows: new}", "train: {}", "trains nothing"),
        ("train: {input_rows: new}", "train: {layers: lora}", "belong together"),
        ("name: one,", "name: one, data: {kor: 1},", "no such source or language"),
        ("name: one,", "name: one, gate: {english_bpb_rises: 0.1},", "unknown gate; did you mean 'english_bpb_rise'?"),
        ("tokenizer: {new_tokens: 10}", "seed: 0", "there are no new rows"),
        (
            "stages:",
            "evaluate: {questions: [{name: q, language: ko, path: q, "
            "columns: {choices: c, fixed_choices: [a, b]}}]}\nstages:",
            "give choices (columns) or fixed_choices (texts), not both",
        ),
        ("learning_rate: 1e-5", "learning_rate: .nan", "learning_rate"),
        ("learning_rate: 1e-5", "learning_rate: -1", "greater than 0"),
        ("learning_rate: 1e-5", "tokens: 5X", "is not a count"),
        ("learning_rate: 1e-5", "tokens: 5, epochs: 1", "epochs or tokens, not both"),
        ("name: small", "name: small\nname: again", "stands twice"),
        ("name: small", "name: ${LINGRAFT_NOT_SET}", "LINGRAFT_NOT_SET is not set"),
        ("name: small", "name: [small", "not valid YAML"),
        ("name: small", "name: !!int abc", "not valid YAML"),
        ("name: small", "name: \x07", "not valid YAML"),
        ("name: small", "? [a, b]\n: c\nname: small", "a key must be a word"),
        ("name: one,", "name: one, gate: {english_accuracy_drop: 0.1},", "evaluate.questions has no set"),
        ("name: one,", "name: one, gate: {english_bpb_rise: 0.1},", "no text in that language is held out"),
        ("name: one,", "name: one, data: {},", "at least 1 item"),
        ("name: one,", "name: one, sequence_length: 1,", "greater than or equal to 8"),
        ("new_tokens: 10", "new_tokens: true", "true is not a count"),
    ],
)
def test_fault(tmp_path: Path, old: str, new: str, message: str) -> None:
    found = faults(tmp_path, MINIMAL.replace(old, new))
    assert any(message in line for line in found), found


def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "elsewhere")
    text = MINIMAL.replace("somewhere/model", '"${WHERE:-nowhere}/model"').replace(
        "1e-5", "1e-5}\n  - name: two\n    train: {input_rows: new"
    )
    text += "    learning_rate: ${RATE:-2e-3}\n"
    recipe = load(write(tmp_path, text))
    assert recipe.base.model == "elsewhere/model"
    assert recipe.stages[1].learning_rate == 2e-3


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, MINIMAL))
    assert recipe.path("../a.txt") == tmp_path.parent / "a.txt"


def test_preset_with_overrides_and_defaults(tmp_path: Path) -> None:
    text = MINIMAL.split("stages:")[0] + "training: {warmup: 0.2, batch_size: 3}\nstages: eeve\n"
    recipe = load(write(tmp_path, text), ["stages.new-rows.tokens=5k"])
    assert [stage.name for stage in recipe.stages] == [stage["name"] for stage in EEVE]
    assert recipe.stages[2].tokens == 5000
    assert recipe.stages[2].epochs is None
    assert recipe.stages[0].epochs == 1
    assert {stage.batch_size for stage in recipe.stages} == {3}
    assert recipe.stages[0].warmup == 0.2
    assert recipe.stages[6].warmup == 0.1, "the preset's own warm-up is more particular than the default"


def test_override_errors(tmp_path: Path) -> None:
    assert "stages has no item 'new-row'" in faults(tmp_path, MINIMAL, "stages.new-row.tokens=1")[0]
    assert "write it as key.key=value" in faults(tmp_path, MINIMAL, "nonsense")[0]
    assert "unknown preset 'eve'; did you mean 'eeve'?" in faults(tmp_path, MINIMAL, "stages=eve")[0]


def test_tied_matrices_collapse_eeve_to_four_stages(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, MINIMAL), ["stages=eeve"])
    kept, lines = collapse(recipe.stages)
    assert [stage.name for stage in kept] == ["new-rows", "all-output-rows", "all-layers", "cool-down"]
    assert len(lines) == 3


def test_dump_loads_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, MINIMAL), ["stages=eeve"])
    again = load(write(tmp_path, dump(recipe)))
    assert again.model_dump(exclude={"training"}) == recipe.model_dump(exclude={"training"})


def test_default_mixture_has_old_language_only_where_there_is_some(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, MINIMAL))
    assert recipe.stage_data(recipe.stages[0]) == {"ko": 1.0}
    with_english = MINIMAL.replace("path: a.txt}", "path: a.txt}\n    - {name: old, language: en, path: b.txt}")
    recipe = load(write(tmp_path, with_english))
    assert recipe.stage_data(recipe.stages[0]) == {"ko": 0.9, "en": 0.1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.parallel=foo", "training.parallel: should be 'ddp', 'fsdp' or 'zero2' (given: 'foo')"),
        ("training.micro_batch=0", "training.micro_batch: should be 'auto', or be greater than 0 (given: 0)"),
        ("stages.cool-down.micro_batch=0", "stages[6].micro_batch: should be 'auto', or be greater than 0 (given: 0)"),
    ],
)
def test_a_fault_is_told_once(override: str, message: str) -> None:
    """Not for each stage that has it by default, nor for each kind of value that the key may have."""
    with pytest.raises(RecipeError) as caught:
        load("quickstart", [override])
    assert re.fullmatch(rf"quickstart\.yaml:\d+: {re.escape(message)}", str(caught.value))


@pytest.mark.parametrize("name", built_in_names())
def test_shipped_recipe_parses(name: str) -> None:
    recipe = load(name)
    assert isinstance(recipe, Recipe)
    assert recipe.description
    assert recipe.name == name
