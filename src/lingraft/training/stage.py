"""One stage from checkpoint folder to checkpoint folder, with the proof of what it changed.

load → choose what trains → loop → write a copy of the checkpoint with what was learnt → prove the rest unchanged.
The model that trains is only as whole as it has to be: frozen weights may be held in 4 bits, images' towers not at all.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from lingraft.model.changes import Changes, Proof, Rows, check_writable, write_changed
from lingraft.model.dimensions import dimensions
from lingraft.model.load import DTYPES, body_parameters, input_matrix, load, output_matrix
from lingraft.model.lora import adapters, add_lora, lora_parameters
from lingraft.model.rows import TrainableRows, VocabularyTraining
from lingraft.model.surgery import open_checkpoint
from lingraft.training.attention import blocks_on_cpu
from lingraft.training.batches import Batches
from lingraft.training.loop import LoopResult, train
from lingraft.training.loss import MixedPrecision, NextTokenLoss
from lingraft.training.memory import BYTES, stage_memory
from lingraft.training.optimizer import parameter_groups
from lingraft.training.parallel import Parallel, parallel_for
from lingraft.training.settings import StageSettings

Loss = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class Learnt:
    """A stage that has trained: the loop's log, the numbers of trained values, and what they are now."""

    loop: LoopResult
    trainable: dict[str, int]
    changes: Changes


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

    The arguments are those of `train_stage`.

    Raises:
        TrainingError: the loss went wrong. AssertionError: a frozen tensor changed (a defect of ours).
    """
    learnt = train_stage(source, work, settings, batches, new_ids, loss, validation, events)
    return write_stage(source, out, learnt, new_ids)


def train_stage(
    source: Path,
    work: Path,
    settings: StageSettings,
    batches: Batches,
    new_ids: list[int],
    loss: Loss = NextTokenLoss,
    validation: Batches | None = None,
    events: Path | None = None,
) -> Learnt:
    """Train one stage from the checkpoint `source`; several processes do so together (`lingraft.processes`).

    Args:
        work: holds the stage's own checkpoints; a killed stage goes on from there.
        new_ids: ids of the grafted tokens, whose rows are the "new" rows.
        loss: makes the loss from the model once its trainable parts are in.
        validation: held-out text, see `loop.train`; events: folder for TensorBoard.
    Returns:
        What was learnt; of several processes the first has its values.
    Raises:
        TrainingError: the loss went wrong.
    """
    parallel = parallel_for(settings)
    model = _load(source, settings)
    parallel.place(model, settings)
    trained = _Trained(model, settings, new_ids)
    check_writable(source, trained.targets, trained.replaced)
    result = trained.train(batches, work, loss, parallel, validation, events)
    learnt = Learnt(result, trained.sizes(), trained.changes(parallel))
    parallel.close()
    del model, trained
    gc.collect()  # the rest of the model is not needed any more
    return learnt


def write_stage(source: Path, out: Path, learnt: Learnt, new_ids: list[int]) -> StageResult:
    """Write the checkpoint `source` with what was learnt to the folder `out`, and prove the rest of it unchanged."""
    return StageResult(learnt.loop, learnt.trainable, write_changed(source, out, learnt.changes, new_ids))


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
    result = trained.train(batches, work, loss, Parallel())
    trained.vocabulary.restore()
    return result


def _load(source: Path, settings: StageSettings) -> PreTrainedModel:
    """The model in the precision that the stage computes in; its vocabulary as narrow as it is stored.

    Rows are converted when they are used. On a CPU, what is not converted stays in the file: of an input matrix only
    the rows that are looked up are ever read, and a matrix that trains is let go once it has been copied.
    """
    dtype = DTYPES[settings.precision]
    if settings.quantise != "none":
        return load(source, dtype, settings.quantise, vision=False)
    model = load(source, vision=False)
    checkpoint = open_checkpoint(source)
    input_matrix(model).data = checkpoint.tensor(checkpoint.input)
    if not checkpoint.tied and checkpoint.output:
        output_matrix(model).data = checkpoint.tensor(checkpoint.output)
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


class _Trained:
    """The parameters that a stage trains, put into the model.

    targets: names of the modules with adapters; replaced: names of the layers' own parameters.
    """

    def __init__(self, model: PreTrainedModel, settings: StageSettings, new_ids: list[int]) -> None:
        torch.manual_seed(settings.seed)
        self.model, self.settings = model, settings
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.targets: list[str] = []
        self.replaced: list[str] = []
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
            for name, parameter in body_parameters(model).items():
                parameter.requires_grad_(True)
                self.replaced.append(name)
        dtype = DTYPES[settings.precision]
        self.vocabulary = VocabularyTraining(model, settings.input_rows, settings.output_rows, new_ids, dtype)

    # Looked up each time: parameters that processes share out are new objects.

    @property
    def rows(self) -> dict[str, nn.Parameter]:
        return self.vocabulary.parameters()

    @property
    def layers(self) -> dict[str, nn.Parameter]:
        return {name: self.model.get_parameter(name) for name in self.replaced} | lora_parameters(self.model)

    def train(
        self,
        batches: Batches,
        work: Path,
        loss: Loss,
        parallel: Parallel,
        validation: Batches | None = None,
        events: Path | None = None,
    ) -> LoopResult:
        """Train them through the loop."""
        if self.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_model = loss(self.model)
        if self.settings.precision == "bf16" and self.settings.layers != "none":
            loss_model = MixedPrecision(loss_model)
        parallel.shard(self.model, loss_model, self.settings)
        for name in self.replaced:
            parameter = self.model.get_parameter(name)
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        groups = parameter_groups(self.rows.values(), self.layers.values(), self.settings)
        parameters = self.rows | self.layers
        with blocks_on_cpu(self.model):
            result = train(
                loss_model,
                groups,
                parameters,
                batches,
                self.settings,
                work,
                parallel,
                self._needed(batches.sequence_length, parallel.device),
                validation,
                events,
            )
        self.model.gradient_checkpointing_disable()
        return result

    def _needed(self, sequence_length: int, device: torch.device) -> Callable[[int], float]:
        """Bytes that training takes beside the weights, with so many rows at a time."""
        dims = dimensions(self.model.config, tied=self.vocabulary.tied)
        stored = BYTES[self.settings.precision]

        def needed(rows: int) -> float:
            new, settings = len(self.vocabulary.new_ids), self.settings
            parts = stage_memory(dims, settings, new, sequence_length, rows, stored_bytes=stored, device=device.type)
            return parts.peak - parts.weights - parts.trained

        return needed

    def sizes(self) -> dict[str, int]:
        """Numbers of trainable values: in rows, and in layers or adapters."""
        sizes = {name: values.numel() for name, values in self.rows.items()}
        layers = sum(p.numel() for p in self.layers.values())
        return sizes | ({"lora" if self.settings.lora else "layers": layers} if layers else {})

    def changes(self, parallel: Parallel) -> Changes:
        """What was learnt, whole in the first process."""
        whole = parallel.whole

        def learnt(rows: TrainableRows | None) -> Rows | None:
            if rows is None:
                return None
            return Rows(None if rows.ids is None else rows.ids.tolist(), whole(rows.values))

        vocabulary = self.vocabulary
        return Changes(
            input=learnt(vocabulary.input),
            output=None if vocabulary.tied else learnt(vocabulary.output),
            adapters={
                name: replace(adapter, A=whole(adapter.A), B=whole(adapter.B))
                for name, adapter in adapters(self.model).items()
            },
            parameters={name: whole(self.model.get_parameter(name)) for name in self.replaced},
        )
