"""Hashes of a model's tensors, to prove what a stage changed and what it did not.

The matrices of the vocabulary are hashed in two parts, old rows and new rows, so that "only new rows trained" is
something that a hash can show.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lingraft.model.load import input_matrix, output_matrix


def digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's bytes, as 16 hex digits."""
    flat = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()[:16]


def fingerprint(model: PreTrainedModel, new_ids: list[int]) -> dict[str, str]:
    """A hash for every tensor; vocabulary matrices give `<name>[old rows]` and `<name>[new rows]`.

    Tied matrices appear once, under the input embedding's name.
    """
    matrices = {id(input_matrix(model)): "input", id(output_matrix(model)): "output"}
    if input_matrix(model) is output_matrix(model):
        matrices = {id(input_matrix(model)): "tied"}
    new = torch.zeros(input_matrix(model).shape[0], dtype=torch.bool)
    new[[i for i in new_ids if i < len(new)]] = True  # before a resize, appended rows are not there yet
    prints: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in matrices:
            here = parameter.detach().cpu()
            prints[f"{name}[old rows]"] = digest(here[~new])
            if new_ids:
                prints[f"{name}[new rows]"] = digest(here[new])
        else:
            prints[name] = digest(parameter)
    for name, tensor in model.named_buffers():
        prints[f"buffer {name}"] = digest(tensor)
    return prints


def expected_changes(
    model: PreTrainedModel, input_rows: str, output_rows: str, layers: str, lora_targets: list[str]
) -> set[str]:
    """Names, as in `fingerprint`, of the tensors that a stage with these settings is allowed to change."""
    names = {id(p): name for name, p in model.named_parameters()}
    allowed: set[str] = set()
    for matrix, which in ((input_matrix(model), input_rows), (output_matrix(model), output_rows)):
        parts = {"none": [], "new": ["new rows"], "all": ["old rows", "new rows"]}[which]
        allowed |= {f"{names[id(matrix)]}[{part}]" for part in parts}
    if layers == "all":
        allowed |= set(body_parameters(model))
    elif layers == "lora":
        allowed |= {f"{target}.weight" for target in lora_targets}
    return allowed


def body_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The language model's own parameters beside the vocabulary's matrices: layers and norms, no vision tower."""
    matrices = {id(input_matrix(model)), id(output_matrix(model))}
    decoder = model.get_decoder()
    inside = {id(p) for p in decoder.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) in inside and id(p) not in matrices}


def differences(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Names whose hash differs, or that stand in one of the two only."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
