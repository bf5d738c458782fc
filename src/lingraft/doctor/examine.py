"""The list of checks, in order, and the run over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lingraft.doctor import added_words, against_base, configs, files, rows, runtime_ids, tokenizers
from lingraft.doctor.findings import Case, Finding, Problem
from lingraft.doctor.folder import CannotCheck, ModelFolder
from lingraft.doctor.lines import BUILT_IN
from lingraft.errors import ModelError
from lingraft.progress import track

State = Literal["ok", "note", "warning", "fault", "not checked"]

CHECKS: tuple[tuple[str, Callable[[Case], list[Problem]]], ...] = (
    ("json-files", files.damaged_json),
    ("config-file", files.missing_config),
    ("pickled-weights", files.pickled_weights),
    ("weight-index", files.weight_index),
    ("damaged-shards", files.damaged_shards),
    ("config-twins", configs.config_twins),
    ("tied-flag", configs.tied_flag),
    ("rows-and-configs", configs.rows_and_configs),
    ("tokens-beyond-rows", configs.tokens_beyond_rows),
    ("layer-pattern", configs.layer_pattern),
    ("dtype-mix", configs.dtype_mix),
    ("not-finite", rows.not_finite),
    ("zero-rows", rows.zero_rows),
    ("untrained-rows", rows.untrained_rows),
    ("outlier-rows", rows.outlier_rows),
    ("tokenizer-file", tokenizers.tokenizer_file),
    ("sentencepiece-model", tokenizers.sentencepiece_model),
    ("special-ids", tokenizers.special_ids),
    ("tokenizer-config", tokenizers.tokenizer_config),
    ("chat-template", tokenizers.chat_template),
    ("added-words", added_words.added_words),
    ("added-words-gain", added_words.added_words_gain),
    ("byte-merges", tokenizers.byte_merges),
    ("unreachable-pieces", tokenizers.unreachable_pieces),
    ("sentencepiece-ids", runtime_ids.sentencepiece_ids),
    ("llama-cpp-ids", runtime_ids.llama_cpp_ids),
    ("old-ids", against_base.old_ids),
    ("old-boundaries", against_base.old_boundaries),
    ("old-rows", against_base.old_rows),
    ("old-logits", against_base.old_logits),
)


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and the state of every check in order."""

    model: Path
    base: Path | None
    findings: list[Finding]
    checks: dict[str, State]

    @property
    def healthy(self) -> bool:
        """No fault and no warning; notes do not count."""
        return all(finding.severity == "note" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data, as `lingraft doctor --json` prints it."""
        return {
            "model": str(self.model),
            "base": str(self.base) if self.base else None,
            "healthy": self.healthy,
            "findings": [asdict(finding) for finding in self.findings],
            "checks": [{"id": name, "state": state} for name, state in self.checks.items()],
        }


def examine(model: Path, base: Path | None = None, texts: Sequence[str] = BUILT_IN) -> Diagnosis:
    """Run every check on a model folder, or on a folder of a tokenizer alone.

    Args:
        base: the model it was made from, for the checks of what must not have changed.
        texts: lines to try in every runtime and, those without new letters, in both models.
    Raises:
        ModelError: no such folder, or nothing of a model in it.
    """
    for folder in filter(None, (model, base)):
        _check_folder(folder)
    case = Case(ModelFolder(model), ModelFolder(base) if base else None, texts)
    findings: list[Finding] = []
    states: dict[str, State] = {}
    for name, check in track(CHECKS, "examining"):
        try:
            problems = check(case)
            severities = {problem.severity for problem in problems}
            states[name] = next((s for s in ("fault", "warning", "note") if s in severities), "ok")  # type: ignore[assignment]
        except CannotCheck as reason:
            problems = [_not_checked(str(reason))]
            states[name] = "not checked"
        except Exception as error:  # anyone's folder may be odd in ways that no check foresees; the others still run
            problems = [_not_checked(f"something in this folder is of an odd shape ({type(error).__name__}: {error})")]
            states[name] = "not checked"
        findings += [Finding(id=name, **asdict(problem)) for problem in problems]
    return Diagnosis(model, base, findings, states)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    if not any((folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer.model")) and not any(
        folder.glob("*.safetensors")
    ):
        raise ModelError(f"{folder}: neither config.json, weights nor tokenizer here; give a model's folder")


def _not_checked(reason: str) -> Problem:
    return Problem(
        severity="note",
        what="not checked",
        where=reason,
        why="this check needs what is missing here",
        cure="give what is missing to have it checked",
    )
