"""Does the device wait for its data? The loader alone, the parts before it, and a training step beside it.

    python benchmarks/input.py                     # about 4 minutes on two cores

Reads the project's data folder (../shared/data, or LINGRAFT_DATA) with the real Gemma 3 tokenizer: Korean health law,
film reviews, names of diseases, procedures and devices, and English medical answers. Prints, in this order:

- tokenisation into the memory-mapped cache, with one and two of the tokenizer's threads (a process each, median of 3);
- the share of padding with packing and without it, by source, and the tokens/s that the loader makes of them;
- seconds to lay out a stage of 5 million documents;
- the share of its time that a stage on Gemma 3 270M's shape waits for its batches, 512 tokens a step, through the real
  loop, in the stage whose steps are the shortest (new output rows, bfloat16).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import DATA, sources
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from lingraft.families.shapes import SHAPES
from lingraft.recipe import Stage, Trains
from lingraft.steps.batches import encode
from lingraft.steps.stage import stage_settings
from lingraft.training.batches import Batches, MicroBatch, mixture, pack
from lingraft.training.stage import train_rows
from lingraft.training.tokens import Tokens, lengths_of, write_tokens

ROWS_PER_STEP, SEQUENCE_LENGTH = 16, 2048  # the recipes' defaults
NEW_IDS = list(range(256_001, 262_144))  # Gemma 3's unused ids
MANY = 5_000_000

STAGE = Stage(
    name="new-output-rows",
    train=Trains(output_rows="new"),
    batch_size=1,
    gradient_accumulation_steps=1,
    micro_batch=1,
    checkpoint_seconds=1e9,
)


def write_corpus(folder: Path) -> list[str]:
    """The texts as a corpus step writes them, one file a source; returns the sources' names."""
    with gzip.open(DATA / "en-medical/medquad.jsonl.gz", "rt", encoding="utf-8") as lines:
        answers = [text for line in lines if (text := json.loads(line)["answer"])]
    found = sources() | {"answers": answers}
    (folder / "train").mkdir(parents=True)
    for name, texts in found.items():
        with open(folder / "train" / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number, text in enumerate(texts, 1):
                file.write(json.dumps({"text": text, "id": f"{name}#{number}"}, ensure_ascii=False) + "\n")
    return list(found)


def tokenizer() -> PreTrainedTokenizerFast:
    """The real Gemma 3 tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_bytes(gzip.decompress((DATA / "tokenizers/gemma3_262k/tokenizer.json.gz").read_bytes()))
        return PreTrainedTokenizerFast(
            tokenizer_file=str(file), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        )


def tokenise(work: Path, name: str) -> float:
    """Tokenise a source into `work/tokens/<name>`; its seconds, without those that the tokenizer takes to load."""
    loaded = tokenizer()
    place = work / "tokens" / name
    place.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    write_tokens(place, encode(work / "corpus", "train", name, loaded))
    return time.perf_counter() - start


def measure_tokenisation(work: Path, names: list[str]) -> None:
    """Each number of threads in a process of its own: the library's pool is made once."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for threads, measured in seconds.items():
            command = [sys.executable, __file__, "--tokenise", str(work), *names]
            environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
            shown = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured.append(float(shown))
    tokens = sum(int(lengths_of(Tokens(work / "tokens" / name, name)).sum()) for name in names)
    for threads, measured in seconds.items():
        rate = tokens / statistics.median(measured)
        print(
            f"tokenising     {threads} thread{'s' * (threads > 1):1}  {rate / 1e6:6.2f} M tokens/s  ({tokens:,} tokens)"
        )


def measure_loader(work: Path, names: list[str]) -> None:
    """Padding, and tokens/s of the loader with nothing else to do."""
    found = {name: Tokens(work / "tokens" / name, name) for name in names}
    print(f"\n{'':15}{'documents':>10}{'tokens':>12}{'padding packed':>16}{'single':>9}{'M tokens/s':>13}{'single':>9}")
    for name, groups in ({n: {n: t} for n, t in found.items()} | {"all together": found}).items():
        documents = sum(map(len, groups.values()))
        tokens = {n: int(lengths_of(t).sum()) for n, t in groups.items()}
        padding, rates = [], []
        for packing in (True, False):
            laid_out = Batches(
                groups,
                {n: float(size) for n, size in tokens.items()},
                sequence_length=SEQUENCE_LENGTH,
                rows_per_step=ROWS_PER_STEP,
                packing=packing,
                pad=0,
                bos=2,
                seed=0,
                epochs=1,
            )
            start, read, padded = time.perf_counter(), 0, 0
            for _, micro_batches in laid_out.from_step(0, micro_batch=4):
                read += sum(batch.size for batch in micro_batches)
                padded += sum(batch.input_ids_BT.numel() for batch in micro_batches)
            rates.append(read / (time.perf_counter() - start) / 1e6)
            padding.append(1 - read / padded)
        print(
            f"{name:15}{documents:>10,}{sum(tokens.values()):>12,}{padding[0]:>16.2%}{padding[1]:>9.2%}"
            f"{rates[0]:>13.2f}{rates[1]:>9.2f}"
        )


def measure_layout(work: Path, names: list[str]) -> None:
    """A stage of `MANY` documents, as long as the real ones are."""
    real = np.concatenate([lengths_of(Tokens(work / "tokens" / name, name)) for name in names])
    lengths = np.minimum(np.random.default_rng(0).choice(real, MANY), SEQUENCE_LENGTH)
    groups = [lengths[: MANY // 10], lengths[MANY // 10 :]]
    start = time.perf_counter()
    order = mixture(groups, [0.1, 0.9], int(lengths.sum()), seed=0)
    mixed = time.perf_counter()
    places = pack(lengths[order], SEQUENCE_LENGTH, ROWS_PER_STEP)
    end = time.perf_counter()
    print(
        f"\nlaying out     {len(order):,} documents, {lengths[order].sum() / 1e9:.2f} G tokens, "
        f"{len(places.starts_S) - 1:,} steps: mixture {mixed - start:.1f} s, packing {end - mixed:.1f} s"
    )


class WatchedBatches(Batches):
    """Batches that sum up how long the loop waited for each step's."""

    def from_step(self, first: int, micro_batch: int = 1) -> Iterator[tuple[int, list[MicroBatch]]]:
        self.waited: list[float] = []
        steps = super().from_step(first, micro_batch)
        for _ in range(first, len(self)):
            start = time.perf_counter()
            ready = next(steps)
            self.waited.append(time.perf_counter() - start)
            yield ready


def measure_waiting(work: Path, names: list[str], steps: int, tokens_per_step: int) -> None:
    """A short stage on random weights of Gemma 3 270M's shape, untied."""
    found = {name: Tokens(work / "tokens" / name, name) for name in names}
    batches = WatchedBatches(
        found,
        {name: float(lengths_of(tokens).sum()) for name, tokens in found.items()},
        sequence_length=tokens_per_step,
        rows_per_step=1,
        pad=0,
        bos=2,
        seed=0,
        budget_tokens=steps * tokens_per_step,
    )
    shape: dict[str, Any] = SHAPES["gemma-3-270m"] | {"tie_word_embeddings": False}
    torch.manual_seed(0)
    model = Gemma3ForCausalLM._from_config(Gemma3TextConfig(**shape), dtype=torch.bfloat16)
    settings = stage_settings(STAGE, shape["model_type"], seed=0)
    result = train_rows(model, settings, batches, NEW_IDS, work)
    seconds, waited = result.seconds / result.steps, batches.waited
    print(
        f"\ntraining       {result.steps} steps of {result.tokens / result.steps:.0f} tokens, {seconds:.2f} s each, "
        f"{result.tokens / result.seconds:,.0f} tokens/s on {torch.get_num_threads()} threads\n"
        f"waiting        {sum(waited) / result.seconds:.4%} of the time; the first step {waited[0] * 1e3:.1f} ms, "
        f"a later one {statistics.median(waited[1:]) * 1e3:.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a training step")
    parser.add_argument("--tokenise", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tokenise:
        folder, *names = arguments.tokenise
        print(sum(tokenise(Path(folder), name) for name in names))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = write_corpus(work / "corpus")
        measure_tokenisation(work, names)
        measure_loader(work, names)
        measure_layout(work, names)
        measure_waiting(work, names, arguments.steps, arguments.tokens)


if __name__ == "__main__":
    main()
