"""Checks of the folder's files, before anything in them is understood."""

from __future__ import annotations

import re

from safetensors import SafetensorError, safe_open

from lingraft.doctor.findings import Case, Problem, first
from lingraft.doctor.folder import INDEX_FILE, CannotCheck, parse_object, shards

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "graft.json",
    INDEX_FILE,
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def damaged_json(case: Case) -> list[Problem]:
    """JSON files that cannot be read."""
    return [
        Problem(
            severity="fault",
            what=f"{name} cannot be read",
            where=f"{name}: {reason}",
            why="whatever loads the model stops there, or goes on without the settings",
            cure=f"fetch {name} again",
        )
        for name in JSON_FILES
        if (reason := _unreadable(case, name))
    ]


def _unreadable(case: Case, name: str) -> str | None:
    path = case.model.path / name
    try:
        if path.is_file():
            parse_object(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def missing_config(case: Case) -> list[Problem]:
    """Weights without a config.json."""
    if (case.model.path / "config.json").is_file():
        return []
    if not list(case.model.path.glob("*.safetensors")):
        raise CannotCheck("a folder of a tokenizer alone: no weights, no config.json")
    return [
        Problem(
            severity="fault",
            what="no config.json beside the weights",
            where=str(case.model.path),
            why="nothing can know the architecture that these weights belong to",
            cure="copy config.json from the model that the weights came from",
        )
    ]


def pickled_weights(case: Case) -> list[Problem]:
    """Weights in formats that can run code when opened."""
    found = sorted(path.name for pattern in PICKLES for path in case.model.path.glob(pattern))
    if not found:
        return []
    only = not shards(case.model.path)
    return [
        Problem(
            severity="fault" if only else "warning",
            what="pickled weights" + (" and no safetensors" if only else " beside the safetensors"),
            where=first(found),
            why="a pickle can run any code on the machine that opens it, and some tools prefer it to safetensors",
            cure="save the model as safetensors on a machine without secrets" if only else "delete the pickled files",
        )
    ]


def weight_index(case: Case) -> list[Problem]:
    """The index names files or tensors that are not there; shards without an index."""
    folder = case.model.path
    if not (folder / INDEX_FILE).is_file():
        loose = [file.name for file in shards(folder) if re.search(r"-\d{5}-of-\d{5}\.safetensors$", file.name)]
        return [_bad_index(f"shards without {INDEX_FILE}", first(loose))] if loose else []
    weight_map = case.model.json(INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        return [_bad_index("the index has no weight_map", INDEX_FILE)]
    if missing := sorted({str(name) for name in weight_map.values() if not (folder / str(name)).is_file()}):
        return [_bad_index(f"the index names {len(missing)} missing file(s)", first(missing))]
    if damaged_shards(case):
        raise CannotCheck("some files are damaged (see damaged-shards)")
    absent = sorted(set(weight_map) - set(case.model.weights.names))
    return [_bad_index(f"the index names {len(absent)} tensors that no file holds", first(absent))] if absent else []


def _bad_index(what: str, where: str) -> Problem:
    return Problem(
        severity="fault",
        what=what,
        where=where,
        why="the model cannot be loaded whole; some loaders fill what is missing with random values",
        cure="fetch the missing files and the index again from one and the same version of the model",
    )


def damaged_shards(case: Case) -> list[Problem]:
    """Safetensors files that are cut short or no safetensors at all."""
    problems = []
    for file in shards(case.model.path):
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            problems.append(
                Problem(
                    severity="fault",
                    what="a weight file is damaged or cut short",
                    where=f"{file.name}, {file.stat().st_size:,} bytes: {error}",
                    why="its tensors cannot be read",
                    cure=f"fetch {file.name} again",
                )
            )
    return problems
