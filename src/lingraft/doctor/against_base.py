"""Checks against the model that this one was made from: what was there before must still be there. V rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from lingraft.doctor.cuts import common_scripts, cut, difference, scripts_of
from lingraft.doctor.findings import Case, Problem, first, short
from lingraft.doctor.folder import CannotCheck, ModelFolder, shards
from lingraft.errors import ModelError
from lingraft.model.load import load
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import readable

LOGITS_TEXTS, LOGITS_TOKENS = 4, 64
# Of a logit's spread: with other numbers of rows, matrices may be multiplied in another order.
LOGITS_TOLERANCE = {torch.float32: 1e-3}
HALF_PRECISION_TOLERANCE = 2e-2
MEMORY_SHARE = 0.6
_MEANT = "; if it was trained on all rows or layers, this is what training did, and the scoreboard says whether it hurt"


def _base(case: Case) -> ModelFolder:
    if case.base is None:
        raise CannotCheck("no --base to compare with")
    return case.base


def _shared_ids(case: Case) -> list[int]:
    """Ids that mean the same in both tokenizers."""
    old, new = _base(case).tokenizer.piece_of, case.model.tokenizer.piece_of
    return [index for index, piece in sorted(old.items()) if new.get(index) == piece]


def old_rows(case: Case) -> list[Problem]:
    """Rows of tokens that both have, bit by bit."""
    base = _base(case)
    shared = torch.tensor(_shared_ids(case), dtype=torch.long)
    problems = []
    for role, name in case.model.weights.matrices.items():
        before = base.weights.matrices.get(role, base.weights.input)  # an untied head began as the input embedding
        rows = min(case.model.weights.shape(name)[0], base.weights.shape(before)[0])
        if case.model.weights.shape(name)[1] != base.weights.shape(before)[1]:
            raise CannotCheck(f"{name} is of another width than the base's: no graft of this base")
        wanted = torch.zeros(rows, dtype=torch.bool)
        wanted[shared[shared < rows]] = True
        changed: list[int] = []
        largest = 0.0
        slices = zip(case.model.weights.slices(name), base.weights.slices(before), strict=False)
        for (start, mine), (_, theirs) in slices:
            height = min(len(mine), len(theirs))
            ours, old = mine[:height].float(), theirs[:height].float()
            here = ((ours != old).any(dim=1) & wanted[start : start + height]).nonzero().flatten()
            changed += (start + here).tolist()
            if len(here):
                moved = (ours[here] - old[here]).norm(dim=1) / old[here].norm(dim=1).clamp(min=1e-12)
                largest = max(largest, float(moved.max()))
        if changed:
            problems.append(
                Problem(
                    severity="warning",
                    what=f"{len(changed):,} of {int(wanted.sum()):,} old rows changed",
                    where=f"{name}, row {first([case.model.name_token(row) for row in changed[:3]])}; "
                    f"the largest change is {largest:.2g} of a row's length",
                    why="what the model knew about old tokens is no longer what it was" + _MEANT,
                    cure="copy the old rows from the base again, and train new rows only",
                )
            )
    return problems


def old_ids(case: Case) -> list[Problem]:
    """Text without the new pieces' script: its ids must not change."""
    old, new = _base(case).tokenizer, case.model.tokenizer
    changed = [(text, before, after) for text, before, after in _both(case, _old_lines(case)) if before != after]
    if not changed:
        return []
    text, before, after = changed[0]
    return [
        Problem(
            severity="fault",
            what="old text gets other ids than from the base",
            where=f"{len(changed):,} of {len(_old_lines(case)):,} lines, first {short(text)}: "
            f"{difference(cut(old, before), cut(new, after))}",
            why="the model reads text that it knew in pieces that it never learnt: it forgets without any training",
            cure="append new merges after all old ones, and keep new pieces to the new language's script",
        )
    ]


