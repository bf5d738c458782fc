"""The recipe: one YAML file that says everything a run does.

`load(path)` reads it, fills environment variables, applies `--set` overrides, expands stage presets, checks
every key and value, and reports all faults at once with their place in the file. No torch is imported here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lingraft.errors import RecipeError
from lingraft.evaluation.scoreboard import METRICS, parse_limit
from lingraft.languages import LANGUAGE_NAMES
from lingraft.presets import PRESETS

# ---------------------------------------------------------------------------------------------- values

_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def _count(value: Any) -> Any:
    """Read `50M`, `200k`, `1.5GB` or a plain number as an integer count."""
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-zA-Z]{1,2})?", value.strip())
        if not match or (match[2] and match[2].lower() not in _UNITS):
            raise ValueError(f"{value!r} is not a count; write a whole number or one such as 200k, 50M, 1GB")
        return round(float(match[1].replace("_", "")) * _UNITS.get((match[2] or "").lower(), 1))
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a count; write a whole number")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(_count), Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PartShare = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Strict(BaseModel):
    """A section of the recipe: unknown keys are fatal, values are not guessed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


# -------------------------------------------------------------------------------------------- sections


class Languages(Strict):
    target: Language
    old: Language = "en"


class NewTokenizer(Strict):
    """A fresh SentencePiece-BPE vocabulary for a model made from scratch."""

    vocabulary: Count = 4096
    unused: Annotated[int, Field(ge=0)] = 1500


class Scratch(Strict):
    """A model of random weights (miniatures, tests): family, configuration and its own tokenizer."""

    family: str
    config: dict[str, Any]
    tokenizer: NewTokenizer = NewTokenizer()


