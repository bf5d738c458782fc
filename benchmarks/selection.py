"""Which pieces are worth a slot: ways to choose 6,143 new tokens for Gemma 3, measured on held-out Korean text.

    python benchmarks/selection.py                 # about 3 minutes on one core

Reads the project's data folder (../shared/data, or LINGRAFT_DATA): health law, disease names (KCD), procedures and
devices (EDI), film reviews. Every tenth text, chosen by its hash, is held out. Prints the share of tokens saved on it.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Iterator
from typing import Any

from data import gemma3, sources

from lingraft.families import family
from lingraft.tokenizer.graft import graft, place
from lingraft.tokenizer.learn import balance, learn

SLOTS = 6_143
PLAIN: dict[str, Any] = {"max_words": 1, "characters_first": True, "exponent": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain greedy, characters first": PLAIN,
    "+ characters by worth": PLAIN | {"characters_first": False},
    "+ up to 4 words a piece": PLAIN | {"characters_first": False, "max_words": 4},
    "+ balance 0.7": {"max_words": 4, "exponent": 0.7},
    "+ balance 0.5 (the default)": {"max_words": 4, "exponent": 0.5},
    "+ balance 0.3": {"max_words": 4, "exponent": 0.3},
    "balance 0.5, single words": {"max_words": 1, "exponent": 0.5},
    "balance 0.5, up to 2 words": {"max_words": 2, "exponent": 0.5},
}


def held_out(name: str, index: int) -> bool:
    """One text in ten."""
    return zlib.crc32(f"{name} {index}".encode()) % 10 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=SLOTS)
    slots = parser.parse_args().slots
    texts = sources()
    train = {n: [t for i, t in enumerate(ts) if not held_out(n, i)] for n, ts in texts.items()}
    test = {n: [t for i, t in enumerate(ts) if held_out(n, i)] for n, ts in texts.items()}
    base = gemma3()
    before = {name: sum(map(len, base.encode(lines))) for name, lines in test.items()}
    print(f"{sum(len(t) for ts in train.values() for t in ts):,} characters to learn from, {slots:,} slots")
    print(f"{'tokens saved on held-out text':34}{'learnt in':>10}" + "".join(f"{name:>12}" for name in test))
    for title, settings in SETTINGS.items():
        options = dict(settings)
        weights = balance({n: float(sum(map(len, ts))) for n, ts in train.items()}, options.pop("exponent"))

        def weighted(weights: dict[str, float] = weights) -> Iterator[tuple[str, float]]:
            return ((text, weights[name]) for name, lines in train.items() for text in lines)

        start = time.perf_counter()
        learnt = learn(base, weighted(), new_tokens=slots, scripts=frozenset({"Hangul"}), **options)
        seconds = time.perf_counter() - start
        grafted = graft(base, place(base, learnt, family=family("gemma3"))).tokenizer
        after = {name: sum(map(len, grafted.encode(lines))) for name, lines in test.items()}
        saved = "".join(f"{1 - after[name] / before[name]:>12.1%}" for name in test)
        print(f"{title:34}{seconds:>8.1f} s{saved}", flush=True)


if __name__ == "__main__":
    main()
