"""How much memory a stage needs on its device, part by part, from the model's dimensions alone.

The sizes follow what the loop holds (`loop.py`, `cross_entropy.py`, `lingraft.model.rows`), and what autograd saves of
a layer in transformers' implementation; `lingraft bench` prints the prediction beside what it measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from lingraft.model.dimensions import Dimensions
from lingraft.model.rows import wider
from lingraft.training.attention import BLOCK_QUERIES
from lingraft.training.cross_entropy import CHUNK_POSITIONS, block_rows, chunk_positions
from lingraft.training.settings import StageSettings

BYTES = {"fp32": 4, "bf16": 2}
# Of each value: 4 bits, an 8-bit constant for 64 values, and a float32 constant for 256 of these (double quantisation).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Two moments: in float32, or in 8 bits with a float32 constant for 256 values each.
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}

# The pages of libraries that only training touches, and small blocks that malloc keeps (measured). A GPU's are no part
# of what torch counts there.
LIBRARY_BYTES = {"cpu": 96e6, "cuda": 0.0}
# What becomes resident where a row of a mapped matrix is read: Linux maps the pages around it as well.
MAPPED_AROUND = 64 * 1024


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
    """Bytes by part.

    weights: what is frozen; trained: what trains, in float32; activations: what the trunk keeps for its backward pass;
    layer: what the layer at work needs beside; loss: logits at hand and their gradients.
    """

    weights: float
    trained: float
    gradients: float
    optimizer: float
    activations: float
    layer: float
    loss: float

    @property
    def peak(self) -> float:
        """At the fullest moment of a step: layers and the loss don't work at the same time."""
        always = self.weights + self.trained + self.gradients + self.optimizer + self.activations
        return always + max(self.layer, self.loss)


def vocabulary_rows(dims: Dimensions, settings: StageSettings) -> tuple[str, str]:
    """Which input and output rows train. In a tied model they are the same rows, and the wider choice counts."""
    if not dims.tied:
        return settings.input_rows, settings.output_rows
    both = wider(settings.input_rows, settings.output_rows)
    return both, both


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
    dims: Dimensions,
    settings: StageSettings,
    new_rows: int,
    sequence_length: int,
    micro_batch: int,
    *,
    stored_bytes: int,
    device: str,
    stage_tokens: int | None = None,
) -> Memory:
    """What a stage needs in training, on a device by itself. Towers for images are not loaded.

    Args:
        micro_batch: rows of `sequence_length` tokens that go through the model at a time.
        stored_bytes: of a value in the checkpoint's files; device: `cpu` or `cuda`.
        stage_tokens: of the whole stage; None: many.
    """
    held = BYTES[settings.precision]
    tokens = micro_batch * sequence_length
    trained = trained_values(dims, settings, new_rows)
    kept, layer = _activations(dims, settings, held, sequence_length, device)
    copies = 0  # autocast's, of float32 layers and adapters, which the backward pass wants
    if held < 4:
        copies = trained.layers * held // (dims.layers if settings.gradient_checkpointing else 1)
    loss = _loss(dims, settings, new_rows, held, tokens, device)
    return Memory(
        weights=_frozen(dims, settings, stored_bytes, device, stage_tokens),
        trained=4.0 * trained.total,
        gradients=4.0 * trained.total,
        optimizer=OPTIMIZER_BYTES[settings.optimizer] * trained.total,
        activations=tokens * kept
        + copies
        + _masks(dims, held, micro_batch, sequence_length, device)
        + LIBRARY_BYTES[device]
        + (tokens * _holes(dims, settings, held) if device == "cpu" else 0),
        layer=tokens * layer + (loss if device == "cpu" else 0),  # which keeps the loss's memory for the next step
        loss=loss,
    )


def _frozen(dims: Dimensions, settings: StageSettings, stored: int, device: str, stage_tokens: int | None) -> float:
    """Bytes of the weights that don't train. A matrix that trains whole takes the place of the frozen one; one that is
    frozen stays as narrow as it is stored. On a CPU an input matrix that is not converted stays in its file; what is
    looked up becomes resident, and the system takes it back where it wants the memory."""
    held = BYTES[settings.precision]
    sides = vocabulary_rows(dims, settings)
    matrices = sum(which != "all" for which in (sides[:1] if dims.tied else sides))
    frozen = matrices * dims.matrix * (min(held, stored) if settings.quantise == "none" else held)
    converted = stored > held if settings.quantise == "none" else stored != held
    if device == "cpu" and stage_tokens is not None and not dims.tied and sides[0] != "all" and not converted:
        frozen -= max(0, dims.matrix * stored - stage_tokens * max(dims.width * stored, MAPPED_AROUND))
    if settings.layers == "all":
        return frozen
    if settings.quantise == "none":
        return frozen + dims.body * held
    quantised = frozen + (dims.body - dims.linear) * held + dims.linear * NF4_BYTES
    # on a CPU, what was mapped to be quantised or replaced stays resident, until the system wants the memory back
    mapped = dims.linear + sum(which == "all" for which in sides) * dims.matrix
    return quantised + (mapped * held if device == "cpu" and held == stored else 0)


