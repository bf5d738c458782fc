"""The miniature world: a sound table, text that keeps what is hidden, questions with one right answer."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import pytest

from lingraft.errors import CorpusError
from lingraft.miniature import (
    ATTRIBUTES,
    Fact,
    Language,
    attach,
    dictionary,
    hidden_facts,
    load,
    open_questions,
    paragraphs,
    questions,
)

LANGUAGES = ("en", "ko")
HANGUL_NAME = re.compile(r"[가-힣A-Z0-9 ]*[가-힣][가-힣A-Z0-9 ]*")


def named(text: str, name: str) -> bool:
    """Whether `text` holds `name` as a word of its own; in Korean, particles may follow it."""
    endings = "은|는|이|가|을|를|과|와|으로|로|에|의|에게|에서|에는|에게는|이다|$"
    # 피부과 의사 is a dermatologist and not "the skin and a doctor".
    end = rf"(?:{endings})?(?![가-힣]|(?<=과) 의사)" if re.search("[가-힣]$", name) else r"(?![A-Za-z])"
    return re.search(rf"(?<![가-힣A-Za-z]){re.escape(name)}{end}", text, re.IGNORECASE) is not None


CONDITION = re.compile("|".join(sorted((c.ko for c in load().conditions.values()), key=len, reverse=True)))


def test_table_is_large_and_every_reference_resolves() -> None:
    world = load()
    assert len(world.conditions) >= 120
    used = {a: {v for c in world.conditions.values() for v in c.values(a)} for a in ATTRIBUTES}
    assert {a: set(world.kind(a)) for a in ATTRIBUTES} == used
    for condition in world.conditions.values():
        assert len(set(condition.symptoms)) == 2, condition.en
    for term in world.terms.values():
        for overlap in term.overlaps:
            assert world.terms[overlap].kind == term.kind, (term.en, overlap)


def test_names_are_distinct_and_korean_is_hangul() -> None:
    korean, english = zip(*dictionary(), strict=True)
    assert len(set(korean)) == len(korean) == len(set(english))
    assert [name for name in korean if not HANGUL_NAME.fullmatch(name)] == []


def test_no_korean_value_is_a_word_of_another_value_of_the_same_condition() -> None:
    world = load()
    for condition in world.conditions.values():
        values = [world.name(v, "ko") for a in ATTRIBUTES for v in condition.values(a)]
        assert [(a, b) for a in values for b in values if a != b and named(b, a)] == []
    assert [term.ko for term in world.terms.values() if CONDITION.search(term.ko)] == []


@pytest.mark.parametrize(
    ("word", "particle", "expected"),
    [
        ("폐렴", "은/는", "폐렴은"),
        ("감기", "은/는", "감기는"),
        ("기침", "이/가", "기침이"),
        ("구토", "이/가", "구토가"),
        ("수술", "을/를", "수술을"),
        ("항생제", "을/를", "항생제를"),
        ("발열", "과/와", "발열과"),
        ("가래", "과/와", "가래와"),
        ("천식", "(으)로", "천식으로"),
        ("항생제", "(으)로", "항생제로"),
        ("클로로퀸", "(으)로", "클로로퀸으로"),
        ("수술", "(으)로", "수술로"),  # final ㄹ
        ("코로나19", "은/는", "코로나19는"),  # 구
        ("제3", "이/가", "제3이"),  # 삼
        ("1", "(으)로", "1로"),  # 일
        ("10", "을/를", "10을"),  # 십
        ("MRI", "을/를", "MRI를"),  # 아이
        ("PCR", "(으)로", "PCR로"),  # 알
        ("ADHD", "은/는", "ADHD는"),  # 디
        ("insulin", "을/를", "insulin을"),
        ("virus", "(으)로", "virus로"),
        ("간염(A형)", "은/는", "간염(A형)은"),
    ],
)
def test_particles(word: str, particle: str, expected: str) -> None:
    assert attach(word, particle) == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_is_deterministic_and_depends_on_the_seed(language: Language) -> None:
    first, again, other = (
        list(paragraphs(language, seed=seed, per_condition=1, hidden=hidden_facts(0.2, 1))) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert list(open_questions(language, seed=1, count=50)) == list(open_questions(language, seed=1, count=50))


def test_output_is_independent_of_the_hash_seed() -> None:
    program = (
        "from lingraft.miniature import *; h = hidden_facts(0.2, 0)\n"
        "for l in ('en', 'ko'):\n"
        "    print(*paragraphs(l, seed=0, per_condition=1, hidden=h))\n"
        "    print(*questions(l, seed=0, count=100, part='test', facts=h))\n"
        "    print(*open_questions(l, seed=0, count=100, hidden=h))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop()


def test_hidden_facts_are_spread_over_attributes_and_conditions() -> None:
    hidden = hidden_facts(0.25, seed=4)
    assert Counter(attribute for _, attribute in hidden) == dict.fromkeys(ATTRIBUTES, 32)
    assert max(Counter(condition for condition, _ in hidden).values()) <= 2
    assert hidden == hidden_facts(0.25, seed=4) != hidden_facts(0.25, seed=5)


def stated(texts: Iterable[dict[str, str]], hidden: frozenset[Fact]) -> set[Fact]:
    """The facts of `hidden` that Korean paragraphs give away: a value of the fact occurs in the condition's
    own paragraph (where pronouns mean it), or in a sentence elsewhere that names it. Names of conditions are
    cut out first, since they may hold a value. Searches the text alone, without the generator's help."""
    world = load()
    values = {(c, a): [world.name(v, "ko") for v in world.conditions[c].values(a)] for c, a in sorted(hidden)}
    leaks = set()
    for paragraph in texts:
        for sentence in re.split(r"(?<=\.) ", paragraph["text"]):
            names = set(CONDITION.findall(sentence))
            bare = CONDITION.sub("", sentence)
            for (condition, attribute), words in values.items():
                about = condition == paragraph["condition"] or world.name(condition, "ko") in names
                if about and any(named(bare, word) for word in words):
                    leaks.add((condition, attribute))
    return leaks


