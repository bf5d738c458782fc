"""The report: numbers, chart geometry, the verdict, and the page of a whole, a partial and a hostile run."""

import copy
import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lingraft.errors import RunError
from lingraft.report import charts, numbers, render, summary, write
from lingraft.report.page import step_labels

STAGES = [
    ("new-input-rows", "New input rows", "new input rows", 76_800, 1e-3),
    ("new-output-rows", "New output rows", "new output rows", 76_800, 1e-3),
    ("new-rows", "New rows of both", "new input and output rows", 153_600, 5e-4),
    ("all-output-rows", "All output rows", "all output rows", 272_384, 1e-4),
    ("rows", "New input and all output rows", "new input rows, all output rows", 349_184, 1e-4),
    ("layers", "Everything", "all layers, all rows", 1_956_608, 5e-5),
    ("cool-down", "Layers alone", "all layers", 1_411_840, 2e-5),
]


def language(bits: float, spread: float, tokens_per_character: float, unigram: float) -> dict[str, Any]:
    return {
        "bits_per_byte": bits,
        "low": bits - spread,
        "high": bits + spread,
        "unigram_bits_per_byte": unigram,
        "tokens_per_character": tokens_per_character,
        "documents": 240,
        "bytes": 412_345,
    }


def questions(code: str, correct: int, total: int) -> dict[str, Any]:
    accuracy = correct / total
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / total)
    return {
        "language": code,
        "accuracy": accuracy,
        "correct": correct,
        "total": total,
        "low": accuracy - half,
        "high": accuracy + half,
        "chance": 0.25,
        "at_chance": accuracy - half <= 0.25,
    }


def generations(repetition: float, script: float, used: float, samples: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "prompts": 24,
        "empty": 0.0,
        "loops": 0.125 if repetition > 0.2 else 0.0,
        "broken": 0.02 if repetition > 0.2 else 0.0,
        "repetition": repetition,
        "target_script": script,
        "new_token_share": used,
        "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
    }


def entry(index: int, ko: float, en: float, right: tuple[int, int, int]) -> dict[str, Any]:
    names = ["base", "embeddings", *(stage[0] for stage in STAGES)]
    titles = [
        "The base model",
        "After surgery",
        *(f"Stage {i}: {s[1]}" for i, s in enumerate(STAGES, start=1)),
    ]
    korean = ("폐렴의 흔한 증상은", "기침과 열과 가래이다. 증상이 심하면 병원에서 흉부 사진을 찍는다.")
    english = ("The usual sign of asthma is", "wheezing, which gets worse at night.")
    if index == 0:
        korean = (korean[0], "은은은은 의 의 의 다다 ���")
    return {
        "step": names[index],
        "title": titles[index],
        "tokens_trained": max(0, index - 1) * 200_000,
        "languages": {
            "ko": language(ko, 0.06, 1.612 if index == 0 else 0.871, 3.02),
            "en": language(en, 0.04, 0.318, 2.87),
        },
        "questions": {
            "korean": questions("ko", right[0], 150),
            "korean-unseen-facts": questions("ko", right[1], 80),
            "english": questions("en", right[2], 150),
        },
        "generations": {
            "ko": generations(0.31 if index == 0 else 0.04, 0.62 if index == 0 else 0.99, 0.41 * bool(index), [korean]),
            "en": generations(0.02, 1.0, 0.0, [english]),
        },
        "gate": None
        if index < 2
        else {
            "passed": True,
            "checks": [
                {"name": "english_bpb_rise", "value": (en - 1.04) / 1.04, "limit": 0.02, "passed": True},
                {"name": "english_accuracy_drop", "value": 0.007, "limit": 0.05, "passed": True},
            ],
        },
        "seconds": 11.2,
    }


