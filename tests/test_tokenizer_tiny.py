"""Continued BPE on tokenizers small enough to check by hand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lingraft.errors import TokenizerError
from lingraft.families import Family, family
from lingraft.tokenizer.check import runtime_mismatches, unchanged, unreachable, verify
from lingraft.tokenizer.graft import (
    GRAFT_FILE,
    graft,
    place,
    read_graft,
    scores_below,
    unused_slots,
    write,
)
from lingraft.tokenizer.inspect import fertility, segmentation
from lingraft.tokenizer.learn import Learnt, NewPiece, learn
from lingraft.tokenizer.load import BaseTokenizer, load
from lingraft.tokenizer.new import tokenizer_json
from lingraft.tokenizer.pieces import BYTE_OF, readable, to_bytes
from lingraft.tokenizer.runtimes import llama_cpp_available
from lingraft.tokenizer.sentencepiece_proto import BPE, ModelProto, PieceType

HANGUL = frozenset({"Hangul"})
GEMMA = family("gemma3")
IMAGE = {
    "content": "<image_soft_token>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def sentencepiece_base(folder: Path, letters: str = "▁abcd", unused: int = 0, image: bool = False) -> BaseTokenizer:
    """Four controls, 256 bytes, the letters, unused slots; with `image`, an added token past all of them."""
    proto = ModelProto()
    proto.trainer_spec.model_type = BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id = 0, 1
    proto.trainer_spec.bos_id, proto.trainer_spec.unk_id = 2, 3
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece in ("<pad>", "<eos>", "<bos>"):
        proto.pieces.add(piece=piece, score=0, type=PieceType.CONTROL)
    proto.pieces.add(piece="<unk>", score=0, type=PieceType.UNKNOWN)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=PieceType.BYTE)
    for score, letter in enumerate(letters):
        proto.pieces.add(piece=letter, score=-score, type=PieceType.NORMAL)
    for number in range(unused):
        proto.pieces.add(piece=f"<unused{number}>", score=0, type=PieceType.USER_DEFINED)
    parsed = tokenizer_json(proto)
    if image:
        parsed["added_tokens"].append({"id": len(proto.pieces), **IMAGE})
    return save(folder, parsed, proto)


def save(folder: Path, parsed: dict[str, Any], proto: Any | None = None) -> BaseTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(parsed), "utf-8")
    if proto is not None:
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return load(folder)


def byte_level_base(folder: Path) -> BaseTokenizer:
    """The 256 bytes and no merge."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    vocab = {char: index for index, char in enumerate(BYTE_OF)}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False}
    parsed = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return save(folder, parsed)


def triples(learnt: Learnt) -> list[tuple[str, str | None, str | None, int]]:
    return [(new.piece, new.left, new.right, new.count) for new in learnt.pieces]


def merges(count: int) -> Learnt:
    """`count` pieces that need nothing but the letters a–d: aa, ab, …"""
    pairs = [(x, y) for x in "abcd" for y in "abcd"][:count]
    return Learnt([NewPiece(x + y, x, y, 9, "merge") for x, y in pairs])


def test_the_textbook_example(tmp_path: Path) -> None:
    """https://en.wikipedia.org/wiki/Byte-pair_encoding: aaabdaaabac → Z=aa, Y=ab, X=ZY."""
    base = sentencepiece_base(tmp_path)
    learnt = learn(base, [("aaabdaaabac", 1.0)], new_tokens=10, min_frequency=2)
    assert triples(learnt) == [("aa", "a", "a", 4), ("ab", "a", "b", 2), ("aaab", "aa", "ab", 2)]

    grafted = graft(base, place(base, learnt, family=GEMMA))
    [ids] = grafted.tokenizer.encode(["aaabdaaabac"])
    assert [grafted.tokenizer.piece_of[i] for i in ids] == ["aaab", "d", "aaab", "a", "c"]


def test_weights_the_budget_and_the_longest_piece(tmp_path: Path) -> None:
    base = sentencepiece_base(tmp_path)
    texts = [("ab", 1.0), ("cd", 2.5)]
    assert triples(learn(base, texts, new_tokens=1)) == [("cd", "c", "d", 2)]
    assert triples(learn(base, [("abab", 3.0)], new_tokens=9, max_piece_chars=2)) == [("ab", "a", "b", 6)]


def test_a_piece_holds_single_spaces_in_front_or_between_words(tmp_path: Path) -> None:
    base = sentencepiece_base(tmp_path)
    texts = [("a  ab ab\nab", 5.0)]
    assert [new.piece for new in learn(base, texts, new_tokens=20, max_words=1).pieces] == ["ab", "▁ab"]
    assert [new.piece for new in learn(base, texts, new_tokens=20).pieces] == ["ab", "▁ab", "▁ab▁ab"]


