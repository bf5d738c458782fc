"""What the training loop needs to know of a stage, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters: rank `r`, scale `alpha`/r, and whether the frozen weights are held in 4 bits."""

    r: int
    alpha: int
    dropout: float = 0.0
    rank_stabilised: bool = False
    targets: tuple[str, ...] = ()
    quantise: str = "none"


@dataclass(frozen=True)
class StageSettings:
    """One stage. Rows: `none`, `new`, `all`; layers: `none`, `all`, `lora`."""

    name: str
    input_rows: str
    output_rows: str
    layers: str
    lora: LoraSettings | None
    learning_rate: float
    embedding_learning_rate: float | None
    batch_size: int
    gradient_accumulation_steps: int
    precision: str
    warmup: float
    schedule: str
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    gradient_checkpointing: bool
    checkpoint_seconds: float
    seed: int

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
            bits = ", 4-bit base" if self.lora.quantise == "nf4" else ""
            parts.append(f"LoRA r {self.lora.r} on every layer{bits}")
        return " + ".join(parts)

    def _sides(self) -> tuple[tuple[str, str], ...]:
        return (self.input_rows, "input"), (self.output_rows, "output")
