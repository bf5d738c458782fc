"""Whether a stage fits into some memory, and if not, the change of its recipe that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from lingraft.model.dimensions import Dimensions
from lingraft.training.flops import seconds_per_token
from lingraft.training.memory import Memory, passes_back, stage_memory
from lingraft.training.settings import StageSettings

SHORTEST = 512  # tokens of a row: shorter ones are not proposed


@dataclass(frozen=True)
class Way:
    """A way to run a stage. `changes` are recipe keys and their new values; `seconds` are those of one token."""

    changes: dict[str, Any]
    memory: Memory
    seconds: float


@dataclass(frozen=True)
class Job:
    """A stage on a model, at the rates (FLOP/s, bytes/s) that matrix products and memory traffic are expected to have.

    settings.micro_batch None stands for whatever fits: a row at a time is counted. stored_bytes, device: see
    `stage_memory`.
    """

    dims: Dimensions
    settings: StageSettings
    new_rows: int
    sequence_length: int
    stored_bytes: int
    device: str
    flops_per_second: float
    bytes_per_second: float

    def with_changes(self, changes: dict[str, Any]) -> Way:
        """The stage with these keys of its recipe changed."""
        own = {key: value for key, value in changes.items() if key != "sequence_length"}
        settings = replace(self.settings, **own)
        shape = (self.dims, settings, self.new_rows, changes.get("sequence_length", self.sequence_length))
        micro_batch = settings.micro_batch or 1
        return Way(
            changes,
            stage_memory(*shape, micro_batch, stored_bytes=self.stored_bytes, device=self.device),
            seconds_per_token(
                *shape,
                micro_batch,
                flops_per_second=self.flops_per_second,
                bytes_per_second=self.bytes_per_second,
            ),
        )

    def within(self, memory: float) -> Way | None:
        """The way that fits into so many bytes and least changes what is learnt, the quickest among those; or None.

        What is learnt is the same for any micro-batch, with checkpointing or without; nearly the same with 8-bit
        moments; a little different over 4-bit layers; and shorter rows cut documents more often.
        """
        ways = [way for way in self.ways() if way.memory.peak <= memory]
        return min(ways, key=_harm_then_time, default=None)

    def smallest(self) -> Way:
        """The way of least memory at the recipe's length of rows."""
        ways = [way for way in self.ways() if "sequence_length" not in way.changes]
        return min(ways, key=lambda way: way.memory.peak)

    def ways(self) -> Iterator[Way]:
        """Every combination of changes that could save memory, none at all first."""
        given = self.settings
        options: dict[str, list[Any]] = {"sequence_length": [self.sequence_length]}
        while options["sequence_length"][-1] // 2 >= SHORTEST:
            options["sequence_length"].append(options["sequence_length"][-1] // 2)
        if given.micro_batch not in (None, 1):
            options["micro_batch"] = [given.micro_batch, 1]
        if passes_back(self.dims, given) and not given.gradient_checkpointing:
            options["gradient_checkpointing"] = [False, True]
        if given.optimizer == "adamw" and given.parallel == "ddp":
            options["optimizer"] = ["adamw", "adamw_8bit"]
        if given.layers != "all" and given.quantise == "none":
            options["quantise"] = ["none", "nf4"]
        for chosen in product(*options.values()):
            pairs = zip(options.items(), chosen, strict=True)
            yield self.with_changes({key: value for (key, values), value in pairs if value != values[0]})


def _harm_then_time(way: Way) -> tuple[Any, ...]:
    shortened = -way.changes.get("sequence_length", float("inf"))
    return shortened, "quantise" in way.changes, "optimizer" in way.changes, way.seconds
