"""Batches: cutting, mixture, packing, steps that no layout changes, and the tokens kept on disk."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from lingraft.atomic import write_json
from lingraft.model.load import load, load_tokenizer
from lingraft.prompts import encode_chat
from lingraft.steps import batches as step
from lingraft.steps.context import Context
from lingraft.training import batches as module
from lingraft.training.batches import IGNORED, Batches, mixture, pack, to_micro_batch, together
from lingraft.training.stage import run_stage
from lingraft.training.tokens import Encoded, Tokens, cut, lengths_of, no_longer_than, write_tokens

NEW_IDS = [400, 401, 402, 450]


def encoded(*ids: int, origin: str = "d#1") -> Encoded:
    """A document whose first token is not learnt."""
    return Encoded(np.array(ids, np.int32), np.arange(len(ids)) > 0, origin)


def of_length(length: int, origin: str = "d#1") -> Encoded:
    return Encoded(np.zeros(length, np.int32), np.ones(length, bool), origin)


def texts(count: int = 120) -> list[Encoded]:
    """Documents of 5 to 79 random ids, the new ones among them."""
    random = np.random.default_rng(0)
    return [encoded(2, *random.integers(390, 460, size=random.integers(4, 79)), origin=f"d#{i}") for i in range(count)]


def batches(documents: list[Encoded], **changes: Any) -> Batches:
    settings = {"sequence_length": 64, "rows_per_step": 4, "pad": 0, "bos": 2, "seed": 0, "epochs": 1} | changes
    return Batches({"a": documents}, {"a": 1.0}, **settings)


def read(batches: Batches, number: int, micro_batch: int = 1) -> list[tuple[int, ...]]:
    """The documents of a step by their ids, sorted; a new one begins where positions are 0."""
    found = []
    for batch in batches.step(number, micro_batch):
        for ids, positions in zip(batch.input_ids_BT, batch.position_ids_BT, strict=True):
            ends = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
            found += [tuple(ids[a:b].tolist()) for a, b in pairwise(ends)]
    return sorted(document for document in found if any(document))  # padding is all 0


def test_long_documents_are_cut_and_start_with_bos_again() -> None:
    document, short = encoded(*range(2, 27), origin="long"), encoded(7, 8)
    pieces = cut([document, short], 10, bos=2)
    assert [p.ids.tolist() for p in pieces] == [list(range(2, 12)), [2, *range(12, 21)], [2, *range(21, 27)], [7, 8]]
    assert lengths_of(pieces).tolist() == [10, 10, 7, 2]
    assert [int(p.learnt.sum()) for p in pieces] == [9, 9, 6, 1]
    assert [p.origin for p in pieces] == ["long"] * 3 + ["d#1"]
    assert [p.ids.tolist() for p in cut([document], 20, bos=None)] == [list(range(2, 22)), list(range(22, 27))]


def test_only_documents_that_are_too_long_are_left_out() -> None:
    kept = no_longer_than([of_length(5, "a"), of_length(6, "b"), of_length(4, "c")], 5)
    assert [(document.origin, len(document)) for document in kept] == [("a", 5), ("c", 4)]
    assert lengths_of(kept).tolist() == [5, 4]


def test_mixture_follows_the_shares_everywhere() -> None:
    order = mixture([np.full(500, 10), np.full(50, 10)], [0.1, 0.9], 10_000, seed=0)
    assert len(order) == 1000
    second = order >= 500
    assert second.reshape(10, 100).sum(axis=1) == pytest.approx(90, abs=1)
    for epoch in range(18):
        assert sorted(order[second][50 * epoch : 50 * (epoch + 1)]) == list(range(500, 550)), "each once an epoch"
    assert order[second][:50].tolist() != order[second][50:100].tolist()


def test_first_fit_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 10: 6+4 and 7+3; 5 and 2 find no room and begin the next step."""
    monkeypatch.setattr(module, "LOOKAHEAD", 2)
    places = pack(np.array([6, 7, 5, 4, 3, 2, 9]), 10, rows_per_step=2)
    assert places.order_P.tolist() == [0, 1, 3, 4, 2, 5, 6]
    assert places.row_P.tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert places.starts_S.tolist() == [0, 4, 7]


@pytest.mark.parametrize("rows_per_step", [1, 4, 40])
def test_packing_loses_nothing_and_overfills_no_row(rows_per_step: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 33, size=3000)
    places = pack(lengths, 64, rows_per_step)
    assert sorted(places.order_P) == list(range(3000))
    steps = np.repeat(np.arange(len(places.starts_S) - 1), np.diff(places.starts_S))
    rows, used = np.unique(steps * rows_per_step + places.row_P, return_inverse=True)
    assert np.bincount(used, lengths[places.order_P]).max() <= 64
    assert places.row_P.max() < rows_per_step
    assert lengths.sum() / (64 * len(rows)) > 0.97


