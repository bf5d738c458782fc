"""Token economics: the curve against real truncated grafts, and everything else by hand."""

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import lingraft
from lingraft import terminal
from lingraft.errors import TokenizerError
from lingraft.families import family
from lingraft.planning import describe
from lingraft.tokenizer import economics
from lingraft.tokenizer.economics import ModelShape, assess, compare, curve_of, knee, savings, slot_order, verdict
from lingraft.tokenizer.graft import GraftedPiece, GraftedTokenizer, graft, place
from lingraft.tokenizer.learn import Learnt, NewPiece, learn
from lingraft.tokenizer.load import BaseTokenizer, load

HANGUL = frozenset({"Hangul"})
GEMMA = family("gemma3")


def piece(text: str, left: str | None = None, right: str | None = None, count: int = 1, size: int = 2) -> GraftedPiece:
    kind = "merge" if left else "character"
    return GraftedPiece(0, text, left, right, count, kind, list(range(size)), ["?"] * size)


# 가 takes three bytes; 가나 and ▁가나 are made of it, 다라 of base pieces.
PIECES = [piece("가", count=10, size=3), piece("다라", "다", "라", 25), piece("가나", "가", "나", 8)]
PIECES.append(piece("▁가나", "▁", "가나", 8, size=5))


def grafted_with(base: BaseTokenizer, pieces: list[GraftedPiece]) -> GraftedTokenizer:
    learnt = [NewPiece(p.piece, p.left, p.right, p.count, p.kind) for p in pieces]  # type: ignore[arg-type]
    return graft(base, place(base, Learnt(learnt), family=GEMMA))


def check_curve_against_truncated_grafts(
    base: BaseTokenizer, grafted: GraftedTokenizer, texts: list[str], numbers: list[int]
) -> None:
    order = slot_order(grafted.pieces)
    before, after = (sum(map(len, t.encode(texts))) for t in (base, grafted.tokenizer))
    ids = np.array([i for row in grafted.tokenizer.encode(texts) for i in row])
    saved = savings(grafted.pieces, np.bincount(ids, minlength=len(grafted.tokenizer))[[p.id for p in grafted.pieces]])
    assert before - saved.sum() == after < before
    for number in numbers:
        first = [grafted.pieces[i] for i in sorted(order[:number])]
        truncated = grafted_with(base, first).tokenizer
        assert before - saved[order[:number]].sum() == sum(map(len, truncated.encode(texts))), number


def test_savings_walk_the_merge_trees() -> None:
    # 가 comes out twice, 다라 four times, 가나 once, ▁가나 three times: 가나 is made 4 times, 가 6 times.
    assert savings(PIECES, np.array([2, 4, 1, 3])).tolist() == [6 * 2, 4, 4, 3]


def test_slots_go_to_the_pieces_worth_most() -> None:
    # 다라 saved 25 tokens in training, 가 10 × 2, 가나 8.
    assert slot_order(PIECES).tolist() == [1, 0, 2, 3]


def test_curve_equals_grafts_that_stop_early(tiny_tokenizer: Path) -> None:
    base = load(tiny_tokenizer)
    texts = tiny.korean(160)
    learnt = learn(base, [(text, 1.0) for text in texts[:100]], new_tokens=200, min_frequency=2, scripts=HANGUL)
    grafted = graft(base, place(base, learnt, family=GEMMA))
    assert {"character", "merge"} == {p.kind for p in grafted.pieces}
    check_curve_against_truncated_grafts(base, grafted, texts[100:], [1, 2, 10, 50, 100, 150, 199, 200])


def test_curve_and_knee_by_hand() -> None:
    curve = curve_of(np.array([40, 10, 0, 0]), before=100)
    assert curve["points"] == [[0, 0.0], [1, 0.4], [2, 0.5], [3, 0.5], [4, 0.5]]
    # On scaled axes the curve stands 0.8 − 0.25 above the chord at one slot, 1 − 0.5 at two.
    assert curve["knee"] == {"slots": 1, "saved": 0.4, "share_of_gain": 0.8}
    assert curve["reached"] == [{"share_of_gain": 0.5, "slots": 1}, {"share_of_gain": 0.9, "slots": 2}]
    flat = curve_of(np.array([0, 0]), before=100)
    assert (flat["knee"], flat["reached"]) == (None, [])
    assert knee(np.sqrt(np.linspace(0, 1, 101))) == 25  # √x − x is largest at ¼


