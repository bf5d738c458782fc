"""Initial rows of new tokens: each rule by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from pydantic import ValidationError

import lingraft
from lingraft.embeddings.calibrate import (
    bias_direction,
    calibrate_norm,
    calibrate_share,
    median_norm,
    script_of,
    target_norms,
)
from lingraft.embeddings.mixtures import (
    Mixture,
    Space,
    combine,
    orthogonal_matching_pursuit,
    pursuit,
    softmax_neighbours,
    sparsemax,
    sparsemax_neighbours,
)
from lingraft.embeddings.parts import Parts, count_characters, find_parts, first_translation
from lingraft.embeddings.rules import NEEDS, RULES, Material
from lingraft.embeddings.word_vectors import (
    WordVectors,
    align,
    procrustes,
    read_vectors,
    train_token_vectors,
    vectors_of_tokens,
)
from lingraft.errors import CorpusError, ModelError, RecipeError
from lingraft.model.load import input_matrix, load
from lingraft.recipe import Embeddings, InitialRows
from lingraft.steps.base import Base
from lingraft.steps.context import Context
from lingraft.steps.rows import NewRows, initial_rows, old_text_states, plain_rows
from lingraft.tokenizer.graft import read_graft

MATRIX = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
PARTS = [Parts([1, 2], [1, 3]), Parts([3], [2]), Parts([2, 2, 1], [1, 1, 2], "dictionary")]
# tokens 0 and 2 lie in it, with old tokens 1 and 3
SPACE = Space(
    torch.tensor([0, 2]),
    torch.tensor([[2.0, 0.0], [0.6, 0.8]]),
    torch.tensor([1, 3]),
    torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
)
MATERIAL = Material(PARTS, words=SPACE, corpus=SPACE, donor=SPACE)


def rows(rule: str, material: Material = MATERIAL) -> torch.Tensor:
    return RULES[rule](MATRIX, material).rows_ND


def test_subword_mean() -> None:
    assert torch.allclose(rows("subword_mean"), torch.tensor([[0.5, 1.5], [5.0, 5.0], [1 / 3, 2.0]]))


def test_first_subword() -> None:
    assert rows("first_subword").tolist() == [[1.0, 0.0], [5.0, 5.0], [0.0, 3.0]]


def test_length_weighted() -> None:
    expected = [[1 / 4, 3 * 3 / 4], [5.0, 5.0], [2 / 4, (3 + 3) / 4]]
    assert torch.allclose(rows("length_weighted"), torch.tensor(expected))


def test_global_mean() -> None:
    assert rows("global_mean").tolist() == [[1.5, 2.0]] * 3


def test_controls_have_the_spread_of_the_old_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    old_VD = torch.randn(50_000, 2, generator=generator) @ factor.T + torch.tensor([1.0, -2.0])
    many = Material(PARTS * 4000, seed=3)
    drawn = RULES["gaussian"](old_VD.bfloat16(), many).rows_ND
    assert torch.allclose(drawn.mean(dim=0), torch.tensor([1.0, -2.0]), atol=0.06)
    assert torch.allclose(drawn.T.cov(), factor @ factor.T, atol=0.12)
    independent = RULES["random"](old_VD, many).rows_ND
    assert independent.mean().item() == pytest.approx(0, abs=0.03)
    assert independent.square().mean().item() == pytest.approx(old_VD.square().mean().item(), rel=0.03)
    assert torch.equal(independent, RULES["random"](old_VD, many).rows_ND)


def test_wechsel_weighs_the_nearest_by_softmax() -> None:
    mixture = softmax_neighbours(SPACE, neighbours=2, temperature=0.1)
    near = 1 / (1 + torch.tensor(-10.0).exp())  # cosines 1 and 0, then 0.6 and 0.8
    far = 1 / (1 + torch.tensor(2.0).exp())
    assert mixture.ids_M.tolist() == [1, 3, 3, 1]
    assert torch.allclose(mixture.weights_M, torch.stack([near, 1 - near, 1 - far, far]), atol=1e-6)
    assert torch.allclose(rows("wechsel")[0], near * MATRIX[1] + (1 - near) * MATRIX[3], atol=1e-3)


def test_sparsemax() -> None:
    scores = torch.tensor([[1.0, 0.8, 0.1], [3.0, 1.0, 0.0], [0.2, 0.2, 0.2]])
    assert torch.allclose(sparsemax(scores), torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


def test_focus_weighs_by_sparsemax() -> None:
    mixture = sparsemax_neighbours(SPACE)
    assert mixture.ids_M.tolist() == [1, 3, 1]
    assert torch.allclose(mixture.weights_M, torch.tensor([1.0, 0.6, 0.4]))
    assert torch.allclose(rows("focus")[2], 0.6 * MATRIX[3] + 0.4 * MATRIX[1])


def test_sparsemax_neighbours_are_exact_where_the_support_is_large() -> None:
    """300 old tokens in almost one direction: more than the neighbours that are sorted first."""
    angles = torch.linspace(0, 0.05, 300)
    old = torch.stack([angles.cos(), angles.sin()], dim=1)
    mixture = sparsemax_neighbours(Space(torch.tensor([0]), torch.tensor([[1.0, 0.0]]), torch.arange(300), old))
    expected = sparsemax(old[:, 0][None])[0]
    assert mixture.sizes_N.item() == (expected > 0).sum() > 256
    assert torch.allclose(torch.zeros(300).index_add_(0, mixture.ids_M, mixture.weights_M), expected, atol=1e-6)


def test_matching_pursuit_by_hand() -> None:
    """(4, 3, 0): the longest shadow is on the diagonal (7/√2 against 4), then x's rest (0.5) is fitted anew."""
    old = torch.tensor([[1.0, 0.0, 0.0], [3.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    chosen, weights = orthogonal_matching_pursuit(old, torch.tensor([[4.0, 3.0, 0.0]]), atoms=1)
    assert (chosen.tolist(), weights.tolist()) == ([[1]], [[pytest.approx(7 / 6)]])
    chosen, weights = orthogonal_matching_pursuit(old, torch.tensor([[4.0, 3.0, 0.0]]), atoms=2)
    assert chosen.tolist() == [[1, 0]]
    assert torch.allclose(weights, torch.tensor([[1.0, 1.0]]))


def test_matching_pursuit_finds_sparse_sums_again() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(200, 64, generator=generator)
    ids = torch.stack([torch.randperm(200, generator=generator)[:4] for _ in range(300)])
    weights = torch.rand(300, 4, generator=generator) + 1
    space = Space(torch.arange(300), torch.einsum("nk,nke->ne", weights, old[ids]), torch.arange(200), old)
    assert torch.allclose(combine(old, pursuit(space, atoms=16)), space.new_NE, atol=1e-3)


def test_matching_pursuit_gives_no_weight_to_repeated_old_tokens() -> None:
    old = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    _, weights = orthogonal_matching_pursuit(old, torch.tensor([[3.0, 1.0]]), atoms=3)
    assert torch.isfinite(weights).all()
    assert (weights != 0).sum() == 1


def test_tokens_that_a_space_does_not_know_get_the_mean_of_their_parts() -> None:
    for rule in NEEDS:
        new, made_by = RULES[rule](MATRIX, MATERIAL)
        assert made_by == [rule, "subword_mean", rule]
        assert new[1].tolist() == [5.0, 5.0]
        with pytest.raises(RecipeError, match=rf"embeddings: the rule {rule} needs .*; give it or choose another"):
            RULES[rule](MATRIX, Material(PARTS))


@pytest.mark.parametrize("rule", ["subword_mean", "first_subword", "length_weighted"])
def test_rules_of_parts_do_not_depend_on_other_tokens(rule: str) -> None:
    together, made_by = RULES[rule](MATRIX.bfloat16(), MATERIAL)
    assert together.dtype == torch.float32
    assert made_by == [rule, rule, f"{rule} of the translation"]
    for i, part in enumerate(PARTS):
        assert torch.allclose(RULES[rule](MATRIX.bfloat16(), Material([part])).rows_ND[0], together[i])


def test_sums_of_more_tokens_than_one_chunk() -> None:
    ids = [[i % 4, (i + 1) % 4][: 1 + i % 2] for i in range(1000)]
    weights = [[0.25, 0.75][: len(row)] for row in ids]
    expected = [
        sum(w * MATRIX[i] for i, w in zip(row, share, strict=True)) for row, share in zip(ids, weights, strict=True)
    ]
    assert torch.allclose(combine(MATRIX, Mixture.of(ids, weights)), torch.stack(expected))


def test_a_recipe_may_name_every_rule_but_random() -> None:
    assert set(get_args(InitialRows)) == RULES.keys() - {"random"}


def test_calibrated_rows_keep_their_direction() -> None:
    scaled = calibrate_norm(torch.tensor([[3.0, 4.0], [0.0, 0.1]]), torch.tensor([2.0, 1.0]))
    assert torch.allclose(scaled, torch.tensor([[1.2, 1.6], [0.0, 1.0]]))
    assert median_norm(MATRIX, [1, 2, 3]) == pytest.approx(3.0)


def test_norms_are_those_of_the_script() -> None:
    """16 Hangul rows of norms 1…16 (median 8), 15 Latin ones, too few; the parts' median is that of rows 0 and 15."""
    matrix = torch.arange(1.0, 32.0)[:, None]
    old = {i: "▁가" if i < 16 else "the" for i in range(31)}
    norms = target_norms(matrix, old, [" 폐렴", "mg", "%"], [[0], [15], [2]])
    assert norms.tolist() == [8.0, 3.0, 3.0]
    assert [script_of(text) for text in ("코로나19 PCR", "癌", "<0xEA>", "�", "")] == [
        "HANGUL",
        "CJK",
        "LATIN",
        None,
        None,
    ]


def test_the_bias_direction_is_constant_on_the_states() -> None:
    states = torch.tensor([[1.0, 2.0, 0.0], [1.0, -1.0, 3.0], [1.0, 0.5, -1.0], [1.0, 1.0, 1.0]])
    assert torch.allclose(bias_direction(states, ridge=1e-6), torch.tensor([1.0, 0.0, 0.0]), atol=1e-4)


def test_new_output_rows_take_the_share_they_are_given() -> None:
    """One position with two old logits of 0 and two new ones of 0 takes half; for a tenth the new ones fall by ln 9."""
    states, old, new = torch.tensor([[1.0, 0.0]]), torch.zeros(3, 2), torch.zeros(2, 2)
    lowered = calibrate_share(new, old, states, 0.1, left_out=[2])
    assert torch.allclose(lowered @ states[0], torch.full((2,), -2.1972), atol=1e-3)
    assert torch.equal(calibrate_share(new, old, states, 0.6, left_out=[2]), new)
    generator = torch.Generator().manual_seed(0)
    states, old = torch.randn(100, 8, generator=generator) + 2, torch.randn(50, 8, generator=generator)
    logits = states @ torch.cat([old, calibrate_share(old, old, states, 0.01)]).T
    assert logits.softmax(dim=1)[:, 50:].sum(dim=1).mean().item() == pytest.approx(0.01, rel=1e-3)


def test_a_dictionary_term_takes_its_translations_tokens() -> None:
    dictionary = first_translation([("폐렴", "Pneumonia"), ("폐렴", "lung fever"), ("천식", "asthma")])
    parts = find_parts(
        ["▁폐렴", "폐렴", "환자"],
        [[10, 11], [10, 12], [13]],
        dictionary,
        lambda text: [ord(c) for c in text],
        lambda token: b"x" if token < 128 else b"",
    )
    assert [p.origin for p in parts] == ["dictionary", "dictionary", "subwords"]
    assert parts[0].ids == [ord(c) for c in "pneumonia"]
    assert parts[2] == Parts([13], [1.0])


def test_bytes_share_their_character() -> None:
    syllable = "폐".encode()
    assert count_characters([b" a", syllable[:1], syllable[1:]]) == pytest.approx([2, 1 / 3, 2 / 3])
    assert count_characters([b"\xff", "é".encode()]) == [1, 1]


def test_procrustes_finds_a_rotation_again() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    source = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(procrustes(source, source @ rotation), rotation, atol=1e-5)


def test_words_are_aligned_by_the_dictionary() -> None:
    target = WordVectors(["폐렴", "천식", "의사"], torch.tensor([[0.0, 1.0], [-3.0, 0.0], [-1.0, 1.0]]))
    old = WordVectors(["Pneumonia", "asthma"], torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    dictionary = {"폐렴": "pneumonia", "천식": "asthma", "두통": "headache"}
    turned, _ = align(target, old, dictionary, "embeddings.vectors")
    assert torch.allclose(turned, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]]), atol=1e-6)
    with pytest.raises(CorpusError, match="none of the dictionary's 1 pairs has vectors in both files"):
        align(target, old, {"두통": "headache"}, "embeddings.vectors")
    with pytest.raises(CorpusError, match=r"different widths \(2 and 3\)"):
        align(target, WordVectors(["a"], torch.ones(1, 3)), dictionary, "embeddings.vectors")


def test_tokens_take_the_mean_of_their_words_by_frequency() -> None:
    ids, vectors = vectors_of_tokens(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]), [[7, 9, 7], [7], [4]])
    assert ids.tolist() == [4, 7, 9]
    assert torch.allclose(vectors, torch.tensor([[3.0, 3.0], [2 / 3, 1 / 3], [1.0, 0.0]]))


