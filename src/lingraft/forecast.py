"""What the stages of a plan will take: memory, time and disk, and the changes that make them fit a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lingraft.errors import ModelError
from lingraft.layout import Plan, Step
from lingraft.recipe import Recipe, Stage, did_you_mean
from lingraft.steps.batches import make_batches, tokens_are_kept
from lingraft.steps.context import Context
from lingraft.steps.shape import Shape
from lingraft.steps.stage import stage_seed, stage_settings
from lingraft.training.devices import DEVICES, Device, measured
from lingraft.training.fit import Job, Way
from lingraft.training.flops import flops_per_token
from lingraft.training.memory import OPTIMIZER_BYTES, trained_values
from lingraft.training.settings import StageSettings

CARDS_GB = (16.0, 24.0, 48.0, 80.0)
# What of a card's memory a run may fill: the driver, its libraries and gaps between blocks take the rest.
USABLE = 0.92
# The share of the peak rate of matrix products that training is assumed to reach: of a card's data sheet, or of a plain
# product on this machine. `lingraft bench` measures it.
UTILISATION = {"cuda": 0.4, "cpu": 0.6}
GB = 1e9


@dataclass(frozen=True)
class Rates:
    """A device's peak rates, and what of them is counted on."""

    name: str
    kind: str
    peak: Device

    @property
    def utilisation(self) -> float:
        return UTILISATION[self.kind]

    def assumption(self, precision: str) -> str:
        """What times are derived from, in words."""
        return (
            f"{self.name}: {self.utilisation:.0%} of {self.peak.rate(precision) / 1e12:.3g} TFLOP/s ({precision}), "
            f"memory at {self.peak.bandwidth / 1e9:,.0f} GB/s"
        )


def rates(device: str | None) -> Rates:
    """The rates of a card of the table, or of this machine, measured: `cpu`, or None for its GPU if it has one.

    Raises:
        ModelError: no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        return Rates(f"this machine's {device}", device, measured(torch.device(device)))
    if device not in DEVICES:
        known = ", ".join((*DEVICES, "cpu"))
        raise ModelError(f"--device: no rates are known of {device!r}{did_you_mean(device, DEVICES)}; known: {known}")
    return Rates(device, "cuda", DEVICES[device])


def forecast(
    plan: Plan,
    step: Step,
    shape: Shape,
    added_rows: int,
    tokens: dict[str, Any] | None,
    device: Rates,
    memory_gb: Sequence[float] = CARDS_GB,
) -> dict[str, Any]:
    """One stage: values that train, memory by part, time, disk, and for each card whether it fits and how.

    Args:
        added_rows: that the graft appends; tokens: `lingraft.steps.economics`, for how long an epoch is.
    """
    stage, recipe = step.stage, plan.recipe
    assert stage is not None
    settings = stage_settings(stage, shape.config.model_type, stage_seed(recipe, step.stage_index))
    dims = shape.dims.grown(added_rows)
    new_rows = recipe.tokenizer.new_tokens if recipe.tokenizer else 0
    job = Job(
        dims,
        settings,
        new_rows,
        stage.sequence_length,
        stored_bytes=shape.stored_bytes,
        device=device.kind,
        flops_per_second=device.utilisation * device.peak.rate(stage.precision),
        bytes_per_second=device.peak.bandwidth,
    )
    given = job.with_changes({})
    on_card = replace(job, device="cuda")
    trained = trained_values(dims, settings, new_rows).total
    expected, origin = expected_tokens(plan, step, settings, tokens)
    return {
        "trainable": trained,
        "device": device.name,
        "memory_gb": {part: size / GB for part, size in asdict(given.memory).items()}
        | {"peak": given.memory.peak / GB},
        "flops_per_token": flops_per_token(dims, settings, new_rows, stage.sequence_length).total,
        "assumed": device.assumption(stage.precision),
        "tokens_per_second": 1 / given.seconds,
        "expected_tokens": expected,
        "expected_from": origin,
        "seconds": None if expected is None else expected * given.seconds,
        "disk_gb": {
            "model": dims.parameters * shape.stored_bytes / GB,
            "checkpoints": _checkpoint_bytes(settings, trained) / GB,
        },
        "cards": {f"{size:g}": _verdict(on_card.within(USABLE * size * GB), given) for size in memory_gb},
        "least": _verdict(on_card.smallest(), given),
    }


def _checkpoint_bytes(settings: StageSettings, trained: int) -> float:
    """What a stage's own checkpoints take at most, one of them being written, and the best values beside them."""
    checkpoint = trained * (4 + OPTIMIZER_BYTES[settings.optimizer])
    return (settings.keep_checkpoints + 1) * checkpoint + (2 * 4 * trained if settings.keep == "best" else 0)


