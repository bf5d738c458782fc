"""Checks for ordinary words among the added tokens, which are cut out of the text before BPE sees it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from lingraft.doctor.cuts import common_scripts, cut, difference, scripts_of
from lingraft.doctor.findings import Case, Problem, first, short
from lingraft.doctor.folder import CannotCheck
from lingraft.doctor.rows import RESERVED
from lingraft.doctor.tokenizers import base_vocab
from lingraft.families import Family
from lingraft.tokenizer.graft import graft, place
from lingraft.tokenizer.learn import learn
from lingraft.tokenizer.load import BaseTokenizer

# Fewer lines are too few to learn merges from.
COMPARED_LINES = 1000


def added_words(case: Case) -> list[Problem]:
    """Ordinary words among the added tokens: they are cut out of the text before BPE sees it."""
    model = case.model
    tokenizer = model.bpe
    words = _added_words(case)
    if not words:
        return []
    plain = _without(tokenizer, words)
    rows = list(zip(case.texts, _cuts(plain, case.texts), _cuts(tokenizer, case.texts), strict=True))
    scripts = common_scripts(words)
    inside = [row for row in rows if scripts_of(row[0]) & scripts]
    changed = [row for row in rows if row[1] != row[2]]
    foreign = [row for row in changed if not scripts_of(row[0]) & scripts]
    problems = [
        Problem(
            severity="fault" if changed else "warning",
            what=f"{len(words):,} words are added tokens, matched before BPE",
            where=f"tokenizer.json's added_tokens: {first([repr(word) for word in sorted(words)])}; " + _effect(inside),
            why="they are cut out of the middle of other words, the rest falls into fragments that the model never "
            "saw together, and llama.cpp and SentencePiece cut differently",
            cure="take the words out and learn merges on your text instead (lingraft tokenizer graft)",
        )
    ]
    if foreign:
        text, before, after = foreign[0]
        problems.append(
            Problem(
                severity="fault",
                what="added tokens change text of other languages",
                where=f"{len(foreign):,} of {len(rows) - len(inside):,} lines without "
                f"{'/'.join(sorted(scripts)).title() or 'new'} letters, first "
                f"{short(text)}: {difference(before, after)}",
                why="what the model already did well now reaches it in pieces that it was not trained on",
                cure="take the words out, or keep new pieces to the new language's script",
            )
        )
    return problems


def _effect(rows: Sequence[tuple[str, list[str], list[str]]]) -> str:
    """What the words do to the lines of their script."""
    changed = [row for row in rows if row[1] != row[2]]
    if not changed:
        return "none occurs in the text given"
    before, after = (sum(len(row[k]) for row in rows) for k in (1, 2))
    longer = sum(len(row[2]) > len(row[1]) for row in changed)
    _, old, new = changed[0]
    return (
        f"{len(changed):,} of {len(rows):,} lines in their script ({len(changed) / len(rows):.0%}) are cut differently"
        f", {longer:,} of them into more tokens than BPE alone; {before:,} tokens become {after:,} "
        f"({(after - before) / max(before, 1):+.1%}); {difference(old, new)}"
    )


def added_words_gain(case: Case) -> list[Problem]:
    """What the added words save, against as many merges learnt on every other line; the lines between decide."""
    words = _added_words(case)
    if not words:
        return []
    tokenizer = case.model.bpe
    scripts = common_scripts(words)
    texts = [text for text in case.texts if scripts_of(text) & scripts]
    if len(texts) < COMPARED_LINES:
        raise CannotCheck(f"needs --text with {COMPARED_LINES:,} lines in the added words' script")
    model = tokenizer.json["model"]
    kept = [t for t in tokenizer.json["added_tokens"] if t["content"] not in words and t["id"] < len(model["vocab"])]
    parsed = tokenizer.json | {"added_tokens": kept}
    plain = BaseTokenizer(parsed, Tokenizer.from_str(json.dumps(parsed)), tokenizer.kind, None, {})
    seen, held_out = texts[::2], texts[1::2]
    learnt = learn(plain, ((text, 1.0) for text in seen), new_tokens=len(words))
    merged = graft(plain, place(plain, learnt, family=Family("generic"), slots="append")).tokenizer
    before, by_words, by_merges = (sum(map(len, each.encode(held_out))) for each in (plain, tokenizer, merged))
    if by_words <= by_merges:
        return []
    return [
        Problem(
            severity="warning",
            what="the added words shorten text less than merges would",
            where=f"on {len(held_out):,} lines {len(words):,} words change tokens by {by_words / before - 1:+.1%}, "
            f"{len(learnt.pieces):,} merges learnt on {len(seen):,} other lines by {by_merges / before - 1:+.1%}",
            why="each word costs a row that is trained and carried, and pays it back only where it occurs as it stands",
            cure="take the words out and learn merges on your text instead (lingraft tokenizer graft)",
        )
    ]


def _added_words(case: Case) -> set[str]:
    """Added tokens that are words and not the base's."""
    known = base_vocab(case)
    return {content for content in case.model.added if content not in known and _is_word(content)}


def _is_word(content: str) -> bool:
    """Text that people write, not a mark: letters, and no brackets around it."""
    bracketed = content[:1] in "<[{|" and content[-1:] in ">]}|"
    return any(char.isalpha() for char in content) and not bracketed and not RESERVED.search(content)


def _without(tokenizer: BaseTokenizer, words: set[str]) -> BaseTokenizer:
    """The tokenizer less some of its added tokens: BPE alone. Added tokens past its vocabulary may change ids."""
    plain = Tokenizer(tokenizer.tokenizer.model)
    plain.normalizer = tokenizer.tokenizer.normalizer
    plain.pre_tokenizer = tokenizer.tokenizer.pre_tokenizer
    for token in tokenizer.tokenizer.get_added_tokens_decoder().values():
        if token.content not in words:
            (plain.add_special_tokens if token.special else plain.add_tokens)([token])
    return BaseTokenizer(tokenizer.json, plain, tokenizer.kind, None, {})


def _cuts(tokenizer: BaseTokenizer, texts: Sequence[str]) -> list[list[str]]:
    return [cut(tokenizer, ids) for ids in tokenizer.encode(texts)]
