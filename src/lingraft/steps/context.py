"""What every step is given: the recipe, the run's folder, and where the other steps' results lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

from lingraft.corpus.build import Part, read_documents
from lingraft.recipe import Recipe, Stage
from lingraft.steps.base import Base
from lingraft.tokenizer.graft import GRAFT_FILE, GraftedPiece, read_graft


@dataclass(frozen=True)
class Context:
    """A run in progress."""

    recipe: Recipe
    run: Path
    base: Base

    @property
    def corpus(self) -> Path:
        return self.run / "01-corpus"

    @property
    def tokenizer(self) -> Path:
        return self.run / "02-tokenizer"

    @property
    def events(self) -> Path:
        """For TensorBoard, a folder a stage."""
        return self.run / "tensorboard"

    def texts(self, part: Part, language: str, limit: int | None = None) -> Iterator[str]:
        """Plain texts of a language from the corpus step, a document of each source in turn until all are read."""
        readers = [
            read_documents(self.corpus, part, source.name)
            for source in self.recipe.corpus.sources
            if source.language == language and source.format == "text"
        ]
        rounds = zip_longest(*readers)
        documents = (document for one_of_each in rounds for document in one_of_each if document is not None)
        return (document["text"] for document in islice(documents, limit))

    def languages(self) -> list[str]:
        """Target and old language, target first, without repeats."""
        return list(dict.fromkeys((self.recipe.languages.target, self.recipe.languages.old)))


def grafted_pieces(folder: Path) -> list[GraftedPiece]:
    """The grafted tokens of a checkpoint or tokenizer folder; empty where nothing was grafted."""
    return read_graft(folder) if (folder / GRAFT_FILE).is_file() else []


def new_token_ids(folder: Path) -> list[int]:
    """Ids of the grafted tokens of a checkpoint or tokenizer folder."""
    return [piece.id for piece in grafted_pieces(folder)]


def stage_folder(index: int, stage: Stage, first: int) -> str:
    """The folder of stage number `index` (from 1), for example `04-stage-1-new-input-rows`."""
    return f"{first + index - 1:02d}-stage-{index}-{stage.name}"
