"""What the training loop needs to know of a stage, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters: rank `r`, scale `alpha`/r (rank-stabilised: `alpha`/√r)."""

    r: int
    alpha: int
    dropout: float = 0.0
    rank_stabilised: bool = False
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageSettings:
    """One stage. Rows: `none`, `new`, `all`; layers: `none`, `all`, `lora`.

    quantise: `nf4` holds the language model's frozen linear layers in 4 bits.
    rows_per_step: rows of the batch of one optimiser step; micro_batch: how many of them go through the model at a
    time, None for as many as fit. parallel: how several processes share the stage, see `lingraft.training.parallel`.
    keep: which parameters the stage ends with, the `last` or the `best` by validation loss; validate_every: steps from
    one validation to the next, below 1 a share of the stage's steps, None for once an epoch and at least four times
    where the best is kept, else never.
    """

    name: str
    input_rows: str
    output_rows: str
    layers: str
    lora: LoraSettings | None
    quantise: str
    learning_rate: float
    embedding_learning_rate: float | None
    rows_per_step: int
    micro_batch: int | None
    packing: bool
    precision: str
    optimizer: str
    warmup: float
    schedule: str
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    gradient_checkpointing: bool
    parallel: str
    checkpoint_seconds: float
    keep_checkpoints: int
    keep: str
    validate_every: float | None
    seed: int

    @property
    def validates(self) -> bool:
        """Whether the stage measures its loss on held-out text."""
        return self.keep == "best" or self.validate_every is not None

    @property
    def trains(self) -> str:
        """What trains, in words: `new input rows + all output rows + LoRA r 64`."""
        parts = []
        if self.input_rows == self.output_rows != "none":
            parts.append(f"{self.input_rows} input and output rows")
        else:
            parts += [f"{w} {side} rows" for w, side in self._sides() if w != "none"]
        if self.layers == "all":
            parts.append("every layer")
        elif self.lora:
            parts.append(f"LoRA r {self.lora.r} on every layer")
        return " + ".join(parts) + (", 4-bit base" if self.quantise == "nf4" else "")

    def _sides(self) -> tuple[tuple[str, str], ...]:
        return (self.input_rows, "input"), (self.output_rows, "output")
