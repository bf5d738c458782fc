"""Token distillation: the old segmentation by hand, what changes and what must not, exact resume, and what it gains."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import lingraft
from lingraft.errors import TrainingError
from lingraft.model.load import input_matrix, load, output_matrix
from lingraft.model.rows import VocabularyTraining
from lingraft.steps.context import new_token_ids
from lingraft.training import loop
from lingraft.training.batches import IGNORED, Batches, to_micro_batch
from lingraft.training.stage import run_stage
from lingraft.training.token_distillation import (
    Segmentation,
    TokenDistillationLoss,
    cut_by_old_tokens,
    hidden_state_error,
)
from lingraft.training.tokens import Encoded

# Tokens 0–9 are old; 10 is written 1 2 3, and 11 is written 4 5.
NEW_IDS, OLD_IDS = [10, 11], [[1, 2, 3], [4, 5]]

# In the tiny checkpoints' vocabulary.
TINY_NEW = [400, 401, 402, 450]
TINY_OLD = [[300, 301], [302, 303, 304], [300, 305], [306, 307]]
SETTINGS = replace(tiny.STAGE_SETTINGS, name="token-distillation", input_rows="new", weight_decay=0.0)


@pytest.fixture
def segmentation() -> Segmentation:
    return Segmentation(12, NEW_IDS, OLD_IDS)


def encoded(*ids: int) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array([False] + [True] * (len(ids) - 1)), "d")


def documents(count: int = 24, length: int = 20) -> list[Encoded]:
    """Random documents over old ids and the four new ones, of which every document holds some."""
    generator = np.random.default_rng(0)
    choices = np.array([*range(290, 330), *TINY_NEW * 8])
    return [encoded(2, *generator.choice(choices, length)) for _ in range(count)]


def batches(**changes: object) -> Batches:
    settings = {"sequence_length": 64, "rows_per_step": 4, "pad": 0, "bos": 2, "seed": 0, "epochs": 8}
    return Batches({"a": documents()}, {"a": 1.0}, **(settings | changes))  # type: ignore[arg-type]


def make_loss(weight: float = 0.1, layer: int = -1) -> partial[TokenDistillationLoss]:
    return partial(TokenDistillationLoss, new_ids=TINY_NEW, old_ids=TINY_OLD, layer=layer, next_token_weight=weight)


def test_old_segmentation_of_packed_rows(segmentation: Segmentation) -> None:
    batch = to_micro_batch([[encoded(7, 10, 8), encoded(11, 9)], [encoded(6, 6)]], pad=0)
    old = segmentation.old(batch.input_ids_BT, batch.position_ids_BT)
    assert old.ids_BS[0].tolist() == [7, 1, 2, 3, 8, 4, 5, 9]
    assert old.position_ids_BS[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert old.ends_BT[0].tolist() == [0, 3, 4, 6, 7]
    # the second row: two old tokens, three of padding in the batch, three more to the first row's length
    assert old.ids_BS[1, :2].tolist() == [6, 6]
    assert old.position_ids_BS[1].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]


def test_positions_count_from_a_documents_first_new_token(segmentation: Segmentation) -> None:
    batch = to_micro_batch([[encoded(7, 10, 8), encoded(9, 9), encoded(11, 9)]], pad=0)
    reached = segmentation.reached(batch.input_ids_BT, batch.position_ids_BT)
    assert reached[0].tolist() == [False, True, True, False, False, True, True]


def test_parts_are_read_in_order(segmentation: Segmentation) -> None:
    ids = torch.tensor([10, 10, 11, 7])
    assert segmentation.part(ids, torch.tensor([0, 2, 1, 0])).tolist() == [1, 3, 5, 7]


def test_documents_are_cut_by_their_old_tokens() -> None:
    lengths = np.ones(12, np.int64)
    lengths[NEW_IDS] = [3, 2]
    pieces = list(cut_by_old_tokens([encoded(0, 10, 11, 7, 10, 8)], lengths, limit=6, bos=0))
    assert [p.ids.tolist() for p in pieces] == [[0, 10, 11], [0, 7, 10, 8]]
    assert [p.learnt.tolist() for p in pieces] == [[False, True, True], [False, True, True, True]]
    assert all(lengths[p.ids].sum() <= 6 for p in pieces)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_error_is_zero_where_both_segmentations_are_one(tmp_path: Path, tiny_tokenizer: Path, family: str) -> None:
    """A new token that stands for one old token, with that token's row, can't be told from it."""
    model = load(tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, family, tied=False))
    with torch.no_grad():
        input_matrix(model)[400] = input_matrix(model)[300]
    loss = TokenDistillationLoss(model, [400], [[300]], layer=-1, next_token_weight=0.0)
    same = to_micro_batch([[encoded(2, 310, 400, 311, 312)]], pad=0)
    assert hidden_state_error(loss, [same]) == pytest.approx(0.0, abs=1e-9)
    other = to_micro_batch([[encoded(2, 310, 401, 311, 312)]], pad=0)
    assert hidden_state_error(loss, [other]) == 0.0  # 401 is an old token here: nothing counts
    with torch.no_grad():
        input_matrix(model)[400] = input_matrix(model)[301]
    assert hidden_state_error(loss, [same]) > 0.01


@pytest.mark.parametrize("layer", [-1, 1])
def test_loss_is_the_relative_squared_error_plus_the_next_old_token(
    tmp_path: Path, tiny_tokenizer: Path, layer: int
) -> None:
    """Against a plain computation, one document after another, without packing or tables."""
    model = load(tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, "gemma3", tied=False))
    texts = [[2, 310, 400, 311, 401], [2, 402, 312]]
    old_texts = [[2, 310, 300, 301, 311, 302, 303, 304], [2, 300, 305, 312]]
    ends, first_new = [[0, 1, 3, 4, 7], [0, 2, 3]], [2, 1]
    expected = 0.0
    for ids, old_ids, end, first in zip(texts, old_texts, ends, first_new, strict=True):
        with torch.no_grad():
            student = model(torch.tensor([ids]), output_hidden_states=True)
            teacher = model(torch.tensor([old_ids]), output_hidden_states=True)
        logits = student.logits[0].float()
        logits[:, TINY_NEW] = -torch.inf
        for place in range(first, len(ids) - 1):
            s, t = student.hidden_states[layer][0, place], teacher.hidden_states[layer][0, end[place]]
            following = dict(zip(TINY_NEW, TINY_OLD, strict=True)).get(ids[place + 1], [ids[place + 1]])[0]
            expected += float((s - t).square().sum() / t.square().sum())
            expected -= 0.5 * float(logits[place].log_softmax(0)[following])
    batch = to_micro_batch([[encoded(*ids) for ids in texts]], pad=0)
    loss = make_loss(0.5, layer)(model)
    found = loss(batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_only_new_input_rows_have_a_gradient(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = load(tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, "gemma3", tied=False))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows = VocabularyTraining(model, "new", "none", TINY_NEW).parameters()["input_rows"]
    batch = to_micro_batch([[encoded(2, 310, 400, 311)]], pad=0)
    make_loss()(model)(batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT).backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum(dim=1).gt(0).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("family", "tied"), [("gemma3", False), ("llama", False), ("gemma3", True)])
def test_everything_but_the_new_rows_is_bit_identical(
    tmp_path: Path, tiny_tokenizer: Path, family: str, tied: bool
) -> None:
    source = tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, family, tied)
    run_stage(source, tmp_path / "out", tmp_path, SETTINGS, batches(epochs=2), TINY_NEW, make_loss())
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    old = [i for i in range(tiny.VOCABULARY) if i not in TINY_NEW]
    for name, tensor in before.items():
        if name.endswith("embed_tokens.weight"):
            assert torch.equal(tensor[old], after[name][old])
            assert not torch.isclose(tensor[TINY_NEW], after[name][TINY_NEW]).all(dim=1).any()
        else:
            assert torch.equal(tensor, after[name]), name


def test_a_killed_pass_ends_in_the_same_bits(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, tied=False)
    often = replace(SETTINGS, checkpoint_seconds=0)
    run = partial(run_stage, source, settings=often, batches=batches(), new_ids=TINY_NEW, loss=make_loss())
    run(out=tmp_path / "whole", work=tmp_path)
    checked = loop.LossWatch.check

    def killed(watch: loop.LossWatch, step: int, *rest: object) -> None:
        if step == 5:
            raise RuntimeError("killed")
        checked(watch, step, *rest)  # type: ignore[arg-type]

    (tmp_path / "work").mkdir()
    monkeypatch.setattr(loop.LossWatch, "check", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(out=tmp_path / "resumed", work=tmp_path / "work")
    monkeypatch.undo()
    run(out=tmp_path / "resumed", work=tmp_path / "work")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_layer_that_the_model_lacks_is_named(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = load(tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer))
    with pytest.raises(TrainingError, match=r"distillation\.layer: the model has no layer 3; give 0 .* to 2"):
        make_loss(layer=3)(model)


def test_micro_batches_without_anything_to_match_cost_nothing(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = load(tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, tied=False))
    batch = to_micro_batch([[encoded(2, 310, 400)]], pad=0)
    silent = torch.full_like(batch.labels_BT, IGNORED)
    assert float(make_loss()(model)(batch.input_ids_BT, silent, batch.position_ids_BT).detach()) == 0.0


def test_a_recipe_with_distillation_lowers_the_error_and_says_so(tmp_path: Path, tiny_gemma: Path) -> None:
    """On held-out text the hidden-state error falls, and only new input rows differ from the plain graft."""
    rows = {"name": "rows", "train": {"input_rows": "new", "output_rows": "new"}, "tokens": 500}
    settings = {"tokens": 6000, "learning_rate": 1e-3, "next_token_weight": 0}
    path = tiny.write_recipe(tmp_path, tiny_gemma, stages=[rows], embeddings={"distillation": settings})
    lingraft.run(path, tmp_path / "plain", ["embeddings.distillation=null"])
    result = lingraft.run(path, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "03-embeddings" / "manifest.json").read_text())
    figures = manifest["results"]["distillation"]
    assert figures["after"]["hidden_state_error"] < 0.9 * figures["before"]["hidden_state_error"]
    assert set(figures["changed_tensors"]) == {"model.embed_tokens.weight[new rows]"}
    plain, distilled = (load(tmp_path / name / "03-embeddings") for name in ("plain", "run"))
    ids = new_token_ids(result.run / "03-embeddings")
    assert torch.equal(output_matrix(plain), output_matrix(distilled))
    assert not torch.equal(input_matrix(plain)[ids], input_matrix(distilled)[ids])
    assert (result.run / "03-embeddings" / "graft.json").is_file()
