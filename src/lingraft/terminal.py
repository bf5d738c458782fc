"""Results as plain text for a terminal: aligned columns, nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

Row = Sequence[str]


def table(rows: Sequence[Row], indent: str = "") -> str:
    """Rows of equally many cells in columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def before_after(entries: Sequence[dict[str, Any]]) -> str:
    """The base's measurements against the last ones."""
    first, last = entries[0], entries[-1]
    rows = [("", first["title"], last["title"])]
    for language in last["languages"]:
        before, after = (entry["languages"].get(language, {}) for entry in (first, last))
        for key in ("bits_per_byte", "tokens_per_character"):
            rows.append((f"{language} {key.replace('_', ' ')}", _number(before, key), _number(after, key)))
    for name in last["questions"]:
        before, after = (entry["questions"].get(name) for entry in (first, last))
        rows.append((f"{name} questions", _accuracy(before), _accuracy(after)))
    return table(rows)


def plan(data: dict[str, Any]) -> str:
    """What `lingraft plan` shows: the base, every step with its state, every stage with what it trains and takes."""
    base = data["base"]
    size = f"size unknown ({base.get('unknown')})"
    if "parameters" in base:
        tied = "tied" if base["tied"] else "untied"
        size = f"{base['parameters']:,} parameters with the graft, {base['rows']:,} rows, {tied}"
    steps = [(step["state"], step["step"]) for step in data["steps"]]
    stages = [("", "stage", "trains", "lr", "length")]
    for number, stage in enumerate(data["stages"], 1):
        chosen = {which.replace("_", " "): rows for which, rows in stage["train"].items() if rows != "none"}
        trains = ", ".join(f"{which} {rows}" for which, rows in chosen.items())
        length = f"{stage['tokens']:,} tokens" if stage["tokens"] else f"{stage['epochs']:g} epoch(s)"
        stages.append((str(number), stage["name"], trains, f"{stage['learning_rate']:g}", length))
    head = [f"{data['name']} → {data['run']}", f"base {base['model']}: {size}", *data["notes"]]
    head += [f"  {base['assumed']}"] if "assumed" in base else []
    forecast = ["", _forecast(data)] if "disk_gb" in data else []
    economics = ["", tokens(data["tokens"])] if data["tokens"] else []
    return "\n".join([*head, "", table(steps, "  "), "", table(stages, "  "), *forecast, *economics])


_MEMORY_PARTS = ("weights", "trained", "gradients", "optimizer", "activations", "layer", "loss", "peak")
# Changes of a recipe as they are named in the table of cards, and below it.
_CHANGES = {
    "micro_batch": "one row",
    "gradient_checkpointing": "checkpointing",
    "optimizer": "8-bit Adam",
    "quantise": "NF4",
    "sequence_length": "rows of {}",
}


def _forecast(data: dict[str, Any]) -> str:
    """Memory by part, time and disk of each stage, and what makes it fit a card."""
    stages = data["stages"]
    memory: list[Row] = [("", "values that train", *_MEMORY_PARTS)]
    memory += [
        (s["name"], f"{s['trainable']:,}", *(_gb(s["memory_gb"][part]) for part in _MEMORY_PARTS)) for s in stages
    ]
    times: list[Row] = [("", "tokens/s", "tokens", "time", "model", "checkpoints")]
    for s in stages:
        known = s["expected_tokens"] is not None
        times.append(
            (
                s["name"],
                f"{s['tokens_per_second']:,.0f}",
                f"{s['expected_tokens']:,}" if known else "–",
                _time(s["seconds"]) if known else "–",
                *(f"{_gb(s['disk_gb'][part])} GB" for part in ("model", "checkpoints")),
            )
        )
    cards: list[Row] = [("", *(f"{size} GB card" for size in stages[0]["cards"]), "at least")]
    cards += [(s["name"], *(_verdict(way) for way in s["cards"].values()), _least(s["least"])) for s in stages]
    used = {key: value for s in stages for way in (*s["cards"].values(), s["least"]) for key, value in _changed(way)}
    legend = "; ".join(f"{_CHANGES[key].format('…')} is {key}: {_yaml(key, value)}" for key, value in used.items())
    unknown = {s["expected_from"] for s in stages if s["expected_tokens"] is None}
    lines = [
        f"memory of training, GB, on {stages[0]['device']}, one row at a time where micro_batch is auto; a layer and "
        "the loss work in turn",
        table(memory, "  "),
        "",
        *(f"time at {assumed}" for assumed in dict.fromkeys(s["assumed"] for s in stages)),
        *(f"  tokens: {reason}" for reason in unknown),
        table(times, "  "),
        f"  disk at most {_gb(data['disk_gb'])} GB, beside the base and the corpus",
        "",
        "fits a GPU of so much memory as it is, or with these changes of the recipe (× time)",
        table(cards, "  "),
    ]
    return "\n".join([*lines, f"  {legend}"] if legend else lines)


