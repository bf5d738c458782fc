"""Questions about the facts: five-choice with one right answer, and open ones with a short answer.

Wrong choices are drawn at random from the terms of the answer's kind, without those that are right for the
condition or overlap with a right one. "Right" means by the fact table, which lists two symptoms of a
condition and not all of them. One phrasing of every fact
is kept for the test part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from random import Random
from typing import Any, Literal
from zlib import crc32

from lingraft.errors import CorpusError
from lingraft.miniature.nouns import listing, noun, sentence_case
from lingraft.miniature.world import Fact, Language, World, load

Part = Literal["train", "test"]

CHOICES = 5

TEMPLATES: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "body_part": (
            "Which part of the body does {c} mainly affect?",
            "Which of these is affected by {c}?",
            "In which part of the body does {c} develop?",
        ),
        "symptom": (
            "Which of these is a common symptom of {c}?",
            "What does {c} often cause?",
            "What do patients with {c} usually have?",
        ),
        "cause": (
            "What is the main cause of {c}?",
            "What is {c} caused by?",
            "Which of these can lead to {c}?",
        ),
        "treatment": (
            "What is the standard treatment for {c}?",
            "How is {c} usually treated?",
            "Which of these is used to treat {c}?",
        ),
        "specialist": (
            "Which specialist treats {c}?",
            "Which doctor should patients with {c} see?",
            "To which doctor are patients with {c} referred?",
        ),
    },
    "ko": {
        "body_part": (
            "{c:이/가} 주로 영향을 주는 신체 부위는 어디인가?",
            "{c:은/는} 어디에 생기는 병인가?",
            "다음 중 {c:과/와} 관련된 신체 부위는?",
        ),
        "symptom": (
            "다음 중 {c}의 흔한 증상은 무엇인가?",
            "{c:이/가} 흔히 일으키는 증상은?",
            "{c} 환자에게 자주 나타나는 증상은 무엇인가?",
        ),
        "cause": (
            "{c}의 주된 원인은 무엇인가?",
            "{c:은/는} 무엇 때문에 생기는가?",
            "다음 중 {c:을/를} 일으킬 수 있는 것은?",
        ),
        "treatment": (
            "{c}의 표준 치료는 무엇인가?",
            "{c:은/는} 무엇으로 치료하는가?",
            "다음 중 {c:을/를} 치료할 때 권하는 것은?",
        ),
        "specialist": (
            "{c:을/를} 진료하는 전문가는 누구인가?",
            "{c} 환자는 누구에게 진료를 받아야 하는가?",
            "다음 중 {c:을/를} 진료하는 의사는?",
        ),
    },
}

OPEN_TEMPLATES: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "body_part": ("Which part of the body does {c} affect?", "Where in the body does {c} develop?"),
        "symptom": ("What are common symptoms of {c}?", "What does {c} cause?"),
        "cause": ("What is the main cause of {c}?", "What is {c} caused by?"),
        "treatment": ("What is the treatment of {c}?", "How is {c} treated?"),
        "specialist": ("Which specialist treats {c}?", "Which doctor should patients with {c} see?"),
    },
    "ko": {
        "body_part": ("{c:은/는} 어디에 생기는가?", "{c:과/와} 관련된 신체 부위는 어디인가?"),
        "symptom": ("{c}의 흔한 증상은 무엇인가?", "{c:은/는} 어떤 증상을 일으키는가?"),
        "cause": ("{c}의 주된 원인은 무엇인가?", "{c:은/는} 무엇 때문에 생기는가?"),
        "treatment": ("{c}의 치료는 무엇인가?", "{c:은/는} 무엇으로 치료하는가?"),
        "specialist": ("{c:을/를} 진료하는 전문가는 누구인가?", "{c} 환자는 누구를 찾아야 하는가?"),
    },
}

_ENGLISH_ANSWERS = {"body_part": "the {v}.", "specialist": "{v:a}."}


def questions(
    language: Language, *, seed: int, count: int, part: Part, facts: Collection[Fact] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield `count` five-choice questions that go round all `facts` (default: every fact) in random order.

    Each is {"question", "choices" (5 strings), "answer" (index, uniform), "condition" (English),
    "attribute", "language"}. One phrasing of every fact is kept for the test part, so no test question's text
    occurs in the train part, at any seed. Raises CorpusError when `facts` names none of the world's facts.
    """
    world = load()
    random = Random(f"questions/{seed}/{language}/{part}")
    asked = _rounds(_selected(world, facts), random)
    for fact in islice(asked, count):
        yield _draw(world, language, fact, part, random)


def open_questions(
    language: Language, *, seed: int, count: int, hidden: Collection[Fact] = frozenset()
) -> Iterator[dict[str, str]]:
    """Yield `count` {"prompt", "answer"} pairs that go round all facts but the `hidden` ones.

    None is worded as the test part's five-choice question on the same fact.

    Raises CorpusError when every fact is hidden.
    """
    world = load()
    random = Random(f"open/{seed}/{language}")
    visible = [fact for fact in world.facts() if fact not in hidden]
    for condition, attribute in islice(_rounds(_selected(world, visible), random), count):
        kept = _phrasings(language, (condition, attribute), "test")
        template = random.choice([t for t in OPEN_TEMPLATES[language][attribute] if t not in kept])
        yield {
            "prompt": template.format(c=noun(world.name(condition, language), language)),
            "answer": _open_answer(world, language, condition, attribute, random),
        }


def _selected(world: World, facts: Collection[Fact] | None) -> list[Fact]:
    # The table's order, and not the collection's: a set's order would depend on PYTHONHASHSEED.
    selected = [fact for fact in world.facts() if facts is None or fact in facts]
    if not selected:
        raise CorpusError(
            "miniature questions: no facts to ask about; give (condition, attribute) pairs of the table, "
            "such as ('pneumonia', 'treatment')"
        )
    return selected


def _rounds(facts: list[Fact], random: Random) -> Iterator[Fact]:
    while True:
        yield from random.sample(facts, len(facts))


def _draw(world: World, language: Language, fact: Fact, part: Part, random: Random) -> dict[str, Any]:
    condition, attribute = fact
    right = world.conditions[condition].values(attribute)
    wrong = [
        term
        for term in world.kind(attribute)
        if term not in right and not any(world.overlap(term, value) for value in right)
    ]
    choices = random.sample(wrong, CHOICES - 1)
    answer = random.randrange(CHOICES)
    choices.insert(answer, random.choice(right))
    template = random.choice(_phrasings(language, fact, part))
    return {
        "question": template.format(c=noun(world.name(condition, language), language)),
        "choices": [world.name(choice, language) for choice in choices],
        "answer": answer,
        "condition": condition,
        "attribute": attribute,
        "language": language,
    }


def _phrasings(language: Language, fact: Fact, part: Part) -> list[str]:
    """The templates in which a part may ask about a fact: a checksum of the fact picks the test part's one."""
    templates = TEMPLATES[language][fact[1]]
    kept = crc32("|".join([language, *fact]).encode()) % len(templates)
    return [template for number, template in enumerate(templates) if (number == kept) == (part == "test")]


def _open_answer(world: World, language: Language, condition: str, attribute: str, random: Random) -> str:
    values = world.conditions[condition].values(attribute)
    names = [world.name(value, language) for value in random.sample(values, len(values))]
    if len(names) == 1:
        template = _ENGLISH_ANSWERS.get(attribute, "{v}.") if language == "en" else "{v}."
        return sentence_case(template.format(v=noun(names[0], language)))
    return sentence_case(f"{listing(names, language)}.")
