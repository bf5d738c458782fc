"""Collect what the steps' manifests say into the data that the report page shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lingraft.languages import LANGUAGE_NAMES
from lingraft.recipe_file import dump
from lingraft.steps.context import grafted_pieces
from lingraft.steps.economics import published
from lingraft.steps.shape import shape_if_known
from lingraft.version import versions

if TYPE_CHECKING:
    from lingraft.layout import Plan

EXAMPLES = 20


def report_data(plan: Plan, entries: list[dict[str, Any]], state: str, command: str) -> dict[str, Any]:
    """The report's data: the schema is that of `lingraft.report`."""
    from lingraft.evaluation.scoreboard import alarms

    recipe = plan.recipe
    done = {step.name: plan.manifest(step.name) for step in plan.steps if plan.state(step) == "done"}
    results = {name: manifest["results"] for name, manifest in done.items() if manifest}
    stages = [(s, results[s.name]) for s in plan.training_steps if s.name in results]
    embeddings = results.get("03-embeddings")
    base_alarms = alarms(entries[0], recipe.languages.old) if entries and entries[0]["step"] == "00-base" else []
    manifests = [m for m in done.values() if m]
    return {
        "name": recipe.name,
        "miniature": recipe.miniature,
        "created": max((m["started"] for m in manifests), default=None),
        "lingraft_version": versions()["lingraft"],
        "state": state,
        "state_detail": _gate_detail(entries) if state == "stopped by a gate" else "",
        "seconds": sum(m["seconds"] for m in manifests),
        "peak_memory_gb": max((r["peak_memory_gb"] for _, r in stages), default=None),
        "languages": recipe.languages.model_dump(),
        "language_names": {code: LANGUAGE_NAMES.get(code, code) for code in recipe.languages.model_dump().values()},
        "base": {"model": plan.base.label} | (embeddings["base"] if embeddings else {}),
        "final": {
            "path": "model/ beside this page",
            "parameters": embeddings["parameters"] if embeddings else None,
            "tied": embeddings["tied"] if embeddings else None,
            "vocabulary": results["02-tokenizer"]["vocabulary_after"] if embeddings else None,
        },
        "alarms": [line.removeprefix("alarm: ") for line in base_alarms if line.startswith("alarm")],
        "notes": [
            *(line.removeprefix("note: ") for line in base_alarms if line.startswith("note")),
            *plan.collapsed,
        ],
        "scoreboard": entries,
        "tokenizer": _tokenizer(plan, results.get("02-tokenizer")),
        "embeddings": {k: embeddings[k] for k in ("input", "output")} if embeddings else None,
        "distillation": embeddings.get("distillation") if embeddings else None,
        "probe": embeddings.get("probe") if embeddings else None,
        "stages": [
            result
            | {
                "name": step.name,
                "title": step.stage.name if step.stage else step.title,
            }
            | {"changed_tensors": len(result["changed_tensors"])}
            for step, result in stages
        ],
        "corpus": _corpus(plan, results.get("01-corpus")),
        "recipe_yaml": dump(recipe),
        "versions": versions(),
        "command": command or next((m["command"] for m in manifests if m["command"]), ""),
        "seed": recipe.seed,
    }


def _tokenizer(plan: Plan, result: dict[str, Any] | None) -> dict[str, Any] | None:
    if result is None:
        return None
    places = {"in unused slots": result["reused_slots"], "appended at the end": result["appended"]}
    used = {words: count for words, count in places.items() if count}
    route = next(iter(used)) if len(used) == 1 else " and ".join(f"{count:,} {words}" for words, count in used.items())
    pieces = grafted_pieces(plan.run / "02-tokenizer")
    every = max(1, len(pieces) // EXAMPLES)
    return result | {
        "economics": published(plan, shape_if_known(plan)[0]),
        "route": route,
        "examples": [
            {"piece": p.piece, "id": p.id, "count": p.count, "decomposition": p.base_pieces}
            for p in pieces[::every][:EXAMPLES]
        ],
    }


def _corpus(plan: Plan, result: dict[str, Any] | None) -> dict[str, Any] | None:
    if result is None:
        return None
    languages = {source.name: source.language for source in plan.recipe.corpus.sources}
    return {
        "sources": [
            {
                "name": name + (" (sampled from the base itself)" if name in result["replayed_from_base"] else ""),
                "language": languages[name],
                "documents": counts["train"]["documents"],
                "held_out": counts["held_out"]["documents"],
                "bytes": counts["train"]["bytes"],
                "dropped": counts["dropped"],
            }
            for name, counts in result["sources"].items()
        ]
    }


def _gate_detail(entries: list[dict[str, Any]]) -> str:
    stopped = next(entry for entry in entries if entry["gate"] and not entry["gate"]["passed"])
    failed = (check for check in stopped["gate"]["checks"] if not check["passed"])
    reasons = "; ".join(f"{c['name']} {c['value']:+.4f}, allowed {c['limit']:+.4f}" for c in failed)
    return f"{stopped['title']}: {reasons}"