def test_a_step_reads_the_same_documents_however_they_are_laid_out() -> None:
    packed, single = batches(texts()), batches(texts(), packing=False)
    assert len(packed) == len(single) >= 14
    assert packed.epochs == pytest.approx(1, rel=1e-3)
    for number in range(len(packed)):
        expected = read(packed, number)
        assert all(read(packed, number, size) == expected for size in (2, 3, 8))
        assert all(read(single, number, size) == expected for size in (1, 4))
    everything = [document for number in range(len(packed)) for document in read(packed, number)]
    assert sum(map(len, everything)) == packed.tokens
    assert len(everything) == len(list(cut(texts(), 64, 2)))


def test_rows_that_go_together_pad_little() -> None:
    """At most 128 tokens and a fifth of padding: 60 would be the third of 64, and 2 leave 4 of 15 empty."""
    rows = [[of_length(size)] for size in (2, 60, 5, 30, 31, 4, 64, 62)]
    groups = [[len(document) for [document] in group] for group in together(rows, tokens=128)]
    assert groups == [[64, 62], [60], [31, 30], [5, 4], [2]]


def test_every_stretch_of_a_stage_has_the_mixture() -> None:
    laid_out = Batches(
        {"ko": [of_length(20, "ko")] * 90, "en": [of_length(20, "en")] * 90},
        {"ko": 0.75, "en": 0.25},
        sequence_length=100,
        rows_per_step=8,
        pad=0,
        bos=2,
        seed=0,
        budget_tokens=16_000,
    )
    assert len(laid_out) == 20
    assert laid_out.tokens == 16_000
    for number in range(20):
        origins = [origin for batch in laid_out.step(number) for origin in batch.origins]
        assert origins.count("ko") / len(origins) == pytest.approx(0.75, abs=0.06)


def test_steps_made_ahead_are_the_steps() -> None:
    laid_out = batches(texts())
    for number, ahead in laid_out.from_step(3, micro_batch=2):
        for one, other in zip(laid_out.step(number, 2), ahead, strict=True):
            assert torch.equal(one.input_ids_BT, other.input_ids_BT)
    assert number == len(laid_out) - 1
    assert [number for number, _ in islice(laid_out.from_step(0), 2)] == [0, 1]
    assert list(laid_out.from_step(len(laid_out))) == []


