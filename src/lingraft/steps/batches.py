"""A stage's batches: the corpus as tokens, made once for each tokenizer, in the recipe's mixture."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lingraft.artifact import Hashes, key_of, publish, read_manifest
from lingraft.corpus.build import Part, read_documents
from lingraft.corpus.records import Record
from lingraft.errors import CorpusError
from lingraft.model.load import TOKENIZER_FILES, load_tokenizer
from lingraft.progress import track
from lingraft.prompts import encode_chat
from lingraft.recipe import Recipe, Source, Stage
from lingraft.steps.context import Context
from lingraft.training.batches import Batches
from lingraft.training.settings import StageSettings
from lingraft.training.tokens import Documents, Encoded, Tokens, lengths_of, no_longer_than, write_tokens

TOKENS_VERSION = 1  # raise it when the same text and tokenizer give other tokens, or lie on disk in another way
# Enough text for all of the tokenizer's threads to be busy; its encodings take a few hundred bytes a token.
BLOCK_CHARACTERS = 1_000_000
# Of a validation, at most: about the time of one optimiser step of a full-size stage, which has backward passes too.
VALIDATION_TOKENS = 100_000


def make_batches(
    context: Context,
    stage: Stage,
    settings: StageSettings,
    folder: Path,
    cut: Callable[[Documents], Documents] = lambda documents: documents,
) -> tuple[Batches, int]:
    """Tokenise the stage's documents with the folder's tokenizer and lay out its batches.

    A key of the stage's data that names a language shares its weight among that language's sources, in proportion to
    their tokens times their own weight. A chat longer than a row is left out, never cut.

    Args:
        cut: splits documents for a loss that needs them shorter than a row of the batch.
    Returns:
        The batches, and how many chats were left out.
    """
    tokenizer = load_tokenizer(folder)
    mixture = _Mixture(context.recipe, stage)
    for key, sources in context.recipe.sources_for(stage).items():
        if not mixture.add(key, ((s, cut(training_tokens(context, s.name, folder, tokenizer))) for s in sources)):
            raise CorpusError(
                f"stage {stage.name}: nothing to train on from {key!r}: it has no document, or only chats longer than "
                f"sequence_length {stage.sequence_length}; raise sequence_length or change data"
            )
    return mixture.batches(settings, tokenizer, stage.tokens, stage.epochs), mixture.left_out


def make_tokens(context: Context, stage: Stage, folder: Path) -> None:
    """Tokenise the stage's documents ahead of `make_batches`, in the process whose progress is shown."""
    tokenizer = load_tokenizer(folder)
    for sources in context.recipe.sources_for(stage).values():
        for source in sources:
            training_tokens(context, source.name, folder, tokenizer)


def validation_batches(context: Context, stage: Stage, settings: StageSettings, folder: Path) -> Batches:
    """Held-out documents in the stage's mixture: each of the largest group once, or about `VALIDATION_TOKENS`.

    Raises:
        CorpusError: the stage's data has none.
    """
    tokenizer = load_tokenizer(folder)
    mixture = _Mixture(context.recipe, stage)
    for key, sources in context.recipe.sources_for(stage).items():
        mixture.add(key, ((s, list(encode(context.corpus, "held-out", s.name, tokenizer))) for s in sources))
    if not mixture.groups:
        raise CorpusError(
            f"stage {stage.name}: there are no held-out documents of its data to validate on; raise corpus.held_out, "
            "or set keep: last and no validate_every"
        )
    return mixture.batches(settings, tokenizer, VALIDATION_TOKENS, epochs=1)


class _Mixture:
    """Documents by source, as they come together for a stage: `groups`, their weights, and the chats left out."""

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        self.recipe, self.stage = recipe, stage
        self.groups: dict[str, Documents] = {}
        self.shares: dict[str, float] = {}
        self.left_out = 0

    def add(self, key: str, sources: Iterable[tuple[Source, Documents]]) -> bool:
        """Share the weight of a key of the stage's data among its sources; whether they have any document."""
        sizes: dict[str, float] = {}
        for source, documents in sources:
            if source.format != "text":
                whole = no_longer_than(documents, self.stage.sequence_length)
                self.left_out += len(documents) - len(whole)
                documents = whole
            if len(documents):
                self.groups[source.name] = documents
                sizes[source.name] = source.weight * int(lengths_of(documents).sum())
        for name, size in sizes.items():
            share = self.recipe.stage_data(self.stage)[key] * size / sum(sizes.values())
            self.shares[name] = self.shares.get(name, 0.0) + share
        return bool(sizes)

    def batches(self, settings: StageSettings, tokenizer: Any, tokens: int | None, epochs: float | None) -> Batches:
        pad = tokenizer.pad_token_id
        return Batches(
            self.groups,
            self.shares,
            sequence_length=self.stage.sequence_length,
            rows_per_step=settings.rows_per_step,
            packing=settings.packing,
            pad=0 if pad is None else pad,
            bos=tokenizer.bos_token_id,
            seed=settings.seed,
            budget_tokens=tokens,
            epochs=epochs,
        )


