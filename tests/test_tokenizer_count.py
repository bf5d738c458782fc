"""Counting: units segment as in their text, counts are exact whoever counts, memory is bounded, options do as told."""

import gzip
import importlib.util
import json
import os
import shutil
import unicodedata
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import GemmaTokenizer, LlamaTokenizer

from lingraft.errors import TokenizerError
from lingraft.recipe import Tokenizer as TokenizerSettings
from lingraft.tokenizer import tally as tally_module
from lingraft.tokenizer.count import count_units
from lingraft.tokenizer.cut import ByteLevelCutter, SentencePieceCutter, WordCutter, cutter_of
from lingraft.tokenizer.load import BaseTokenizer, load
from lingraft.tokenizer.merges import merge_greedily
from lingraft.tokenizer.pieces import SCRIPTS, wanted_characters
from lingraft.tokenizer.tally import Counting, tally

ODD = [
    "",
    " ",
    "   ",
    "\n",
    " a",
    "a ",
    "a  b\n\n\n  c\t\td \n e\r\n\r\n f",
    "가  나\n\n   다\t라  ",
    "<b>굵게</b> </i> > </p>> </",
    ">",
    " </a>",
    "x>  </p>>   </ >\n </ >\n\n",
    "▁literal▁▁mark ▁ ▁▁",
    "▁",
    "don't I'LL ... (1 234) 한'글 --x",
    "\x1c \x1d\u2028 \u00a0\u3000 나\u0085 다",
    "👩‍⚕️ 환자 😀 ½ ² Ⅳ e\u0301 é",
    unicodedata.normalize("NFD", "한국어 문장 café"),
]


def counted(base: BaseTokenizer, texts: list[str], **options: Any) -> dict[str, float]:
    return count_units(base, [(text, 1.0) for text in texts], **({"workers": 1} | options))


def tokens_of(base: BaseTokenizer, units: dict[str, float]) -> Counter[int]:
    tokens: Counter[int] = Counter()
    for count, ids in zip(units.values(), base.segment(list(units)), strict=True):
        for token in ids:
            tokens[token] += round(count)
    return tokens


def whole_tokens(base: BaseTokenizer, texts: list[str]) -> Counter[int]:
    """Tokens of whole texts by the base's own parts; without added tokens, which count as ordinary text."""
    words = WordCutter(base.tokenizer.normalizer, base.tokenizer.pre_tokenizer, together=None).cut(texts)
    return Counter(chain.from_iterable(base.segment([word.decode() for word in words.to_pylist()])))


# --- Real tokenizers


