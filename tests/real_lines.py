"""Real lines of many kinds from the shared data, and how the published tokenizers there become folders."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_EMOJI = re.compile("[\u2600-\u27bf\U0001f300-\U0001faff]")

# Each is a trap of its own: nothing, white space alone, long runs, tabs, other scripts, literal marks.
ODD_LINES = [
    "",
    " ",
    "\n",
    "\t",
    "  가",
    " \n 가 \n",
    "a  b\n\n\n  c\t\td",
    "가  나\n\n   다\t라  ",
    "가\r\n나\r\n",
    "\u3000전각\u00a0공백\u200b",
    "👩‍⚕️ 환자 😀👨‍👩‍👧‍👦 🇰🇷",
    "ᄒᆞᆫ글 漢字 かな カナ 한漢字글",
    "뷁쀍 ㄱㄴㄷ ㅋㅋㅋㅋ ㅠㅠ",
    "３７．５℃ ㎎/㎗ Ⅳ형 ①②③ ½",
    "<h1>검역</h1>",
    "▁가▁나",
    "Ünïcödé naïve résumé Привет мир שלום مرحبا สวัสดี नमस्ते",
    "\u0000\u0001\ufeff\ufffd",
]
ODD_LINES += [space * n + "가" for space in " \n\t" for n in range(1, 32)]
ODD_LINES += [space * n + "가" for space in " \n" for n in (32, 33, 62, 63, 100)]
# Beyond its longest piece of 31 tabs the two files of Gemma 3 disagree, as published; no real line has so many.
LONG_RUNS_OF_TABS = ["\t" * n + "가" for n in (32, 33, 62, 63, 100)]


def _json_lines(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """Lines as they stand, indentation included."""
    return (line for text in texts for line in text.split("\n") if line)


def korean(data: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """Law, documents with code, reviews, disease and procedure names, dialogue, news; every `parts`-th line."""
    law = _lines(row["text"] for row in islice(_json_lines(data / "ko-medical/health_law.jsonl.gz"), 8))
    documents = _lines(
        row["text"]
        for name in ("react", "pytorch_tutorials", "rust_book", "vue")
        for row in islice(_json_lines(data / f"ko-general/docs/{name}_ko.jsonl.gz"), 25)
    )
    with gzip.open(data / "ko-general/nsmc_reviews.tsv.gz", "rt", encoding="utf-8") as rows:
        reviews = [row.rstrip("\n").split("\t")[1] for row in islice(rows, 1, 6_001)]
    names = [
        name
        for file in ("kcd8_en_ko.tsv", "edi_procedures_en_ko.tsv")
        for row in islice((data / "ko-medical" / file).open(encoding="utf-8"), 1, 4_001)
        for name in row.rstrip("\n").split("\t")[1:3]
    ]
    with (data / "ko-general/chatbot/ChatbotData.csv").open(encoding="utf-8") as rows:
        dialogue = [cell for row in islice(csv.reader(rows), 1, 2_001) for cell in row[:2]]
    news = (data / "bilingual/korean-english-park.dev.ko").read_text("utf-8").split("\n")
    return [*law, *documents, *reviews, *names, *dialogue, *news][part::parts]


def english(data: Path) -> list[str]:
    """Medical answers, dialogues of doctors and patients, novels, an encyclopaedia, documentation."""
    answers = _lines(row["answer"] for row in islice(_json_lines(data / "en-medical/medquad.jsonl.gz"), 400))
    documents = _lines(row["en"] for row in islice(_json_lines(data / "bilingual/python_docs_en_ko.jsonl.gz"), 2_000))
    with (data / "en-medical/mts_dialog_validationset.csv").open(encoding="utf-8") as rows:
        dialogues = [cell for row in csv.reader(rows) for cell in row]
    books = [
        line
        for name in ("pride_and_prejudice", "tinyshakespeare", "wikitext2_valid")
        for line in islice((data / f"en-general/{name}.txt").read_text("utf-8").split("\n"), 200, 1_400)
        if "<unk>" not in line  # WikiText's rare words; a control symbol, which SentencePiece does not read in text
    ]
    return [*islice(answers, 2_000), *islice(documents, 2_000), *dialogues, *books]


def other_languages(data: Path) -> list[str]:
    """Text without Hangul in many scripts and in code, made for testing tokenizers."""
    files = (data / "tokenizers/gemma3_golden" / name for name in ("mixed_input.txt", "small_input.txt"))
    lines = [line for file in files for line in file.read_text("utf-8").split("\n")]
    return [line for line in lines if not _HANGUL.search(line)]


def with_emoji(data: Path) -> list[str]:
    """Korean lines with emoji, from all of a documentation and all reviews."""
    documents = _lines(row["text"] for row in _json_lines(data / "ko-general/docs/react_ko.jsonl.gz"))
    with gzip.open(data / "ko-general/nsmc_reviews.tsv.gz", "rt", encoding="utf-8") as rows:
        return [line for line in [*documents, *rows] if _EMOJI.search(line)]


def decomposed(lines: list[str]) -> list[str]:
    """NFD: Hangul as single Jamo, as macOS writes file names."""
    return [unicodedata.normalize("NFD", line) for line in lines]


def write_base(data: Path, name: str, folder: Path) -> Path:
    """A published tokenizer as the folder that users have; Gemma 2 and Llama 2 come as tokenizer.model alone."""
    source = data / "tokenizers" / name
    folder.mkdir(exist_ok=True)
    if (source / "tokenizer.model").is_file():
        shutil.copy(source / "tokenizer.model", folder)
    if (source / "tokenizer.json.gz").is_file():
        (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    configs = {
        "gemma3_262k": {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "mask_token": "<mask>"},
        "qwen2_151k": {"tokenizer_class": "Qwen2Tokenizer"},
    }
    if name in configs:
        (folder / "tokenizer_config.json").write_text(json.dumps(configs[name]))
    return folder
