"""Counting and learning against the plain ways to do them, and the memory of counting a large corpus.

    python benchmarks/tokenizer.py             # a quarter of an hour on two cores, 1 GB in the temporary folder
    python benchmarks/tokenizer.py --quick     # about two minutes

Reads the project's data folder (../shared/data, or LINGRAFT_DATA): the Gemma 3 tokenizer, health law, disease names
(KCD), procedures (EDI) and film reviews. Times are CPU seconds of one thread, medians of paired runs.
"""

from __future__ import annotations

import argparse
import heapq
import os
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from data import gemma3, sources

from lingraft.tokenizer.count import Run, count_runs, count_units
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.merges import merge_greedily
from lingraft.tokenizer.pieces import wanted_characters

HANGUL = frozenset({"Hangul"})
Pair = tuple[str, str]


def seconds(function: Callable[[], Any]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


# --- Counting


def naive_counts(encode: Callable[[str], list[int]], texts: Iterable[str], pairs: bool) -> Counter[Any]:
    """The plain loop: encode each line, count its tokens or its pairs of neighbours."""
    counts: Counter[Any] = Counter()
    for text in texts:
        for line in text.split("\n"):
            ids = encode(line)
            counts.update(pairwise(ids) if pairs else ids)
    return counts


def benchmark_counting(base: BaseTokenizer, texts: list[str], runs: int) -> None:
    # Not at the top: every process that counts imports this file, too.
    from transformers import PreTrainedTokenizerFast

    transformers = PreTrainedTokenizerFast(tokenizer_object=base.tokenizer)

    def bare(line: str) -> list[int]:
        return base.tokenizer.encode(line, add_special_tokens=False).ids

    def wrapped(line: str) -> list[int]:
        return transformers.encode(line, add_special_tokens=False)

    loops = {
        "transformers encode, Counter of pairs": (wrapped, True),
        "transformers encode, Counter of tokens": (wrapped, False),
        "tokenizers encode, Counter of pairs": (bare, True),
        "tokenizers encode, Counter of tokens": (bare, False),
    }
    weighted = [(text, 1.0) for text in texts]
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        ours = seconds(lambda: count_units(base, weighted, workers=1))
        taken["ours"].append(ours)
        for name, (encode, pairs) in loops.items():
            taken[name].append(seconds(lambda: naive_counts(encode, texts, pairs)))  # noqa: B023
    characters = sum(map(len, texts))
    print(f"\ncounting {characters:,} characters, one core, median of {runs}")
    print(f"  ours: {characters / statistics.median(taken['ours']) / 1e6:.1f} million characters/s")
    for name in loops:
        ratio = statistics.median(naive / ours for naive, ours in zip(taken[name], taken["ours"], strict=True))
        speed = characters / statistics.median(taken[name]) / 1e6
        print(f"  {name}: {speed:.2f} million characters/s; ours / naive = {ratio:.1f}")


# --- Learning


def plain_greedy_bpe(runs: Mapping[Run, float], merges: int) -> list[tuple[str, str, float]]:
    """The well-known learner (Sennrich et al. 2016): words with frequencies, counts of pairs kept up to date word by
    word, an index of the words that hold a pair, and a heap whose outdated entries are put back when they come up."""
    words, weights = [list(run) for run in runs], list(runs.values())
    counts: defaultdict[Pair, float] = defaultdict(float)
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += weights[index]
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    learnt: list[tuple[str, str, float]] = []
    while heap and len(learnt) < merges:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        learnt.append((*pair, -negative))
        born: set[Pair] = set()
        for index in where.pop(pair):
            for old in pairwise(words[index]):
                counts[old] -= weights[index]
            words[index] = _joined(words[index], pair)
            for new in pairwise(words[index]):
                counts[new] += weights[index]
                where[new].add(index)
                if pair[0] + pair[1] in new:
                    born.add(new)
        for new in born:
            heapq.heappush(heap, (-counts[new], new))
    return learnt


def _joined(word: list[str], pair: Pair) -> list[str]:
    joined: list[str] = []
    position = 0
    while position < len(word):
        found = word[position] == pair[0] and word[position + 1 : position + 2] == [pair[1]]
        joined.append(pair[0] + pair[1] if found else word[position])
        position += 1 + found
    return joined


def benchmark_learning(base: BaseTokenizer, texts: list[str], merges: int, runs: int) -> None:
    units = count_units(base, ((text, 1.0) for text in texts), workers=1)
    counted = count_runs(base, units, wanted_characters(HANGUL), frozenset())

    def ours() -> None:
        for _ in islice(merge_greedily(counted, 2, lambda piece: True), merges):
            pass

    taken = [(seconds(ours), seconds(lambda: plain_greedy_bpe(counted, merges))) for _ in range(runs)]
    mine, plain = (statistics.median(column) for column in zip(*taken, strict=True))
    ratio = statistics.median(plain / mine for mine, plain in taken)
    print(f"\nlearning {merges:,} merges from {len(counted):,} different runs, one core, median of {runs}")
    print(f"  ours {mine:.1f} s, plain greedy BPE in Python {plain:.1f} s; plain / ours = {ratio:.1f}")


# --- Memory


def write_corpus(path: Path, size_bytes: int) -> None:
    """Lines of random Hangul words, 2 to 5 syllables, by Zipf's law (exponent 1.2): never-ending rare words."""
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < size_bytes:
            ranks = generator.zipf(1.2, 100_000) % (1 << 40)
            for start in range(0, len(ranks), 20):
                line = " ".join(map(_word, ranks[start : start + 20].tolist())) + "\n"
                written += len(line.encode())
                file.write(line)


def _word(rank: int) -> str:
    """A word for each rank: frequent words are short."""
    syllables = []
    while rank or not syllables:
        rank, digit = divmod(rank, 2_350)
        syllables.append(chr(0xAC00 + digit * 4_751 % 11_172))
    return "".join(syllables)


def resident_bytes() -> int:
    """Memory of this process and its children: their proportional set size, which counts shared pages once."""
    pids = [os.getpid()]
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += map(int, task.read_text().split())
    return sum(_proportional_bytes(pid) for pid in pids)


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def benchmark_memory(base: BaseTokenizer, size_bytes: int, workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.txt"
        write_corpus(path, size_bytes)
        before = peak = resident_bytes()
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.25):
                peak = max(peak, resident_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        begin = time.monotonic()
        with path.open(encoding="utf-8") as lines:
            units = count_units(
                base, ((line.rstrip("\n"), 1.0) for line in lines), workers=workers, folder=Path(folder)
            )
        elapsed = time.monotonic() - begin
        ended.set()
        watcher.join()
        print(f"\ncounting {path.stat().st_size / 1e9:.2f} GB of made-up text with {workers} workers: {elapsed:.0f} s")
        gigabytes = f"{before / 1e9:.2f} GB before, at most {peak / 1e9:.2f} GB"
        print(f"  {len(units):,} words kept; memory of all processes: {gigabytes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the text, 100 MB, one run")
    parser.add_argument("--workers", type=int, default=2, help="processes that count the large corpus")
    parser.add_argument("--only", choices=["counting", "learning", "memory"], help="one part alone")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    base = gemma3()
    texts = [text for source in sources().values() for text in source][:: 10 if options.quick else 1]
    runs = 1 if options.quick else 3
    # Memory first, since the other parts leave theirs behind.
    if options.only in (None, "memory"):
        benchmark_memory(base, 10**8 if options.quick else 10**9, options.workers)
    if options.only in (None, "counting"):
        benchmark_counting(base, texts, runs)
    if options.only in (None, "learning"):
        benchmark_learning(base, texts, 2_000 if options.quick else 20_000, runs)


if __name__ == "__main__":
    main()
