"""One stage from checkpoint folder to checkpoint folder, with the proof of what it changed.

load → choose what trains → loop → write back → hash every tensor → save. A tensor (or part of a vocabulary matrix)
that the stage does not train must have the hash it had before, or the stage fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from lingraft.model.fingerprint import body_parameters, differences, expected_changes, fingerprint
from lingraft.model.load import DTYPES, input_matrix, load, output_matrix, save, to_device
from lingraft.model.lora import add_lora, lora_parameters, merge, take_off, target_modules
from lingraft.model.rows import TrainableRows, VocabularyTraining
from lingraft.training.batches import Batches
from lingraft.training.loop import LoopResult, train
from lingraft.training.loss import NextTokenLoss
from lingraft.training.settings import StageSettings

Loss = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class StageResult:
    """What a stage did: the loop's log, and how many tensors changed and were proven unchanged."""

    loop: LoopResult
    trainable: dict[str, int]
    changed: list[str]
    unchanged: int


def run_stage(
    source: Path,
    out: Path,
    work: Path,
    settings: StageSettings,
    batches: Batches,
    new_ids: list[int],
    loss: Loss = NextTokenLoss,
) -> StageResult:
    """Train one stage from the checkpoint `source` into the new checkpoint folder `out`.

    Args:
        work: holds the stage's own checkpoints; a killed stage goes on from there.
        new_ids: ids of the grafted tokens, whose rows are the "new" rows.
        loss: makes the loss from the model once its trainable parts are in.
    Raises:
        TrainingError: the loss went wrong. AssertionError: a frozen tensor changed (a defect of ours).
    """
    torch.manual_seed(settings.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    quantise = settings.lora.quantise if settings.lora else "none"
    model = load(source)
    before = fingerprint(model, new_ids)
    stored_dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    dtype = DTYPES[settings.precision]
    in_place = quantise == "none" and all(p.dtype == dtype for p in model.parameters())
    if not in_place:
        del model  # never two of them in memory
        model = load(source, dtype, quantise)
    if quantise == "none":
        to_device(model, accelerator.device)

    trained = _Trained(model, settings, new_ids)
    loop = _train(trained, model, settings, batches, work, loss, accelerator)
    trainable = trained.sizes()
    changes = trained.finish()
    if in_place:
        final = to_device(model, "cpu")
    else:
        del model, trained
        final = load(source)
    changes.apply(final, stored_dtypes)

    after = fingerprint(final, new_ids)
    changed = differences(before, after)
    targets = target_modules(final, settings.lora.targets) if settings.lora else []
    allowed = expected_changes(final, settings.input_rows, settings.output_rows, settings.layers, targets)
    assert changed <= allowed, f"stage {settings.name} changed frozen tensors: {sorted(changed - allowed)}"
    save(final, out, companions=source)
    return StageResult(loop, trainable, sorted(changed), len(after) - len(changed))


def train_rows(
    model: PreTrainedModel,
    settings: StageSettings,
    batches: Batches,
    new_ids: list[int],
    work: Path,
    loss: Loss = NextTokenLoss,
) -> LoopResult:
    """Train vocabulary rows of a model in memory, in place: a stage without folders, for short comparisons.

    Args:
        work: holds checkpoints, as in `run_stage`.
    """
    assert settings.layers == "none"
    torch.manual_seed(settings.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    trained = _Trained(model, settings, new_ids)
    result = _train(trained, model, settings, batches, work, loss, accelerator)
    trained.finish().apply(model, {})
    return result


def _train(
    trained: _Trained,
    model: PreTrainedModel,
    settings: StageSettings,
    batches: Batches,
    work: Path,
    loss: Loss,
    accelerator: Accelerator,
) -> LoopResult:
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    result = train(loss(model), trained.groups(), trained.parameters, batches, settings, work, accelerator)
    model.gradient_checkpointing_disable()
    accelerator.free_memory()
    return result


@dataclass(frozen=True)
class _Changes:
    """Everything a stage learnt, apart from the model it was learnt in."""

    input_rows: TrainableRows | None
    output_rows: TrainableRows | None
    deltas: dict[str, Tensor]
    layers: dict[str, nn.Parameter]

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, stored_dtypes: dict[str, torch.dtype]) -> None:
        """Write it into a model of the same shape, in the precision that the checkpoint is stored in."""
        if self.input_rows is not None:
            self.input_rows.write_to(input_matrix(model))
        if self.output_rows is not None:
            self.output_rows.write_to(output_matrix(model))
        merge(model, self.deltas)
        for name, value in self.layers.items():
            parameter = model.get_parameter(name)
            parameter.data = value.detach().to(parameter.device, stored_dtypes[name])


class _Trained:
    """The parameters that a stage trains, put into the model and taken out again."""

    def __init__(self, model: PreTrainedModel, settings: StageSettings, new_ids: list[int]) -> None:
        self.model, self.settings = model, settings
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if settings.lora:
            lora = settings.lora
            add_lora(
                model,
                r=lora.r,
                alpha=lora.alpha,
                dropout=lora.dropout,
                targets=lora.targets,
                rank_stabilised=lora.rank_stabilised,
            )
        self.layers = lora_parameters(model)
        if settings.layers == "all":
            self.layers = body_parameters(model)
            for parameter in self.layers.values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self.vocabulary = VocabularyTraining(model, settings.input_rows, settings.output_rows, new_ids)
        self.rows = self.vocabulary.parameters()
        self.parameters: dict[str, nn.Parameter] = self.rows | self.layers

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups. Weight decay acts on matrices of the layers only: not on rows, norms or biases."""
        settings = self.settings
        rows_lr = settings.embedding_learning_rate or settings.learning_rate
        matrices = [p for p in self.layers.values() if p.dim() > 1]
        vectors = [p for p in self.layers.values() if p.dim() <= 1]
        groups = [
            {"name": "rows", "params": list(self.rows.values()), "lr": rows_lr, "weight_decay": 0.0},
            {
                "name": "layers",
                "params": matrices,
                "lr": settings.learning_rate,
                "weight_decay": settings.weight_decay,
            },
            {"name": "norms", "params": vectors, "lr": settings.learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def sizes(self) -> dict[str, int]:
        """Numbers of trainable values: in rows, and in layers or adapters."""
        sizes = {name: values.numel() for name, values in self.rows.items()}
        layers = sum(p.numel() for p in self.layers.values())
        return sizes | ({"lora" if self.settings.lora else "layers": layers} if layers else {})

    def finish(self) -> _Changes:
        """Give the model its plain modules back, and return what was learnt."""
        self.vocabulary.restore()
        deltas = take_off(self.model) if self.settings.lora else {}
        layers = self.layers if self.settings.layers == "all" else {}
        return _Changes(self.vocabulary.input, self.vocabulary.output, deltas, layers)
