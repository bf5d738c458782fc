"""Reading a recipe: one YAML file in, a checked `Recipe` out.

`load(path)` fills environment variables, applies `--set` overrides, expands stage presets, checks every key and value,
and reports all faults at once with their place in the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lingraft.errors import RecipeError
from lingraft.presets import PRESETS
from lingraft.recipe import Recipe, Settings, did_you_mean

# ------------------------------------------------------------------------------------------------ YAML

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them (`1e-5`), no duplicate keys, and environment variables."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in rules if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _substitute(text: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise RecipeError(
                f"{where}: the environment variable {match[1]} is not set; "
                f"set it, or write a default as ${{{match[1]}:-default}}"
            )
        return found

    return _VARIABLE.sub(value, text)


def _fill_variables(loader: _Loader, node: yaml.Node, name: str) -> None:
    """Replace `${NAME:-default}` in place; a plain scalar is typed again afterwards. Also finds duplicate keys."""
    if isinstance(node, yaml.ScalarNode) and "${" in node.value:
        node.value = _substitute(node.value, f"{name}:{node.start_mark.line + 1}")
        if node.style is None:
            node.tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _fill_variables(loader, item, name)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{name}:{key.start_mark.line + 1}: a key must be a word")
            if key.value in seen:
                raise RecipeError(f"{name}:{key.start_mark.line + 1}: the key {key.value!r} stands twice; keep one")
            seen.add(key.value)
            _fill_variables(loader, item, name)


def _lines(node: yaml.Node, at: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], int]:
    """Line number of every place in the file, by path of keys and indices."""
    found = {at: node.start_mark.line + 1}
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            found |= _lines(item, (*at, i))
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            found |= _lines(item, (*at, key.value))
            found[(*at, key.value)] = key.start_mark.line + 1
    return found


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: the recipe is not UTF-8 text; save it as UTF-8") from error
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a control character, say
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{path}: a recipe is a YAML mapping with keys such as name, base, corpus, stages")
        _fill_variables(loader, node, path.name)
        return loader.construct_document(node), _lines(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    finally:
        loader.dispose()


def parse_value(text: str) -> Any:
    """The value of `--set a.b=VALUE`, typed as YAML would type it."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"--set: {text!r} is not a YAML value") from error


# ----------------------------------------------------------------------------------- presets, overrides


def expand_stages(stages: Any) -> list[Any]:
    """Expand preset names (`eeve`, or `{preset: eeve, override: {stage: {…}}}`) into plain stages."""
    expanded: list[Any] = []
    for item in stages if isinstance(stages, list) else [stages]:
        if isinstance(item, str):
            item = {"preset": item}
        if not isinstance(item, Mapping) or "preset" not in item:
            expanded.append(item)
            continue
        unknown = set(item) - {"preset", "override", "every"}
        if unknown:
            raise RecipeError(f"stages: unknown key {sorted(unknown)[0]!r} beside preset; known: override, every")
        name = item["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            raise RecipeError(
                f"stages: unknown preset {name!r}{did_you_mean(str(name), PRESETS)}; known: {', '.join(PRESETS)}"
            )
        override = item.get("override") or {}
        preset = deepcopy(PRESETS[name])
        names = [stage["name"] for stage in preset]
        for key in override:
            if key not in names:
                raise RecipeError(f"stages: preset {name} has no stage {key!r}{did_you_mean(key, names)}")
        expanded += [_merge(_merge(s, item.get("every") or {}), override.get(s["name"]) or {}) for s in preset]
    return expanded


def _merge(old: Any, new: Any) -> Any:
    """`new` over `old`, mapping by mapping; epochs and tokens displace each other."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return deepcopy(new)
    merged = {k: _merge(v, new[k]) if k in new else deepcopy(v) for k, v in old.items()}
    merged |= {k: deepcopy(v) for k, v in new.items() if k not in old}
    if "tokens" in new:
        merged.pop("epochs", None) if "epochs" not in new else None
    elif "epochs" in new:
        merged.pop("tokens", None)
    return merged


def apply_override(data: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b.c=value` in place; list items are named by index or by their `name`."""
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {assignment}: write it as key.key=value, for example training.precision=fp32")
    if keys[0] == "stages" and len(keys) > 1:
        data["stages"] = expand_stages(data.get("stages"))
    here: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            names = [str(x.get("name")) if isinstance(x, Mapping) else "" for x in here]
            if key in names:
                index = names.index(key)
            elif key.isdigit() and int(key) < len(here):
                index = int(key)
            else:
                at = ".".join(keys[:depth])
                raise RecipeError(f"--set {assignment}: {at} has no item {key!r}{did_you_mean(key, names)}")
            if last:
                here[index] = parse_value(text)
            else:
                here = here[index]
        elif isinstance(here, dict):
            if last:
                here[key] = parse_value(text)
                for one, other in (("epochs", "tokens"), ("tokens", "epochs")):
                    if key == one:
                        here.pop(other, None)
            else:
                if not isinstance(here.get(key), (dict, list)):
                    here[key] = {}
                here = here[key]