def stage(index: int) -> dict[str, Any]:
    name, title, trains, parameters, rate = STAGES[index]
    top, bottom = (5.2, 3.1, 2.6, 2.4, 2.3, 2.2, 1.9)[index], (3.4, 2.7, 2.4, 2.3, 2.2, 1.9, 1.87)[index]
    noise = random.Random(index)
    loss = [[step, bottom + (top - bottom) * math.exp(-step / 60) + noise.gauss(0, 0.02)] for step in range(1, 241)]
    validation = [[step, loss[step - 1][1] + 0.1 + max(0, step - 120) / 800] for step in (60, 120, 180, 240)]
    spike = {"step": 200, "loss": 3.1, "usual": 2.0, "read": "web#17, web#5 and 12 more"}
    return {
        "name": name,
        "title": title,
        "trains": trains,
        "parameters": parameters,
        "learning_rate": rate,
        "tokens": 200_000,
        "steps": 240,
        "seconds": 21.4 + 6 * index,
        "tokens_per_second": 9_500 - 900 * index,
        "peak_memory_gb": 1.4,
        "loss": loss,
        "first_loss": loss[0][1],
        "last_loss": loss[-1][1],
        "validation": validation if index == 5 else [],
        "keep": "best" if index == 5 else "last",
        "kept_step": 120 if index == 5 else 240,
        "spikes": int(index == 5),
        "first_spikes": [spike] if index == 5 else [],
        "unchanged_tensors": 52 if index < 5 else 2,
        "changed_tensors": 1 if index < 5 else 51,
        "notes": ["The loss was still falling at the end."] if index == 5 else [],
    }


def tokens(pieces: str) -> list[str]:
    return pieces.split()


def flags(digits: str) -> list[bool]:
    return [digit == "1" for digit in digits]


BITS = [
    (2.41, 1.04),
    (2.35, 1.04),
    (1.92, 1.04),
    (1.71, 1.041),
    (1.62, 1.043),
    (1.55, 1.046),
    (1.5, 1.047),
    (1.21, 1.05),
    (1.19, 1.048),
]
RIGHT = [
    (39, 19, 131),
    (37, 20, 131),
    (52, 22, 130),
    (64, 22, 131),
    (71, 24, 130),
    (80, 23, 129),
    (88, 24, 130),
    (118, 26, 128),
    (121, 25, 129),
]