def disk_gb(stages: Sequence[dict[str, Any]], grafts: bool) -> float:
    """What a run has on disk at its fullest: a checkpoint after the graft and after each stage, beside them the one
    stage's own that needs most. The base and the corpus are not counted; the final model is a link."""
    models = sum(stage["disk_gb"]["model"] for stage in stages) + (stages[0]["disk_gb"]["model"] if grafts else 0)
    return models + max(stage["disk_gb"]["checkpoints"] for stage in stages)


def _verdict(way: Way | None, given: Way) -> dict[str, Any] | None:
    """What to change in the recipe, the peak then, and the time for a token against the recipe's own; None: no way."""
    if way is None:
        return None
    return {"changes": way.changes, "peak_gb": way.memory.peak / GB, "times": way.seconds / given.seconds}


def expected_tokens(
    plan: Plan, step: Step, settings: StageSettings, tokens: dict[str, Any] | None
) -> tuple[int | None, str]:
    """How many tokens a stage will read, and where that is known from; None where it is not yet."""
    stage = step.stage
    assert stage is not None
    manifest = plan.manifest(step.name) if plan.state(step) == "done" else None
    if manifest:
        return manifest["results"]["tokens"], "the finished stage"
    if stage.tokens:
        return stage.tokens, "the recipe"
    if any(plan.state(before) != "done" for before in plan.steps if before.name in ("01-corpus", "02-tokenizer")):
        return None, "known after the corpus and tokenizer steps"
    context = Context(plan.recipe, plan.run, plan.base)
    grafted = plan.run / "03-embeddings"
    if grafted.is_dir() and tokens_are_kept(context, stage, grafted):
        return make_batches(context, stage, settings, grafted)[0].tokens, "the corpus as tokens"
    found = plan.manifest("01-corpus")
    if not found or not tokens or "compared" not in tokens:
        return None, "known when the stage begins"
    sizes = _source_tokens(found["results"]["sources"], tokens["compared"])
    return round(_epoch(plan.recipe, stage, sizes) * (stage.epochs or 1)), "the corpus's characters"


def _source_tokens(counts: dict[str, Any], compared: dict[str, Any]) -> dict[str, float]:
    """About how many tokens each source has: its characters, at the rate of its held-out text, or of all together."""
    measured_on = compared["sources"]
    return {
        name: count["train"]["characters"]
        * measured_on.get(name, compared["together"])["after"]["tokens_per_character"]
        for name, count in counts.items()
    }


def _epoch(recipe: Recipe, stage: Stage, sizes: dict[str, float]) -> float:
    """Tokens of one epoch: one pass over the source of the largest share, the others in proportion."""
    shares: dict[str, float] = {}
    for key, sources in recipe.sources_for(stage).items():
        weights = {source.name: source.weight * sizes[source.name] for source in sources}
        for name, weight in weights.items():
            shares[name] = shares.get(name, 0.0) + recipe.stage_data(stage)[key] * weight / max(
                sum(weights.values()), 1
            )
    heaviest = max(sorted(shares), key=lambda name: shares[name])
    return sizes[heaviest] * sum(shares.values()) / shares[heaviest] if shares[heaviest] else 0.0
