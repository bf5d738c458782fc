"""The steps without a recipe: graft a tokenizer, report on one, graft a model's weights.

Each writes one folder, published in one move and never over something that is there. Together they make a model:

    graft_tokenizer(base, ["texts/*.txt"], tokenizer, new_tokens=6000)
    graft_model(base, tokenizer, out)
"""

from __future__ import annotations

import glob
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from lingraft.artifact import publish
from lingraft.corpus.build import document_text
from lingraft.corpus.read import read
from lingraft.doctor.lines import BUILT_IN
from lingraft.embeddings.rules import NEEDS
from lingraft.errors import CorpusError, ModelError, RunError, TokenizerError
from lingraft.families import Family, family, family_of_pieces
from lingraft.model.load import check, read_config, special_ids
from lingraft.progress import say
from lingraft.recipe import Embeddings, InitialRows, did_you_mean
from lingraft.recipe import Tokenizer as TokenizerSettings
from lingraft.steps.embeddings import write_checkpoint
from lingraft.steps.rows import plain_rows
from lingraft.tokenizer.check import verify
from lingraft.tokenizer.economics import compare
from lingraft.tokenizer.graft import GraftedPiece, Slots, free_slots, graft, place, read_graft, write
from lingraft.tokenizer.learn import balance, learn
from lingraft.tokenizer.load import BaseTokenizer, load
from lingraft.tokenizer.pieces import SCRIPTS, wanted_characters
from lingraft.version import VERSION

HELD_OUT_EVERY, HELD_OUT_MOST = 20, 2000  # one document in 20 is kept from learning, to measure the gain on
SCRIPT_SAMPLE_DOCUMENTS = 2000
SCRIPT_SHARE = 0.1  # of the letters: a script that the base may lack goes before Latin from here on
JAPANESE = frozenset({"Hiragana", "Katakana", "Han"})


def graft_tokenizer(
    base: Path,
    texts: Sequence[str],
    out: Path,
    *,
    new_tokens: int,
    slots: Slots = "auto",
    min_frequency: int = 2,
    scripts: Sequence[str] = (),
    held_out: Sequence[str] = (),
    column: str | None = None,
) -> dict[str, Any]:
    """Learn new tokens from text, put them into the tokenizer of `base`, prove it harmless and write it to `out`.

    Args:
        base: a model's folder, or that of a tokenizer alone.
        texts: files, folders or globs, of any kind that a recipe reads; `column` is the one that holds the text.
        scripts: Unicode names of the scripts that new tokens may hold; by default the one that the text is written in.
        held_out: text to measure the gain on; by default every HELD_OUT_EVERYth document is kept for that.
    Returns:
        Plain data: where the new tokens went, what was checked, and what `economics.compare` measures.
    Raises:
        LingraftError: text or tokenizer can't be used, the slots don't suffice, or `out` is not empty.
    """
    out = _free(out)
    _check_scripts(scripts)
    tokenizer = load(base)
    row, in_use = _family_of(base, tokenizer)
    # Learning takes minutes: slots that cannot suffice are refused before it.
    free_slots(tokenizer, new_tokens, family=row, slots=slots, in_use=in_use)
    documents = partial(_documents, texts, column, "--text")
    wanted = frozenset(scripts) or _main_scripts(documents())
    kept = list(_documents(held_out, column, "--held-out")) if held_out else list(_every_so_often(documents()))
    if not kept:
        say(
            f"  fewer than {HELD_OUT_EVERY} documents (blank lines part them in a .txt): the gain is measured on the "
            "very text learnt from; give --held-out",
            style="yellow",
        )
    learnt = learn(
        tokenizer,
        _weighted(texts, column, all_of_it=bool(held_out)),
        new_tokens=new_tokens,
        min_frequency=min_frequency,
        scripts=wanted,
    )
    placement = place(tokenizer, learnt, family=row, slots=slots, in_use=in_use)
    grafted = graft(tokenizer, placement)
    measured = {"held out": kept} if kept else {"the text learnt from": list(islice(documents(), HELD_OUT_MOST))}

    def fill(folder: Path) -> dict[str, Any]:
        write(grafted, folder)
        new_texts = next(iter(measured.values()))
        old_texts = _without(wanted, [*BUILT_IN, *new_texts])
        checked = verify(tokenizer, folder, old_texts, new_texts, row.llama_cpp_pre_tokenizer)
        return {
            "base": str(base),
            "new_tokens": len(learnt.pieces),
            "characters": sum(piece.kind == "character" for piece in learnt.pieces),
            "reused_slots": len(placement.reused),
            "appended": placement.appended,
            "vocabulary_before": len(tokenizer),
            "vocabulary_after": len(grafted.tokenizer),
            "scripts": sorted(wanted),
            "checks": checked,
            "economics": compare(tokenizer, grafted.tokenizer, measured, grafted.pieces, wanted),
        }

    return _published(out, fill)


