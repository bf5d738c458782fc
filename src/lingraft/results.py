"""What a run has found so far: lines about finished steps, the scoreboard with its gates, the report."""

from __future__ import annotations

import json
from typing import Any

from lingraft.atomic import write_json
from lingraft.evaluation.scoreboard import gate_checks
from lingraft.layout import Plan, Step
from lingraft.report import write as write_report
from lingraft.report.summary import kept_loss
from lingraft.steps.report import report_data


def summary(step: Step, results: dict[str, Any]) -> list[str]:
    """What a finished step says about itself."""
    if step.name == "01-corpus":
        lines = []
        for name, counts in results["sources"].items():
            dropped = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items())
            lines.append(
                f"  {name}: {counts['train']['documents']:,} documents, {counts['held_out']['documents']:,} held out"
                + (f", dropped {dropped}" if dropped else "")
            )
        return lines
    if step.name == "02-tokenizer":
        return [
            f"  {results['new_tokens']:,} new tokens, {results['reused_slots']:,} in unused slots, "
            f"{results['appended']:,} appended",
            *(
                f"  {language}: {gain['before']['tokens_per_character']:.2f} → "
                f"{gain['after']['tokens_per_character']:.2f} tokens a character"
                for language, gain in results["fertility"].items()
            ),
        ]
    if step.name == "03-embeddings":
        lines = ["  " + ", ".join(f"{count:,} rows {method}" for method, count in results["input"].items())]
        if distilled := results.get("distillation"):
            before, after = (distilled[when]["hidden_state_error"] for when in ("before", "after"))
            lines.append(f"  token distillation: hidden-state error {before:.3f} → {after:.3f} on held-out text")
        return lines
    if "tokens_per_second" in results:
        return [
            f"  {results['trains']}: loss {results['first_loss']:.3f} → {results['last_loss']:.3f}, "
            + _validated(results)
            + f"{results['tokens']:,} tokens in {results['seconds']:.0f} s ({results['tokens_per_second']:,.0f}/s); "
            f"{results['unchanged_tensors']} tensors proven unchanged",
            *(
                [f"  {results['chats_left_out']:,} chats left out: longer than sequence_length"]
                if results["chats_left_out"]
                else []
            ),
        ]
    return []


def _validated(results: dict[str, Any]) -> str:
    loss = kept_loss(results)
    if loss is None:
        return ""
    best = f" (the best, after step {results['kept_step']:,} of {results['steps']:,})"
    return f"validation {loss:.3f}{best if results['keep'] == 'best' else ''}, "


def headline(entry: dict[str, Any]) -> str:
    """One line for a scoreboard entry."""
    parts = [
        f"{lang} {m['bits_per_byte']:.3f} bits/byte (unigram {m['unigram_bits_per_byte']:.3f})"
        for lang, m in entry["languages"].items()
    ]
    parts += [f"{name} {q['accuracy']:.1%} [{q['low']:.1%}–{q['high']:.1%}]" for name, q in entry["questions"].items()]
    return "  ".join(parts)


def scoreboard(plan: Plan) -> list[dict[str, Any]]:
    """All measurements so far, in order, each with its stage's gate judged by the recipe as it stands."""
    entries: list[dict[str, Any]] = []
    trained = 0
    for step in plan.steps:
        if plan.state(step) != "done":
            continue
        manifest = plan.manifest(step.name)
        assert manifest is not None
        if step.stage and not step.name.startswith("scores/"):
            trained += manifest["results"]["tokens"]
        if step.name.startswith("scores/"):
            entry = json.loads((plan.run / step.name / "scores.json").read_text(encoding="utf-8"))
            entry["tokens_trained"] = trained
            if step.stage and step.stage.gate and entries:
                checks = gate_checks(entry, entries[0], step.stage.gate)
                entry["gate"] = {"passed": all(c["passed"] for c in checks), "checks": checks}
            entries.append(entry)
    return entries


def publish_results(plan: Plan, state: str, command: str) -> list[dict[str, Any]]:
    """Write scoreboard.json and report.html from what is done so far."""
    entries = scoreboard(plan)
    write_json(
        plan.run / "scoreboard.json",
        {"name": plan.recipe.name, "miniature": plan.recipe.miniature, "entries": entries},
    )
    write_report(report_data(plan, entries, state, command), plan.run / "report.html")
    return entries
