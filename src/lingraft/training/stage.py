"""One stage from checkpoint folder to checkpoint folder, with the proof of what it changed.

load → choose what trains → loop → write a copy of the checkpoint with what was learnt → prove the rest unchanged.
The model that trains is only as whole as it has to be: frozen weights may be held in 4 bits, images' towers not at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from lingraft.model.changes import Changes, Proof, Rows, check_writable, write_changed
from lingraft.model.load import DTYPES, body_parameters, input_matrix, load, output_matrix, to_device
from lingraft.model.lora import adapters, add_lora, lora_parameters
from lingraft.model.rows import TrainableRows, VocabularyTraining
from lingraft.training.batches import Batches
from lingraft.training.loop import LoopResult, train
from lingraft.training.loss import NextTokenLoss
from lingraft.training.optimizer import parameter_groups
from lingraft.training.settings import StageSettings

Loss = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class StageResult:
    """What a stage did: the loop's log, the numbers of trained values, and what its checkpoint was proven to be."""

    loop: LoopResult
    trainable: dict[str, int]
    proof: Proof


def run_stage(
    source: Path,
    out: Path,
    work: Path,
    settings: StageSettings,
    batches: Batches,
    new_ids: list[int],
    loss: Loss = NextTokenLoss,
    validation: Batches | None = None,
    events: Path | None = None,
) -> StageResult:
    """Train one stage from the checkpoint `source` into the new checkpoint folder `out`.

    Args:
        work: holds the stage's own checkpoints; a killed stage goes on from there.
        new_ids: ids of the grafted tokens, whose rows are the "new" rows.
        loss: makes the loss from the model once its trainable parts are in.
        validation: held-out text, see `loop.train`; events: folder for TensorBoard.
    Raises:
        TrainingError: the loss went wrong. AssertionError: a frozen tensor changed (a defect of ours).
    """
    accelerator = _accelerator()
    model = _load(source, settings)
    if settings.quantise == "none":
        to_device(model, accelerator.device)
    trained = _Trained(model, settings, new_ids)
    check_writable(source, trained.targets, trained.replaced)
    result = trained.train(batches, work, loss, accelerator, validation, events)
    sizes, changes = trained.sizes(), trained.changes()
    del model, trained  # the rest of it is not needed any more
    return StageResult(result, sizes, write_changed(source, out, changes, new_ids))


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
    trained = _Trained(model, settings, new_ids)
    result = trained.train(batches, work, loss, _accelerator())
    trained.vocabulary.restore()
    return result


def _load(source: Path, settings: StageSettings) -> PreTrainedModel:
    """The model in the precision that the stage computes in; its vocabulary as narrow as it is stored.

    Rows are converted when they are used. On a CPU, what is not converted stays in the file, of which only the rows
    that are looked up are read.
    """
    dtype = DTYPES[settings.precision]
    if settings.quantise != "none":
        return load(source, dtype, settings.quantise, vision=False)
    model = load(source, vision=False)
    vocabulary = {id(input_matrix(model)), id(output_matrix(model))}
    for parameter in model.parameters():
        if id(parameter) not in vocabulary or dtype.itemsize < parameter.dtype.itemsize:
            parameter.data = parameter.data.to(dtype)
    _set_constants(model, dtype)
    return model


def _set_constants(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Constants that no checkpoint has (Gemma's √D), as a model made in `dtype` rounds them."""
    config = copy.deepcopy(model.config)
    for section in (config, config.get_text_config()):
        section.dtype = dtype
    with init_empty_weights(include_buffers=False):
        made = type(model)._from_config(config)
    stored = model.state_dict().keys()
    constants = dict(made.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in stored:
            buffer.data = constants[name]


def _accelerator() -> Accelerator:
    return Accelerator(cpu=not torch.cuda.is_available())


class _Trained:
    """The parameters that a stage trains, put into the model.

    targets: names of the modules with adapters; replaced: the layers' own parameters, by name.
    """

    def __init__(self, model: PreTrainedModel, settings: StageSettings, new_ids: list[int]) -> None:
        torch.manual_seed(settings.seed)
        self.model, self.settings = model, settings
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.targets: list[str] = []
        self.replaced: dict[str, nn.Parameter] = {}
        if settings.lora:
            lora = settings.lora
            self.targets = add_lora(
                model,
                r=lora.r,
                alpha=lora.alpha,
                dropout=lora.dropout,
                targets=lora.targets,
                rank_stabilised=lora.rank_stabilised,
            )
        elif settings.layers == "all":
            self.replaced = body_parameters(model)
            for parameter in self.replaced.values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self.layers = self.replaced | lora_parameters(model)
        dtype = DTYPES[settings.precision]
        self.vocabulary = VocabularyTraining(model, settings.input_rows, settings.output_rows, new_ids, dtype)
        self.rows = self.vocabulary.parameters()

    def train(
        self,
        batches: Batches,
        work: Path,
        loss: Loss,
        accelerator: Accelerator,
        validation: Batches | None = None,
        events: Path | None = None,
    ) -> LoopResult:
        """Train them through the loop."""
        if self.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        groups = parameter_groups(self.rows.values(), self.layers.values(), self.settings)
        parameters = self.rows | self.layers
        result = train(
            loss(self.model), groups, parameters, batches, self.settings, work, accelerator, validation, events
        )
        self.model.gradient_checkpointing_disable()
        accelerator.free_memory()
        return result

    def sizes(self) -> dict[str, int]:
        """Numbers of trainable values: in rows, and in layers or adapters."""
        sizes = {name: values.numel() for name, values in self.rows.items()}
        layers = sum(p.numel() for p in self.layers.values())
        return sizes | ({"lora" if self.settings.lora else "layers": layers} if layers else {})

    def changes(self) -> Changes:
        """What was learnt."""
        vocabulary = self.vocabulary
        return Changes(
            input=_learnt(vocabulary.input),
            output=None if vocabulary.tied else _learnt(vocabulary.output),
            adapters=adapters(self.model),
            parameters=self.replaced,
        )


def _learnt(rows: TrainableRows | None) -> Rows | None:
    if rows is None:
        return None
    return Rows(None if rows.ids is None else rows.ids.tolist(), rows.values.detach())
