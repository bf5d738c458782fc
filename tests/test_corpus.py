"""Reading, cleaning, splitting and writing the corpus: small files made here, and real ones where present."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError

from lingraft.corpus import clean, files, hub
from lingraft.corpus.build import Source, build, read_documents
from lingraft.corpus.questions import Question, read_questions
from lingraft.corpus.read import read
from lingraft.corpus.split import HeldOutChoice, Overlap
from lingraft.corpus.terms import read_dictionary
from lingraft.errors import CorpusError

WHERE = "corpus.sources[2]"


def texts(path: Path, **options) -> list[str]:
    return [record["text"] for record in read(path, where=WHERE, **options)]


def chats(path: Path, **options) -> list[list[tuple[str, str]]]:
    return [
        [(message["role"], message["content"]) for message in record["messages"]]
        for record in read(path, where=WHERE, **options)
    ]


def write(path: Path, content: str | bytes | list[dict]) -> Path:
    """Write a text, bytes, or records as JSON lines; packed if the name ends in .gz."""
    if isinstance(content, list):
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def fault(*parts: str):
    """A CorpusError of one line that starts with the place in the recipe and holds the parts in this order."""
    return pytest.raises(CorpusError, match=rf"\A{'.*'.join(map(re.escape, (WHERE, *parts)))}.*\Z")


# --- reading: kinds of files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("line", ["one\n", "two\n", "three"]),
        ("paragraph", ["one\ntwo\n", "three"]),
        ("file", ["one\ntwo\n \n\nthree"]),
    ],
)
def test_text_file_is_cut_into_documents(tmp_path, documents, expected):
    assert texts(write(tmp_path / "a.txt", "one\r\ntwo\n \n\nthree"), documents=documents) == expected


def test_same_rows_from_every_kind(tmp_path):
    rows = [{"text": "콜레라", "n": "1"}, {"text": 'a "b", c', "n": "2"}]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "a.jsonl.gz", rows)
    write(tmp_path / "list.json", json.dumps(rows))
    write(tmp_path / "object.json", json.dumps({"x": rows[0], "y": rows[1]}))
    write(tmp_path / "data.json", json.dumps({"version": 1, "data": rows}))
    write(tmp_path / "a.csv", 'text,n\n콜레라,1\n"a ""b"", c",2\n')
    write(tmp_path / "a.tsv.gz", 'text\tn\n콜레라\t1\na "b", c\t2\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = files.find_files(tmp_path, WHERE)
    assert len(found) == 8
    for file in found:
        assert texts(file, column="{n}: {text}") == ["1: 콜레라", '2: a "b", c'], file.name


def test_single_json_object_is_one_document(tmp_path):
    assert texts(write(tmp_path / "a.json", '{"id": 1, "text": "whole"}')) == ["whole"]


def test_folder_glob_and_list(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden/d.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, Path(name).stem)
    assert texts(tmp_path) == ["a", "b", "c"]
    assert texts(tmp_path / "?.txt") == ["a", "b"]
    assert texts([tmp_path / "b.txt", tmp_path / "deep"]) == ["b", "c"]


def test_stray_quotes_in_tsv_swallow_nothing(tmp_path):
    assert texts(write(tmp_path / "a.tsv", 'text\tn\n"open\t1\nnext\t2\n')) == ['"open', "next"]


def test_multi_line_csv_field_beyond_pythons_limit(tmp_path):
    long = "가나\n다라" * 50_000
    assert texts(write(tmp_path / "a.csv", f'text\n"{long}"\n')) == [long]


def test_parquet_reads_wanted_columns_only(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "other": ["b"]}), tmp_path / "a.parquet")
    (row,) = files.read_rows(tmp_path / "a.parquet", columns=["text"], where=WHERE)
    assert row.values == {"text": "a"}


def test_streams_before_reaching_damage(tmp_path):
    lines = "".join(
        json.dumps({"text": hashlib.sha512(bytes([i % 256, i >> 8])).hexdigest()}) + "\n" for i in range(9999)
    )
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-1000])
    records = read(path, where=WHERE)
    assert len(next(records)["text"]) == 128
    with fault("a.jsonl.gz", "cut short or damaged", "fetch it again"):
        list(records)


# --- reading: encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp949"])
def test_encoding_is_detected(tmp_path, encoding):
    path = write(tmp_path / "a.csv", "text\n비브리오 콜레라\n똠방각하\n".encode(encoding))
    assert texts(path, column="text") == ["비브리오 콜레라", "똠방각하"]


def test_named_encoding_wins_and_its_byte_order_mark_is_dropped(tmp_path):
    assert texts(write(tmp_path / "a.csv", "text\ncafé\n".encode("cp1252")), encoding="cp1252") == ["café"]
    assert texts(write(tmp_path / "b.csv", "text\na\n".encode("utf-8-sig")), encoding="utf8") == ["a"]


@pytest.mark.parametrize("encoding", ["utf-8", "cp949"])
def test_character_cut_by_the_end_of_the_detected_part(tmp_path, monkeypatch, encoding):
    path = write(tmp_path / "a.txt", "가나다라마".encode(encoding))
    for size in range(3, 9):
        monkeypatch.setattr(files, "DETECTION_BYTES", size)
        assert texts(path) == ["가나다라마"]


def test_windows_quotation_marks_are_not_taken_for_korean(tmp_path):
    path = write(tmp_path / "a.txt", "He said \u201cThe patient\u2019s fever\u201d is gone.".encode("cp1252"))
    with fault("a.txt", "neither UTF-8 nor CP949", "encoding: cp1252"):
        texts(path)


def test_fault_beyond_the_detected_part_names_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DETECTION_BYTES", 64)
    lines = [b"plain English line, number %d\n" % number for number in range(1, 2001)]
    lines[1233] = "한국어\n".encode("cp949")
    with fault("a.txt:1234 is not UTF-8", "encoding"):
        texts(write(tmp_path / "a.txt", b"".join(lines)), documents="line")


# --- reading: chats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "Q"},
                {"role": "model", "content": "A"},
            ]
        },
        {"prompt": "Q", "answer": "A"},
        {"prompt": "Q", "completion": "A", "id": 7},
        {"instruction": "Q", "input": "", "output": "A"},
    ],
)
def test_chat_shapes_are_recognised(tmp_path, row):
    assert chats(write(tmp_path / "a.jsonl", [row])) == [[("user", "Q"), ("assistant", "A")]]


def test_alpaca_input_and_system(tmp_path):
    row = {"system": "S", "instruction": "I", "input": "X", "output": "A"}
    assert chats(write(tmp_path / "a.jsonl", [row])) == [[("system", "S"), ("user", "I\n\nX"), ("assistant", "A")]]


def test_chat_from_named_columns(tmp_path):
    path = write(tmp_path / "a.csv", "Q,A,topic\nwhy,so,t\n")
    mapping = {"assistant": "A", "user": "[{topic}] {Q}"}
    assert chats(path, column=mapping) == [[("user", "[t] why"), ("assistant", "so")]]
    turns = [{"dialogue": [{"role": "user", "content": "Q"}], "text": "t"}]
    assert chats(write(tmp_path / "b.jsonl", turns), column="dialogue", format="chat") == [[("user", "Q")]]


def test_text_column_outweighs_chat_shape_unless_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "T", "prompt": "Q", "answer": "A"}])
    assert texts(path) == ["T"]
    assert chats(path, format="chat") == [[("user", "Q"), ("assistant", "A")]]


def test_template_with_an_empty_column_gives_an_empty_document(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "Q", "a": "A"}, {"q": "Q", "a": None}, {"q": "Q", "a": ["x", "y"]}])
    assert texts(path, column="{q}\n{a}") == ["Q\nA", "", "Q\nx\ny"]


# --- reading: faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "options", "parts"),
    [
        ("a.csv", "text,ko\nx,y\n", {"column": "txet"}, ["no column 'txet'", "did you mean 'text'?", "text, ko"]),
        ("a.csv", "en,ko\nx,y\n", {}, ["no column 'text'", "`column`", "en, ko"]),
        ("a.csv", "en,ko\nx,y\n", {"column": "{en} {kr}"}, ["no column 'kr'", "en, ko"]),
        ("a.csv", "en,ko\nx,y\n", {"column": "{en"}, ["'{en' does not combine columns", "{title} {body}"]),
        ("a.csv", "a,b\n1,2\n1,2,3\n", {"column": "a"}, ["a.csv:3 has 3 fields", "names 2 columns"]),
        ("a.csv", "a,b\n1,2\n", {"column": {"usr": "a"}}, ["unknown role 'usr'", "did you mean 'user'?"]),
        ("a.csv", "a,b\n1,2\n", {"format": "chat"}, ["a.csv:2 is not a chat", "a, b", "column: {user:"]),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, ["a.jsonl:2 is not JSON", "one object"]),
        ("a.jsonl", '["a"]\n', {}, ["a.jsonl:1 holds a list, not an object"]),
        ("a.jsonl", '{"text": {"a": 1}}\n', {}, ["column 'text' at", "a.jsonl:1 holds a dict"]),
        ("a.jsonl", '{"messages": "hi"}\n', {}, ["'messages' at", "a.jsonl:1 is not a list"]),
        ("a.jsonl", '{"messages": [{"role": "tool"}]}\n', {}, ["role 'tool'", "known are"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [1]}]}\n', {}, ["holds a list", "only text"]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', {}, ["a.json:2 is not JSON", "name it '.jsonl'"]),
        ("a.json", "3", {}, ["holds a int, not a list of objects"]),
        ("a.txt", "a", {"encoding": "utf-9"}, ["unknown encoding 'utf-9'", "leave `encoding` out"]),
        ("a.txt", "한", {"encoding": "ascii"}, ["a.txt:1 is not ASCII"]),
        ("a.parquet", "no parquet", {}, ["a.parquet' is not Parquet"]),
        ("a.docx", "x", {}, ["a.docx' is of an unknown kind", "known are .txt"]),
    ],
)
def test_faults_say_what_where_and_the_cure(tmp_path, name, content, options, parts):
    with fault(*parts):
        list(read(write(tmp_path / name, content), where=WHERE, **options))


def test_missing_files_are_told_before_anything_is_read(tmp_path):
    write(tmp_path / "corpus.jsonl", [])
    with fault("no such file", "corpsu.jsonl", "did you mean 'corpus.jsonl'?", "relative to the recipe"):
        read(tmp_path / "corpsu.jsonl", where=WHERE)
    with fault("no file matches", "*.csv"):
        read(tmp_path / "*.csv", where=WHERE)
    (tmp_path / "empty").mkdir()
    with fault("no text in the folder", "empty", "known are .txt"):
        read(tmp_path / "empty", where=WHERE)


def test_what_is_not_gzip_or_not_readable(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_text("plain")
    with fault("a.txt.gz' is not gzip", "take '.gz' off"):
        texts(tmp_path / "a.txt.gz")

    def refuse(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "_open", refuse)
    with fault("cannot read", "a.txt.gz' (Permission denied)"):
        texts(tmp_path / "a.txt.gz")


def test_open_quotation_mark_does_not_swallow_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", 'text\n"open\n' + "x" * (files.CSV_FIELD_CHARACTERS + 1))
    with fault("a.csv:", "is not CSV", "quotation mark left open"):
        texts(path)


# --- the Hub -----------------------------------------------------------------------------------------------


def test_hub_reads_a_local_folder_and_names_the_splits(tmp_path):
    write(tmp_path / "train.jsonl", [{"q": "Q", "a": "A", "n": 1}, {"q": "R", "a": "B", "n": 2}])
    records = hub.read_hub(str(tmp_path), column="{q} {a}", where=WHERE)
    assert list(records) == [{"text": "Q A"}, {"text": "R B"}]
    (row, _) = hub.hub_rows(str(tmp_path), columns=["q"], where=WHERE)
    assert row.values == {"q": "Q"}
    with fault("Bad split: test", "['train']", "name one of these"):
        next(hub.read_hub(str(tmp_path), split="test", where=WHERE))
    with fault("BuilderConfig 'ko' not found", "name one of these"):
        next(hub.read_hub(str(tmp_path), config="ko", where=WHERE))
    with fault("no column 'Q'", "did you mean 'q'?"):
        next(hub.read_hub(str(tmp_path), column="Q", where=WHERE))


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated."),
            ["gated dataset", "accept its terms at https://huggingface.co/datasets/a/b", "hf auth login"],
        ),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub."), ["doesn't exist", "hf auth login"]),
        (ConnectionError("Couldn't reach 'a/b' on the Hub\n(long)"), ["Couldn't reach", "network", "hf download"]),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), ["scripts", "runs no code"]),
    ],
)
def test_hub_faults(monkeypatch, error, parts):
    asked = {}

    def refuse(dataset: str, **options):
        asked.update(options)
        raise error

    monkeypatch.setattr(hub, "load_dataset", refuse)
    with fault("a/b", *parts) as caught:
        next(hub.read_hub("a/b", where=WHERE))
    assert "\n" not in str(caught.value)
    assert asked == {"name": None, "split": "train", "revision": None, "streaming": True}


# --- cleaning ----------------------------------------------------------------------------------------------


def test_normalise_mends_only_what_nobody_wrote():
    assert clean.normalise("\ufeff\r\n가나 \r\n\x00  b\tc\x1b\u3000\n\n\nd\x0ce\ud800\n") == "가나\n  b\tc\n\n\nd\ne"
    assert clean.normalise("ＡＢ “x” ﬁ") == "ＡＢ “x” ﬁ"
    once = clean.normalise("a \u0085 b\r")
    assert clean.normalise(once) == once == "a\n b"


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("감기 flu", "ko", 2 / 5),
        ("檢疫 검역", "ko", 1.0),
        ("病毒感染", "ko", 0.0),
        ("病毒感染", "ja", 0.0),
        ("薬を飲む", "ja", 1.0),
        ("病毒感染", "zh", 1.0),
        ("Grüße, 12 °C!", "de", 1.0),
        ("Привет", "en", 0.0),
        ("हिन्दी भाषा", "hi", 1.0),
        ("ไข้หวัดใหญ่", "th", 1.0),
        ("12.5 – !", "en", 0.0),
    ],
)
def test_script_share(text, language, share):
    assert clean.script_share(text, language) == pytest.approx(share)


def test_unknown_language():
    with pytest.raises(CorpusError, match=r"language 'kr' is unknown.*known are.*ko"):
        clean.other_language_than("kr", 0.5)


def test_filters_give_reasons():
    filters = [
        clean.is_empty,
        clean.shorter_than(3),
        clean.longer_than(20),
        clean.other_language_than("en", 0.5),
        clean.without_keywords(["Fever", "cough (dry)"]),
        clean.Duplicates(),
    ]
    reasons = {
        text: clean.reason_to_drop(text, filters) for text in (" ", "ab", "fever " * 9, "고열 있음", "cough dry")
    }
    assert list(reasons.values()) == ["empty", "too short", "too long", "not the language", "no keyword"]
    again = [clean.reason_to_drop("a FEVER", filters) for _ in range(2)]
    assert again == [None, "duplicate"]


# --- splitting ---------------------------------------------------------------------------------------------


def choose(documents: list[str], seed: int = 0, fraction: float = 0.1, most: int = 100, size: int = 10**6) -> set[str]:
    choice = HeldOutChoice(seed, fraction, most, size)
    for index, text in enumerate(documents):
        choice.offer(index, text)
    return {documents[index] for index in choice.indices()}


def test_choice_depends_on_seed_and_text_only():
    documents = [f"document {number}" for number in range(1000)]
    chosen = choose(documents)
    assert 70 <= len(chosen) <= 130
    assert choose(documents[::-1]) == chosen
    assert choose(documents, seed=1) != chosen
    assert chosen < choose(documents + [f"more {number}" for number in range(500)], most=1000)


def test_choice_is_bounded_by_documents_and_bytes():
    documents = [f"document {number:03}" for number in range(1000)]  # 12 bytes each
    chosen = choose(documents)
    assert choose(documents, most=10) < chosen
    assert len(choose(documents, most=10)) == 10
    assert choose(documents, size=12 * 10 + 11) == choose(documents, most=10)


def test_choice_of_few():
    assert len(choose(["a", "b", "c"], fraction=1e-6)) == 1
    assert choose(["a"], fraction=0.5) == set()
    assert choose(["a", "b", "c"], fraction=0) == set()


def test_overlap_by_share_of_runs():
    held_out = "a b c d e f g h"  # six runs of three words
    strict, half = Overlap([held_out], 3, 0), Overlap([held_out], 3, 0.5)
    one_run = "x y A, b; C! z z"
    assert strict.found_in(one_run)
    assert not half.found_in(one_run)  # one of its five
    assert half.found_in("x y z w v u t s a b c d e")  # three of the held-out text's six
    assert half.found_in("b c d")  # a part of it
    assert not strict.found_in("a b d c")
    assert not strict.found_in("a b")
    assert not Overlap([], 3, 0).found_in(held_out)
    assert not Overlap(["a b"], 3, 0).found_in("a b")


def test_overlap_where_words_have_no_spaces():
    assert Overlap(["病毒感染的症状"], 5, 0).found_in("这是病毒感染的。")


# --- building ----------------------------------------------------------------------------------------------


def source(name: str, documents: list[str], **options) -> Source:
    return Source(name, lambda: [{"text": text} for text in documents], **options)


def test_build_counts_and_writes(tmp_path):
    documents = ["첫 문서", " ", "둘", "English only", "첫 문서  ", "셋째 문서", "넷째 문서"]
    chat = {"messages": [{"role": "user", "content": "왜?"}, {"role": "assistant", "content": "그냥 "}]}
    empty = {"messages": [{"role": "user", "content": "왜?"}, {"role": "assistant", "content": ""}]}
    asked = {"messages": [{"role": "user", "content": "왜?"}]}
    sources = [
        source("law", documents, language="ko", min_characters=2, held_out=1e-9),
        Source("talk", lambda: [chat, empty, asked], held_out=0),
    ]
    counts = build(sources, tmp_path, seed=1, save_rejects=True)
    law = counts["law"]
    assert law["read"] == 7
    assert law["dropped"] == {"empty": 1, "too short": 1, "not the language": 1, "duplicate": 1}
    assert law["held_out"]["documents"] == 1
    assert law["train"]["documents"] == 2
    assert law["train"]["characters"] + law["held_out"]["characters"] == 4 + 5 + 5
    assert law["train"]["bytes"] + law["held_out"]["bytes"] == 10 + 13 + 13
    kept = [*read_documents(tmp_path, "train", "law"), *read_documents(tmp_path, "held-out", "law")]
    assert sorted((each["id"], each["text"]) for each in kept) == [
        ("law#1", "첫 문서"),
        ("law#6", "셋째 문서"),
        ("law#7", "넷째 문서"),
    ]
    rejects = [(each["id"], each["reason"]) for each in read_documents(tmp_path, "rejects", "law")]
    assert rejects == [
        ("law#2", "empty"),
        ("law#3", "too short"),
        ("law#4", "not the language"),
        ("law#5", "duplicate"),
    ]
    assert counts["talk"]["dropped"] == {"empty": 1, "no answer": 1}
    (talk,) = read_documents(tmp_path, "train", "talk")
    assert talk == {"messages": [chat["messages"][0], {"role": "assistant", "content": "그냥"}], "id": "talk#1"}
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["law.jsonl"] * 3 + ["talk.jsonl"] * 3
    json.dumps(counts)


def test_no_text_crosses_the_split_nor_comes_twice(tmp_path):
    first = [f"sentence number {number % 300}" for number in range(600)]
    second = [f"sentence number {number}" for number in range(200, 400)]
    counts = build([source("a", first, held_out=0.2), source("b", second, held_out=0.2)], tmp_path, seed=3)
    written = Counter(
        record["text"]
        for part in ("train", "held-out")
        for name in ("a", "b")
        for record in read_documents(tmp_path, part, name)
    )
    assert set(written.values()) == {1}
    assert len(written) == 400
    assert counts["a"]["dropped"] == {"duplicate": 300}
    assert counts["b"]["dropped"] == {"duplicate": 100}


def test_copies_of_held_out_documents_are_dropped_from_every_source(tmp_path):
    words = [[f"w{document}x{word}" for word in range(40)] for document in range(30)]
    originals = [" ".join(each) for each in words]
    excerpts = [" ".join(each[10:30]) for each in words]
    counts = build([source("a", originals, held_out=0.2), source("b", excerpts, held_out=0)], tmp_path, seed=0)
    held_out = counts["a"]["held_out"]["documents"]
    assert counts["b"]["dropped"] == {"overlaps held-out": held_out}
    assert counts["b"]["train"]["documents"] == 30 - held_out
    counts = build([source("a", originals), source("b", excerpts)], tmp_path, seed=0, overlap_words=None)
    assert counts["b"]["dropped"] == {}


def test_limits_stop_the_stream(tmp_path):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield {"text": f"{len(taken):09}" if len(taken) % 2 else ""}

    counts = build([Source("a", endless, limit_documents=5, held_out=0)], tmp_path, seed=0)
    assert counts["a"]["train"]["documents"] == 5
    assert len(taken) == counts["a"]["read"] == 9
    counts = build([Source("b", endless, limit_bytes=50, held_out=0)], tmp_path, seed=0)
    assert counts["b"]["train"]["bytes"] == 54


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "there is nothing in it; is it the right file"),
        (["", " ", "a"], {"min_characters": 2}, r"no text left of 3 documents \(2 empty, 1 too short\); .*`column`"),
        (["one", "two"], {"language": "ko"}, "no text in 'ko' left of 2 documents .*`language` right"),
        (["one"], {"keywords": ("fever",)}, r"no text left of 1 documents \(1 no keyword\); check `keywords`"),
    ],
)
def test_nothing_left_says_why(tmp_path, documents, options, message):
    with pytest.raises(CorpusError, match=f"^corpus source 'law': {message}"):
        build([source("law", documents, **options)], tmp_path, seed=0)


@pytest.mark.parametrize("names", [("a", "a"), ("a/b", "c")])
def test_names_have_to_serve_as_files(tmp_path, names):
    with pytest.raises(CorpusError, match="names become file names"):
        build([source(name, ["text"]) for name in names], tmp_path, seed=0)


BUILD_ONCE = """
import sys
from pathlib import Path
from lingraft.corpus.build import Source, build
documents = [{"text": " ".join(f"w{n % 7}{k}" for k in range(n % 40))} for n in range(500)]
build([Source("a", lambda: documents, held_out=0.1)], Path(sys.argv[1]), seed=5)
"""


def test_files_are_the_same_for_every_hash_seed(tmp_path):
    digests = set()
    for hash_seed in ("1", "2"):
        out = tmp_path / hash_seed
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", BUILD_ONCE, str(out)], env=environment, check=True)
        written = b"".join(path.read_bytes() for path in sorted(out.rglob("*.jsonl")))
        digests.add(hashlib.sha256(written).hexdigest())
    assert len(digests) == 1


# --- questions and dictionaries ----------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [2, "2", "C", "c", " third "])
def test_answers_by_number_letter_or_text(tmp_path, answer):
    row = {"question": "Which?", "choices": ["first", "second", "third"], "answer": answer}
    path = write(tmp_path / "a.jsonl", [row])
    assert read_questions(path, where=WHERE) == [Question("Which?", ("first", "second", "third"), 2)]


def test_choices_from_columns_or_letters(tmp_path):
    path = write(tmp_path / "a.csv", "q,A,B,C,answer\nWhich?,x,y,,2\n")
    options = {"question": "q", "choices": ["A", "B", "C"], "answer_base": 1}
    assert read_questions(path, where=WHERE, **options) == [Question("Which?", ("x", "y"), 1)]
    row = {"question": "Which?", "options": {"B": "y", "A": "x"}, "answer_idx": "B"}
    path = write(tmp_path / "b.jsonl", [row])
    assert read_questions(path, choices="options", answer="answer_idx", where=WHERE)[0].choices == ("x", "y")


def test_text_from_fields_of_objects(tmp_path):
    row = {"title": "T", "body": {"parts": ["one", "two"], "by": {"name": "N"}}, "body.id": 7, "empty": None}
    path = write(tmp_path / "a.jsonl", [row, {"title": "U", "body": None}])
    assert texts(path, column="{title}: {body.parts} ({body.by.name})") == ["T: one\ntwo (N)", ""]
    assert texts(write(tmp_path / "b.jsonl", [row]), column="body.id") == ["7"]
    with fault("no column 'body.part'", "did you mean 'body.parts'?", "it has body.parts, body.by"):
        texts(path, column="body.part")
    with fault("no column 'title.x'", "it has title, body"):
        texts(path, column="{title.x}")


def test_fixed_choices_and_nested_question_columns(tmp_path):
    row = {"context": {"contexts": ["First.", "Second."]}, "question": "So?", "final_decision": "maybe"}
    path = write(tmp_path / "a.jsonl", [row])
    options = {"question": "{context.contexts}\n{question}", "fixed_choices": ["yes", "no", "maybe"]}
    assert read_questions(path, answer="final_decision", where=WHERE, **options) == [
        Question("First.\nSecond.\nSo?", ("yes", "no", "maybe"), 2)
    ]
    row = {"q": {"stem": "Which?", "options": {"B": "y", "A": "x"}}, "key": {"letter": "B"}}
    path = write(tmp_path / "b.jsonl", [row])
    columns = {"question": "q.stem", "choices": "q.options", "answer": "key.letter"}
    assert read_questions(path, where=WHERE, **columns) == [Question("Which?", ("x", "y"), 1)]
    with fault("no column 'q.choices'", "it has q.stem, q.options"):
        read_questions(path, where=WHERE, **(columns | {"choices": "q.choices"}))
    with fault("the answer 'maybe' at", "none of its 2 choices"):
        read_questions(
            tmp_path / "a.jsonl", answer="final_decision", where=WHERE, **(options | {"fixed_choices": ["yes", "no"]})
        )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"answer": 3}, ["the answer 3 at", "a.jsonl:1", "3 choices counted from 0", "answer_base"]),
        ({"answer": "E"}, ["the answer 'E'"]),
        ({"answer": None}, ["the answer None"]),
        ({"question": " "}, ["a.jsonl:1 is empty"]),
        ({"choices": ["a"]}, ["has 1 choices; at least two"]),
        ({"choices": ["a", "", "c"]}, ["choice 2 of the question at", "is empty"]),
        ({"choices": "a b"}, ["'choices' at", "not a list of choices", "choices: [A, B, C, D]"]),
    ],
)
def test_question_faults(tmp_path, changes, parts):
    row = {"question": "Which?", "choices": ["a", "b", "c"], "answer": 0} | changes
    with fault(*parts):
        read_questions(write(tmp_path / "a.jsonl", [row]), where=WHERE)


def test_question_file_without_questions_or_columns(tmp_path):
    with fault("no question found"):
        read_questions(write(tmp_path / "a.jsonl", []), where=WHERE)
    with fault("no column 'choices'", "question, A, B"):
        read_questions(write(tmp_path / "b.csv", "question,A,B\nx,y,z\n"), where=WHERE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "code\tko\ten\n1\t감기\tcold\n2\t 감기\tcold \n3\t\tflu\n4\t독감\tflu\n"),
        ("a.csv", "ko,en\n감기,cold\n독감,flu\n"),
        ("a.jsonl", '{"ko": "감기", "en": "cold"}\n{"ko": "독감", "en": "flu"}\n'),
        ("a.json", '{"감기": "cold", "독감": "flu"}'),
        ("b.json", '[{"ko": "감기", "en": "cold"}, {"ko": "독감", "en": "flu"}]'),
    ],
)
def test_dictionary(tmp_path, name, content):
    pairs = read_dictionary(write(tmp_path / name, content), "ko", "en", WHERE)
    assert pairs == [("감기", "cold"), ("독감", "flu")]


def test_dictionary_faults(tmp_path):
    path = write(tmp_path / "a.tsv", "code\tko\ten\n1\t감기\tcold\n")
    with fault("no column 'english'", "code, ko, en"):
        read_dictionary(path, "ko", "english", WHERE)
    with fault("no pair of terms"):
        read_dictionary(write(tmp_path / "b.tsv", "ko\ten\n감기\t\n"), "ko", "en", WHERE)


# --- real data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options", "count", "start"),
    [
        ("ko-medical/kcd8_en_ko.tsv", {"column": "ko"}, 18_381, "콜레라"),
        ("ko-medical/health_law.jsonl.gz", {}, 121, "# 검역법"),
        (
            "ko-medical/edi_measurement_cp949.csv",
            {"column": "source_code_description"},
            210,
            "Microalbumin urine; 미량",
        ),
        ("ko-medical/edi_device_utf8.csv", {"column": "EDI_concept_code"}, 996, "A0013001"),
        ("ko-general/nsmc_reviews.tsv.gz", {"column": "review"}, 59_978, "시놉은 괜찮았으나"),
        ("en-medical/medquad.jsonl.gz", {"column": "{question}\n{answer}"}, 15_049, "What is (are) Adult"),
        ("en-medical/pubmedqa_train.json", {"column": "QUESTION"}, 500, "Can tailored interventions"),
    ],
)
def test_real_sources(shared_data, path, options, count, start):
    documents = texts(shared_data / path, **options)
    assert len(documents) == count
    assert documents[0].startswith(start)


def test_real_questions_count_answers_from_one(shared_data):
    path = shared_data / "en-medical/medmcqa_dev.jsonl"
    columns = {"choices": ["opa", "opb", "opc", "opd"], "answer": "cop"}
    questions = read_questions(path, **columns, answer_base=1, where=WHERE)
    assert Counter(question.answer for question in questions) == {0: 1348, 1: 1085, 2: 925, 3: 825}
    with fault("the answer 4 at", "medmcqa_dev.jsonl:18", "answer_base"):
        read_questions(path, **columns, where=WHERE)


def test_real_questions_with_fixed_choices(shared_data):
    path = shared_data / "en-medical/pubmedqa_train.json"
    questions = read_questions(
        path,
        question="{CONTEXTS}\n{QUESTION}",
        fixed_choices=["yes", "no", "maybe"],
        answer="final_decision",
        where=WHERE,
    )
    assert Counter(question.answer for question in questions) == {0: 276, 1: 169, 2: 55}
    assert questions[0].question.startswith("Telephone counseling and tailored")
    assert questions[0].question.endswith("\nCan tailored interventions increase mammography use among HMO women?")


def test_real_dictionary(shared_data):
    pairs = read_dictionary(shared_data / "ko-medical/kcd8_en_ko.tsv", "ko", "en", WHERE)
    assert pairs[0] == ("콜레라", "Cholera")
    assert len(pairs) == 18_011


def test_real_build(shared_data, tmp_path):
    def records(path: str, column: str | None = None):
        return lambda: read(shared_data / path, column=column, where=WHERE)

    sources = [
        Source("names", records("ko-medical/kcd8_en_ko.tsv", "ko"), "ko"),
        Source("law", records("ko-medical/health_law.jsonl.gz"), "ko"),
    ]
    counts = build(sources, tmp_path, seed=1)
    assert counts["names"]["dropped"] == {"duplicate": 398, "overlaps held-out": 10}
    assert counts["law"]["train"]["documents"] == 120
    assert counts["law"]["held_out"]["documents"] == 1
    for name in ("names", "law"):
        held_out = {record["text"] for record in read_documents(tmp_path, "held-out", name)}
        train = {record["text"] for record in read_documents(tmp_path, "train", name)}
        assert not held_out & train
        assert len(train) == counts[name]["train"]["documents"]
