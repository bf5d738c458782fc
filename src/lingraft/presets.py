"""Stage lists that have a name. Each is plain data: the same as writing the stages out in a recipe.

`eeve`: the seven stages of EEVE (arXiv 2402.14714), with the learning rates and the LoRA settings of the
reference case. Where the base keeps its matrices tied, `collapse` leaves out the repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingraft.recipe import Stage

EEVE: list[dict[str, Any]] = [
    {
        "name": "new-input-rows",
        "train": {"input_rows": "new"},
        "learning_rate": 1e-4,
        "epochs": 1,
    },
    {
        "name": "new-output-rows",
        "train": {"output_rows": "new"},
        "learning_rate": 1e-4,
        "epochs": 1,
    },
    {
        "name": "new-rows",
        "train": {"input_rows": "new", "output_rows": "new"},
        "learning_rate": 5e-5,
        "epochs": 1,
    },
    {
        "name": "all-output-rows",
        "train": {"output_rows": "all"},
        "learning_rate": 2e-5,
        "epochs": 1,
    },
    {
        "name": "new-input-all-output-rows",
        "train": {"input_rows": "new", "output_rows": "all"},
        "learning_rate": 2e-5,
        "epochs": 1,
    },
    {
        "name": "all-layers",
        "train": {"input_rows": "all", "output_rows": "all", "layers": "lora"},
        "lora": {"r": 64, "alpha": 128, "dropout": 0.05, "quantise": "nf4"},
        "learning_rate": 2e-4,
        "embedding_learning_rate": 2e-5,
        "epochs": 3,
    },
    {
        "name": "cool-down",
        "train": {"layers": "lora"},
        "lora": {"r": 32, "alpha": 64},
        "learning_rate": 5e-5,
        "warmup": 0.1,
        "epochs": 1,
    },
]

INSTRUCTION: list[dict[str, Any]] = [
    {
        "name": "instruction",
        "train": {"layers": "lora"},
        "lora": {"r": 32, "alpha": 64, "dropout": 0.05},
        "format": "chat",
        "learning_rate": 2e-5,
        "clip": 0.3,
        "epochs": 3,
        "keep": "best",
    },
]

PRESETS: dict[str, list[dict[str, Any]]] = {"eeve": EEVE, "instruction": INSTRUCTION}


def collapse(stages: Sequence[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages that make sense when input and output embeddings are one matrix, and a line for each left out.

    There, "input rows" and "output rows" are the same rows. Of consecutive stages that train the same rows on the
    same data, the one that was meant for both sides stays, else the first (EEVE: stages 3, 4, 6 and 7 remain).
    """
    runs: list[list[Stage]] = []
    for stage in stages:
        if runs and stage.train.layers == "none" and _rows_of(stage) == _rows_of(runs[-1][-1]):
            runs[-1].append(stage)
        else:
            runs.append([stage])
    kept, lines = [], []
    for run in runs:
        chosen = next((s for s in run if s.train.input_rows == s.train.output_rows), run[0])
        kept.append(chosen)
        lines += [
            f"tied matrices: stage {stage.name} would repeat {chosen.name}, left out"
            for stage in run
            if stage is not chosen
        ]
    return kept, lines


def _rows_of(stage: Stage) -> tuple[Any, ...]:
    rows = max(stage.train.input_rows, stage.train.output_rows, key=("none", "new", "all").index)
    return rows, stage.train.layers, stage.data, stage.format
