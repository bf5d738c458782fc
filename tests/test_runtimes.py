"""Hugging Face, SentencePiece and llama.cpp give the same ids: small cases by hand, then real tokenizers and lines."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from real_lines import ODD_LINES, decomposed, english, korean, other_languages, with_emoji, write_base
from transformers import AutoTokenizer

from lingraft.errors import TokenizerError
from lingraft.families import family
from lingraft.tokenizer import runtimes
from lingraft.tokenizer.check import round_trip_failures, unchanged, unreachable, verify
from lingraft.tokenizer.graft import GraftedTokenizer, graft, place, write
from lingraft.tokenizer.learn import Learnt, NewPiece, learn
from lingraft.tokenizer.load import BaseTokenizer, load
from lingraft.tokenizer.sentencepiece_proto import BPE, ModelProto, PieceType

HANGUL = frozenset({"Hangul"})

with_llama_cpp = pytest.mark.skipif(not runtimes.llama_cpp_available(), reason="llama.cpp: pip install lingraft[gguf]")


def model(letters: dict[str, float], *, dummy_prefix: bool = False, user_defined: tuple[str, ...] = ()) -> Any:
    """A SentencePiece model laid out like Llama 2's: unk, bos, eos, the bytes, then symbols and pieces with scores."""
    proto = ModelProto()
    proto.trainer_spec.model_type = BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.pieces.add(piece="<unk>", score=0, type=PieceType.UNKNOWN)
    for control in ("<s>", "</s>"):
        proto.pieces.add(piece=control, score=0, type=PieceType.CONTROL)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=PieceType.BYTE)
    for piece in user_defined:
        proto.pieces.add(piece=piece, score=0, type=PieceType.USER_DEFINED)
    for piece, score in letters.items():
        proto.pieces.add(piece=piece, score=score, type=PieceType.NORMAL)
    return proto


def folder_of(folder: Path, proto: Any) -> BaseTokenizer:
    """A folder with tokenizer.model alone."""
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return load(folder)


def cuts(tokenizer: BaseTokenizer, text: str) -> list[str]:
    [ids] = tokenizer.encode([text])
    return [tokenizer.piece_of[i] for i in ids]


def assert_all_agree(tokenizer: BaseTokenizer, texts: list[str], pre_tokenizer: str = "default") -> None:
    found = runtimes.disagreements(tokenizer, texts, pre_tokenizer)
    assert {runtime: rows[:3] for runtime, rows in found.items() if rows} == {}


LETTERS = {"▁": -9.0, "a": -9.0, "b": -9.0, "ab": -1.0, "▁a": -2.0, "▁ab": -3.0}


def test_the_space_in_front_is_added_even_where_there_is_one(tmp_path: Path) -> None:
    base = folder_of(tmp_path, model(LETTERS, dummy_prefix=True))
    assert cuts(base, "ab") == ["▁ab"]
    assert cuts(base, " ab") == ["▁", "▁ab"]
    assert cuts(base, " ") == ["▁", "▁"]
    assert cuts(base, "") == []
    texts = ["ab", " ab", "  ab b", " ", "", "\n ab", "\nab ", "▁ab", "b<0x41>é"]
    assert_all_agree(base, texts)
    assert base.decode(base.encode([" ab", "ab "])) == [" ab", "ab "]


def test_equal_scores_merge_from_the_left(tmp_path: Path) -> None:
    runs = {"▁" * n: -10.0 for n in range(2, 5)}
    base = folder_of(tmp_path, model(LETTERS | runs))
    assert cuts(base, " " * 7) == ["▁▁▁▁", "▁▁▁"]
    assert cuts(base, " " * 5 + "a") == ["▁▁▁▁", "▁a"]
    assert_all_agree(base, [" " * n + tail for n in range(14) for tail in ("", "a", "ab")])


def test_user_defined_runs_come_before_all_merges(tmp_path: Path) -> None:
    symbols = ("▁▁", "▁▁▁", "\n", "\n\n", "\t\t", "<tag>")
    base = folder_of(tmp_path, model(LETTERS, user_defined=symbols))
    assert cuts(base, "   ab") == ["▁▁▁", "ab"]
    assert cuts(base, "\n\n\n<tag>a") == ["\n\n", "\n", "<tag>", "a"]
    assert cuts(base, "\t\t\ta") == ["\t\t", "<0x09>", "a"]
    added = {token["content"] for token in base.json["added_tokens"]}
    assert added == {"<unk>", "<s>", "</s>", "\t\t", "<tag>"}
    assert_all_agree(base, [mark * n + "ab" for mark in " \n\t" for n in range(9)] + ["a<tag> <tag>  b\n \n"])