@pytest.fixture(scope="module")
def real_bases(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("gemma3_262k", "qwen2_151k"):
        (folder / name).mkdir()
        packed = (shared_data / "tokenizers" / name / "tokenizer.json.gz").read_bytes()
        (folder / name / "tokenizer.json").write_bytes(gzip.decompress(packed))
    for name, tokenizer_class in (("llama2", LlamaTokenizer), ("gemma2", GemmaTokenizer)):
        source = folder / "source" / name
        source.mkdir(parents=True)
        shutil.copy(shared_data / "tokenizers" / name / "tokenizer.model", source)
        tokenizer_class.from_pretrained(source).save_pretrained(folder / name)
    return {name: load(folder / name) for name in ("gemma3_262k", "gemma2", "llama2", "qwen2_151k")}


@pytest.fixture(scope="module")
def real_texts(shared_data: Path) -> list[str]:
    with gzip.open(shared_data / "ko-medical/health_law.jsonl.gz", "rt") as lines:
        laws = [json.loads(next(lines))["text"] for _ in range(6)]
    with gzip.open(shared_data / "ko-general/nsmc_reviews.tsv.gz", "rt") as lines:
        reviews = [next(lines).split("\t")[1] for _ in range(2_000)]
    with gzip.open(shared_data / "ko-general/docs/react_ko.jsonl.gz", "rt") as lines:
        code = [json.loads(next(lines))["text"] for _ in range(5)]
    english = (shared_data / "en-general/wikitext2_valid.txt").read_text("utf-8")[:200_000]
    golden = (shared_data / "tokenizers/gemma3_golden/mixed_input.txt").read_text("utf-8")
    return [*laws, *reviews, *code, english, golden, *ODD]


@pytest.mark.parametrize("name", ["gemma3_262k", "gemma2", "llama2", "qwen2_151k"])
def test_units_segment_as_in_their_text(real_bases: dict[str, BaseTokenizer], real_texts: list[str], name: str) -> None:
    base = real_bases[name]
    expected_class = ByteLevelCutter if name == "qwen2_151k" else SentencePieceCutter
    assert isinstance(cutter_of(base), expected_class)
    whole = whole_tokens(base, real_texts)
    assert whole.total() > 200_000
    assert tokens_of(base, counted(base, real_texts, nfc=False)) == whole


@pytest.mark.parametrize("name", ["gemma3_262k", "gemma2", "llama2", "qwen2_151k"])
def test_units_of_single_texts(real_bases: dict[str, BaseTokenizer], real_texts: list[str], name: str) -> None:
    base = real_bases[name]
    counting = Counting(cutter_of(base), nfc=False)
    for text in real_texts[-len(ODD) - 20 :]:
        units = tally([(text, 1.0)], counting, max_units=1_000_000, workers=1)
        assert tokens_of(base, units) == whole_tokens(base, [text]), text


# --- A tiny tokenizer


@pytest.fixture(scope="module")
def base(tiny_tokenizer: Path) -> BaseTokenizer:
    return load(tiny_tokenizer)


def test_counts_by_hand(base: BaseTokenizer) -> None:
    assert count_units(base, [("가 나 가", 1.0), ("가 나", 0.5)]) == {"가": 1.5, "▁나": 1.5, "▁가": 1.0}


def test_nfc_changes_what_is_counted_only(base: BaseTokenizer) -> None:
    decomposed = unicodedata.normalize("NFD", "한국")
    assert counted(base, [decomposed]) == {"한국": 1}
    assert counted(base, [decomposed], nfc=False) == {decomposed: 1}


def test_no_text(base: BaseTokenizer) -> None:
    assert counted(base, []) == counted(base, ["", ""]) == {}


WORDS = [f"{chr(0xAC00 + n * 37 % 11_172)}{chr(0xAC00 + n * 101 % 11_172)}" for n in range(3_000)]
# Word n comes 3,000 / (n + 1) times, in texts of changing weight.
ZIPF = [(" ".join(WORDS[: 3_000 // n]), 0.1 + n % 3) for n in range(1, 3_001)]


def test_spilt_counts_are_the_same(
    base: BaseTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = count_units(base, ZIPF, workers=1)
    monkeypatch.setattr(tally_module, "BATCH_CHARACTERS", 2_000)
    kept = count_units(base, ZIPF, workers=1, max_units=500, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    threshold = max(count for unit, count in expected.items() if unit not in kept)
    assert kept == {unit: count for unit, count in expected.items() if count > threshold}
    assert 400 < len(kept) <= 500
    assert "of the text, are left out" in capsys.readouterr().out


def test_any_number_of_workers_counts_the_same(base: BaseTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = count_units(base, ZIPF, workers=1)
    monkeypatch.setattr(tally_module, "BATCH_CHARACTERS", 5_000)
    monkeypatch.setattr(tally_module, "ALONE_BATCHES", 1)
    one, two = (count_units(base, ZIPF, workers=workers) for workers in (1, 2))
    assert whole == one == two
    assert list(one) == list(two)


def test_files_are_removed_on_failure(base: BaseTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally_module, "BATCH_CHARACTERS", 100)

    def broken() -> Any:
        yield from ZIPF[:10]
        raise OSError("no more text")

    with pytest.raises(OSError, match="no more text"):
        count_units(base, broken(), workers=1, max_units=10, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lost_worker_is_one_line(base: BaseTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally_module, "BATCH_CHARACTERS", 5_000)
    monkeypatch.setattr(tally_module, "ALONE_BATCHES", 1)
    monkeypatch.setattr(tally_module, "_start", os._exit)
    with pytest.raises(TokenizerError, match="a worker process ended early"):
        count_units(base, ZIPF, workers=2)


# --- Which characters


@pytest.mark.parametrize(
    ("script", "inside", "outside"),
    [("Hangul", "가ᄒㄱ", "漢ak ㎎1"), ("Han", "漢檢", "가あ"), ("Latin", "aé", "가µ"), ("Thai", "กั", "ລ")],
)
def test_wanted_characters(script: str, inside: str, outside: str) -> None:
    wanted = wanted_characters(frozenset({script}))
    assert all(map(wanted, inside))
    assert not any(map(wanted, outside))


def test_every_script_has_letters() -> None:
    names = {unicodedata.name(chr(code), "").split(" ")[0] for code in range(0x20000)}
    assert {script.upper() for script in SCRIPTS} - names == {"HAN"}


@pytest.mark.parametrize(
    ("scripts", "message"),
    [
        (["Hangeul"], "did you mean 'Hangul'?"),
        (["hangul"], "did you mean 'Hangul'?"),
        (["Klingon"], "examples: Hangul, Han, Thai"),
        (["Hangul", "units"], "BPE merges know no context"),
    ],
)
def test_unknown_scripts(scripts: list[str], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        TokenizerSettings(new_tokens=10, scripts=scripts)
    assert message in str(error.value)
    assert TokenizerSettings(new_tokens=10, scripts=["Hangul", "Han"]).characters_first is False


# --- The benchmark's own parts


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks/tokenizer.py"
    spec = importlib.util.spec_from_file_location("tokenizer_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))  # as where it is run
        spec.loader.exec_module(module)
    return module


def test_plain_greedy_bpe(benchmark: ModuleType) -> None:
    runs = {("a", "b", "c"): 3.0, ("a", "b"): 2.0, ("a", "a", "a"): 4.0}
    learnt = benchmark.plain_greedy_bpe(runs, 3)
    assert learnt == [("a", "a", 8.0), ("a", "b", 5.0), ("aa", "a", 4.0)]
    assert learnt == list(islice(merge_greedily(runs, 1, lambda piece: True), 3))


def test_naive_counts(benchmark: ModuleType, base: BaseTokenizer) -> None:
    ids = base.encode(["가 나", "가 나"])[0]
    counts = benchmark.naive_counts(lambda line: base.encode([line])[0], ["가 나\n가 나"], pairs=False)
    assert counts == {token: 2 * count for token, count in Counter(ids).items()}


def test_made_up_corpus(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_corpus(tmp_path / "corpus.txt", 10_000)
    words = Counter((tmp_path / "corpus.txt").read_text("utf-8").split())
    assert (tmp_path / "corpus.txt").stat().st_size >= 10_000
    assert words.most_common(1)[0][1] > 100
    assert all("가" <= letter <= "힣" for word in words for letter in word)