QUICKSTART: dict[str, Any] = {
    "name": "quickstart",
    "miniature": True,
    "created": "2026-11-21T01:00:00Z",
    "lingraft_version": "0.1.0",
    "state": "finished",
    "state_detail": "",
    "seconds": 391.0,
    "peak_memory_gb": 2.1,
    "languages": {"target": "ko", "old": "en"},
    "language_names": {"ko": "Korean", "en": "English"},
    "base": {"model": "miniature-base", "parameters": 1_803_000, "tied": True},
    "final": {
        "path": "runs/quickstart/12-export/model",
        "parameters": 2_152_184,
        "tied": False,
        "vocabulary": 5_328,
    },
    "alarms": ["The base answers Korean questions at chance (26.0 %): it can't show what the graft cost in Korean."],
    "notes": [
        "The seven stages are EEVE's, at miniature size.",
        "Held-out documents were never seen in training.",
    ],
    "scoreboard": [entry(i, *bits, right) for i, (bits, right) in enumerate(zip(BITS, RIGHT, strict=True))],
    "tokenizer": {
        "new_tokens": 1_200,
        "route": "unused slots",
        "vocabulary_before": 4_128,
        "vocabulary_after": 5_328,
        "fertility": {
            "ko": {
                "before": {"tokens_per_character": 1.612, "tokens_per_word": 5.41, "tokens_per_byte": 0.641},
                "after": {"tokens_per_character": 0.871, "tokens_per_word": 2.92, "tokens_per_byte": 0.346},
            },
            "en": {
                "before": {"tokens_per_character": 0.318, "tokens_per_word": 1.72, "tokens_per_byte": 0.318},
                "after": {"tokens_per_character": 0.318, "tokens_per_word": 1.72, "tokens_per_byte": 0.318},
            },
        },
        "segmentation": [
            {
                "language": "ko",
                "text": "폐렴 환자는 기침과 가래가 심하다.",
                "before": tokens("<ED> <8F> <90> <EB> <A0> <B4> ▁환 자 는 ▁기 침 과 ▁가 <EB> <9E> <98> 가 ▁심 하 다 ."),
                "after": tokens("폐렴 ▁환자 는 ▁기침 과 ▁가래 가 ▁심 하다 ."),
                "new": flags("1101010010"),
            },
            {
                "language": "ko",
                "text": "천식은 기도의 만성 염증으로 숨이 차고 쌕쌕거리는 병이며 밤에 더 심해진다.",
                "before": tokens(
                    "천 식 은 ▁기 도 의 ▁만 성 ▁ <EC> <97> <BC> 증 으 로 ▁숨 이 ▁차 고 "
                    "▁ <EC> <8C> <95> <EC> <8C> <95> 거 리 는 ▁ 병 이 며 ▁밤 에 ▁더 ▁심 해 진 다 ."
                ),
                "after": tokens(
                    "천식 은 ▁기도 의 ▁만성 ▁염증 으로 ▁숨이 ▁차 고 ▁ 쌕 쌕 거리는 ▁병이 며 ▁밤에 ▁더 ▁심해 진다 ."
                ),
                "new": flags("101011110001111010110"),
            },
            {
                "language": "en",
                "text": "Wheezing gets worse at night.",
                "before": tokens("W hee zing ▁gets ▁worse ▁at ▁night ."),
                "after": tokens("W hee zing ▁gets ▁worse ▁at ▁night ."),
                "new": flags("00000000"),
            },
        ],
        "examples": [
            {"piece": "▁환자", "id": 4_128, "count": 18_204, "decomposition": ["▁환", "자"]},
            {
                "piece": "폐렴",
                "id": 4_131,
                "count": 6_120,
                "decomposition": ["<0xED>", "<0x8F>", "<0x90>", "<0xEB>", "<0xA0>", "<0xB4>"],
            },
            {
                "piece": "▁가래",
                "id": 4_402,
                "count": 1_044,
                "decomposition": ["▁가", "<0xEB>", "<0x9E>", "<0x98>"],
            },
        ],
        "checks": {"old_text_changed": 0, "old_text_lines": 500, "unreachable": 0, "round_trip_failures": 0},
    },
    "embeddings": {
        "input": {"subword_mean": 900, "dictionary": 300},
        "output": {"first_subword": 900, "dictionary": 300},
    },
    "stages": [stage(i) for i in range(7)],
    "corpus": {
        "sources": [
            {
                "name": "clinic-notes-ko",
                "language": "ko",
                "documents": 4_812,
                "held_out": 240,
                "bytes": 3_456_789,
                "dropped": {"duplicate": 31, "too_short": 12},
            },
            {
                "name": "textbook-en",
                "language": "en",
                "documents": 2_203,
                "held_out": 240,
                "bytes": 1_234_567,
                "dropped": {},
            },
        ]
    },
    "recipe_yaml": "name: quickstart\nbase: miniature\nlanguages: {target: ko, old: en}\nstages: eeve\n",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.15.1", "tokenizers": "0.23.0"},
    "command": "lingraft run quickstart",
    "seed": 0,
}

PARTS = [key for key in QUICKSTART if key not in ("name", "state")]


def without_attributes(page: str) -> str:
    """What a reader sees: the text between tags, style left out."""
    return re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S))


def assert_sound(page: str) -> None:
    """Balanced tags, unique ids, labelled pictures and tables, nothing fetched, no number that isn't one."""
    checker = Balance()
    checker.feed(page)
    assert checker.open == []
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^"]+)"', page)) <= set(ids)
    assert page.count("<table") == page.count("<caption")
    for picture in re.findall(r'<svg class="chart".*?</svg>', page, flags=re.S):
        assert ET.fromstring(picture).find("title") is not None
    assert not re.search(r"<script|<link (?!rel=\"icon\" href=\"data:,\")|<img|src=|@import|url\(|https?:", page)
    assert not re.search(r"\b(nan|NaN|inf|None|Undefined)\b", without_attributes(page))