def report_tokenizer(grafted: Path, base: Path, texts: Sequence[str], column: str | None = None) -> dict[str, Any]:
    """How a tokenizer, grafted here or elsewhere, cuts text against its base: see `economics.compare`.

    Raises:
        LingraftError: a tokenizer or the text can't be used.
    """
    sources = {path: list(_documents([path], column, "--text")) for path in texts}
    old, new = load(base), load(grafted)
    pieces = read_graft(grafted) if (grafted / "graft.json").is_file() else None
    if pieces is not None:
        _check_same_base(old, new, pieces, base, grafted)
    return {"tokenizer": str(grafted), "base": str(base)} | compare(old, new, sources, pieces)


def graft_model(
    model: Path,
    tokenizer: Path,
    out: Path,
    *,
    input_rule: str = "subword_mean",
    output_rule: str = "length_weighted",
    tie: Literal["untie", "keep"] = "untie",
) -> dict[str, Any]:
    """Give the weights of `model` a row for each token of the grafted `tokenizer`, and write the model to `out`.

    Weights stream from shard to shard, so that memory hardly depends on the model's size. Everything but the new rows
    is proven bit-identical.

    Args:
        input_rule, output_rule: how new rows begin, a rule that needs nothing but the model.
        tie: `untie` parts tied matrices, so that each side can train alone.
    Returns:
        Plain data: rows before and after, how they were made, seconds.
    Raises:
        LingraftError: the weights, the tokenizer or the two together can't be used, or `out` is not empty.
    """
    out = _free(out)
    for option, rule in (("--input", input_rule), ("--output", output_rule)):
        _check_rule(option, rule)
    tokens = read_graft(tokenizer)
    base = load(model)
    check(model, tokens=len(base))
    _check_same_base(base, load(tokenizer), tokens, model, tokenizer)
    settings = Embeddings.model_validate({"input": input_rule, "output": output_rule, "tie": tie})

    def fill(folder: Path) -> dict[str, Any]:
        rows = partial(plain_rows, settings, model, tokens)
        written = write_checkpoint(model, tokenizer, folder, rows, untie=tie == "untie")
        return {"base": str(model), "tokenizer": str(tokenizer), "new_tokens": len(tokens)} | written

    return _published(out, fill)