def test_files_of_word_vectors(tmp_path: Path) -> None:
    (tmp_path / "a.vec").write_text("2 3\n폐렴 1 0 0.5\nasthma -1 2 0 \n", encoding="utf-8")
    (tmp_path / "glove.txt").write_text("폐렴 1 0 0.5\nasthma -1 2 0\n", encoding="utf-8")
    rows = [
        word.encode() + b" " + struct.pack("<3f", *v) + b"\n"
        for word, v in [("폐렴", (1, 0, 0.5)), ("asthma", (-1, 2, 0))]
    ]
    (tmp_path / "a.bin").write_bytes(b"2 3\n" + b"".join(rows))
    for name in ("a.vec", "glove.txt", "a.bin"):
        found = read_vectors(tmp_path / name, "embeddings.vectors.old")
        assert found.words == ["폐렴", "asthma"]
        assert found.vectors_WE.tolist() == [[1, 0, 0.5], [-1, 2, 0]]
    assert read_vectors(tmp_path / "a.vec", "x", max_words=1).words == ["폐렴"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, r"embeddings\.vectors\.old: cannot read .*No such file.*relative to the recipe"),
        ("", "is empty"),
        ("a 1 2\nb 1\n", "word 2 has 1 numbers, the first 2"),
        ("some prose, no vectors\n", "is no file of word vectors"),
    ],
)
def test_unusable_vector_files_are_one_line(tmp_path: Path, content: str | None, fault: str) -> None:
    path = tmp_path / "v.vec"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=fault) as caught:
        read_vectors(path, "embeddings.vectors.old")
    assert "\n" not in str(caught.value)