def test_rows_and_speed_by_hand() -> None:
    shape = ModelShape(body=1000, width=10, rows=100, tied=True, untied=True, bytes_per_parameter=2)
    costs = economics.row_costs(shape, new_tokens=30, added_rows=20)
    assert costs["parameters"] == 20 * 10 * 2  # in both matrices, since the graft parts them
    assert costs["untying"] == 100 * 10
    assert costs["bytes"] == 2 * 1400
    assert costs["share"] == 1400 / 2000
    assert economics.row_costs(ModelShape(1000, 10, 100, tied=True), 30, 20)["parameters"] == 200
    entry = {"saved": 0.5, "before": {"tokens_per_character": 1.0}, "after": {"tokens_per_character": 0.5}}
    found = economics.speed(shape, entry, added_rows=20)
    assert found["decode"] == 2 * 2000 / 2200  # half the tokens, each reading 2,200 parameters in place of 2,000
    assert found["prefill"] == (1000 * 1000 + 1000) / (500 * 1000 + 1200)


def compared(
    saved: float, points: list[tuple[int, float]], words: float = 0.2, vocabulary: int = 100
) -> dict[str, Any]:
    running = np.array([share for _, share in points])
    at = int(np.argmax(running / running[-1] - np.arange(len(points)) / (len(points) - 1)))
    bend = {"slots": points[at][0], "saved": points[at][1], "share_of_gain": points[at][1] / saved}
    curve = {"points": points, "knee": bend, "reached": []}
    return {
        "new_tokens": points[-1][0],
        "vocabulary_after": vocabulary,
        "words": {"share": words, "most_frequent": []},
        "together": {"saved": saved, "curve": curve},
    }


GRADUAL = [(0, 0.0), (10, 0.12), (20, 0.2), (30, 0.26)]
STEEP = [(0, 0.0), (10, 0.24), (20, 0.25), (30, 0.26)]
WEAK = [(0, 0.0), (10, 0.04), (20, 0.05), (30, 0.06)]
SMALL = ModelShape(body=500, width=10, rows=100, tied=True)


@pytest.mark.parametrize(
    ("data", "shape", "answer", "slots", "reason"),
    [
        (compared(0.26, GRADUAL), None, "expand", 30, "save 26.0% .* 1.35 times as fast; the knee is at 10 with 46%"),
        (compared(0.26, GRADUAL), SMALL, "expand", 30, "1.35 times"),
        (compared(0.26, STEEP), SMALL, "fewer", 10, "the knee is at 10 with 92% of the gain"),
        (compared(0.06, WEAK, words=0.5), SMALL, "don't expand", 0, "6.0% .* less than 10%; 50% of its words"),
        (compared(0.26, GRADUAL, words=0.93), SMALL, "don't expand", 0, "93% of its words are single tokens already"),
        # Thirty rows of 10 on 1,500 parameters: ×1.35 / 1.2 for all of them, ×1.36 for the first ten, which have slots.
        (compared(0.26, STEEP, vocabulary=130), SMALL, "fewer", 10, "all 30 only 1.13 times"),
        (compared(0.26, GRADUAL, vocabulary=1130), SMALL, "don't expand", 0, "slow each token more"),
    ],
)
def test_verdicts(data: dict[str, Any], shape: ModelShape | None, answer: str, slots: int, reason: str) -> None:
    found = verdict(data, shape)
    assert (found["answer"], found["slots"]) == (answer, slots)
    assert re.search(reason, found["reason"]), found["reason"]


def test_compare_of_a_tokenizer_made_elsewhere(tiny_tokenizer: Path, tmp_path: Path) -> None:
    base = load(tiny_tokenizer)
    folder = shutil.copytree(tiny_tokenizer, tmp_path / "added")
    parsed = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    new = parsed["added_tokens"][0] | {"id": len(base), "content": "폐렴", "special": False}
    parsed["added_tokens"].append(new)
    (folder / "tokenizer.json").write_text(json.dumps(parsed), "utf-8")
    found = compare(base, load(folder), {"notes": ["폐렴 a", "폐렴"]})
    assert (found["new_tokens"], found["unreachable"]) == (1, 0)
    assert found["sources"]["notes"]["curve"] is None
    assert found["sources"]["notes"]["new_tokens_used_share"] == 1
    assert found["sources"]["notes"]["saved"] > 0
    assert assess(found, None)["verdict"]["answer"] == "expand"
    json.dumps(found)