def _verdict(way: dict[str, Any] | None) -> str:
    if way is None:
        return "no"
    if not way["changes"]:
        return "yes"
    names = " + ".join(_CHANGES[key].format(value) for key, value in way["changes"].items())
    return f"{names} ×{way['times']:.2f}"


def _least(way: dict[str, Any]) -> str:
    changed = "" if not way["changes"] else f": {_verdict(way)}"
    return f"{_gb(way['peak_gb'])} GB{changed}"


def _gb(size: float) -> str:
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}" if size >= 0.1 else f"{size:.3f}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _changed(way: dict[str, Any] | None) -> list[tuple[str, Any]]:
    return list(way["changes"].items()) if way else []


def _yaml(key: str, value: Any) -> str:
    return "…" if key == "sequence_length" else str(value).lower()


def bench(stages: Sequence[dict[str, Any]]) -> str:
    """What `lingraft bench` shows: for each stage its speed, its memory, and where its time went."""
    first = stages[0]
    head = f"{first['shape']}, {first['dtype']}, {first['tokens_per_step']:,} tokens a step, on {first['device']}"
    rows: list[Row] = [("", "tokens/s", "utilisation", "peak GB", "predicted", "weights GB", *_BENCH_PARTS)]
    for s in stages:
        parts = (f"{s['seconds'][part] / s['seconds_per_step']:.0%}" for part in _BENCH_PARTS.values())
        rows.append(
            (
                f"{s['stage']} {s['name']}",
                f"{s['tokens_per_second']:,.1f}",
                f"{s['matmul_utilisation']:.0%}",
                *(_gb(s[key]) for key in ("peak_memory_gb", "predicted_memory_gb", "weights_gb")),
                *parts,
            )
        )
    slowest, fastest = (pick(s["matmul_gflops_per_second"] for s in stages) for pick in (min, max))
    return "\n".join(
        [
            head,
            table(rows, "  "),
            f"  utilisation: products needed, against a plain one that ran at {slowest:,.0f} to {fastest:,.0f} GFLOP/s",
        ]
    )


_BENCH_PARTS = {
    "data": "data",
    "trunk forward": "trunk_forward",
    "loss": "loss",
    "trunk backward": "trunk_backward",
    "optimizer": "optimizer",
}


