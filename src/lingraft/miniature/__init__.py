"""A miniature bilingual world of medicine: the built-in quickstart, with no network and no weights.

128 conditions, each with a body part, two symptoms, a cause, a treatment and a specialist, named in English
and Korean. All text is generated from that table, deterministically by seed: paragraphs, five-choice
questions, open questions. A tiny model learns the English side from nothing, lingraft grafts Korean onto
it, and questions in both languages measure what arrived and what was lost. Facts hidden from the Korean
text show what crossed over from English.

    hidden = hidden_facts(share=0.2, seed=0)
    english = paragraphs("en", seed=0, per_condition=20)
    korean = paragraphs("ko", seed=0, per_condition=20, hidden=hidden)
    seen = questions("ko", seed=0, count=500, part="train", facts=set(load().facts()) - hidden)
    crossed_over = questions("ko", seed=0, count=500, part="test", facts=hidden)

It is a toy: textbook-level facts, one cause and one treatment each. It measures training code and is no
medical advice.
"""

from lingraft.miniature.particles import attach
from lingraft.miniature.questions import open_questions, questions
from lingraft.miniature.text import hidden_facts, paragraphs
from lingraft.miniature.world import ATTRIBUTES, Condition, Fact, Language, World, dictionary, load

__all__ = [
    "ATTRIBUTES",
    "Condition",
    "Fact",
    "Language",
    "World",
    "attach",
    "dictionary",
    "hidden_facts",
    "load",
    "open_questions",
    "paragraphs",
    "questions",
]
