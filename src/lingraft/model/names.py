"""Which stored tensor fills which parameter: checkpoints keep older names than the classes that read them.

transformers renames (`language_model.model.layers.0…` → `model.language_model.layers.0…`) and sometimes joins or splits
tensors while it loads. Its own table is asked here, so that what a stage learnt goes back to where it came from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lingraft.errors import ModelError
from lingraft.model.load import blank


def stored_names(folder: Path, stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """The stored tensor behind each of the `wanted` parameters of the checkpoint's architecture.

    Args:
        stored: the names of all tensors in the checkpoint's files.
    Raises:
        ModelError: a parameter that no stored tensor fills as it is.
    """
    names = _renamed(folder, stored)
    found: dict[str, str] = {}
    for parameter in wanted:
        if len(sources := names.get(parameter, [])) != 1:
            reason = f"{' and '.join(sources[:2])} both fill it" if sources else "it is not stored by itself"
            raise ModelError(
                f"{folder}: what a stage learns in {parameter} could not be written back: {reason} (transformers joins "
                "or splits this architecture's weights when it loads them); leave it out of lora.targets, or train rows"
            )
        found[parameter] = sources[0]
    return found


def _renamed(folder: Path, stored: Iterable[str]) -> dict[str, list[str]]:
    """Parameter → the stored tensors that fill it unconverted, as `PreTrainedModel.from_pretrained` matches them."""
    model = blank(folder)
    parameters, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names: dict[str, list[str]] = {}
    for name in sorted(stored, key=dot_natural_key):  # some of the renamings depend on this order
        renamed, converted = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, converted = rename_source_key(name, [], [], prefix, parameters)
        if converted is None:
            names.setdefault(renamed, []).append(name)
    return names
