"""A model's dimensions that decide memory and work, read off its configuration without any weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from lingraft.families.shapes import SHAPES
from lingraft.model.load import body_parameters, input_matrix, is_tied


@dataclass(frozen=True)
class Linear:
    """A linear layer of the decoder, by the last part of its name."""

    name: str
    inputs: int
    outputs: int

    @property
    def values(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Dimensions:
    """Dimensions of a decoder and its two vocabulary matrices.

    body: values of layers and norms; other: those of anything else, such as a vision tower.
    normed: values that the norms of one layer read for each token.
    windows: for each layer, how many tokens its attention looks back at most, None for all of them.
    """

    rows: int
    width: int
    tied: bool
    body: int
    other: int
    linears: tuple[Linear, ...]
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    normed: int
    windows: tuple[int | None, ...]

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def matrix(self) -> int:
        """Values of one vocabulary matrix."""
        return self.rows * self.width

    @property
    def parameters(self) -> int:
        """Values of the whole model, a tied matrix counted once."""
        return self.body + self.other + self.matrix * (1 if self.tied else 2)

    @property
    def linear(self) -> int:
        """Values of the decoder's linear layers: what 4 bits hold, and what each token is multiplied with."""
        return sum(linear.values for linear in self.linears)

    def grown(self, rows: int) -> Dimensions:
        """With so many rows appended to the vocabulary's matrices."""
        return replace(self, rows=self.rows + rows)

    def targets(self, names: Sequence[str]) -> list[Linear]:
        """The linear layers that adapters on `names` wrap."""
        return [linear for linear in self.linears if linear.name in names]


def named_config(shape: str) -> Any:
    """The transformers configuration of a named shape (`lingraft.families.shapes`)."""
    numbers = SHAPES[shape]
    return CONFIG_MAPPING[numbers["model_type"]](**numbers)


def empty_model(config: Any) -> Any:
    """The configuration's model without memory for its weights (on torch's meta device)."""
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return kind(config) if kind is not None else transformers.AutoModelForCausalLM.from_config(config)


def dimensions(config: Any, *, tied: bool) -> Dimensions:
    """The dimensions of a configuration's model; `tied` says whether its two matrices are one in the end."""
    model = empty_model(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    decoder: Any = model.get_decoder()
    body = sum(p.numel() for p in body_parameters(model).values())
    matrices = input_matrix(model).numel() * (1 if is_tied(config) else 2)
    per_head = {"q_norm": heads * head_width, "k_norm": kv_heads * head_width}
    return Dimensions(
        rows=input_matrix(model).shape[0],
        width=input_matrix(model).shape[1],
        tied=tied,
        body=body,
        other=sum(p.numel() for p in model.parameters()) - body - matrices,
        linears=tuple(
            Linear(name.rpartition(".")[2], module.in_features, module.out_features)
            for name, module in decoder.named_modules()
            if isinstance(module, nn.Linear)
        ),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        hidden=max(module.out_features for module in decoder.layers[0].modules() if isinstance(module, nn.Linear)),
        normed=sum(
            per_head.get(name.rpartition(".")[2], module.weight.numel())
            for name, module in decoder.layers[0].named_modules()
            if type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None
        ),
        windows=tuple(_windows(text)),
    )


def _windows(text: Any) -> list[int | None]:
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [text.sliding_window if kind == "sliding_attention" else None for kind in kinds]