def tokens(data: dict[str, Any]) -> str:
    """Token economics: what new tokens save by source, where the curve bends, what rows cost, and the verdict."""
    if "unknown" in data:
        return f"tokens saved: {data['unknown']}"
    compared = data["compared"]
    together = {"together": compared["together"]} if len(compared["sources"]) > 1 else {}
    rows = [("", "tokens a character", "saved", "half of it at", "90 % at", "knee at", "new tokens used")]
    for name, entry in {**compared["sources"], **together}.items():
        curve = entry["curve"] or {"knee": None, "reached": []}
        reached = [f"{mark['slots']:,}" for mark in curve["reached"]] or ["–", "–"]
        knee = curve["knee"]
        rows.append(
            (
                name,
                f"{entry['before']['tokens_per_character']:.3f} → {entry['after']['tokens_per_character']:.3f}",
                f"{entry['saved']:.1%}",
                *reached,
                f"{knee['slots']:,} ({knee['share_of_gain']:.0%})" if knee else "–",
                f"{entry['new_tokens_used_share']:.0%}",
            )
        )
    lines = [f"tokens saved by {compared['new_tokens']:,} new ones ({data['from']})", table(rows, "  ")]
    if compared["unreachable"]:
        lines.append(f"  {compared['unreachable']:,} new tokens can never come out")
    words = compared["words"]
    if words["share"]:
        known = ", ".join(word for word, _ in words["most_frequent"])
        lines.append(f"  {words['share']:.0%} of the words are one token in the base already: {known}")
    if data["rows"]:
        lines += [f"  {_row_costs(data['rows'])}", f"  {_speed(data['speed'])}"]
    return "\n".join([*lines, f"  {data['verdict']['answer']}: {data['verdict']['reason']}"])


def _row_costs(rows: dict[str, Any]) -> str:
    text = f"rows: {rows['reused_rows']:,} in place of unused ones, {rows['added_rows']:,} added"
    if rows["added_rows"]:
        text += f" in {'each of two matrices' if rows['matrices'] == 2 else 'one tied matrix'}"
    text += f": {rows['parameters']:,} parameters"
    if rows["untying"]:
        text += f", and {rows['untying']:,} for parting the tied matrices"
    return f"{text} ({rows['bytes'] / 1e6:,.1f} MB, {rows['share']:.1%} of the model)"


def _speed(speed: dict[str, Any]) -> str:
    return (
        f"speed a character: decode ×{speed['decode']:.2f}, prefill of {speed['characters']:,} "
        f"×{speed['prefill']:.2f}\n    ({speed['assumptions']})"
    )


def status(data: dict[str, Any]) -> str:
    """What `lingraft status` shows: every step with its state and time, and the scoreboard so far."""
    steps = [
        (step["state"], step["step"], "" if step["seconds"] is None else f"{step['seconds']:.1f} s")
        for step in data["steps"]
    ]
    economics = [tokens(data["tokens"])] if data["tokens"] else []
    return "\n\n".join([table(steps), *economics, *([before_after(data["scoreboard"])] if data["scoreboard"] else [])])


def comparison(data: dict[str, Any]) -> str:
    """What `lingraft embeddings compare` shows: the candidates, the best first, and those that were not run."""
    languages = data["languages"]
    rows = [("", "initial rows", *(f"{language} {when}" for language in languages for when in ("step 0", "trained")))]
    for rank, result in enumerate(data["results"], 1):
        bits = (
            _number(result[when].get(language, {}), "bits_per_byte")
            for language in languages
            for when in ("start", "end")
        )
        rows.append((str(rank), result["name"], *bits))
    return "\n".join(
        [
            f"held-out bits per byte at step 0 and after {data['steps']} steps of training new rows "
            f"({data['tokens']:,} tokens)",
            table(rows, "  "),
            *(f"not run: {name}: {reason}" for name, reason in data["not_run"].items()),
            f"best: {data['winner']['name']}",
        ]
    )


def grafted_tokenizer(data: dict[str, Any]) -> str:
    """What `lingraft tokenizer graft` shows: where the new tokens went, what they save, what was checked."""
    checks, measured = data["checks"], data["economics"]
    lines = [
        f"{data['new_tokens']:,} new tokens of {' or '.join(data['scripts'])} ({data['characters']:,} single "
        f"characters): {data['reused_slots']:,} in unused slots, {data['appended']:,} appended; "
        f"vocabulary {data['vocabulary_before']:,} → {data['vocabulary_after']:,}",
        "",
        _economics(measured),
        "",
        f"checked: ids of {_count(checks['old_texts'], 'line')} without these scripts kept, "
        f"{_count(checks['new_texts'], 'text')} decoded back whole, "
        f"{checks['new_pieces']:,} of {data['new_tokens']:,} new tokens reachable",
        f"tokenizer  {data['out']}",
    ]
    return "\n".join(lines)