def old_boundaries(case: Case) -> list[Problem]:
    """Text in the new script: each new token must be whole old tokens put together."""
    old, new = _base(case).tokenizer, case.model.tokenizer
    outside = set(_old_lines(case))
    lines = [text for text in case.texts if text not in outside]
    crossed = [text for text in lines if not _ends(new, text) <= _ends(old, text)]
    if not crossed:
        return []
    text = crossed[0]
    return [
        Problem(
            severity="fault",
            what="new tokens cut across old ones",
            where=f"{len(crossed):,} of {len(lines):,} lines in the new script, first {short(text)}: "
            f"{difference(cut(old, old.encode([text])[0]), cut(new, new.encode([text])[0]))}",
            why="new rows cannot be built from the old pieces, the rest falls into other fragments, and the base "
            "cannot teach this model token by token",
            cure="learn merges on top of the base's own cut (lingraft tokenizer graft), not words or a new vocabulary",
        )
    ]


def _both(case: Case, texts: Sequence[str]) -> list[tuple[str, list[int], list[int]]]:
    """(text, ids from the base, ids from the model)."""
    return list(zip(texts, _base(case).tokenizer.encode(texts), case.model.tokenizer.encode(texts), strict=True))


def _old_lines(case: Case) -> list[str]:
    """The lines without any letter of the new pieces' scripts."""
    tokenizer = case.model.tokenizer
    new = tokenizer.vocab.keys() - _base(case).tokenizer.vocab.keys()
    scripts = common_scripts(readable(piece, tokenizer.kind) for piece in new)
    return [text for text in case.texts if not scripts_of(text) & scripts]


def _ends(tokenizer: BaseTokenizer, text: str) -> set[int]:
    """The characters after which a token ends."""
    return {end for _, end in tokenizer.tokenizer.encode(text, add_special_tokens=False).offsets}


def old_logits(case: Case) -> list[Problem]:
    """Logits of shared ids on a few old texts, by running both models."""
    base = _base(case)
    _check_memory(case.model)
    _check_memory(base)
    shared = _shared_ids(case)
    rows = min(folder.weights.shape(folder.weights.input)[0] for folder in (case.model, base))
    columns = torch.tensor([index for index in shared if index < rows])
    same = [before for _, before, after in _both(case, _old_lines(case)) if before == after]
    texts = [ids[:LOGITS_TOKENS] for ids in same if ids and max(ids) < rows][:LOGITS_TEXTS]
    if not texts:
        raise CannotCheck("no line has the same ids in both")
    before, dtype = _logits(base, texts, columns)
    after, _ = _logits(case.model, texts, columns)
    change = max(float(((a - b).abs().amax(dim=1) / b.std(dim=1)).max()) for b, a in zip(before, after, strict=True))
    if change <= LOGITS_TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE):
        return []
    flipped = sum(int((a.argmax(1) != b.argmax(1)).sum()) for b, a in zip(before, after, strict=True))
    positions = sum(map(len, texts))
    return [
        Problem(
            severity="warning",
            what="the model answers differently on old text",
            where=f"over {len(texts)} lines, old tokens' logits moved by up to {change:.2g} of their spread; the most "
            f"likely next token changed at {flipped:,} of {positions:,} positions",
            why="more than the new rows was changed" + _MEANT,
            cure="compare the other tensors with the base's; a graft alone leaves these logits as they are",
        )
    ]


def _check_memory(folder: ModelFolder) -> None:
    needed = sum(file.stat().st_size for file in shards(folder.path))
    free = psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise CannotCheck(
            f"{folder.path.name} needs {needed / 1e9:.1f} GB, more than {MEMORY_SHARE:.0%} of the free {free / 1e9:.1f}"
        )


@torch.inference_mode()
def _logits(folder: ModelFolder, texts: list[list[int]], columns: Tensor) -> tuple[list[Tensor], torch.dtype]:
    """Logits (T, columns) of each text, and the type that the model ran in."""
    try:
        model = load(folder.path)
        logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0][:, columns].float() for ids in texts]
    except ModelError as error:
        raise CannotCheck(str(error)) from None
    except Exception as error:  # odd checkpoints fail inside transformers in many ways
        raise CannotCheck(f"{folder.path.name} cannot run ({type(error).__name__}: {error})") from None
    return logits, model.dtype