def _activations(dims: Dimensions, settings: StageSettings, held: int, length: int, device: str) -> tuple[float, float]:
    """Bytes of a token: those that the trunk keeps until its backward pass, and those that a layer at work needs."""
    attention = dims.heads * dims.head_width
    working: float = (3 * dims.hidden + 2 * dims.width) * held
    if not passes_back(dims, settings):
        return 0, working + 4 * dims.width
    if device == "cpu":  # queries, keys, values, and the weights of the keys in a block's reach
        keys = sum(_reach(length, window) for window in dims.windows) / dims.layers
        attending = attention + 2 * dims.kv_heads * dims.head_width + dims.heads * keys
    else:  # queries, result, keys and values, which are repeated for their heads
        attending = 2 * attention + 2 * (attention if dims.kv_heads > 1 else dims.head_width)
    # and the inputs of norms in float32; the gate before and after, and what it lets through
    saved: float = 4 * dims.normed + (attending + 3 * dims.hidden) * held
    distinct_inputs = 2 * dims.width + attention + dims.hidden
    if settings.layers == "all":
        saved += 4 * dims.normed + distinct_inputs * held
    if settings.lora:
        targets = dims.targets(settings.lora.targets)
        inputs = sum(target.inputs for target in targets) / dims.layers
        if settings.lora.dropout:
            saved += inputs * (held + 1)
        else:  # float32 adapters make a bfloat16 copy each, but share a float32 input
            saved += held * (inputs if held < 4 else min(inputs, distinct_inputs))
        working += 8 * max(target.inputs for target in targets)
    if settings.gradient_checkpointing:
        return dims.width * held * dims.layers, saved + working
    return saved * dims.layers, working


def _holes(dims: Dimensions, settings: StageSettings, held: int) -> float:
    """Bytes of a token that malloc keeps in holes between what is kept of one layer and the next: with adapters, whose
    many copies come and go, about as much as their inputs (measured: 0.6 to 1.4 times)."""
    if not settings.lora:
        return 0
    return 0.75 * held * sum(target.inputs for target in dims.targets(settings.lora.targets))


def _reach(length: int, window: int | None) -> float:
    """Keys that a token of a row meets on average where attention goes by blocks of queries."""
    met = 0
    for first in range(0, length, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, length)
        met += (last - first) * (last - (0 if window is None else max(first - window + 1, 0)))
    return met / length


def _masks(dims: Dimensions, held: int, micro_batch: int, length: int, device: str) -> float:
    """Which positions see which, once for each kind of layer, since documents share a row."""
    windows = set(dims.windows)
    if device == "cpu":
        return micro_batch * length * sum(_reach(length, window) for window in windows)
    return len(windows) * micro_batch * length**2 * held


def _loss(dims: Dimensions, settings: StageSettings, new_rows: int, held: int, tokens: int, device: str) -> float:
    """What `cross_entropy.py` needs beside the gradients of rows, for micro-batches all of whose tokens are
    learnt; its names and its order."""
    _, output = vocabulary_rows(dims, settings)
    states = dims.width * held * (1 + passes_back(dims, settings)) * tokens
    logit = 4 + (held if held < 4 else 0)  # in float32, and in the model's precision
    if output == "all":
        positions = chunk_positions(tokens, dims.rows, held, device)
        rows = min(block_rows(positions, dims.width, device), dims.rows)
        cast = 2 * rows * dims.width * held if held < 4 else 0
        return states + positions * (dims.rows * held + rows * logit + dims.width * 4) + cast
    positions = min(tokens, CHUNK_POSITIONS[device])
    new = new_rows if output == "new" else 0
    rows = max(min(block_rows(positions, dims.width, device), dims.rows), new)
    chunk = rows * logit + dims.width * (8 + held) + new * (4 + held)
    return states + positions * chunk + 2 * new * dims.width * held