class Base(Strict):
    """The model to graft onto: a folder or hub id, another recipe's result, or fresh weights."""

    model: str | None = None
    revision: str | None = None
    recipe: str | None = None
    scratch: Scratch | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Base:
        given = [k for k in ("model", "recipe", "scratch") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, recipe, scratch (given: {', '.join(given) or 'none'})")
        return self


class QuestionColumns(Strict):
    """Which columns hold what; `fixed_choices` are the choices themselves, where no column holds them."""

    question: str = "question"
    choices: str | list[str] = "choices"
    fixed_choices: Annotated[list[str], Field(min_length=2)] | None = None
    answer: str = "answer"
    answer_base: Literal[0, 1] = 0

    @model_validator(mode="after")
    def _one_kind_of_choices(self) -> QuestionColumns:
        if self.fixed_choices and self.choices != "choices":
            raise ValueError("give choices (columns) or fixed_choices (texts), not both")
        return self


class Replay(Strict):
    """Old-language text sampled from the base itself, for bases whose training data nobody has."""

    documents: Count = 400
    max_tokens: Count = 256
    temperature: Positive = 1.0


class Origin(Strict):
    """Where rows come from: exactly one of path, hub, miniature (and, for sources, replay)."""

    name: Name
    language: Language
    path: str | list[str] | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    miniature: str | None = None
    column: str | dict[str, str] | None = None
    columns: QuestionColumns = QuestionColumns()
    scoring: Literal["letter", "cloze"] = "letter"
    encoding: str | None = None
    limit_documents: Count | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Origin:
        origins = ("path", "hub", "miniature", *(("replay",) if "replay" in type(self).model_fields else ()))
        given = [k for k in origins if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(origins)} (given: {', '.join(given) or 'none'})")
        return self


class Source(Origin):
    """One body of text, chats or questions to train and measure on."""

    replay: Literal["self"] | Replay | None = None
    format: Literal["text", "chat", "questions"] = "text"
    documents: Literal["line", "paragraph", "file"] = "paragraph"
    weight: Positive = 1.0
    held_out: PartShare | None = None
    min_characters: Annotated[int, Field(ge=0)] = 1
    max_characters: Count | None = None
    min_script_share: Share = 0.3
    keywords: list[str] = []
    limit_bytes: Count | None = None


class Dictionary(Strict):
    """Pairs of a target-language term and its old-language translation."""

    path: str | None = None
    miniature: bool = False
    target_column: str | None = None
    old_column: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Dictionary:
        if (self.path is None) == (not self.miniature):
            raise ValueError("give exactly one of path, miniature")
        return self


class Corpus(Strict):
    sources: Annotated[list[Source], Field(min_length=1)]
    held_out: PartShare = 0.05
    max_held_out_documents: Count = 500
    decontaminate: bool = True
    save_rejects: bool = False


class Tokenizer(Strict):
    new_tokens: Count
    min_frequency: Count = 2
    slots: Literal["auto", "unused", "append"] = "auto"
    scripts: list[str] | None = None
    max_piece_characters: Count = 16
    sources: list[str] | None = None


class Embeddings(Strict):
    input: Literal["subword_mean", "first_subword", "length_weighted"] = "subword_mean"
    output: Literal["subword_mean", "first_subword", "length_weighted"] = "first_subword"
    calibrate_norm: bool = False
    dictionary: Dictionary | None = None
    tie: Literal["untie", "keep"] = "untie"


class Trains(Strict):
    input_rows: Literal["none", "new", "all"] = "none"
    output_rows: Literal["none", "new", "all"] = "none"
    layers: Literal["none", "all", "lora"] = "none"


class Lora(Strict):
    r: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank_stabilised: bool = False
    targets: list[str] | None = None
    quantise: Literal["none", "nf4"] = "none"


class Settings(Strict):
    """How a stage trains; `training:` gives defaults for every stage."""

    learning_rate: Positive = 1e-4
    embedding_learning_rate: Positive | None = None
    epochs: Positive | None = None
    tokens: Count | None = None
    sequence_length: Annotated[Count, Field(ge=8)] = 2048
    batch_size: Count = 1
    gradient_accumulation_steps: Count = 16
    precision: Literal["fp32", "bf16"] = "bf16"
    warmup: Share = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[PartShare, PartShare] = (0.9, 0.95)
    clip: Positive = 1.0
    gradient_checkpointing: bool = True
    checkpoint_seconds: Positive = 600


class Stage(Settings):
    """One entry of the stage list: what trains, on what, how long, and what it may cost."""

    name: Name
    train: Trains
    lora: Lora | None = None
    data: Annotated[dict[str, Positive], Field(min_length=1)] | None = None
    format: Literal["text", "chat"] = "text"
    gate: dict[str, float] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if set(self.train.model_dump().values()) == {"none"}:
            raise ValueError("trains nothing: set input_rows, output_rows or layers under train")
        if (self.train.layers == "lora") != (self.lora is not None):
            raise ValueError("train.layers: lora and a lora section belong together; give both or neither")
        if self.epochs is not None and self.tokens is not None:
            raise ValueError("give epochs or tokens, not both")
        return self


class Generation(Strict):
    prompts: dict[Language, list[str]] = {}
    count: Count = 4
    max_new_tokens: Count = 48


class Questions(Origin):
    """A set of multiple-choice questions for the scoreboard."""

    documents: Literal["line", "paragraph", "file"] = "line"


class Evaluate(Strict):
    max_documents: Count = 200
    max_document_characters: Count = 20_000
    span_bytes: Annotated[Count, Field(ge=4)] = 480
    questions: list[Questions] = []
    generation: Generation = Generation()


class Recipe(Strict):
    """The whole recipe. `folder` is where relative paths start: by default where the recipe's file lies."""

    name: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    miniature: bool = False
    languages: Languages
    base: Base
    corpus: Corpus
    tokenizer: Tokenizer | None = None
    embeddings: Embeddings = Embeddings()
    training: Settings = Settings()
    stages: Annotated[list[Stage], Field(min_length=1)]
    evaluate: Evaluate = Evaluate()
    folder: Path = Path()

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        faults = [*_duplicate_names(self), *_unknown_data(self), *_unknown_gates(self)]
        if self.tokenizer is None:
            faults += [
                f"stages[{i}].train: there are no new rows, since the recipe has no tokenizer section"
                for i, stage in enumerate(self.stages)
                if "new" in (stage.train.input_rows, stage.train.output_rows)
            ]
        if self.tokenizer and self.base.scratch:
            faults.append("tokenizer: a base from scratch has its vocabulary under base.scratch.tokenizer")
        faults = faults or list(_unmeasured_gates(self))
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def path(self, text: str) -> Path:
        """An absolute path for a path written in the recipe, relative to the recipe's folder."""
        return Path(os.path.normpath(self.folder / Path(text).expanduser()))

    def stage_data(self, stage: Stage) -> dict[str, float]:
        """Weights of the stage's data, by source name or language; by default 90 % target and 10 % old language
        where the corpus has old-language text of the stage's format, else the target alone."""
        if stage.data is not None:
            return dict(stage.data)
        target, old = self.languages.target, self.languages.old
        has_old = any(s.language == old and _matches(s, stage.format) for s in self.corpus.sources)
        return {target: 0.9, old: 0.1} if has_old and old != target else {target: 1.0}

    def sources_for(self, stage: Stage) -> dict[str, list[Source]]:
        """The corpus sources behind each key of the stage's data weights."""
        by_name = {s.name: s for s in self.corpus.sources}
        return {
            key: [by_name[key]]
            if key in by_name
            else [s for s in self.corpus.sources if s.language == key and _matches(s, stage.format)]
            for key in self.stage_data(stage)
        }


def _matches(source: Source, stage_format: str) -> bool:
    return (source.format == "text") == (stage_format == "text")


def _duplicate_names(recipe: Recipe) -> Iterable[str]:
    for where, names in (
        ("corpus.sources", [s.name for s in recipe.corpus.sources]),
        ("stages", [s.name for s in recipe.stages]),
        ("evaluate.questions", [q.name for q in recipe.evaluate.questions]),
    ):
        for i, name in enumerate(names):
            if name in names[:i]:
                yield f"{where}[{i}].name: {name!r} is used twice; names must differ"


def _unknown_data(recipe: Recipe) -> Iterable[str]:
    known = {s.name for s in recipe.corpus.sources} | {s.language for s in recipe.corpus.sources}
    for i, stage in enumerate(recipe.stages):
        for key in recipe.stage_data(stage):
            if key not in known:
                yield f"stages[{i}].data.{key}: no such source or language{did_you_mean(key, known)}"
            elif not recipe.sources_for(stage)[key]:
                yield f"stages[{i}].data.{key}: no source of that language has format {stage.format}"
    for key in recipe.tokenizer.sources or [] if recipe.tokenizer else []:
        if key not in known:
            yield f"tokenizer.sources: no such source or language {key!r}{did_you_mean(key, known)}"


def _unknown_gates(recipe: Recipe) -> Iterable[str]:
    languages = (recipe.languages.target, recipe.languages.old)
    for i, stage in enumerate(recipe.stages):
        for key in stage.gate:
            try:
                known = parse_limit(key)[0] in languages
            except RecipeError:
                known = False
            if not known:
                spelled = (*languages, *(LANGUAGE_NAMES.get(code, code).lower() for code in languages))
                examples = [f"{lang}_{metric}" for lang in dict.fromkeys(spelled) for metric in METRICS]
                yield f"stages[{i}].gate.{key}: unknown gate{did_you_mean(key, examples)}; known: {', '.join(examples)}"


def _unmeasured_gates(recipe: Recipe) -> Iterable[str]:
    """Gates that could only be found impossible after their stage has trained."""
    asked = {questions.language for questions in recipe.evaluate.questions}
    measured = {
        source.language
        for source in recipe.corpus.sources
        if source.format == "text" and (recipe.corpus.held_out if source.held_out is None else source.held_out) > 0
    }
    for i, stage in enumerate(recipe.stages):
        for key in stage.gate:
            language, metric = parse_limit(key)
            if recipe.base.scratch:
                yield f"stages[{i}].gate.{key}: a base from scratch has no scores to compare with; remove the gate"
            elif metric == "accuracy_drop" and language not in asked:
                yield f"stages[{i}].gate.{key}: evaluate.questions has no set in that language; add one"
            elif metric == "bpb_rise" and language not in measured:
                yield f"stages[{i}].gate.{key}: no text in that language is held out; add some or remove the gate"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a near miss, else the empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


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
        faults = [line for e in error.errors() for line in _fault(e, name, lines or {})]
        raise RecipeError("\n".join(dict.fromkeys(faults))) from None


def _fault(error: Any, name: str, lines: Mapping[tuple[str | int, ...], int]) -> list[str]:
    loc = tuple(part for part in error["loc"] if not _is_union_branch(part))
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
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    shown = "" if isinstance(error["input"], (Mapping, BaseModel)) else f" (given: {error['input']!r})"
    if error["type"] == "value_error":
        shown = ""
    return [f"{place}: {spelled}: {m}{shown}" if spelled else f"{place}: {m}" for m in message.split("\n")]


def _is_union_branch(part: str | int) -> bool:
    # pydantic names the tried branch of a union inside the location: not a key of the file
    return isinstance(part, str) and (
        part in ("str", "int", "Replay") or part.startswith(("list[", "dict[", "literal["))
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
