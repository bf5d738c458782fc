"""How much memory a stage needs on its device, part by part, from the model's dimensions alone.

The sizes follow what the loop holds (`loop.py`, `loss.py`, `lingraft.model.rows`), and what autograd saves of a layer
in transformers' implementation; `lingraft bench` prints the prediction beside what it measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from lingraft.model.dimensions import Dimensions
from lingraft.training.settings import StageSettings

BYTES = {"fp32": 4, "bf16": 2}
# Of each value: 4 bits, an 8-bit constant for 64 values, and a float32 constant for 256 of these (double quantisation).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Two moments: in float32, or in 8 bits with a float32 constant for 256 values each.
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}


@dataclass(frozen=True)
class Trained:
    """Values that a stage trains."""

    input_rows: int
    output_rows: int
    layers: int

    @property
    def total(self) -> int:
        return self.input_rows + self.output_rows + self.layers


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the fullest moment of a step.

    weights: what is frozen; trained: what trains, in float32; activations: what the backward pass needs of the trunk,
    with the layer at work; loss: logits at hand and their gradients.
    """

    weights: float
    trained: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def peak(self) -> float:
        return self.weights + self.trained + self.gradients + self.optimizer + self.activations + self.loss


def vocabulary_rows(dims: Dimensions, settings: StageSettings) -> tuple[str, str]:
    """Which input and output rows train. In a tied model they are the same rows, and the wider choice counts."""
    if not dims.tied:
        return settings.input_rows, settings.output_rows
    wider = max(settings.input_rows, settings.output_rows, key=("none", "new", "all").index)
    return wider, wider


def passes_back(dims: Dimensions, settings: StageSettings) -> bool:
    """Whether gradients flow through the trunk: not where output rows alone train."""
    return vocabulary_rows(dims, settings)[0] != "none" or settings.layers != "none"


def quantised(settings: StageSettings) -> bool:
    """Whether the frozen layers are held in 4 bits."""
    return settings.quantise == "nf4"


def trained_values(dims: Dimensions, settings: StageSettings, new_rows: int) -> Trained:
    """How many values the stage trains; rows of a tied matrix count once, as input rows."""
    values = {"none": 0, "new": new_rows * dims.width, "all": dims.matrix}
    input_rows, output_rows = vocabulary_rows(dims, settings)
    layers = 0
    if settings.layers == "all":
        layers = dims.body
    elif settings.lora:
        layers = settings.lora.r * sum(t.inputs + t.outputs for t in dims.targets(settings.lora.targets))
    return Trained(values[input_rows], 0 if dims.tied else values[output_rows], layers)


def stage_memory(
    dims: Dimensions, settings: StageSettings, new_rows: int, sequence_length: int, micro_batch: int, device: str
) -> Memory:
    """What a stage needs in training on a device (`cpu`, `cuda`) by itself. Towers for images are not loaded."""
    held = BYTES[settings.precision]
    trained = trained_values(dims, settings, new_rows)
    return Memory(
        weights=_frozen(dims, settings, held),
        trained=4.0 * trained.total,
        gradients=4.0 * trained.total,
        optimizer=OPTIMIZER_BYTES[settings.optimizer] * trained.total,
        activations=_activations(dims, settings, held, micro_batch * sequence_length)
        + _mask(dims, held, micro_batch, sequence_length),
        loss=_loss(dims, settings, held, micro_batch * sequence_length),
    )


def _frozen(dims: Dimensions, settings: StageSettings, held: int) -> float:
    """Bytes of the weights that don't train. A matrix that trains whole takes the frozen one's place."""
    sides = vocabulary_rows(dims, settings)
    matrices = sides[:1] if dims.tied else sides
    frozen = sum(which != "all" for which in matrices) * dims.matrix * held
    if settings.layers == "all":
        return frozen
    linear = dims.linear * (NF4_BYTES if settings.quantise == "nf4" else held)
    return frozen + linear + (dims.body - dims.linear) * held


def _activations(dims: Dimensions, settings: StageSettings, held: int, tokens: int) -> float:
    attention = dims.heads * dims.head_width
    working = (3 * dims.hidden + 2 * dims.width) * held
    if not passes_back(dims, settings):
        return tokens * (working + 4 * dims.width)
    repeated = attention if dims.kv_heads > 1 else dims.head_width  # keys and values are repeated for their heads
    layer = 4 * dims.normed + (2 * attention + 2 * repeated + 3 * dims.hidden) * held
    if settings.layers == "all":
        layer += 4 * dims.normed + (2 * dims.width + attention + dims.hidden) * held
    kept = dims.width * held * dims.layers + layer if settings.gradient_checkpointing else layer * dims.layers
    return tokens * (kept + working)


def _mask(dims: Dimensions, held: int, micro_batch: int, sequence_length: int) -> float:
    """Which positions see which, once for each kind of layer, since documents share a row."""
    return len(set(dims.windows)) * micro_batch * sequence_length**2 * held


def _loss(dims: Dimensions, settings: StageSettings, held: int, tokens: int) -> float:
    return 2 * 4 * 2**25 + tokens * dims.width * (4 + held)
