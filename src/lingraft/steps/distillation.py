"""Token distillation inside the embeddings step: settings, batches and figures for `training.token_distillation`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lingraft.model.load import input_matrix, load, load_tokenizer, read_config, to_device
from lingraft.recipe import Distillation, Recipe, Stage, Trains
from lingraft.steps.batches import encode, make_batches
from lingraft.steps.context import Context, grafted_pieces
from lingraft.steps.stage import stage_seed, stage_settings
from lingraft.training.batches import Batches, MicroBatch, to_micro_batch, together
from lingraft.training.settings import StageSettings
from lingraft.training.stage import run_stage
from lingraft.training.token_distillation import TokenDistillationLoss, cut_by_old_tokens, hidden_state_error
from lingraft.training.tokens import Documents, Pieces

CHECKED_TEXTS = 64  # held-out texts on which the hidden states are compared


def distillation_stage(recipe: Recipe, settings: Distillation) -> Stage:
    """The pass as a training stage: new input rows alone, on target text, otherwise as `training` says."""
    own = {"epochs", "tokens", "learning_rate", "embedding_learning_rate", "keep", "validate_every"}
    shared = recipe.training.model_dump(exclude=own)
    return Stage(
        **shared,
        name="token-distillation",
        train=Trains(input_rows="new"),
        data={recipe.languages.target: 1.0},
        tokens=settings.tokens,
        learning_rate=settings.learning_rate,
    )


class TokenDistillation:
    """Everything that the pass needs for the grafted checkpoint `folder`.

    No document is longer than `training.sequence_length` in the base's own tokens, however few it has in the new ones.
    """

    def __init__(self, context: Context, settings: Distillation, folder: Path) -> None:
        self.choice = settings
        tokens = grafted_pieces(folder)
        self.new_ids = [token.id for token in tokens]
        self.old_ids = [token.base_ids for token in tokens]
        self._tokenizer = load_tokenizer(folder)
        self._lengths_V = np.ones(max(len(self._tokenizer), *self.new_ids) + 1, np.int64)
        self._lengths_V[self.new_ids] = [len(ids) for ids in self.old_ids]
        stage = distillation_stage(context.recipe, settings)
        self._sequence_length = stage.sequence_length
        self.settings: StageSettings = stage_settings(
            stage, read_config(folder).model_type, stage_seed(context.recipe, 0)
        )
        self.batches: Batches = make_batches(context, stage, self.settings, folder, self._cut)[0]
        self._held_out = self._held_out_batches(context, stage.batch_size)

    def loss(self, model: PreTrainedModel) -> TokenDistillationLoss:
        """The loss for a model that holds its trainable rows."""
        return self._loss(model, self.choice.next_token_weight)

    def figures(self, model: PreTrainedModel) -> dict[str, float]:
        """How far the new input rows are: hidden-state error on held-out text, and the rows' norms."""
        loss = self._loss(model, 0.0)
        loss.segmentation.to(input_matrix(model).device)
        norms_N = input_matrix(model).detach()[self.new_ids].float().norm(dim=1)
        return {
            "hidden_state_error": hidden_state_error(loss, self._held_out),
            "median_norm": float(norms_N.median()),
            "largest_norm": float(norms_N.max()),
        }

    def _loss(self, model: PreTrainedModel, next_token_weight: float) -> TokenDistillationLoss:
        layer = self.choice.layer
        return TokenDistillationLoss(
            model, self.new_ids, self.old_ids, layer=layer, next_token_weight=next_token_weight
        )

    def _cut(self, documents: Documents) -> Pieces:
        return cut_by_old_tokens(documents, self._lengths_V, self._sequence_length, self._tokenizer.bos_token_id)

    def _held_out_batches(self, context: Context, batch_size: int) -> list[MicroBatch]:
        recipe = context.recipe
        pieces = self._cut(
            [
                document
                for source in recipe.corpus.sources
                if source.language == recipe.languages.target and source.format == "text"
                for document in islice(encode(context.corpus, "held-out", source.name, self._tokenizer), CHECKED_TEXTS)
            ]
        )
        rows = ([pieces[i]] for i in range(len(pieces)))
        return [to_micro_batch(group, 0) for group in together(rows, batch_size * self._sequence_length)]


def run(context: Context, settings: Distillation, source: Path, out: Path, work: Path) -> dict[str, Any]:
    """Distil the new input rows of the grafted checkpoint `source` into the new checkpoint `out`.

    A killed pass goes on from `work`; everything but the new input rows is proven unchanged (`training.stage`).
    """
    work.mkdir(parents=True, exist_ok=True)
    distillation = TokenDistillation(context, settings, source)
    before = _loaded(source, distillation.figures)
    result = run_stage(
        source,
        out,
        work,
        distillation.settings,
        distillation.batches,
        distillation.new_ids,
        distillation.loss,
        events=context.events / "03-embeddings",
    )
    log = result.loop.log
    every = max(1, len(log) // 100)
    return {
        "tokens": result.loop.tokens,
        "steps": result.loop.steps,
        "seconds": result.loop.seconds,
        "loss": [[entry["step"], entry["loss"]] for entry in log[::every]],
        "before": before,
        "after": _loaded(out, distillation.figures),
        "changed_tensors": result.proof.changed,
        "unchanged_tensors": result.proof.unchanged,
    }


def _loaded(folder: Path, measure: Callable[[PreTrainedModel], dict[str, float]]) -> dict[str, float]:
    return measure(to_device(load(folder), "cuda" if torch.cuda.is_available() else "cpu"))
