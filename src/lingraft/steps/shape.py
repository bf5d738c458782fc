"""The model's dimensions that decide how much trains and what new rows cost, from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from lingraft.errors import ModelError
from lingraft.families import family
from lingraft.model.fingerprint import body_parameters
from lingraft.model.load import input_matrix, is_tied, output_matrix, read_config
from lingraft.model.lora import target_modules
from lingraft.recipe import Stage
from lingraft.steps.new_base import make_config
from lingraft.tokenizer.economics import ModelShape

if TYPE_CHECKING:
    from lingraft.pipeline import Plan


class Shape:
    """Dimensions of the plan's base; `tied` says whether its matrices are still one after the graft."""

    def __init__(self, config: Any, tied: bool) -> None:
        kind: Any = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
        with torch.device("meta"):
            model: Any = kind(config) if kind is not transformers.AutoModelForCausalLM else kind.from_config(config)
        matrix, tied_before = input_matrix(model), output_matrix(model) is input_matrix(model)
        self.config = config
        self.model = model
        self.tied = tied
        self.rows, self.width = config.get_text_config().vocab_size, matrix.shape[1]
        self.body = sum(p.numel() for p in body_parameters(model).values())
        total = sum(p.numel() for p in model.parameters())
        self.other = total - self.body - (1 if tied_before else 2) * matrix.numel()

    @classmethod
    def of(cls, plan: Plan) -> Shape:
        """From the base's config, without loading weights.

        Raises:
            ModelError: the base can't be reached.
        """
        return cls(base_config(plan), plan.tied)

    def parameters(self, added_rows: int) -> int:
        """Of the whole model after the graft."""
        return self.body + self.other + (self.rows + added_rows) * self.width * (1 if self.tied else 2)

    def as_dict(self, added_rows: int) -> dict[str, Any]:
        """The model after the graft, as `lingraft plan` shows it."""
        parameters, rows = self.parameters(added_rows), self.rows + added_rows
        return {"parameters": parameters, "rows": rows, "width": self.width, "tied": self.tied}

    def for_economics(self) -> ModelShape:
        """What token economics asks of a model."""
        tied_before = is_tied(self.config)
        dtype = self.config.dtype or torch.bfloat16
        return ModelShape(
            body=self.body,
            width=self.width,
            rows=self.rows,
            tied=tied_before,
            untied=tied_before and not self.tied,
            bytes_per_parameter=dtype.itemsize,
        )

    def lora(self, stage: Stage) -> int:
        """Values in the stage's adapters."""
        assert stage.lora is not None
        names = target_modules(self.model, stage.lora.targets or family(self.config.model_type).projections)
        return sum(sum(self.model.get_submodule(n).weight.shape) * stage.lora.r for n in names)


def shape_if_known(plan: Plan) -> tuple[Shape | None, str]:
    """The shape of the plan's base, or None and why it is unknown."""
    try:
        return Shape.of(plan), ""
    except ModelError as error:
        return None, str(error)


def base_config(plan: Plan) -> Any:
    """The transformers configuration of the plan's base.

    Raises:
        ModelError: it can't be read or reached.
    """
    if plan.recipe.base.scratch:
        return make_config(plan.recipe.base.scratch)
    if plan.base_plan and not (plan.base.folder / "config.json").is_file():
        return base_config(plan.base_plan)
    if plan.unreachable:
        raise ModelError(plan.unreachable)
    return read_config(plan.base.folder)