def test_faults_are_named(tiny_tokenizer: Path) -> None:
    base = load(tiny_tokenizer)
    with pytest.raises(TokenizerError, match="notes: there is no text in it"):
        compare(base, base, {"notes": [""]})
    learnt = learn(base, [(text, 1.0) for text in tiny.korean(50)], new_tokens=20, scripts=HANGUL)
    grafted = graft(base, place(base, learnt, family=GEMMA))
    with pytest.raises(TokenizerError, match="give the very base"):
        compare(grafted.tokenizer, grafted.tokenizer, {"notes": tiny.korean(5)}, grafted.pieces)


def test_plan_shows_a_sample_before_any_work(tmp_path: Path, tiny_gemma: Path) -> None:
    data = lingraft.plan(tiny.write_recipe(tmp_path, tiny_gemma), tmp_path / "run")
    found = data["tokens"]
    assert found["from"].startswith("a sample: learnt from ")
    assert list(found["compared"]["sources"]) == ["korean"]
    assert found["compared"]["new_tokens"] == 100
    assert found["rows"]["untying"] == tiny.VOCABULARY * 32
    assert found["verdict"]["answer"] != "don't expand"
    shown = terminal.plan(data)
    assert f"{found['verdict']['answer']}: 100 new tokens save " in shown
    assert "100 in place of unused ones, 0 added" in shown


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"new_tokens": 100, "min_frequency": 10**6}, "on a sample: no new piece"),
        ({"new_tokens": 300, "slots": "unused"}, "on a sample: 300 new tokens but 256 unused slots"),
        ({"new_tokens": 100, "sources": ["hub"]}, "the sources of new tokens are not at hand"),
    ],
)
def test_plan_says_why_it_shows_no_savings(
    tmp_path: Path, tiny_gemma: Path, settings: dict[str, Any], why: str
) -> None:
    recipe = lingraft.load_recipe(tiny.write_recipe(tmp_path, tiny_gemma, tokenizer=settings | {"sources": None}))
    data = recipe.model_dump(exclude={"folder"})
    data["tokenizer"] |= settings
    data["corpus"]["sources"].append({"name": "hub", "language": "ko", "hub": "someone/text"})
    recipe = type(recipe).model_validate(data | {"folder": recipe.folder})
    found = describe(recipe, tmp_path / "run")
    assert why in found["tokens"]["unknown"]
    assert f"tokens saved: {found['tokens']['unknown']}" in terminal.plan(found)


@pytest.fixture(scope="module")
def gemma3(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    folder = tmp_path_factory.mktemp("gemma3")
    with gzip.open(shared_data / "tokenizers/gemma3_262k/tokenizer.json.gz") as packed:
        (folder / "tokenizer.json").write_bytes(packed.read())
    return load(folder)


def test_words_that_gemma_has_already(gemma3: BaseTokenizer) -> None:
    found = economics.single_token_words(gemma3, ["안녕하세요 안녕하세요 우리 뷁쀍 hello"], HANGUL)
    assert found == {"share": 3 / 4, "most_frequent": [["안녕하세요", 2], ["우리", 1]]}


def test_gemma_on_korean_and_on_english(gemma3: BaseTokenizer, shared_data: Path) -> None:
    with gzip.open(shared_data / "ko-medical/health_law.jsonl.gz", "rt") as lines:
        law = json.loads(next(lines))["text"].split("\n")[:600]
    with gzip.open(shared_data / "en-medical/medquad.jsonl.gz", "rt") as lines:
        english = [json.loads(next(lines))["answer"] for _ in range(30)]
    learnt = learn(gemma3, [(line, 1.0) for line in law[::2]], new_tokens=300, scripts=HANGUL)
    grafted = graft(gemma3, place(gemma3, learnt, family=GEMMA))
    check_curve_against_truncated_grafts(gemma3, grafted, law[1::2], [40])
    shape = ModelShape(body=3_209_000_000, width=2560, rows=262_208, tied=True)
    korean = compare(gemma3, grafted.tokenizer, {"law": law[1::2]}, grafted.pieces, HANGUL)
    found = assess(korean, shape)
    assert korean["unreachable"] == 0
    assert found["verdict"]["answer"] != "don't expand"
    assert found["rows"]["parameters"] == 0
    assert found["speed"]["decode"] > 1.1
    answer = assess(compare(gemma3, grafted.tokenizer, {"medquad": english}, grafted.pieces), shape)["verdict"]
    assert answer["answer"] == "don't expand"
    assert "save 0.0%" in answer["reason"]
    assert re.search("9.% of its words are single tokens already", answer["reason"])