def _fill_stage_defaults(data: dict[str, Any]) -> None:
    """Write the `training:` defaults into every stage that does not say otherwise."""
    defaults = data.get("training")
    if not isinstance(defaults, Mapping) or not isinstance(data.get("stages"), list):
        return
    known = {k: v for k, v in defaults.items() if k in Settings.model_fields}
    data["stages"] = [_merge(known, s) if isinstance(s, Mapping) else s for s in data["stages"]]


# ---------------------------------------------------------------------------------------------- loading

BUILT_IN = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")


def find(recipe: str | Path) -> Path:
    """The recipe's file: a path, or the name of a built-in recipe.

    Built-in recipes lie in the installed package, or in `recipes/` of a source checkout.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file; `lingraft recipe list` names the built-in ones")
        return Path(os.path.abspath(path))
    for folder in BUILT_IN:
        if (folder / f"{recipe}.yaml").is_file():
            return folder / f"{recipe}.yaml"
    names = built_in_names()
    raise RecipeError(
        f"{recipe}: no such recipe; give a .yaml file or a built-in name{did_you_mean(str(recipe), names)} "
        f"(built in: {', '.join(names)})"
    )


def built_in_names() -> list[str]:
    """Names of the recipes that ship with lingraft."""
    return sorted({p.stem for folder in BUILT_IN if folder.is_dir() for p in folder.glob("*.yaml")})


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: a YAML file, or the name of a built-in recipe.
        overrides: `a.b=value` assignments, applied in order.
    Raises:
        RecipeError: one line for every fault in the file.
    """
    path = find(recipe)
    data, lines = _read_yaml(path)
    for assignment in overrides:
        apply_override(data, assignment)
    if "stages" in data:
        data["stages"] = expand_stages(data["stages"])
    _fill_stage_defaults(data)
    return validate(data, folder=path.parent, name=path.name, lines=lines)


def validate(
    data: Mapping[str, Any],
    *,
    folder: Path,
    name: str = "recipe",
    lines: Mapping[tuple[str | int, ...], int] | None = None,
) -> Recipe:
    """Turn plain data (presets expanded) into a Recipe, or raise one RecipeError that lists every fault."""
    try:
        return Recipe.model_validate({**data, "folder": folder / str(data.get("folder", ""))})
    except ValidationError as error:
        faults = [line for e in _once(error.errors()) for line in _fault(e, name, lines or {})]
        raise RecipeError("\n".join(dict.fromkeys(faults))) from None


def _once(errors: Sequence[Any]) -> list[Any]:
    """One error for all branches of a union, and none that a stage has from `training` alone."""
    defaults = [(error["loc"][1:], error["input"]) for error in errors if error["loc"][:1] == ("training",)]
    found: list[Any] = []
    for error in errors:
        loc = tuple(part for part in error["loc"] if not _is_union_branch(part))
        if loc[:1] == ("stages",) and (error["loc"][2:], error["input"]) in defaults:
            continue
        message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if len(loc) < len(error["loc"]) and found and found[-1]["loc"] == loc:
            found[-1]["msg"] += f", or {message.removeprefix('should ')}"
        else:
            found.append({**error, "loc": loc, "msg": message})
    return found


def _fault(error: Any, name: str, lines: Mapping[tuple[str | int, ...], int]) -> list[str]:
    loc = error["loc"]
    spelled = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    place = name
    for length in range(len(loc), 0, -1):
        if loc[:length] in lines:
            place = f"{name}:{lines[loc[:length]]}"
            break
    if error["type"] == "extra_forbidden":
        known = _fields_at(loc[:-1])
        listed = f"; known keys: {', '.join(known)}" if known else ""
        return [f"{place}: {spelled}: unknown key{did_you_mean(str(loc[-1]), known) or listed}"]
    if error["type"] == "missing":
        return [f"{place}: {spelled}: this key is missing; add it"]
    shown = "" if isinstance(error["input"], (Mapping, BaseModel)) else f" (given: {error['input']!r})"
    if error["type"] == "value_error":
        shown = ""
    return [f"{place}: {spelled}: {m}{shown}" if spelled else f"{place}: {m}" for m in error["msg"].split("\n")]


def _is_union_branch(part: str | int) -> bool:
    # pydantic names the tried branch of a union inside the location: not a key of the file
    return isinstance(part, str) and (
        part in ("str", "int", "Replay") or part.startswith(("list[", "dict[", "literal[", "function-"))
    )


def _fields_at(loc: tuple[str | int, ...]) -> list[str]:
    """The known keys of the section at `loc`, for "did you mean"."""
    section: type[BaseModel] | None = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = next((m for m in _models(field.annotation)), None) if field else None
        if section is None:
            return []
    return list(section.model_fields) if section else []


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, every default written out."""
    plain = recipe.model_dump(mode="json", exclude={"training"}, exclude_none=True)
    return yaml.safe_dump(plain, allow_unicode=True, sort_keys=False, width=110)