def test_characters_merge_but_their_bytes_never(tmp_path: Path) -> None:
    base = sentencepiece_base(tmp_path)
    learnt = learn(base, [("가가가 나", 1.0), ("나a", 1.0), ("다", 1.0)], new_tokens=10, scripts=HANGUL)
    assert triples(learnt) == [("가", None, None, 3), ("나", None, None, 2), ("가가", "가", "가", 2)]
    assert triples(learn(base, [("가가가 나나", 1.0)], new_tokens=1, scripts=HANGUL)) == [("가", None, None, 3)]


def test_other_scripts_and_digits_stay_out(tmp_path: Path) -> None:
    base = sentencepiece_base(tmp_path, letters="▁ab12가나")
    learnt = learn(base, [("ab가나12 가나", 4.0)], new_tokens=10, scripts=HANGUL)
    assert [new.piece for new in learnt.pieces] == ["가나", "▁가나"]
    with pytest.raises(TokenizerError, match=r"nothing of Thai comes 2 times in 9 characters.*check the scripts"):
        learn(base, [("ab가나ab가나.", 1.0)], new_tokens=10, scripts=frozenset({"Thai"}))


def test_byte_level_pieces_are_whole_characters_or_the_beginning_of_one(tmp_path: Path) -> None:
    base = byte_level_base(tmp_path)
    learnt = learn(base, [("이이 이이 그이 ab ab", 3.0)], new_tokens=20, scripts=HANGUL)
    spelled = [to_bytes(new.piece, "byte_level") for new in learnt.pieces]
    assert spelled[:2] == ["이".encode()[:2], "이".encode()]
    assert " 이이".encode() in spelled
    partial = [piece for piece in spelled if piece.decode(errors="replace").endswith("�")]
    assert sorted(partial) == sorted({"이".encode()[:2], "그".encode()[:2]})
    assert all(0xEA <= piece[0] <= 0xED for piece in partial)

    grafted = graft(base, place(base, learnt, family=family("qwen2")))
    assert unreachable(grafted) == []
    assert unchanged(base, grafted.tokenizer, ["ab ab 你好", "🙂 naïve"]) == []
    [ids] = grafted.tokenizer.encode(["x 그이 이이"])
    assert [readable(grafted.tokenizer.piece_of[i], "byte_level") for i in ids] == ["x", "▁그이", "▁이이"]


@pytest.mark.parametrize("slots", ["unused", "append"])
def test_both_runtimes_agree_on_the_graft(tmp_path: Path, slots: Any) -> None:
    base = sentencepiece_base(tmp_path, unused=8, image=True)
    learnt = learn(base, [("가가가 나", 2.0), ("나다 가나", 2.0)], new_tokens=8, scripts=HANGUL)
    grafted = graft(base, place(base, learnt, family=GEMMA, slots=slots))
    write(grafted, tmp_path / "out")

    texts = ["가가가 나다", "  가  나\n\n다라", "abc 가b", "", "<unused7>"]
    assert runtime_mismatches(tmp_path / "out", texts) == []
    counts = verify(base, tmp_path / "out", ["abc  d", "é 🙂"], texts)
    assert counts == {
        "old_texts": 2,
        "new_texts": 5,
        "new_pieces": len(learnt.pieces),
        "runtimes_compared": 1 + llama_cpp_available(),
        "runtimes_disagree_as_before": 0,
    }
    new = load(tmp_path / "out")
    assert new.vocab["<image_soft_token>"] == base.vocab["<image_soft_token>"] == 273
    assert len(new) == 274 + (len(learnt.pieces) if slots == "append" else 0)
    assert new.proto is not None
    assert new.proto.trainer_spec.vocab_size == len(new.proto.pieces)
    scores = [new.proto.pieces[piece.id].score for piece in grafted.pieces]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert max(scores) < -4
    assert all(new.proto.pieces[piece.id].type == PieceType.NORMAL for piece in grafted.pieces)


def test_the_graft_file_tells_how_the_base_spells_each_piece(tmp_path: Path) -> None:
    base = sentencepiece_base(tmp_path, unused=2)
    learnt = Learnt(
        [NewPiece("가", None, None, 7, "character"), NewPiece("▁가", "▁", "가", 5, "merge")],
    )
    write(graft(base, place(base, learnt, family=GEMMA)), tmp_path / "out")
    first, second = read_graft(tmp_path / "out")
    assert (first.id, first.kind, first.base_pieces) == (265, "character", ["<0xEA>", "<0xB0>", "<0x80>"])
    assert (second.id, second.left, second.right) == (266, "▁", "가")
    assert second.base_ids == [260, 4 + 0xEA, 4 + 0xB0, 4 + 0x80]
    assert json.loads((tmp_path / "out" / GRAFT_FILE).read_text())["vocab_size"] == 267
    with pytest.raises(TokenizerError, match="no folder of a grafted tokenizer"):
        read_graft(tmp_path)