def test_an_error_of_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out = batches(texts())
    monkeypatch.setattr(laid_out, "step", lambda number, micro_batch: 1 // (2 - number))
    with pytest.raises(ZeroDivisionError):
        list(laid_out.from_step(0))


def test_labels_leave_out_prompts_padding_and_what_follows_a_documents_end() -> None:
    chat = Encoded(np.array([2, 5, 6, 7, 8], np.int32), np.array([False, False, False, True, True]), "chat")
    batch = to_micro_batch([[chat, encoded(2, 9)], [encoded(2, 4, 3)]], pad=0)
    assert batch.labels_BT.tolist() == [
        [IGNORED, IGNORED, 7, 8, IGNORED, 9, IGNORED],
        [4, 3, *[IGNORED] * 5],
    ]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert (batch.size, batch.tokens) == (10, 5)
    assert batch.origins == ("chat", "d#1", "d#1")


@pytest.mark.parametrize("family", ["gemma3", "gemma3-multimodal", "llama"])
def test_packed_documents_do_not_see_each_other(tmp_path: Path, tiny_tokenizer: Path, family: str) -> None:
    model = load(tiny.write_checkpoint(tmp_path / family, tiny_tokenizer, family))
    one, two = islice((document for document in texts() if len(document) > 20), 2)

    def states(batch: module.MicroBatch) -> torch.Tensor:
        return model.base_model(
            input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
        ).last_hidden_state

    together, alone = states(to_micro_batch([[one, two]], pad=0)), states(to_micro_batch([[two]], pad=0))
    assert torch.allclose(together[:, len(one) :], alone, atol=2e-6)


def test_the_loss_series_is_the_same_however_a_step_is_laid_out(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """Packing on and off, each with several sizes of micro-batch: 20 steps of all rows and layers in float32."""
    source = tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, "gemma3", tied=False)
    settings = replace(tiny.STAGE_SETTINGS, input_rows="all", output_rows="all", layers="all", learning_rate=1e-3)
    series = []
    for packing in (True, False):
        laid_out = batches(texts(130), packing=packing)
        for micro_batch in (1, 3):
            work = tmp_path / f"{packing}-{micro_batch}"
            work.mkdir()
            changed = replace(settings, packing=packing, micro_batch=micro_batch)
            log = run_stage(source, work / "out", work, changed, laid_out, NEW_IDS).loop.log
            series.append([entry["loss"] for entry in log])
    assert len(series[0]) >= 20
    assert series[0][19] < series[0][0] - 0.1, "it trains"
    for other in series[1:]:
        assert other == pytest.approx(series[0], rel=1e-5)


def test_tokens_come_back_from_disk(tmp_path: Path) -> None:
    documents = [
        Encoded(np.array([0, 262_143, 5]), np.array([False, False, True]), "ko#3"),
        Encoded(np.array([9]), np.array([True]), "ko#12"),
    ]
    write_tokens(tmp_path, iter(documents))
    found = Tokens(tmp_path, "ko")
    assert lengths_of(found).tolist() == [3, 1]
    for before, after in zip(documents, found, strict=True):
        assert (after.ids.tolist(), after.learnt.tolist()) == (before.ids.tolist(), before.learnt.tolist())
        assert after.origin == before.origin
    (tmp_path / "none").mkdir()
    write_tokens(tmp_path / "none", [])
    assert len(Tokens(tmp_path / "none", "ko")) == 0


CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A run whose corpus step is done: a source of texts and one of chats."""
    rows = {
        "texts": [{"text": text, "id": f"texts#{i}"} for i, text in enumerate(tiny.english(50), 1)],
        "chats": [{"messages": CHAT, "id": "chats#4"}],
    }
    train = tmp_path / "run" / "01-corpus" / "train"
    train.mkdir(parents=True)
    for name, documents in rows.items():
        (train / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    counts = {name: {"train": {"documents": len(documents)}} for name, documents in rows.items()}
    write_json(train.parent / "manifest.json", {"results": {"sources": counts}})
    return Context(None, tmp_path / "run", None)  # type: ignore[arg-type]  # tokens need neither recipe nor base


def shelves(context: Context) -> set[str]:
    """What lies in the token cache, without its lock and its memory of hashes."""
    return {p.name for p in (context.run / ".work" / "tokens").iterdir()} - {".lock", "hashes.json"}


def test_texts_and_chats_become_their_tokens(
    context: Context, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "BLOCK_CHARACTERS", 300)
    tokenizer = load_tokenizer(tiny_tokenizer)
    found = step.training_tokens(context, "texts", tiny_tokenizer, tokenizer)
    assert [d.ids.tolist() for d in found] == [
        [2, *ids, 1] for ids in tokenizer(tiny.english(50), add_special_tokens=False)["input_ids"]
    ]
    assert all(d.learnt.tolist() == [False] + [True] * (len(d) - 1) for d in found)
    assert [d.origin for d in found] == [f"texts#{i}" for i in range(1, 51)]
    [chat] = step.training_tokens(context, "chats", tiny_tokenizer, tokenizer)
    ids, learnt = encode_chat(tokenizer, CHAT)
    assert (chat.ids.tolist(), chat.learnt.tolist(), chat.origin) == (ids, learnt, "chats#4")


def test_texts_are_tokenised_once_for_each_tokenizer_and_text(
    context: Context, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    step.training_tokens(context, "texts", tiny_tokenizer, tokenizer)
    [first] = shelves(context)
    with monkeypatch.context() as patched:
        patched.setattr(step, "write_tokens", None)  # a second writing would fail
        again = step.training_tokens(context, "texts", tiny_tokenizer, tokenizer)
    assert len(again) == 50
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_tokenizer.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "tokenizer_config.json").write_text(
        (other / "tokenizer_config.json").read_text(encoding="utf-8").replace("{", '{"chat_template": "x",', 1)
    )
    step.training_tokens(context, "texts", other, load_tokenizer(other))
    assert len(shelves(context)) == 2
    file = context.corpus / "train" / "texts.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("a", "b", 1), encoding="utf-8")
    step.training_tokens(context, "texts", tiny_tokenizer, tokenizer)
    assert len(shelves(context)) == 3
    assert first in shelves(context)


def test_a_build_that_fails_or_was_killed_leaves_nothing_half_valid(
    context: Context, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)

    def full(folder: Path, documents: Any) -> None:
        write_tokens(folder, islice(documents, 5))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(step, "write_tokens", full)
        with pytest.raises(OSError, match="No space"):
            step.training_tokens(context, "texts", tiny_tokenizer, tokenizer)
    assert shelves(context) == set()
    killed = context.run / ".work" / "tokens" / ".making"
    killed.mkdir()
    (killed / "ids.bin").write_bytes(b"cut sh")
    assert len(step.training_tokens(context, "texts", tiny_tokenizer, tokenizer)) == 50
    assert ".making" not in shelves(context)


def test_one_makes_the_tokens_while_others_wait(
    context: Context, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def slowly(folder: Path, documents: Any) -> None:
        made.append(folder)
        time.sleep(0.2)
        write_tokens(folder, documents)

    monkeypatch.setattr(step, "write_tokens", slowly)
    with ThreadPoolExecutor(3) as threads:
        work = [
            threads.submit(step.training_tokens, context, "texts", tiny_tokenizer, load_tokenizer(tiny_tokenizer))
            for _ in range(3)
        ]
    assert [len(future.result()) for future in work] == [50] * 3
    assert len(made) == 1
