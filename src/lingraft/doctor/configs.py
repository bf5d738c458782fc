"""Checks of what the configs say against each other and against the shapes of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lingraft.doctor.findings import Case, Problem, first
from lingraft.doctor.folder import CannotCheck, Weights

TWIN_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "dtype", "torch_dtype")
TWIN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# llama.cpp's src/models/gemma3.cpp: every sixth layer attends to everything, unless the config has a pattern.
LLAMA_CPP_PERIOD = 6
LAYER_PATTERN_TYPES = ("gemma3", "gemma3_text")


def as_ids(value: Any) -> set[int]:
    """The ids of a config's value: a number, a list of numbers, or nothing."""
    values = value if isinstance(value, list) else [value]
    return {number for number in values if isinstance(number, int) and not isinstance(number, bool) and number >= 0}


def config_twins(case: Case) -> list[Problem]:
    """`text_config` against the config around it."""
    top, text = case.model.config, case.model.text_config
    if text is top:
        return []
    clashes = [(key, top[key], text[key]) for key in TWIN_KEYS if key in top and key in text and top[key] != text[key]]
    for key in TWIN_IDS:
        outer, inner = as_ids(top.get(key)), as_ids(text.get(key))
        if outer and inner and not outer & inner:
            clashes.append((key, top[key], text[key]))
    if "tie_word_embeddings" in {*top, *text}:  # with a default on each level, one written value can be a clash
        outer_tied, inner_tied = _tied_flags(case)
        if outer_tied != inner_tied:
            clashes.append(("tie_word_embeddings", outer_tied, inner_tied))
    return [
        Problem(
            severity="fault",
            what=f"the two configs disagree on {key}",
            where=f"config.json: {key} is {outer!r} on top, {inner!r} in text_config",
            why="some tools read the one, some the other, so the same folder gives two different models",
            cure=f"write the right value of {key} in both places",
        )
        for key, outer, inner in clashes
    ]


def _tied_flags(case: Case) -> tuple[bool, bool]:
    """`tie_word_embeddings` on top and in the text config, with transformers' defaults."""
    settings = case.model.settings
    top = bool(getattr(settings, "tie_word_embeddings", False))
    return top, bool(getattr(settings.get_text_config(), "tie_word_embeddings", top))


def tied_flag(case: Case) -> list[Problem]:
    """Config says tied but the output matrix is another, or untied but there is none."""
    weights = case.model.weights
    outer, tied = _tied_flags(case)
    if outer != tied:
        raise CannotCheck("the two configs disagree on it (see config-twins)")
    if not tied and weights.output is None:
        return [
            Problem(
                severity="fault",
                what="the config says untied, but the weights have no output matrix",
                where="config.json: tie_word_embeddings is false; no lm_head.weight",
                why="loaders fill the missing matrix with random values: every answer is noise",
                cure="set tie_word_embeddings to true in both configs, or restore lm_head.weight",
            )
        ]
    if tied and weights.output is not None and (differing := _differing_rows(weights, weights.input, weights.output)):
        return [
            Problem(
                severity="fault",
                what="the config says tied, but the output matrix differs from the input embedding",
                where=f"config.json: tie_word_embeddings is true; {differing} of {weights.output}",
                why="loaders that trust the config throw the output matrix away, and what it learnt with it",
                cure="set tie_word_embeddings to false in both configs, or delete the output matrix from the weights",
            )
        ]
    return []


def _differing_rows(weights: Weights, one: str, other: str) -> str:
    """How two matrices differ, in words; empty where they do not."""
    if weights.shape(one) != weights.shape(other):
        return f"shape {weights.shape(one)} against {weights.shape(other)}"
    pairs = zip(weights.slices(one), weights.slices(other), strict=True)
    count = sum(int((a != b).any(dim=1).sum()) for (_, a), (_, b) in pairs)
    return f"{count:,} of {weights.shape(one)[0]:,} rows differ" if count else ""


def rows_and_configs(case: Case) -> list[Problem]:
    """Rows of the vocabulary's matrices against every vocabulary size that the configs name."""
    weights, config = case.model.weights, case.model.config
    said = {"vocab_size": config.get("vocab_size")}
    if case.model.text_config is not config:
        said["text_config.vocab_size"] = case.model.text_config.get("vocab_size")
    said = {key: value for key, value in said.items() if isinstance(value, int)}
    if not said:
        default = getattr(case.model.settings.get_text_config(), "vocab_size", None)
        said = {"vocab_size (not written; transformers' default)": default} if isinstance(default, int) else {}
    expected = [(name, key, rows) for name in weights.matrices.values() for key, rows in said.items()]
    per_layer = next((name for name in weights.names if name.endswith("embed_tokens_per_layer.weight")), None)
    table_rows = case.model.text_config.get("vocab_size_per_layer_input")
    if per_layer and isinstance(table_rows, int):
        expected.append((per_layer, "vocab_size_per_layer_input", table_rows))
    return [
        Problem(
            severity="fault",
            what="the number of rows is not what the config says",
            where=f"{name} has {weights.shape(name)[0]:,} rows; {key} is {rows:,}",
            why="loaders refuse the weights, fill rows with random values, or silently cut them off",
            cure="write the weights' number of rows as vocab_size on every level of config.json",
        )
        for name, key, rows in expected
        if weights.shape(name)[0] != rows
    ]