def test_corpus_vectors_bring_tokens_of_one_context_together() -> None:
    """Tokens 1 and 2 stand between 5 and 6, tokens 3 and 4 between 7 and 8; 9 is rare."""
    documents = [[5, n, 6] for n in (1, 2)] * 20 + [[7, n, 8] for n in (3, 4)] * 20 + [[9, 9]]
    ids, vectors = train_token_vectors(documents, width=4, window=1)
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    unit = torch.nn.functional.normalize(vectors, dim=1)
    assert (unit[0] @ unit[1]).item() == pytest.approx(1, abs=1e-3)
    assert (unit[0] @ unit[2]).item() == pytest.approx(0, abs=1e-3)
    assert torch.equal(vectors, train_token_vectors(documents, width=4, window=1)[1])
    assert len(train_token_vectors([[1, 2]])[0]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path) -> Context:
    """A tiny run as far as its grafted checkpoint, with word vectors of both languages beside the recipe."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "ko.vec").write_text("3 2\n폐렴 1 0\n천식 0 1\n환자 1 1\n", encoding="utf-8")
    (folder / "en.vec").write_text("3 2\npneumonia 0 1\nasthma 1 0\npatient 1 1\n", encoding="utf-8")
    (folder / "terms.tsv").write_text("ko\ten\n폐렴\tpneumonia\n천식\tasthma\n", encoding="utf-8")
    path = tiny.write_recipe(
        folder, tiny_gemma, stages=[{"name": "rows", "train": {"output_rows": "new"}, "tokens": 100}]
    )
    lingraft.run(path, folder / "run")
    return Context(lingraft.load_recipe(path), folder / "run", Base(tiny_gemma, "", ""))


def new_rows(context: Context, tied: bool = False, **embeddings: Any) -> NewRows:
    model = load(context.base.folder)
    matrix = input_matrix(model).detach()
    settings = context.recipe.embeddings.model_validate(embeddings)
    recipe = context.recipe.model_copy(update={"embeddings": settings})
    tokens = read_graft(context.tokenizer)
    return initial_rows(recipe, context.base.folder, tokens, matrix, None if tied else matrix, context)


def test_a_donor_with_the_same_rows_gives_the_rows_it_has(finished: Context) -> None:
    """The run's own grafted checkpoint as the donor: its new rows are means of old rows, which both models share."""
    donor = {"model": str(finished.run / "03-embeddings")}
    new = new_rows(finished, input="omp", donor=donor)
    assert new.input_methods == {"omp": len(new.input)}
    assert torch.allclose(new.input, new_rows(finished).input, atol=1e-4)
    without_them = new_rows(finished, input="omp", donor={"model": str(finished.base.folder)})
    assert without_them.input_methods == {"subword_mean": len(new.input)}
    with pytest.raises(ModelError, match=r"embeddings\.donor\.model: no such folder"):
        new_rows(finished, input="omp", donor={"model": "./nowhere"})