class Balance(HTMLParser):
    VOID = ("meta", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.count(1_803_000), "1,803,000"),
        (numbers.decimals(1.0237), "1.024"),
        (numbers.decimals(float("nan")), "–"),
        (numbers.percent(0.783), "78.3\u00a0%"),
        (numbers.percent(None), "–"),
        (numbers.interval(1.2, None), ""),
        (numbers.percent_interval(0.7, 0.85), "70.0–85.0\u00a0%"),
        (numbers.signed(-41.24, 1, "%"), "−41.2\u00a0%"),
        (numbers.signed(-0.04), "0.0"),
        (numbers.plain(0.0204), "0.0204"),
        (numbers.plain(1500), "1,500"),
        (numbers.scientific(2.5e-5), "2.5e−5"),
        (numbers.duration(391), "6\u00a0min 31\u00a0s"),
        (numbers.duration(7200), "2\u00a0h"),
        (numbers.duration(0), "0\u00a0s"),
        (numbers.size(1_234_567), "1.2\u00a0MB"),
    ],
)
def test_numbers(written: str, expected: str) -> None:
    assert written == expected


def test_ticks_enclose_the_values_with_round_steps() -> None:
    assert charts.nice_ticks(0.13, 0.87) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.nice_ticks(1.0, 2.0) == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    assert charts.nice_ticks(3.0, 3.0)[0] <= 3.0 <= charts.nice_ticks(3.0, 3.0)[-1]


def test_line_chart_puts_values_and_whiskers_where_the_axis_says() -> None:
    measured = [("Base", {"bits_per_byte": 2.0, "low": 1.0, "high": 3.0}), ("Stage 1", {})]
    chart = charts.line_chart("Bits", [charts.bits_series("Korean", "target", measured)], ["base", "1"])
    assert chart is not None
    [mark] = chart.lines[0].points
    middle = (chart.top + chart.bottom) / 2
    assert (mark.y, mark.ends) == (middle, (chart.bottom, chart.top))  # the axis runs from 1 to 3
    assert mark.x == chart.left + (chart.right - chart.left) / 4  # the first of two steps
    assert mark.title == "Base, Korean: 2.000 (1.000–3.000)"
    assert charts.line_chart("Bits", [charts.bits_series("Korean", "target", [("Base", {})])], ["base"]) is None


def test_values_far_apart_get_a_logarithmic_axis() -> None:
    korean = charts.bits_series("Korean", "target", [("Base", {"bits_per_byte": 10.0}), ("1", {"bits_per_byte": 0.1})])
    chart = charts.line_chart("Bits", [korean], ["base", "1"])
    assert chart is not None
    assert chart.logarithmic
    assert [tick.label for tick in chart.y_ticks] == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    assert [mark.y for mark in chart.lines[0].points] == pytest.approx([chart.top, chart.bottom])
    one = next(tick for tick in chart.y_ticks if tick.label == "1")
    assert one.at == pytest.approx((chart.top + chart.bottom) / 2)


def test_loss_is_averaged_and_keeps_no_nan() -> None:
    assert charts.thin([[1, 4.0], [2, 2.0], [3, math.nan], [4, 1.0]], limit=2) == [(1.5, 3.0), (4.0, 1.0)]
    assert charts.loss_chart("1. Rows", {"loss": [[1, math.inf]]}) is None
    one = charts.loss_chart("1. Rows", {"loss": [[1, 2.0]]})
    assert one is not None
    assert len(one.lines[0].points) == 1


