"""Initial rows of new tokens: each rule by hand."""

from __future__ import annotations

import pytest
import torch

from lingraft.embeddings.parts import find_parts, first_translation
from lingraft.embeddings.rules import RULES, calibrate_norm, first_subword, length_weighted, median_norm, subword_mean

MATRIX = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
PARTS = [[1, 2], [3], [2, 2, 1]]
LENGTHS = [[1, 3], [2], [1, 1, 2]]


def test_subword_mean() -> None:
    expected = [[0.5, 1.5], [5.0, 5.0], [1 / 3, 2.0]]
    assert torch.allclose(subword_mean(MATRIX, PARTS, LENGTHS), torch.tensor(expected))


def test_first_subword() -> None:
    assert first_subword(MATRIX, PARTS, LENGTHS).tolist() == [[1.0, 0.0], [5.0, 5.0], [0.0, 3.0]]


def test_length_weighted() -> None:
    expected = [[1 / 4, 3 * 3 / 4], [5.0, 5.0], [2 / 4, (3 + 3) / 4]]
    assert torch.allclose(length_weighted(MATRIX, PARTS, LENGTHS), torch.tensor(expected))


def test_calibrated_rows_keep_their_direction() -> None:
    rows = calibrate_norm(torch.tensor([[3.0, 4.0], [0.0, 0.1]]), 2.0)
    assert torch.allclose(rows, torch.tensor([[1.2, 1.6], [0.0, 2.0]]))
    assert median_norm(MATRIX, [1, 2, 3]) == pytest.approx(3.0)


@pytest.mark.parametrize("rule", RULES)
def test_rules_do_not_depend_on_other_tokens_and_return_float32(rule: str) -> None:
    together = RULES[rule](MATRIX.bfloat16(), PARTS, LENGTHS)
    assert together.dtype == torch.float32
    for i, (parts, lengths) in enumerate(zip(PARTS, LENGTHS, strict=True)):
        assert torch.allclose(RULES[rule](MATRIX.bfloat16(), [parts], [lengths])[0], together[i])


def test_a_dictionary_term_takes_its_translations_tokens() -> None:
    dictionary = first_translation([("폐렴", "Pneumonia"), ("폐렴", "lung fever"), ("천식", "asthma")])
    parts = find_parts(
        ["▁폐렴", "폐렴", "환자"],
        [[10, 11], [10, 12], [13]],
        dictionary,
        lambda text: [ord(c) for c in text],
        lambda token: 1 if token < 13 else 3,
    )
    assert [p.origin for p in parts] == ["dictionary", "dictionary", "subwords"]
    assert parts[0].ids == [ord(c) for c in "pneumonia"]
    assert parts[2].ids == [13]
    assert parts[2].lengths == [3]
