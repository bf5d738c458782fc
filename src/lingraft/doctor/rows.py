"""Checks of the numbers in the weights, above all of the rows of the vocabulary's matrices. V rows, D width."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from lingraft.doctor.configs import as_ids
from lingraft.doctor.findings import Case, Problem, first
from lingraft.doctor.folder import CannotCheck
from lingraft.tokenizer.pieces import is_byte_piece

# Ordinary tokens of released models lie well inside; a wrong scale (√D, a sum for a mean) lies outside.
OUTLIER_HIGH, OUTLIER_LOW = 10.0, 0.05
# Tokens that their makers reserved and did not train: no harm unless someone writes their names.
RESERVED = re.compile(r"unused|reserved|placeholder|place▁holder|extra_id|dummy|^<SPECIAL_", re.IGNORECASE)


def not_finite(case: Case) -> list[Problem]:
    """NaN or infinite values anywhere in the weights."""
    weights = case.model.weights
    vocabulary = [name for name in weights.names if name in (weights.output, _input_name(case))]
    problems = []
    for name in weights.names:
        if not weights.dtype(name).startswith(("F", "BF")):
            continue
        bad = [start + int(row) for start, rows in weights.slices(name) for row in _bad_rows(rows)]
        if bad:
            rows = [case.model.name_token(row) for row in bad[:3]] if name in vocabulary else bad[:3]
            problems.append(
                Problem(
                    severity="fault",
                    what="the weights hold NaN or infinite values",
                    where=f"{name}: {len(bad):,} of {[*weights.shape(name), 1][0]:,} rows, first {first(rows)}",
                    why="NaN spreads to every later layer: each answer that meets it is noise",
                    cure="go back to the last checkpoint without it; overflow in fp16 training is a common cause",
                )
            )
    return problems


def _input_name(case: Case) -> str | None:
    try:
        return case.model.weights.input
    except CannotCheck:
        return None


def _bad_rows(values: Tensor) -> Tensor:
    if values.element_size() == 1:  # 8-bit floats have no isfinite
        values = values.float()
    return (~values.isfinite()).reshape(len(values) if values.dim() else 1, -1).any(dim=1).nonzero().flatten()


def zero_rows(case: Case) -> list[Problem]:
    """Tokens whose row is all zeros."""
    problems = []
    for role, name in case.model.weights.matrices.items():
        statistics = case.model.weights.statistics(name)
        if zero := [index for index in _judged(case, role) if statistics.norms[index] == 0]:
            problems.append(_untrained(case, name, zero, "all zeros"))
    return problems


def untrained_rows(case: Case) -> list[Problem]:
    """Tokens whose row is a pad row's or the mean of all rows: nobody initialised or trained them."""
    problems = []
    for role, name in case.model.weights.matrices.items():
        statistics, near_mean = case.model.weights.statistics(name), case.model.weights.near_mean(name)
        judged = [index for index in _judged(case, role) if statistics.finite[index] and statistics.norms[index] > 0]
        means = [index for index in judged if near_mean[index]]
        pads = {*_copied_pads(case, name, judged), *_base_pads(case, role, judged)} - set(means)
        if means:
            problems.append(_untrained(case, name, means, "the mean of all rows"))
        if pads:
            problems.append(_untrained(case, name, sorted(pads), "an untrained pad row"))
    return problems


def _untrained(case: Case, name: str, rows: list[int], like: str) -> Problem:
    return Problem(
        severity="fault",
        what=f"{len(rows):,} tokens have an untrained row: {like}",
        where=f"{name}, row {first([case.model.name_token(row) for row in rows[:3]])}",
        why="text with these tokens reaches the model as no word at all, or as the same word",
        cure="initialise the rows from the tokens' old pieces (lingraft graft) and train them",
    )


def outlier_rows(case: Case) -> list[Problem]:
    """Tokens whose row is far longer or shorter than the others."""
    problems = []
    for role, name in case.model.weights.matrices.items():
        statistics = case.model.weights.statistics(name)
        usual = statistics.finite & (statistics.norms > 0) & ~case.model.weights.near_mean(name)
        judged = [index for index in _judged(case, role) if usual[index]]  # the other checks' rows left out
        if not judged:
            continue
        norms = statistics.norms[judged]
        median = statistics.norms[usual].median()
        for kind, strange in (
            ("longer", norms > OUTLIER_HIGH * median),
            ("shorter", norms < OUTLIER_LOW * median),
        ):
            rows = [judged[index] for index in strange.nonzero().flatten().tolist()]
            if rows:
                worst = max(rows, key=lambda row: abs(float((statistics.norms[row] / median).log())))
                times = float(statistics.norms[worst] / median)
                problems.append(
                    Problem(
                        severity="warning",
                        what=f"{len(rows):,} tokens have rows far {kind} than the others",
                        where=f"{name}, row {case.model.name_token(worst)}: {times:.3g} times the median norm",
                        why="a token that long wins or one that short loses whatever the context says"
                        if role == "output"
                        else "the first layers were trained for rows of the usual length",
                        cure="rescale the rows to the median norm of their script, or train them further",
                    )
                )
    return problems


def _judged(case: Case, role: str) -> list[int]:
    """Ids of tokens whose row must be a trained one: no pad, byte or reserved token, and not as the base had it."""
    model = case.model
    rows = model.weights.shape(model.weights.matrices[role])[0]
    config = model.json("config.json")
    text = config.get("text_config")
    pads = as_ids(config.get("pad_token_id")) | as_ids(text.get("pad_token_id") if isinstance(text, dict) else None)
    inherited = _inherited(case, role)
    return [
        index
        for index, piece in sorted(model.tokenizer.piece_of.items())
        if index < rows
        and index not in pads
        and index not in inherited
        and not is_byte_piece(piece)
        and not (piece in model.added and (model.added[piece]["special"] or RESERVED.search(piece)))
    ]


def _inherited(case: Case, role: str) -> set[int]:
    """Ids whose token and row norm are the base's."""
    if case.base is None:
        return set()
    try:
        old = case.base.tokenizer.piece_of
        same = _same_norms(case, role)
    except (CannotCheck, KeyError):
        return set()
    new = case.model.tokenizer.piece_of
    return {index for index in same if index in old and old[index] == new.get(index)}


def _base_pads(case: Case, role: str, judged: list[int]) -> list[int]:
    """Judged ids that have no token in the base, but still the row that stood there."""
    if case.base is None:
        return []
    try:
        old = case.base.tokenizer.piece_of
        same = _same_norms(case, role)
    except (CannotCheck, KeyError):
        return []
    return [index for index in judged if index in same and index not in old]


def _same_norms(case: Case, role: str) -> set[int]:
    """Rows with the same norm in model and base: the same row, since norms are exact to six digits."""
    assert case.base is not None
    mine, theirs = (
        folder.weights.statistics(folder.weights.matrices[role]).norms for folder in (case.model, case.base)
    )
    shared = min(len(mine), len(theirs))
    return set((mine[:shared] == theirs[:shared]).nonzero().flatten().tolist())


def _copied_pads(case: Case, name: str, judged: list[int]) -> list[int]:
    """Judged ids whose row equals one of the rows past the last token."""
    end = len(case.model.tokenizer)
    slices = case.model.weights.slices
    pads = {_key(row) for start, rows in slices(name) for row in rows[max(end - start, 0) :] if row.any()}
    chosen = set(judged) if pads else set()
    return [
        start + offset
        for start, rows in slices(name)
        for offset, row in enumerate(rows)
        if start + offset in chosen and _key(row) in pads
    ]


def _key(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()