def training_tokens(context: Context, source: str, folder: Path, tokenizer: Any) -> Tokens:
    """A source's training documents as tokens of `tokenizer`, which was loaded from `folder`.

    They are kept in the run's scratch folder, named by the hashes of text and tokenizer, for later stages and for a run
    that is resumed.
    """
    shelf = _shelf(context)
    shelf.mkdir(parents=True, exist_ok=True)
    with FileLock(shelf / ".lock"):
        hashes = Hashes(shelf / "hashes.json")
        key = _tokens_key(context, source, folder, hashes)
        hashes.save()
        place = shelf / key
        if not place.is_dir():
            corpus = read_manifest(context.corpus)
            assert corpus is not None, "the corpus step comes first"
            count = corpus["results"]["sources"][source]["train"]["documents"]
            documents = track(encode(context.corpus, "train", source, tokenizer), f"tokenising {source}", count)
            _write(documents, place, key)
    return Tokens(place, source)


def tokens_are_kept(context: Context, stage: Stage, folder: Path) -> bool:
    """Whether an earlier start of this run has left all of the stage's training documents as tokens."""
    shelf = _shelf(context)
    hashes = Hashes(shelf / "hashes.json")
    names = (source.name for sources in context.recipe.sources_for(stage).values() for source in sources)
    return shelf.is_dir() and all((shelf / _tokens_key(context, name, folder, hashes)).is_dir() for name in names)


def _shelf(context: Context) -> Path:
    return context.run / ".work" / "tokens"


def _tokens_key(context: Context, source: str, folder: Path, hashes: Hashes) -> str:
    """The name of a source's tokens: whatever decides them."""
    text = hashes.file(context.corpus / "train" / f"{source}.jsonl")
    cutter = hashes.files(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    return key_of(text=text, tokenizer=cutter, version=TOKENS_VERSION)


def _write(documents: Iterable[Encoded], place: Path, key: str) -> None:
    """Write the documents beside `place`, then move them there in one step; leaves nothing behind if that fails."""
    making = place.with_name(".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        write_tokens(making, documents)
        publish(making, place, {"key": key})
    finally:
        shutil.rmtree(making, ignore_errors=True)


def encode(corpus: Path, part: Part, source: str, tokenizer: Any) -> Iterator[Encoded]:
    """The documents of a source as tokens, in their order."""
    for are_chats, documents in groupby(read_documents(corpus, part, source), lambda document: "messages" in document):
        yield from (_encode_chats if are_chats else _encode_texts)(documents, tokenizer)


def _encode_chats(documents: Iterable[Record], tokenizer: Any) -> Iterator[Encoded]:
    for document in documents:
        ids, learnt = encode_chat(tokenizer, document["messages"])
        yield Encoded(np.array(ids, np.int32), np.array(learnt), document["id"])


def _encode_texts(documents: Iterable[Record], tokenizer: Any) -> Iterator[Encoded]:
    """BOS + text + EOS, as far as the tokenizer has them; everything after BOS is learnt.

    The library's own threads share a block (as many as the process may use cores, or RAYON_NUM_THREADS).
    """
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    for block in _blocks(documents):
        encodings = backend.encode_batch_fast([document["text"] for document in block], add_special_tokens=False)
        for document, encoding in zip(block, encodings, strict=True):
            ids = np.array([*head, *encoding.ids, *tail], np.int32)
            learnt = np.ones(len(ids), bool)
            learnt[: len(head)] = False
            yield Encoded(ids, learnt, document["id"])


def _blocks(documents: Iterable[Record]) -> Iterator[list[Record]]:
    """Runs of documents of about `BLOCK_CHARACTERS` together."""
    block: list[Record] = []
    characters = 0
    for document in documents:
        block.append(document)
        characters += len(document["text"])
        if characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block