def test_control_symbols_in_text(tmp_path: Path) -> None:
    """SentencePiece takes `</s>` for text, the two others for a symbol, so those texts are not compared with it."""
    base = folder_of(tmp_path, model(LETTERS | {"<": -9.0, ">": -9.0, "s": -9.0, "/": -9.0}, dummy_prefix=True))
    assert cuts(base, "a</s>b") == ["▁a", "</s>", "▁", "b"]
    assert runtimes.sentencepiece_ids(base, ["</s>"]) != base.encode(["</s>"])
    assert_all_agree(base, ["a</s>b", "<s>ab", "<unk>"])


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("dummy_prefix", [False, True])
@pytest.mark.parametrize("remove_extra", [False, True])
def test_a_model_alone_becomes_an_equal_tokenizer(
    tmp_path: Path, rule: str, dummy_prefix: bool, remove_extra: bool
) -> None:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The patient was given 25 mg of it. ", "  환자에게 약을 먹였다"] * 20),
        model_writer=trained,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name=rule,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=remove_extra,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    base = load(tmp_path)
    texts = ["The  patient ", " given\n\n 25 mg", "환자에게  약을", "", "  ", "ﬁ ２５㎎ ①", "\t약\n ", " \u3000약", "é"]
    assert runtimes.sentencepiece_ids(base, texts) == base.encode(texts)