def test_reused_slots_leave_the_side_files(tmp_path: Path) -> None:
    config = {"tokenizer_class": "GemmaTokenizer", "added_tokens_decoder": {"266": {"content": "<unused1>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<unused0>": 265, "<unused2>": 267}))
    base = sentencepiece_base(tmp_path, unused=3)
    new = graft(base, place(base, merges(2), family=GEMMA)).tokenizer
    decoder = json.loads(new.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert [token["content"] for token in decoder.values()] == ["<pad>", "<eos>", "<bos>", "<unk>", "<unused2>"]
    assert json.loads(new.files["added_tokens.json"]) == {"<unused2>": 267}
    assert "<unused0>" not in new.vocab


def test_slots_that_a_template_names_or_the_family_protects_are_not_free(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ '<unused1>' }}")
    base = sentencepiece_base(tmp_path, unused=3)
    assert [base.piece_of[i] for i in unused_slots(base, GEMMA)] == ["<unused0>", "<unused2>"]
    assert unused_slots(base, family("llama")) == []
    small = Family("x", unused_pattern=r"<unused(\d+)>", protected_unused=range(2), full_vocab_size=200)
    assert [base.piece_of[i] for i in unused_slots(base, small)] == ["<unused2>"]


def test_too_few_slots(tmp_path: Path) -> None:
    base = sentencepiece_base(tmp_path, unused=3)
    with pytest.raises(TokenizerError, match=r"5 new tokens but 3 unused slots; ask for at most 3 .* auto or append"):
        place(base, merges(5), family=GEMMA, slots="unused")
    with pytest.raises(TokenizerError, match=r"a gemma3n model cannot take ids past .* at most 3 new tokens"):
        place(base, merges(5), family=family("gemma3n"))
    mixed = place(base, merges(5), family=GEMMA)
    assert mixed.ids == [265, 266, 267, 268, 269]
    assert (mixed.appended, list(mixed.reused)) == (2, [265, 266, 267])


def test_scores_stay_distinct_at_any_depth() -> None:
    for lowest in (-255_998.0, -1e9):
        scores = scores_below([0.0, lowest], 20_000)
        assert scores[0] < lowest
        assert all(x > y for x, y in pairwise(scores))


def test_verify_names_the_first_harmed_line(tmp_path: Path) -> None:
    base = sentencepiece_base(tmp_path)
    write(graft(base, place(base, merges(2), family=GEMMA)), tmp_path / "out")
    with pytest.raises(TokenizerError, match=r"1 of 2 lines .* first 'cab': 'c \| a \| b' became 'c \| ab'"):
        verify(base, tmp_path / "out", ["cc", "cab"], [])


def test_fertility_and_segmentation(tmp_path: Path) -> None:
    base = sentencepiece_base(tmp_path)
    new = graft(base, place(base, merges(2), family=GEMMA)).tokenizer
    assert fertility(base, ["ab ab", "가"]) == {
        "tokens": 8,
        "characters": 6,
        "words": 3,
        "bytes": 8,
        "tokens_per_character": 8 / 6,
        "tokens_per_word": 8 / 3,
        "tokens_per_byte": 1.0,
        "characters_per_token": 6 / 8,
    }
    assert segmentation(base, new, ["ab 가"]) == [
        {
            "text": "ab 가",
            "before": ["a", "b", "▁", "<EA>", "<B0>", "<80>"],
            "after": ["ab", "▁", "<EA>", "<B0>", "<80>"],
            "new": [True, False, False, False, False],
        }
    ]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.json: no such file"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="damaged, or no tokenizer"):
        load(tmp_path)
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}
    with pytest.raises(TokenizerError, match="a Unigram tokenizer; continued BPE needs a BPE"):
        save(tmp_path, {"version": "1.0", "added_tokens": [], "model": unigram})

    sentencepiece_base(tmp_path)
    model = tmp_path / "tokenizer.model"
    stale = ModelProto.FromString(model.read_bytes())
    stale.pieces[262].piece = "x"
    model.write_bytes(stale.SerializeToString())
    with pytest.raises(TokenizerError, match=r"id 262 is 'x' in tokenizer.model but 'b' in tokenizer.json"):
        load(tmp_path)
    stale.pieces[262].piece = "b"
    del stale.pieces[-1]
    model.write_bytes(stale.SerializeToString())
    with pytest.raises(TokenizerError, match=r"tokenizer.model ends at 264 pieces .* 264, 'd', .* no added token"):
        load(tmp_path)
    model.write_bytes(b"\xff\xff")
    with pytest.raises(TokenizerError, match="damaged, or no SentencePiece model"):
        load(tmp_path)


def test_families() -> None:
    assert family("gemma3").projections[0] == "q_proj"
    assert family("gemma3").vocab_size_keys == (("vocab_size",), ("text_config", "vocab_size"))
    assert family("gemma3n_text").slots_only
    assert family("qwen3").llama_cpp_pre_tokenizer == "qwen2"
    assert family("something-new") == Family("something-new")