def compared_tokenizers(data: dict[str, Any]) -> str:
    """What `lingraft tokenizer report` shows: rates before and after for each file, use and faults of new tokens."""
    lines = [f"{data['tokenizer']} against {data['base']}: {data['new_tokens']:,} new tokens", _economics(data)]
    if data["unreachable"]:
        shown = ", ".join(data["unreachable_pieces"])
        lines.append(f"{data['unreachable']:,} new tokens can never come out: {shown}")
    return "\n".join(lines)


def _economics(data: dict[str, Any]) -> str:
    """A row for each source, and one for all where there are several."""
    entries = dict(data["sources"])
    if len(entries) > 1:
        entries["together"] = data["together"]
    rows = [("", "tokens/character", "tokens/word", "tokens/byte", "tokens saved", "new tokens used")]
    for name, entry in entries.items():
        pairs = ((entry["before"][f"tokens_per_{unit}"], entry["after"][f"tokens_per_{unit}"]) for unit in _UNITS)
        used = f"{entry['new_tokens_used']:,} ({entry['new_tokens_used_share']:.0%})"
        rates = (f"{before:.3f} → {after:.3f}" for before, after in pairs)
        rows.append((name, *rates, f"{entry['saved']:.1%}", used))
    return table(rows, "  ")


_UNITS = ("character", "word", "byte")


def grafted_model(data: dict[str, Any]) -> str:
    """What `lingraft graft` shows: the rows, how they were made, and the proof."""
    made = {
        end: ", ".join(f"{method} ({count:,})" for method, count in data[end].items()) for end in ("input", "output")
    }
    seconds = data["seconds"]
    rows = [
        ("rows", f"{data['rows_before']:,} → {data['rows_after']:,}, {'tied' if data['tied'] else 'untied'}"),
        ("input rows", made["input"]),
        ("output rows", made["output"]),
        ("proof", "every other tensor and every old row is bit-identical"),
        ("seconds", ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())),
        ("model", data["out"]),
    ]
    return table([(f"{data['new_tokens']:,} new tokens", ""), *rows])


def doctor(data: dict[str, Any]) -> str:
    """What `lingraft doctor` shows: a block for each fault and warning, a line for each note, the verdict."""
    found = [finding for finding in data["findings"] if finding["severity"] != "note"]
    blocks = [
        f"{finding['severity'].upper()}  {finding['id']}: {finding['what']}\n"
        + table([(key, finding[field]) for key, field in _DOCTOR_FIELDS], "  ")
        for finding in found
    ]
    notes: dict[str, list[str]] = {}
    for finding in data["findings"]:
        if finding["severity"] == "note":
            notes.setdefault(f"{finding['what']}: {finding['where']}", []).append(finding["id"])
    if notes:
        blocks.append("\n".join(f"note  {', '.join(ids)}: {text}" for text, ids in notes.items()))
    skipped = sum(check["state"] == "not checked" for check in data["checks"])
    done = f"{len(data['checks']) - skipped} of {len(data['checks'])} checks done"
    counts = Counter(finding["severity"] for finding in found)
    verdict = "healthy" if data["healthy"] else f"not healthy: {counts['fault']} faults, {counts['warning']} warnings"
    return "\n\n".join([*blocks, f"{data['model']}: {verdict}; {done}"])


_DOCTOR_FIELDS = (("where", "where"), ("why", "why"), ("mend", "cure"))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _number(measured: dict[str, Any], key: str) -> str:
    return f"{measured[key]:.3f}" if key in measured else "–"


def _accuracy(asked: dict[str, Any] | None) -> str:
    return f"{asked['accuracy']:.1%} [{asked['low']:.1%}, {asked['high']:.1%}]" if asked else "–"