def test_loss_chart_shows_spikes_and_which_state_was_kept() -> None:
    spike = {"step": 2, "loss": 4.0, "usual": 2.0, "read": "a#1"}
    stage = {"loss": [[1, 2.0], [3, 1.0]], "validation": [[2, 1.5], [4, 1.75]], "kept_step": 2, "first_spikes": [spike]}
    chart = charts.loss_chart("1. Rows", stage)
    assert chart is not None
    training, validation = chart.lines
    assert [mark.title for mark in training.marks] == ["step 2: loss 4.000, usual 2.000"]
    assert [mark.title for mark in validation.marks] == ["after step 2: validation loss 1.500, kept"]
    assert (validation.points[0].x, validation.points[1].x) == (training.marks[0].x, chart.right)
    assert training.marks[0].y == pytest.approx(chart.top)  # the axis has room for it


def test_judgement_needs_intervals_that_do_not_touch() -> None:
    before = {"bits_per_byte": 1.0, "low": 0.9, "high": 1.1}
    for value, expected in ((0.7, "better"), (0.95, "unclear"), (1.4, "worse")):
        after = {"bits_per_byte": value, "low": value - 0.1, "high": value + 0.1}
        assert summary.judge(before, after, "bits_per_byte", lower_is_better=True) == expected
    assert summary.judge(before, {"bits_per_byte": 0.1}, "bits_per_byte", lower_is_better=True) == ""


def test_verdict_says_what_the_numbers_say() -> None:
    said = summary.verdict(QUICKSTART)
    assert (said.headline, said.tone) == ("Korean improved; English held.", "good")
    assert "50.6\u00a0% fewer bits per byte" in said.sentence
    assert "more bits per byte, within the confidence intervals" in said.sentence
    assert "Korean unseen facts from 23.8\u00a0% to 31.2\u00a0% (at chance)" in said.sentence

    harmed = copy.deepcopy(QUICKSTART)
    harmed["scoreboard"][-1]["languages"]["en"] = language(1.4, 0.04, 0.318, 2.87)
    assert summary.verdict(harmed).headline == "Korean improved; English got worse."
    assert summary.verdict(harmed).tone == "bad"
    assert summary.verdict(harmed | {"state": "stopped by a gate"}).headline == "A gate stopped the run."
    assert summary.verdict(QUICKSTART | {"scoreboard": []}).headline == "Nothing has been measured yet."


def test_whole_page() -> None:
    page = render(QUICKSTART)
    assert_sound(page)
    assert page.count('<svg class="chart"') == 3 + len(STAGES)
    for text in (
        "miniature world",
        "at chance",
        "폐렴",
        "1,200 new tokens",
        "subword mean",
        "2.13.0",
        "limit 0.02",
    ):
        assert text in page


