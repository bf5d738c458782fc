"""The dimensions of a plan's base that decide what new rows and stages cost, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lingraft.errors import ModelError
from lingraft.families.shapes import SHAPES, shape_of_hub_name
from lingraft.model.dimensions import Dimensions, dimensions, named_config
from lingraft.model.load import is_tied, read_config
from lingraft.recipe import did_you_mean
from lingraft.steps.new_base import make_config
from lingraft.tokenizer.economics import ModelShape

if TYPE_CHECKING:
    from lingraft.layout import Plan


@dataclass(frozen=True)
class Shape:
    """The base's configuration, and its dimensions before the graft; `dims.tied` is as after it.

    assumed: why a named shape stands in for the base's own configuration, empty where none does.
    """

    config: Any
    dims: Dimensions
    assumed: str = ""

    @classmethod
    def of(cls, plan: Plan, named: str | None = None) -> Shape:
        """From the base's configuration, or from a named shape that stands in for it; no weights are read.

        Raises:
            ModelError: the base can't be reached, or no shape has that name.
        """
        if named is not None:
            return cls(*_configured(plan, config_of(named)), f"the shape {named} stands in for the base")
        try:
            return cls(*_configured(plan, base_config(plan)))
        except ModelError as error:
            stand_in = shape_of_hub_name(plan.recipe.base.model or "")
            if not plan.unreachable or stand_in is None:
                raise
            return cls(*_configured(plan, named_config(stand_in)), f"the shape {stand_in} stands in: {error}")

    def as_dict(self, added_rows: int) -> dict[str, Any]:
        """The model after the graft, as `lingraft plan` shows it."""
        dims = self.dims.grown(added_rows)
        found = {"parameters": dims.parameters, "rows": dims.rows, "width": dims.width, "tied": dims.tied}
        return found | ({"assumed": self.assumed} if self.assumed else {})

    def for_economics(self) -> ModelShape:
        """What token economics asks of a model."""
        tied_before = is_tied(self.config)
        return ModelShape(
            body=self.dims.body,
            width=self.dims.width,
            rows=self.dims.rows,
            tied=tied_before,
            untied=tied_before and not self.dims.tied,
            bytes_per_parameter=self.stored_bytes,
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of one value in the checkpoint's files."""
        return (self.config.dtype or torch.bfloat16).itemsize


def shape_if_known(plan: Plan, named: str | None = None) -> tuple[Shape | None, str]:
    """The shape of the plan's base, or None and why it is unknown.

    Raises:
        ModelError: no shape is called `named`.
    """
    if named is not None:
        return Shape.of(plan, named), ""
    try:
        return Shape.of(plan), ""
    except ModelError as error:
        return None, str(error)


def _configured(plan: Plan, config: Any) -> tuple[Any, Dimensions]:
    return config, dimensions(config, tied=plan.tied)


def config_of(shape: str) -> Any:
    """The configuration of a named shape, or of a model's folder.

    Raises:
        ModelError: no such shape or folder.
    """
    if shape in SHAPES:
        return named_config(shape)
    if (folder := Path(shape)).is_dir():
        return read_config(folder)
    known = ", ".join(SHAPES)
    raise ModelError(f"--shape: no shape is called {shape!r}{did_you_mean(shape, SHAPES)}; known: {known}")


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