def tokens_beyond_rows(case: Case) -> list[Problem]:
    """Tokens whose ids no matrix has a row for."""
    tokenizer = case.model.tokenizer
    try:
        matrices = {name: case.model.weights.shape(name)[0] for name in case.model.weights.matrices.values()}
    except CannotCheck:
        rows = case.model.text_config.get("vocab_size")
        if not isinstance(rows, int):
            raise
        matrices = {"config.json's vocab_size": rows}
    name, rows = min(matrices.items(), key=lambda item: item[1])
    beyond = [index for index in sorted(tokenizer.piece_of) if index >= rows]
    if not beyond:
        return []
    return [
        Problem(
            severity="fault",
            what=f"{len(beyond):,} tokens have no row",
            where=f"{name}: {rows:,} rows; the first token beyond is {case.model.name_token(beyond[0])}",
            why="text with such a token stops the model with an index error, or reads foreign memory on a GPU",
            cure="use the tokenizer that belongs to these weights, or add rows for its tokens and initialise them",
        )
    ]


def dtype_mix(case: Case) -> list[Problem]:
    """Floating tensors of different precision."""
    if "quantization_config" in case.model.json("config.json"):
        raise CannotCheck("quantised weights are of several types by design")
    weights = case.model.weights
    by_type: dict[str, list[str]] = {}
    for name in weights.names:
        if weights.dtype(name).startswith(("F", "BF")):
            by_type.setdefault(weights.dtype(name), []).append(name)
    if len(by_type) < 2:
        return []
    counts = Counter({dtype: len(names) for dtype, names in by_type.items()}).most_common()
    rarest = by_type[counts[-1][0]]
    return [
        Problem(
            severity="warning",
            what="the weights mix types of numbers",
            where=", ".join(f"{count:,} tensors {dtype}" for dtype, count in counts) + f": {first(rarest)}",
            why="loaders convert all to one type, so what was kept in higher precision is lost, or memory doubles",
            cure="save the model in one dtype (model.to(torch.bfloat16).save_pretrained), unless the mix is meant",
        )
    ]


def layer_pattern(case: Case) -> list[Problem]:
    """Gemma 3's order of sliding and full attention, as transformers and as llama.cpp read it."""
    text = case.model.text_config
    types = text.get("layer_types")
    if text.get("model_type") not in LAYER_PATTERN_TYPES or not isinstance(types, list):
        return []
    layers = text.get("num_hidden_layers")
    if layers != len(types):
        return [
            Problem(
                severity="fault",
                what="layer_types does not list every layer",
                where=f"config.json: {len(types)} layer_types, num_hidden_layers is {layers}",
                why="the layers past the list's end get the wrong attention, or loading fails",
                cure="list the type of each layer, a copied layer's being that of its original",
            )
        ]
    sliding = [kind == "sliding_attention" for kind in types]
    written = text.get("sliding_window_pattern", LLAMA_CPP_PERIOD)
    if sliding == _pattern(written, len(types)):
        return []
    wrong = [number for number, same in enumerate(_compare(sliding, _pattern(written, len(types)))) if not same]
    has = f"is {written!r}" if "sliding_window_pattern" in text else "is missing"
    return [
        Problem(
            severity="fault",
            what="llama.cpp would give layers the wrong attention",
            where=f"config.json: sliding_window_pattern {has}, layer_types differs at layer {first(wrong)}",
            why="llama.cpp assumes that every sixth layer of Gemma 3 attends to everything: logits come out wrong",
            cure=f"write sliding_window_pattern beside layer_types as an array: {_json_list(sliding)}",
        )
    ]


def _pattern(written: Any, layers: int) -> list[bool]:
    """Per layer, whether it slides: an array as it stands, a number n as "all but every n-th"."""
    if isinstance(written, int) and not isinstance(written, bool) and written > 0:
        return [(layer + 1) % written != 0 for layer in range(layers)]
    return [bool(kind) for kind in written] if isinstance(written, list) else []


def _compare(one: list[bool], other: list[bool]) -> Iterable[bool]:
    return (number < len(other) and kind == other[number] for number, kind in enumerate(one))


def _json_list(values: list[bool]) -> str:
    shown = ", ".join("true" if value else "false" for value in values[:8])
    return f"[{shown}{', …' if len(values) > 8 else ''}]"