def test_rules_that_learn_from_text_know_tokens_of_that_text(finished: Context) -> None:
    by_corpus = new_rows(finished, input="focus").input_methods
    assert by_corpus["focus"] > by_corpus.get("subword_mean", 0)
    vectors = {"target": "ko.vec", "old": "en.vec"}
    by_words = new_rows(finished, input="wechsel", vectors=vectors, dictionary={"path": "terms.tsv"}).input_methods
    assert by_words["wechsel"] >= 1
    assert sum(by_words.values()) == sum(by_corpus.values())


def test_calibrated_output_rows_take_their_share_of_old_text(finished: Context) -> None:
    matrix = input_matrix(load(finished.base.folder)).detach()
    new = new_rows(finished, output="gaussian", calibrate_output=0.05).output
    assert new is not None
    old_ids = torch.tensor(sorted(set(range(len(matrix))) - {token.id for token in read_graft(finished.tokenizer)}))
    logits = old_text_states(finished, finished.base.folder) @ torch.cat([matrix[old_ids], new]).T
    share = logits.softmax(dim=1)[:, len(old_ids) :].sum(dim=1).mean().item()
    assert share == pytest.approx(0.05, rel=0.3)  # set on a sample of these positions
    with pytest.raises(RecipeError, match=r"embeddings\.calibrate_output: input and output rows are one matrix"):
        new_rows(finished, tied=True, calibrate_output=0.05)


def test_rules_without_a_run_say_what_they_need(finished: Context) -> None:
    tokens, matrix = read_graft(finished.tokenizer), input_matrix(load(finished.base.folder)).detach()
    plain = plain_rows(Embeddings(calibrate_norm=True), finished.base.folder, tokens, matrix, None)
    assert plain.input.norm(dim=1).unique().numel() < len(tokens)
    assert plain.output is None
    with pytest.raises(RecipeError, match="the rule focus needs"):
        plain_rows(Embeddings(input="focus"), finished.base.folder, tokens, matrix, None)
    for settings, missing in (({"input": "omp"}, "a donor"), ({"output": "wechsel"}, "vectors")):
        with pytest.raises(ValidationError, match=f"needs {missing}"):
            Embeddings.model_validate(settings)


def test_a_dictionary_with_wrong_columns_is_one_line(finished: Context, tmp_path: Path) -> None:
    (tmp_path / "terms.tsv").write_text("korean\ten\n폐렴\tpneumonia\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"embeddings\.dictionary: no column 'ko' in .* it has korean, en") as caught:
        new_rows(finished, dictionary={"path": str(tmp_path / "terms.tsv")})
    assert "\n" not in str(caught.value)
