"""Which of a stage's states to keep: the loss on held-out text, and the parameters that had the lowest."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lingraft.atomic import flush
from lingraft.errors import TrainingError
from lingraft.training.parallel import Parallel

FEWEST = 4  # measurements in a stage that is measured once an epoch


def validation_steps(steps: int, epochs: float, every: float | None) -> set[int]:
    """After how many steps of a stage to measure; always after the last.

    Args:
        every: steps from one measurement to the next, or below 1 a share of the stage's steps; None for once an
            epoch, but at least `FEWEST` times.
    """
    if every is None:
        apart = steps / max(epochs, FEWEST)
    elif every < 1:
        apart = every * steps
    else:
        apart = every
    return {min(max(round(number * apart), 1), steps) for number in range(1, math.ceil(steps / apart) + 1)}


class Best:
    """The trained parameters with the lowest validation loss so far, in a file that outlives a kill.

    Its measurement stands in the file itself. A resumed stage that comes by that step again measures the same loss,
    which is no improvement, so the parameters stay those of the first time.

    Raises:
        TrainingError: the file is damaged, or the processes don't find the same one.
    """

    def __init__(self, path: Path, parallel: Parallel) -> None:
        self.path, self.parallel = path, parallel
        self.step, self.loss = 0, math.inf
        if path.is_file():
            try:
                with safe_open(path, "pt") as stored:
                    facts = stored.metadata()
            except SafetensorError as error:
                raise TrainingError(
                    f"{path}: the best parameters so far are damaged ({error}); delete {path.parent} and give the same "
                    "command again: the stage starts anew"
                ) from error
            self.step, self.loss = int(facts["step"]), float(facts["loss"])
        latest, earliest = parallel.most(self.step, -self.step)
        if latest != -earliest:
            raise TrainingError(
                f"{path}: not every process finds it as the others do; the run's folder has to be on a disk that all "
                "machines see alike, then give the same command again"
            )

    def offer(self, step: int, loss: float, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep the parameters after `step` steps where their loss is the lowest.

        Raises:
            OSError, SafetensorError: they can't be written (the disk is full); those before stay.
        """
        if loss >= self.loss:
            return
        self.step, self.loss = step, loss
        tensors = {name: self.parallel.whole(parameter).cpu().contiguous() for name, parameter in parameters.items()}
        if not self.parallel.first:
            return
        partial = self.path.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"step": str(step), "loss": repr(loss)})
            flush(partial)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the kept parameters into the live ones."""
        self.parallel.sum(0)  # wait until the process that writes has done so
        with safe_open(self.path, "pt") as stored:
            for name, parameter in parameters.items():
                self.parallel.fill(parameter, stored.get_tensor(name))
        self.parallel.filled()