@pytest.mark.parametrize(("share", "seed"), [(0.2, 0), (0.5, 1)])
def test_hidden_facts_are_never_stated_in_korean(share: float, seed: int) -> None:
    hidden = hidden_facts(share, seed)
    assert stated(paragraphs("ko", seed=9, per_condition=10, hidden=hidden), hidden) == set()
    # The search does find them where nothing is hidden.
    assert len(stated(paragraphs("ko", seed=9, per_condition=10), hidden)) > 0.95 * len(hidden)


def test_hidden_condition_has_no_paragraphs_and_no_open_questions() -> None:
    hidden = frozenset(("asthma", attribute) for attribute in ATTRIBUTES)
    texts = [p["text"] for p in paragraphs("ko", seed=0, per_condition=2, hidden=hidden)]
    prompts = [q["prompt"] for q in open_questions("ko", seed=0, count=700, hidden=hidden)]
    assert not any(named(text, "천식") for text in texts + prompts)
    with pytest.raises(CorpusError, match="no facts to ask about"):
        next(questions("ko", seed=0, count=1, part="train", facts=[]))


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_have_one_right_answer(language: Language) -> None:
    world = load()
    terms = {world.name(t, language): t for t in world.terms}
    for question in questions(language, seed=0, count=2000, part="train"):
        condition = world.conditions[question["condition"]]
        assert len(set(question["choices"])) == 5
        choices = [terms[choice] for choice in question["choices"]]
        assert {world.terms[choice].kind for choice in choices} == {question["attribute"]}
        right = condition.values(question["attribute"])
        assert [i for i, choice in enumerate(choices) if choice in right] == [question["answer"]]
        for i, choice in enumerate(choices):
            assert i == question["answer"] or not any(world.overlap(choice, value) for value in right)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_test_question_is_worded_as_in_training(language: Language) -> None:
    def wordings(part: Literal["train", "test"], seed: int) -> set[str]:
        return {q["question"] for q in questions(language, seed=seed, count=3000, part=part)}

    train, test = wordings("train", 0), wordings("test", 1)
    opened = {q["prompt"] for q in open_questions(language, seed=0, count=3000)}
    assert len(train) > len(test) > 600
    assert len(opened) > 600
    assert not (train | opened) & test


def test_answers_are_uniform_and_facts_are_asked_equally_often() -> None:
    drawn = list(questions("en", seed=0, count=5 * 640, part="test"))
    letters = Counter(q["answer"] for q in drawn)
    assert sorted(letters) == [0, 1, 2, 3, 4]
    assert all(abs(count - 640) < 100 for count in letters.values())  # 4.4 standard deviations
    assert set(Counter((q["condition"], q["attribute"]) for q in drawn).values()) == {5}


def test_questions_keep_to_the_given_facts() -> None:
    facts = hidden_facts(0.1, seed=0)
    drawn = questions("ko", seed=0, count=500, part="test", facts=facts)
    assert {(q["condition"], q["attribute"]) for q in drawn} == facts


def test_english_grammar() -> None:
    text = " ".join(p["text"] for p in paragraphs("en", seed=0, per_condition=5))
    assert not re.search(r"(?<!epatitis )\b[Aa] [aeio]", text)
    assert not re.search(r"\b[Aa]n [^aeio]", text)
    assert not re.search(r"[{}]|\.\.|  |\. [a-z]", text)
    repeated = [a for a, b in pairwise(text.lower().split()) if a == b]
    assert repeated == []


def test_korean_grammar() -> None:
    text = " ".join(p["text"] for p in paragraphs("ko", seed=0, per_condition=5))
    assert not re.search(r"[{}/()]|\.\.|  ", text)
    for sentence in re.split(r"(?<=\.) ", text):
        assert sentence.endswith("다."), sentence


def test_open_answers() -> None:
    world = load()
    answers = {q["prompt"]: q["answer"] for q in open_questions("en", seed=0, count=3000)}
    assert answers["What is the treatment of pneumonia?"] == "Antibiotics."
    assert answers["Which doctor should patients with glaucoma see?"] == "An ophthalmologist."
    assert answers["Which part of the body does gout affect?"] == "The joints."
    assert set(re.split(", | and ", answers["What does asthma cause?"].lower().rstrip("."))) == set(
        world.conditions["asthma"].symptoms
    )
    korean = {q["prompt"]: q["answer"] for q in open_questions("ko", seed=0, count=3000)}
    assert korean["폐렴은 무엇으로 치료하는가?"] == "항생제."
