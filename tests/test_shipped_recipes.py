"""Every recipe in `recipes/` parses, can be planned without a network, and runs whole on a tiny model of its family.

The recipes are run as they are written, but for budgets: few tokens, short rows, loose gates. The Hub is stood in for
by rows of the same columns, configs and splits as the data sets' cards show, so the recipes' column names are used.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

import lingraft
from lingraft.miniature.sets import records
from lingraft.recipe_file import built_in_names, dump, load

Rows = list[dict[str, Any]]

TOKENS = 400
LOOSE = 1e9


# ------------------------------------------------------------------------------------------------ the Hub


def documents(texts: list[str], together: int = 4) -> list[str]:
    """Longer documents, of some of the texts each."""
    return ["\n".join(texts[i : i + together]) for i in range(0, len(texts), together)]


def exam(language: str, start: int, count: int) -> list[dict[str, Any]]:
    return list(islice(records(f"{language}-exam", 0, "test"), start, start + count))


def wikipedia(texts: list[str]) -> Rows:
    return [
        {"id": str(n), "url": f"https://example.org/{n}", "title": f"제목 {n}", "text": text}
        for n, text in enumerate(documents(texts))
    ]


def kormedmcqa(start: int, count: int) -> Rows:
    return [
        {"subject": "doctor", "year": 2022, "period": 1, "q_number": n, "question": q["question"]}
        | dict(zip("ABCDE", q["choices"], strict=True))
        | {"answer": q["answer"] + 1, "cot": ""}
        for n, q in enumerate(exam("ko", start, count))
    ]


def medqa(q: dict[str, Any]) -> dict[str, Any]:
    letters = dict(zip("ABCDE", q["choices"], strict=True))
    letter = "ABCDE"[q["answer"]]
    return {"question": q["question"], "answer": letters[letter], "options": letters, "answer_idx": letter}


def medmcqa(q: dict[str, Any]) -> dict[str, Any]:
    kept = [q["answer"], *(i for i in range(5) if i != q["answer"])][:4]  # the right choice comes first
    choices = {f"op{letter}": q["choices"][i] for letter, i in zip("abcd", kept, strict=True)}
    return {"id": "x", "question": q["question"], **choices, "cop": 0, "choice_type": "single", "exp": None}


def pubmedqa(number: int, q: dict[str, Any]) -> dict[str, Any]:
    context = {"contexts": tiny.english(8)[:2], "labels": ["AIM", "RESULTS"], "meshes": ["Humans"]}
    decision = ("yes", "no", "maybe")[number % 3]
    return {"pubid": number, "question": q["question"], "context": context, "final_decision": decision}


MMLU = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)

HUB: dict[tuple[str, str | None, str], Callable[[], Rows]] = {
    ("wikimedia/wikipedia", "20231101.ko", "train"): lambda: [
        *wikipedia(tiny.korean(160)),
        {
            "id": "x",
            "url": "",
            "title": "",
            "text": "이 글은 배와 바다와 항구의 옛 이야기를 한참 동안 늘어놓는다. " * 9,
        },
    ],
    ("wikimedia/wikipedia", "20231101.en", "train"): lambda: wikipedia(tiny.english(100)),
    ("HuggingFaceFW/fineweb-2", "kor_Hang", "train"): lambda: [
        {"text": text, "id": "x", "dump": "CC", "language_score": 1.0} for text in documents(tiny.korean(320)[160:])
    ],
    ("epfl-llm/guidelines", None, "train"): lambda: [
        {"id": "x", "source": "who", "title": "t", "clean_text": text, "raw_text": f"<p>{text}</p>"}
        for text in documents(tiny.english(100))
    ],
    **{
        ("sean0042/KorMedMCQA", config, split): lambda start=20 * i, size=size: kormedmcqa(start, size)
        for i, config in enumerate(("doctor", "nurse", "pharm", "dentist"))
        for split, size in (("train", 9), ("test", 3 + i))
    },
    ("GBaker/MedQA-USMLE-4-options", None, "test"): lambda: [medqa(q) for q in exam("en", 0, 4)],
    ("openlifescienceai/medmcqa", None, "validation"): lambda: [medmcqa(q) for q in exam("en", 10, 5)],
    ("qiaojin/PubMedQA", "pqa_labeled", "train"): lambda: [pubmedqa(n, q) for n, q in enumerate(exam("en", 20, 3))],
    **{
        ("cais/mmlu", subject, "test"): lambda start=30 + 4 * i, subject=subject: [
            {"question": q["question"], "subject": subject, "choices": q["choices"], "answer": q["answer"]}
            for q in exam("en", start, 2)
        ]
        for i, subject in enumerate(MMLU)
    },
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets of `HUB` in place of the Hub's."""

    def load_dataset(path: str, *, name: str | None, split: str, streaming: bool, **_: Any) -> IterableDataset:
        assert streaming
        return Dataset.from_list(HUB[path, name, split]()).to_iterable_dataset()

    monkeypatch.setattr("lingraft.corpus.hub.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --------------------------------------------------------------------------------------- smaller recipes


def plain(name: str) -> dict[str, Any]:
    """A shipped recipe as plain data, presets written out."""
    return yaml.safe_load(dump(load(name)))


def shrink(data: dict[str, Any]) -> dict[str, Any]:
    """Cut the recipe's budgets in place, and open its gates."""
    if "tokenizer" in data:
        data["tokenizer"] |= {"new_tokens": 80, "min_frequency": 2}
    for stage in data["stages"]:
        stage.pop("epochs", None)
        stage |= {"tokens": TOKENS, "sequence_length": min(stage["sequence_length"], 384)}
        stage["gate"] = dict.fromkeys(stage["gate"], LOOSE)
        if stage.get("lora", {}).get("quantise") == "nf4" and not find_spec("bitsandbytes"):
            stage["lora"]["quantise"] = "none"
    data["evaluate"] |= {"max_documents": 4}
    data["evaluate"]["generation"] |= {"max_new_tokens": 3, "count": 1}
    return data


def write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / f"{data['name']}.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return path


def run(folder: Path, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run the recipe; its scoreboard by step, checked to be whole."""
    stages = [stage["name"] for stage in data["stages"]]
    result = lingraft.run(write(folder, data), folder / "run")
    assert (result.model / "model.safetensors").is_file()
    assert result.report.is_file()
    entries = {entry["step"]: entry for entry in result.scoreboard}
    assert [step.partition("-stage-")[2].partition("-")[2] for step in entries if "-stage-" in step] == stages
    names = {questions["name"] for questions in data["evaluate"]["questions"]}
    assert all(set(entry["questions"]) == names for entry in entries.values())
    return entries


def results(folder: Path, step: str) -> dict[str, Any]:
    """What a step of the run says of itself."""
    return json.loads((folder / "run" / step / "manifest.json").read_text())["results"]


def gates(data: dict[str, Any]) -> list[set[str]]:
    return [set(stage["gate"]) for stage in data["stages"]]


# ------------------------------------------------------------------------------------------------- tests


def test_every_recipe_is_run_by_a_test_below() -> None:
    assert built_in_names() == [
        "gemma-3-270m-korean",
        "korean-medgemma-4b",
        "miniature-base",
        "quickstart",
        "stories-korean",
    ]


@pytest.mark.parametrize("name", built_in_names())
def test_plan_without_network(
    name: str, tmp_path: Path, hub: None, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINGRAFT_CACHE", str(tmp_path / "cache"))
    plan = lingraft.plan(name, tmp_path / "run")
    recipe = load(name)
    assert [stage["name"] for stage in plan["stages"]] == [stage.name for stage in recipe.stages]
    assert {step["state"] for step in plan["steps"]} == {"pending"}
    if recipe.base.model and recipe.base.model.startswith("google/"):
        assert "stands in" in plan["base"]["assumed"]
    assert all(stage["trainable"] > 0 for stage in plan["stages"])


def test_korean_medgemma(tmp_path: Path, tiny_tokenizer: Path, hub: None) -> None:
    data = shrink(plain("korean-medgemma-4b"))
    english = {"english_bpb_rise", "english_accuracy_drop"}
    assert gates(data) == [set(), *[english] * 7]
    base = tiny.write_checkpoint(tmp_path / "base", tiny_tokenizer, "gemma3-multimodal", tied=True)
    data["base"] = {"model": str(base)}
    entries = run(tmp_path, data)
    assert list(entries)[:2] == ["00-base", "03-embeddings"]
    totals = {
        **{f"kormedmcqa-{name}": (3 + i, 1 / 5) for i, name in enumerate(("doctor", "nurse", "pharm", "dentist"))},
        **{"medqa": (4, 1 / 5), "medmcqa": (5, 1 / 4), "pubmedqa": (3, 1 / 3)},
        **{f"mmlu-{subject.replace('_', '-')}": (2, 1 / 5) for subject in MMLU},
    }
    for entry in entries.values():
        assert {name: result["total"] for name, result in entry["questions"].items()} == {
            name: total for name, (total, _) in totals.items()
        }
        for name, result in entry["questions"].items():
            assert result["chance"] == pytest.approx(totals[name][1]), name
    judged = [entry["gate"] for entry in entries.values() if entry["gate"]]
    assert len(judged) == 7
    assert all({check["name"] for check in gate["checks"]} == english for gate in judged)

    corpus = results(tmp_path, "01-corpus")["sources"]
    assert corpus["ko-wikipedia"]["dropped"]["no keyword"] == 1
    for name in ("doctor", "nurse", "pharm", "dentist"):
        counts = corpus[f"ko-{name}"]
        assert counts["held_out"]["documents"] >= 1, "to validate the instruction stage on"
        assert counts["train"]["documents"] + counts["held_out"]["documents"] == 9
    tokenizer = results(tmp_path, "02-tokenizer")
    assert (tokenizer["new_tokens"], tokenizer["appended"]) == (80, 0)
    bits = ", 4-bit base" if find_spec("bitsandbytes") else ""
    trained = results(tmp_path, "09-stage-6-all-layers")["trains"]
    assert trained == f"all input and output rows + LoRA r 64 on every layer{bits}"
    instruction = results(tmp_path, "11-stage-8-instruction")
    assert (instruction["trains"], instruction["keep"]) == ("LoRA r 32 on every layer", "best")
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "run/model/model.safetensors")
    eyes = [name for name in old if "vision" in name or "multi_modal" in name]
    assert eyes
    assert all((old[name] == new[name]).all() for name in eyes), "a stage touched the model's eyes"


def test_gemma_3_270m(tmp_path: Path, tiny_tokenizer: Path, hub: None) -> None:
    data = shrink(plain("gemma-3-270m-korean"))
    assert gates(data) == [set(), *[{"english_bpb_rise"}] * 6]
    data["base"] = {"model": str(tiny.write_checkpoint(tmp_path / "base", tiny_tokenizer, "gemma3", tied=True))}
    entries = run(tmp_path, data)
    assert all(set(entry["languages"]) == {"ko", "en"} for entry in entries.values())


@pytest.fixture
def stories(tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder in place of the real data that `LINGRAFT_DATA` names: the same files with the same columns."""
    folder = tmp_path / "data"
    for part in ("ko-medical", "ko-general/ud", "models/stories260K"):
        (folder / part).mkdir(parents=True)
    korean = tiny.korean(240)
    laws = [{"law": "법", "kind": "법률", "text": text} for text in documents(korean[:60])]
    lines = "".join(json.dumps(law, ensure_ascii=False) + "\n" for law in laws)
    (folder / "ko-medical/health_law.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    diseases = "".join(f"A{n:02}\tname {n}\t{text.split('.')[0]}\n" for n, text in enumerate(korean[60:110]))
    (folder / "ko-medical/kcd8_en_ko.tsv").write_text("code\ten\tko\n" + diseases, encoding="utf-8")
    reviews = "".join(f"{n}\t{text}\t1\n" for n, text in enumerate(korean[110:160]))
    (folder / "ko-general/nsmc_reviews.tsv.gz").write_bytes(gzip.compress(("id\treview\trating\n" + reviews).encode()))
    for number, part in enumerate((korean[160:200], korean[200:240])):
        (folder / f"ko-general/ud/{number}.txt").write_text("\n".join(part), encoding="utf-8")
    tiny.write_checkpoint(folder / "models/stories260K/hf", tiny_tokenizer, "llama", tied=True)
    monkeypatch.setenv("LINGRAFT_DATA", str(folder))
    return folder


def test_stories(tmp_path: Path, stories: Path) -> None:
    data = shrink(plain("stories-korean"))
    replay = next(source for source in data["corpus"]["sources"] if "replay" in source)
    replay["replay"] |= {"documents": 12, "max_tokens": 24}
    entries = run(tmp_path, data)
    assert all(set(entry["languages"]) == {"ko", "en"} for entry in entries.values())


def test_quickstart_and_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINGRAFT_CACHE", str(tmp_path / "cache"))
    base, data = shrink(plain("miniature-base")), shrink(plain("quickstart"))
    data["base"] = {"recipe": str(write(tmp_path, base))}
    for recipe in (base, data):
        for origin in (*recipe["corpus"]["sources"], *recipe["evaluate"]["questions"]):
            origin["limit_documents"] = 120 if "format" in origin else 4
    base["base"]["scratch"]["tokenizer"] = {"vocabulary": 800, "unused": 250}
    write(tmp_path, base)
    entries = run(tmp_path, data)
    assert (tmp_path / "cache/miniature-base/model/model.safetensors").is_file()
    assert all(q["total"] == 4 for entry in entries.values() for q in entry["questions"].values())