def test_transformers_reads_the_same_tokenizer(tmp_path: Path) -> None:
    """Its class for Llama would build another one from the merges."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text('{"<extra>": 265}')
    base = folder_of(tmp_path, model(LETTERS, dummy_prefix=True))
    grafted = graft(base, place(base, Learnt([NewPiece("bab", "b", "ab", 9, "merge")]), family=family("llama")))
    write(grafted, tmp_path / "out")
    (tmp_path / "out/config.json").write_text('{"model_type": "llama"}')

    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["ab", "  ab bab", "a\n b", "ab<extra>a", ""]
    assert theirs(texts, add_special_tokens=False)["input_ids"] == grafted.tokenizer.encode(texts)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "</s>")
    assert theirs("ab")["input_ids"] == [1, grafted.tokenizer.vocab["▁ab"]]
    assert [piece.id for piece in grafted.pieces] == [266]
    assert_all_agree(grafted.tokenizer, texts)


@with_llama_cpp
def test_the_gguf_file_is_what_the_converter_writes(tmp_path: Path) -> None:
    from gguf import GGUFReader

    base = folder_of(tmp_path, model(LETTERS, dummy_prefix=True, user_defined=("<tag>", "<unused0>", "▁▁")))
    runtimes.write_vocabulary_gguf(base, tmp_path / "vocabulary.gguf")
    fields = GGUFReader(tmp_path / "vocabulary.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = dict(zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True))
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"].contents(), strict=True))
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    # Normal 1, control 3 (also what is added as special or looks it), user-defined 4, byte 6.
    wanted = {"<unk>": 3, "</s>": 3, "<tag>": 4, "<unused0>": 3, "  ": 4, "<0x0A>": 6, "▁a": 1}
    assert {token: types[token] for token in wanted} == wanted
    assert (scores["<tag>"], scores["▁ab"]) == (-1000.0, -3.0)


@with_llama_cpp
def test_llama_cpp_ids_by_hand(tmp_path: Path) -> None:
    base = folder_of(tmp_path, model(LETTERS))
    start = base.vocab["▁"]
    texts = ["ab", "", "a\nb", "é"]
    ids = runtimes.llama_cpp_ids(tmp_path, texts)
    assert ids == [[start + 3], [], [start + 1, 3 + 0x0A, start + 2], [3 + 0xC3, 3 + 0xA9]]
    assert ids == base.encode(texts) == runtimes.sentencepiece_ids(tmp_path, texts)
    many = ["a" * n for n in range(runtimes.TEXTS_PER_REQUEST + 2)]
    assert list(map(len, runtimes.llama_cpp_ids(base, many))) == list(range(len(many)))


def test_added_tokens_with_spaces(tmp_path: Path) -> None:
    """SentencePiece finds none of them, whether in its vocabulary or past it."""
    (tmp_path / "added_tokens.json").write_text('{"and three words": 266}')
    base = folder_of(tmp_path, model(LETTERS, user_defined=("two words",)))
    texts = ["ab two words ab", "ab and three words  ab", "two  words"]
    [first, second, _] = base.encode(texts)
    assert [base.piece_of[i] for i in first] == ["ab", "▁", "two words", "▁ab"]
    assert [base.piece_of[i] for i in second] == ["ab", "▁", "and three words", "▁", "▁ab"]
    assert base.decode([first, second]) == texts[:2]
    grafted = graft(base, place(base, Learnt([NewPiece("ba", "b", "a", 9, "merge")]), family=family("llama")))
    assert [piece.id for piece in grafted.pieces] == [267]
    for tokenizer in (base, grafted.tokenizer):
        assert_all_agree(tokenizer, [*texts, "ba two wordsba"])


def test_verify_names_the_runtime_that_differs(tmp_path: Path) -> None:
    """The piece abc was learnt as a + bc, but ab comes first: there Hugging Face stops, and SentencePiece goes on."""
    base = folder_of(tmp_path, model(dict.fromkeys("▁abc", -9.0)))
    pieces = [("ab", "a", "b"), ("bc", "b", "c"), ("abc", "a", "bc")]
    learnt = Learnt([NewPiece(piece, left, right, 9, "merge") for piece, left, right in pieces])
    write(graft(base, place(base, learnt, family=family("llama"))), tmp_path / "out")
    expected = (
        r"Hugging Face and SentencePiece disagree on 1 of 2 lines .* first 'cabc': 'c \| ab \| c' against 'c \| abc'"
    )
    with pytest.raises(TokenizerError, match=expected):
        verify(base, tmp_path / "out", [], ["cab", "cabc"])


def test_missing_parts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder_of(tmp_path, model(LETTERS))
    (tmp_path / "tokenizer.json").write_text(json.dumps(base.json))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer.model, so SentencePiece cannot run"):
        runtimes.sentencepiece_ids(tmp_path, ["a"])
    assert runtimes.disagreements(load(tmp_path), ["a"]) == {}
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match=r'llama.cpp is not installed; pip install "lingraft\[gguf\]"'):
        runtimes.llama_cpp_ids(tmp_path, ["a"])


def write_unigram(folder: Path) -> None:
    proto = model(LETTERS)
    proto.trainer_spec.model_type = 1
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def write_suffix_spaces(folder: Path) -> None:
    proto = model(LETTERS)
    proto.trainer_spec.treat_whitespace_as_suffix = True
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def write_no_bytes(folder: Path) -> None:
    proto = model(LETTERS)
    del proto.pieces[3:259]
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def write_word_piece(folder: Path) -> None:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2}
    word_piece = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocab}
    word_piece["max_input_chars_per_word"] = 100
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": word_piece}))


def write_git_lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17525357\n"
    (folder / "tokenizer.json").write_text(pointer)


@pytest.mark.parametrize(
    ("write_folder", "message"),
    [
        (write_unigram, r"tokenizer.model: a SentencePiece model of the kind Unigram; continued BPE needs a BPE"),
        (write_suffix_spaces, r"tokenizer.model: .* does not mark spaces by '▁' in front of words"),
        (write_no_bytes, r"a BPE tokenizer with neither byte fallback"),
        (write_word_piece, r"a WordPiece tokenizer; continued BPE needs a BPE"),
        (write_git_lfs_pointer, r"tokenizer.json: damaged, or no tokenizer .* download it again"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b""), r"tokenizer.model: damaged.*no pieces in it"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n"), r"tokenizer.model: damaged"),
        (lambda folder: (folder / "vocab.txt").write_text("a"), r"tokenizer.json: no such file, nor a tokenizer.model"),
    ],
)
def test_what_is_no_bpe_says_so_in_one_line(tmp_path: Path, write_folder: Any, message: str) -> None:
    write_folder(tmp_path)
    with pytest.raises(TokenizerError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


# --- Real tokenizers, more than 20,000 real lines


@pytest.fixture(scope="module")
def lines(shared_data: Path) -> dict[str, list[str]]:
    """Lines by what they are for: "old" must keep their ids. Nothing here is learnt from."""
    ours = korean(shared_data, part=0, parts=2) + with_emoji(shared_data)
    theirs = english(shared_data) + other_languages(shared_data)
    found = {"new": ours + decomposed(ours[::9]) + ODD_LINES, "old": theirs}
    assert len(set(found["new"]) | set(found["old"])) > 20_000
    return found


@pytest.fixture(scope="module")
def training(shared_data: Path) -> list[tuple[str, float]]:
    """The other half of the Korean lines."""
    return [(line, 1.0) for line in korean(shared_data, part=1, parts=2)]


REAL = {
    "gemma3_262k": ("gemma3", 6_143, "default"),
    "gemma2": ("gemma2", 1_500, "default"),
    "llama2": ("llama", 1_500, "default"),
    "qwen2_151k": ("qwen2", 1_500, "qwen2"),
}


@pytest.mark.parametrize("name", REAL)
def test_parity_on_real_lines(
    shared_data: Path,
    lines: dict[str, list[str]],
    training: list[tuple[str, float]],
    tmp_path: Path,
    name: str,
) -> None:
    model_type, new_tokens, pre_tokenizer = REAL[name]
    base = load(write_base(shared_data, name, tmp_path / "base"))
    learnt = learn(base, training, new_tokens=new_tokens, min_frequency=2, scripts=HANGUL)
    placement = place(base, learnt, family=family(model_type))
    assert len(placement.ids) == new_tokens
    grafted = graft(base, placement)
    write(grafted, tmp_path / "out")
    new = load(tmp_path / "out")

    assert unchanged(base, new, lines["old"]) == []
    assert unreachable(GraftedTokenizer(new, grafted.pieces)) == []
    # llama.cpp takes any piece "</s>" for the end of text, and Qwen 2 has one; the base disagrees on such lines too.
    everything = [text for text in lines["new"] + lines["old"] if "</s>" not in text or model_type != "qwen2"]
    assert round_trip_failures(base, new, everything) == []
    compared = runtimes.disagreements(new, everything, pre_tokenizer)
    assert {runtime: rows[:3] for runtime, rows in compared.items() if rows} == {}
