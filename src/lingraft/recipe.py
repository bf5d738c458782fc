"""The recipe's sections: every key, its type, its default, and what must hold between them.

`lingraft.recipe_file` reads a recipe from YAML. No torch is imported here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lingraft.errors import RecipeError
from lingraft.evaluation.scoreboard import METRICS, parse_limit
from lingraft.languages import LANGUAGE_NAMES
from lingraft.tokenizer.pieces import SCRIPTS, WHY_NO_UNITS

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


def _interval(value: float) -> float:
    if value < 1:
        return value
    if value != int(value):
        raise ValueError(f"{value:g} is neither a whole number of steps nor a share below 1")
    return int(value)


Interval = Annotated[float, Field(gt=0), AfterValidator(_interval)]
Share = Annotated[float, Field(ge=0, le=1)]
PartShare = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Strict(BaseModel):
    """A section of the recipe: unknown keys are fatal, values are not guessed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


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
    max_words: Count = 4
    balance: Share = 0.5
    sources: list[str] | None = None
    characters_first: bool = False
    nfc: bool = True

    @field_validator("scripts")
    @classmethod
    def _known_scripts(cls, scripts: list[str] | None) -> list[str] | None:
        for script in scripts or []:
            if script.lower() == "units":
                raise ValueError(f"{script!r} is no script. {WHY_NO_UNITS}; remove it")
            if script not in SCRIPTS:
                cure = did_you_mean(script.capitalize(), SCRIPTS) or "; examples: Hangul, Han, Thai"
                raise ValueError(f"{script!r} is no script that Unicode names so{cure}")
        return scripts


# The rules of `embeddings.rules`, less `random`, a control that the probe alone may use.
InitialRows = Literal[
    "subword_mean", "first_subword", "length_weighted", "wechsel", "focus", "omp", "global_mean", "gaussian"
]


class Vectors(Strict):
    """Files of static word vectors of the two languages, for the rule wechsel."""

    target: str
    old: str


class Donor(Strict):
    """A model that has many of the new tokens, for the rule omp: a folder or hub id."""

    model: str
    revision: str | None = None


class Distillation(Strict):
    """Learn the new input rows from the base's own hidden states, after a rule has set them."""

    tokens: Count = 200_000
    layer: int = -1
    learning_rate: Positive = 1e-3
    next_token_weight: Annotated[float, Field(ge=0)] = 0.1


class Embeddings(Strict):
    method: Literal["rules", "probe"] = "rules"
    input: InitialRows = "subword_mean"
    output: InitialRows = "length_weighted"
    calibrate_norm: bool = True
    calibrate_output: Annotated[float, Field(gt=0, lt=1)] | None = None
    dictionary: Dictionary | None = None
    vectors: Vectors | None = None
    donor: Donor | None = None
    tie: Literal["untie", "keep"] = "untie"
    distillation: Distillation | None = None

    @model_validator(mode="after")
    def _rules_have_what_they_need(self) -> Embeddings:
        rules = (self.input, self.output)
        if "wechsel" in rules and not (self.vectors and self.dictionary):
            raise ValueError("the rule wechsel needs vectors (word vectors of both languages) and a dictionary")
        if "omp" in rules and not self.donor:
            raise ValueError("the rule omp needs a donor (a model that has many of the new tokens)")
        return self


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
    micro_batch: Literal["auto"] | Count = "auto"
    packing: bool = True
    precision: Literal["fp32", "bf16"] = "bf16"
    quantise: Literal["none", "nf4"] = "none"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    warmup: Share = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[PartShare, PartShare] = (0.9, 0.95)
    clip: Positive = 1.0
    gradient_checkpointing: bool = True
    parallel: Literal["ddp", "fsdp", "zero2"] = "ddp"
    checkpoint_seconds: Positive = 600
    keep_checkpoints: Count = 2
    keep: Literal["last", "best"] = "last"
    validate_every: Interval | None = None


# Settings that don't change what a stage learns: a finished stage stays done when they change.
HARMLESS_SETTINGS = frozenset({"checkpoint_seconds", "keep_checkpoints", "micro_batch", "parallel"})


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
        if self.parallel != "ddp" and self.optimizer != "adamw":
            raise ValueError(
                f"parallel: {self.parallel} shares out the states of optimizer: adamw only; set it, or parallel: ddp"
            )
        if self.train.layers == "all" and self.quantised != "none":
            raise ValueError("quantise holds frozen layers in 4 bits, and train.layers: all trains them; give one")
        return self

    @property
    def quantised(self) -> str:
        """How the frozen linear layers are held: by the stage's own key, or by the one under `lora`."""
        return self.lora.quantise if self.lora and self.lora.quantise != "none" else self.quantise


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
        faults = faults or [*_unmeasured_gates(self), *_unmeasured_stages(self)]
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
        source.language for source in recipe.corpus.sources if source.format == "text" and _held_out(recipe, source) > 0
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


def _unmeasured_stages(recipe: Recipe) -> Iterable[str]:
    """Stages that ask for a validation loss where nothing of their data is held out."""
    for i, stage in enumerate(recipe.stages):
        asks = "keep: best" if stage.keep == "best" else "validate_every" if stage.validate_every else None
        data = (source for sources in recipe.sources_for(stage).values() for source in sources)
        if asks and not any(_held_out(recipe, source) > 0 for source in data):
            yield f"stages[{i}].{asks} needs held-out documents of the stage's own data; set held_out of a source"


def _held_out(recipe: Recipe, source: Source) -> float:
    """The part of a source's documents that is set aside."""
    return recipe.corpus.held_out if source.held_out is None else source.held_out


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a near miss, else the empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