def _free(out: Path) -> Path:
    out = out.absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError(f"--out: {out} is there already and is never overwritten; give another folder, or remove it")
    parent = next(folder for folder in out.parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise RunError(f"--out: {out} cannot be made, {parent} is no folder that you may write to; give another folder")
    return out


def _published(out: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Fill a folder beside `out` and move it there; nothing is left of it where that fails."""
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        data = fill(work)
        publish(work, out, {"lingraft": VERSION} | data)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return data | {"out": str(out)}


def _documents(paths: Sequence[str], column: str | None, option: str) -> Iterator[str]:
    """The texts of files, folders and globs.

    Raises:
        CorpusError: one of the paths names nothing, or there is no text in any.
    """
    for path in paths:
        if not Path(path).exists() and not glob.glob(path, recursive=True):
            raise CorpusError(f"{option}: nothing at '{path}'; give files, folders or globs")
    empty = True
    for record in read(paths, column=column, where=option):
        text = document_text(record)
        if text.strip():
            empty = False
            yield text
    if empty:
        raise CorpusError(f"{option}: no text in {', '.join(paths)}; give files that are not empty")


def _is_held_out(number: int) -> bool:
    return number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and number < HELD_OUT_EVERY * HELD_OUT_MOST


def _every_so_often(documents: Iterator[str]) -> Iterator[str]:
    return (text for number, text in enumerate(documents) if _is_held_out(number))


def _weighted(paths: Sequence[str], column: str | None, all_of_it: bool) -> Iterator[tuple[str, float]]:
    """The documents to learn from, those of each path weighted against larger ones as a recipe's sources are."""
    sizes = {path: float(sum(map(len, _documents([path], column, "--text")))) for path in paths}
    weights = balance(sizes, TokenizerSettings.model_fields["balance"].default)
    documents = ((text, weights[path]) for path in paths for text in _documents([path], column, "--text"))
    return (item for number, item in enumerate(documents) if all_of_it or not _is_held_out(number))


def _main_scripts(documents: Iterator[str]) -> frozenset[str]:
    """The script that the text is written in, Latin only where there is hardly any other: bases know that one."""
    letters = (char for text in islice(documents, SCRIPT_SAMPLE_DOCUMENTS) for char in text if char.isalpha())
    counts: Counter[str] = Counter()
    for char, count in Counter(letters).items():
        counts[_script(char)] += count
    if not counts:
        raise CorpusError("--text: there are no letters in it; name the scripts of new tokens with --scripts")
    others = Counter({script: count for script, count in counts.items() if script != "Latin"})
    script, count = others.most_common(1)[0] if others else ("Latin", 0)
    if count < SCRIPT_SHARE * counts.total():
        say("  new tokens hold Latin letters, which can change how the base's own languages are cut", style="yellow")
        return frozenset({"Latin"})
    kana = counts["Hiragana"] + counts["Katakana"]
    return JAPANESE if script in JAPANESE and kana > SCRIPT_SHARE * counts.total() else frozenset({script})


def _script(char: str) -> str:
    """The script that a letter's Unicode name begins with."""
    first = unicodedata.name(char, "Unknown").split(" ")[0]
    return "Han" if first == "CJK" else first.capitalize()


def _without(scripts: frozenset[str], texts: Sequence[str]) -> list[str]:
    """The lines that hold no letter of the scripts: a graft must not change how they are cut."""
    wanted = wanted_characters(scripts)
    return [line for text in texts for line in text.split("\n") if line and not any(map(wanted, line))]


def _family_of(base: Path, tokenizer: BaseTokenizer) -> tuple[Family, frozenset[int]]:
    """The family's row, and the ids that the model's configs use by number."""
    if (base / "config.json").is_file():
        return family(read_config(base).model_type), special_ids(base)
    return family_of_pieces(tokenizer.vocab), frozenset()


def _check_scripts(scripts: Sequence[str]) -> None:
    for script in scripts:
        if script not in SCRIPTS:
            cure = did_you_mean(script.capitalize(), SCRIPTS) or "; examples: Hangul, Han, Thai"
            raise TokenizerError(f"--scripts: {script!r} is no script that Unicode names so{cure}")


def _check_rule(option: str, rule: str) -> None:
    known = [name for name in get_args(InitialRows) if name not in NEEDS]
    if rule in NEEDS:
        raise ModelError(f"{option}: {rule} needs {NEEDS[rule]}: use it in a recipe, or choose {', '.join(known)}")
    if rule not in known:
        raise ModelError(f"{option}: no rule named {rule!r}; choose {', '.join(known)}")


def _check_same_base(
    base: BaseTokenizer, grafted: BaseTokenizer, tokens: list[GraftedPiece], model: Path, folder: Path
) -> None:
    """Raise unless `grafted` is `base` with the new tokens and nothing else."""
    new = {token.id for token in tokens}
    for index in sorted((base.piece_of.keys() | grafted.piece_of.keys()) - new):
        before, after = base.piece_of.get(index), grafted.piece_of.get(index)
        if before != after:
            there, here = ("missing" if piece is None else repr(piece) for piece in (before, after))
            raise TokenizerError(
                f"{folder}: grafted on another base: id {index} is {there} in {model} but {here} here; "
                "give the base that it was grafted on, or graft this model's own tokenizer"
            )
    known = [token.piece for token in tokens if token.piece in base.vocab]
    if known:
        raise TokenizerError(
            f"{model}: has {len(known):,} of the {len(tokens):,} new tokens already, for example {known[0]!r}; "
            "give the model that the tokenizer was grafted on"
        )
