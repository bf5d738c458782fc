"""Running text: facts turned into paragraphs by a small grammar.

A paragraph is about one condition. It states some of its facts in random order, each by a random template
(also in the reverse direction), names it or uses a pronoun, and at times ends with a list of conditions
that share a value or a comparison with another condition. Hidden facts are left out everywhere: each
sentence that names a condition shows only values of its visible facts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from random import Random

from lingraft.miniature.nouns import listing, noun, sentence_case
from lingraft.miniature.templates import ALIKE, FACTS, GROUPS, PRONOUNS, UNLIKE
from lingraft.miniature.world import ATTRIBUTES, Condition, Fact, Language, World, load

_PRONOUN_SHARE = 0.4
_GROUP_SHARE = 0.2
_COMPARISON_SHARE = 0.2
_MAX_GROUP = 3


def hidden_facts(share: float, seed: int) -> frozenset[Fact]:
    """Return `share` (0 to 1) of each attribute's facts, to be kept out of one language.

    Each attribute takes the next stretch of one shuffled circle of conditions, so that the facts are spread
    evenly: up to a share of 0.8, no condition loses all of its facts.
    """
    conditions = list(load().conditions)
    Random(f"hidden/{seed}").shuffle(conditions)
    size = len(conditions)
    hidden = round(share * size)
    return frozenset(
        (conditions[(size * k // len(ATTRIBUTES) + i) % size], attribute)
        for k, attribute in enumerate(ATTRIBUTES)
        for i in range(hidden)
    )


def paragraphs(
    language: Language, *, seed: int, per_condition: int, hidden: Collection[Fact] = frozenset()
) -> Iterator[dict[str, str]]:
    """Yield `per_condition` rounds of a paragraph a condition: {"text", "condition" (English), "language"}.

    No paragraph states a `hidden` fact; a condition with all of its facts hidden has no paragraphs.
    """
    writer = _Writer(language, hidden)
    for round_ in range(per_condition):
        conditions = list(writer.world.conditions.values())
        Random(f"order/{seed}/{language}/{round_}").shuffle(conditions)
        for condition in conditions:
            random = Random(f"paragraph/{seed}/{language}/{round_}/{condition.en}")
            if text := writer.paragraph(condition, random):
                yield {"text": text, "condition": condition.en, "language": language}


class _Writer:
    def __init__(self, language: Language, hidden: Collection[Fact]) -> None:
        self.world: World = load()
        self.language = language
        self.hidden = frozenset(hidden)

    def paragraph(self, condition: Condition, random: Random) -> str:
        attributes = [a for a in ATTRIBUTES if self._visible(condition.en, a)]
        if not attributes:
            return ""
        stated = random.sample(attributes, random.randint(min(2, len(attributes)), len(attributes)))
        sentences = [self._fact(condition, a, i == 0, random) for i, a in enumerate(stated)]
        if random.random() < _GROUP_SHARE:
            sentences += self._group(condition, random.choice(attributes), random)
        if random.random() < _COMPARISON_SHARE:
            sentences += self._comparison(condition, random.choice(attributes), random)
        return " ".join(map(sentence_case, sentences))

    def _visible(self, condition: str, attribute: str) -> bool:
        return (condition, attribute) not in self.hidden

    def _noun(self, english: str) -> str:
        return noun(self.world.name(english, self.language), self.language)

    def _fact(self, condition: Condition, attribute: str, first: bool, random: Random) -> str:
        template = random.choice(FACTS[self.language][attribute])
        values = random.sample(condition.values(attribute), len(condition.values(attribute)))
        name = self._noun(condition.en)
        reference = name if first or random.random() >= _PRONOUN_SHARE else self._pronoun(template, random)
        return template.format(c=reference, name=name, **dict(zip("vw", map(self._noun, values), strict=False)))

    def _pronoun(self, template: str, random: Random) -> str:
        pronouns = PRONOUNS[self.language]
        if self.language == "en" and template.startswith("{c}"):
            pronouns = (*pronouns, "it")
        return noun(random.choice(pronouns), self.language)

    def _group(self, condition: Condition, attribute: str, random: Random) -> list[str]:
        value = random.choice(condition.values(attribute))
        others = [c for c in self.world.sharing(attribute, value) if c != condition.en and self._visible(c, attribute)]
        if not others:
            return []
        members = [condition.en, *random.sample(others, min(len(others), _MAX_GROUP - 1))]
        random.shuffle(members)
        names = listing([self.world.name(c, self.language) for c in members], self.language)
        return [GROUPS[self.language][attribute].format(v=self._noun(value), list=names)]

    def _comparison(self, condition: Condition, attribute: str, random: Random) -> list[str]:
        others = [c for c in self.world.conditions.values() if c != condition and self._visible(c.en, attribute)]
        if not others:
            return []
        other = random.choice(others)
        mine, theirs = condition.values(attribute), other.values(attribute)
        shared = [value for value in mine if value in theirs]
        template = (ALIKE if shared else UNLIKE)[self.language][attribute]
        return [
            template.format(
                a=self._noun(condition.en),
                b=self._noun(other.en),
                v=self._noun(random.choice(shared or mine)),
                w=self._noun(random.choice(theirs)),
            )
        ]