def test_step_labels_know_whether_there_was_a_graft() -> None:
    assert step_labels(QUICKSTART)[:4] == ["base", "graft", "1", "2"]
    assert step_labels(QUICKSTART | {"tokenizer": None, "embeddings": None})[:3] == ["base", "1", "2"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("empty", [None, "missing"])
def test_page_without_a_part(part: str, empty: str | None) -> None:
    data = QUICKSTART | {part: None}
    if empty == "missing":
        del data[part]
    assert_sound(render(data))


def test_pages_of_runs_that_have_not_come_far() -> None:
    assert_sound(render({"name": "new", "state": "unfinished"}))
    for entries in (1, 2):
        data = QUICKSTART | {
            "scoreboard": copy.deepcopy(QUICKSTART["scoreboard"][:entries]),
            "state": "unfinished",
        }
        for one in data["scoreboard"]:
            one |= {"questions": {}, "generations": {}}
        assert_sound(render(data))


def savings(saved: float, knee: int | None) -> dict[str, Any]:
    points = [[slots, saved * math.sqrt(slots / 1200)] for slots in range(0, 1201, 12)]
    bend = knee and {"slots": knee, "saved": saved / 2, "share_of_gain": 0.5}
    reached = [{"share_of_gain": share, "slots": slots} for share, slots in ((0.5, 300), (0.9, 972))] if knee else []
    return {
        "before": {"tokens_per_character": 1.6},
        "after": {"tokens_per_character": 1.6 * (1 - saved)},
        "saved": saved,
        "new_tokens_used_share": 0.61,
        "curve": {"points": points, "knee": bend, "reached": reached},
    }


ECONOMICS = {
    "from": "the run's held-out text",
    "compared": {
        "new_tokens": 1_200,
        "words": {"share": 0.25, "most_frequent": [["안녕하세요", 7]]},
        "sources": {"law": savings(0.46, 300), "<b>bare</b>": savings(0.0, None)},
        "together": savings(0.4, 300),
    },
    "rows": {
        "reused_rows": 200,
        "added_rows": 1_000,
        "matrices": 2,
        "parameters": 256_000,
        "untying": 524_288,
        "bytes": 1_560_576,
        "share": 0.4,
    },
    "speed": {"decode": 1.44, "prefill": 1.61, "characters": 1000, "assumptions": "as assumed"},
    "verdict": {"answer": "fewer", "slots": 300, "reason": "the knee is at 300"},
}


@pytest.mark.parametrize("known", ["all", "no curve, no shape"])
def test_token_economics_are_shown(known: str) -> None:
    data = copy.deepcopy(QUICKSTART)
    data["tokenizer"]["economics"] = economics = copy.deepcopy(ECONOMICS)
    if known != "all":
        economics |= {"rows": None, "speed": None}
        for entry in (*economics["compared"]["sources"].values(), economics["compared"]["together"]):
            entry["curve"] = None
    page = render(data)
    assert_sound(page)
    assert "Fewer slots are enough: 300." in page
    assert "안녕하세요" in page
    assert "<b>bare" not in page
    assert ("law, knee at 300 slots: 23.0\u00a0% saved" in page) == (known == "all")
    assert ("256,000 parameters, and 524,288 for parting" in page) == (known == "all")
    assert page.count('<svg class="chart"') == 3 + len(STAGES) + (known == "all")


def test_no_number_that_is_not_one_is_shown() -> None:
    data = copy.deepcopy(QUICKSTART)
    data["scoreboard"][-1]["languages"]["ko"] |= {"bits_per_byte": math.nan, "low": None, "high": None}
    data["scoreboard"][-1]["questions"]["korean"]["accuracy"] = math.nan
    data["scoreboard"][-1]["gate"]["checks"][0] |= {"value": math.nan, "passed": False}
    data["stages"][0]["loss"][3][1] = math.inf
    assert_sound(render(data))


def test_model_text_cannot_become_markup() -> None:
    attack = "</p><script>alert(1)</script><img src=x onerror=alert(1)>"
    data = copy.deepcopy(QUICKSTART)
    data |= {"name": attack, "recipe_yaml": attack, "alarms": [attack], "state_detail": attack}
    data["scoreboard"][0]["title"] = attack  # also inside the charts' titles
    data["scoreboard"][-1]["generations"]["ko"]["samples"] = [{"prompt": attack, "text": attack}]
    data["tokenizer"]["segmentation"][0]["after"] = [attack, '" onclick="x']
    data["tokenizer"]["segmentation"][0]["new"] = [True, False]
    page = render(data)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert '" onclick' not in page


def test_colours_are_readable_in_light_and_dark() -> None:
    css = (Path(charts.__file__).parent / "report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", css.split("@media")[0]))
    dark = light | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", css.split("@media")[1]))
    pairs = [
        ("ink", "paper"),
        ("soft", "paper"),
        ("soft", "raised"),
        ("good", "good-back"),
        ("bad", "bad-back"),
    ]
    pairs += [("soft", f"tint{i}") for i in range(3)] + [
        ("new-ink", "new-back"),
        ("good", "paper"),
        ("ink", "bad-back"),
    ]
    for theme in (light, dark):
        for ink, back in pairs:
            bright, dim = sorted((luminance(theme[ink]), luminance(theme[back])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, back)  # WCAG 2 AA


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_write_replaces_the_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")
    write(QUICKSTART, page)
    assert page.read_text(encoding="utf-8") == render(QUICKSTART)
    assert list(tmp_path.iterdir()) == [page]


def test_write_failure_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="No space left on device"):
        write(QUICKSTART, page)
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]
