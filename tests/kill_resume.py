"""Kill a run at random moments, and prove that the rerun ends in the same bits as an undisturbed run.

    python tests/kill_resume.py [--recipe quickstart] [--kills 10] [--seed 0] [--base-cache DIR] [--set key=value …]
    python tests/kill_resume.py --stage rows [--kills 20] [--seed 0] [--signal KILL|TERM]

A recipe: runs it once undisturbed and once with `--kills` kills spread at random over the same length, each in folders
(and a base cache) of its own. One stage of a tiny model (`STAGES`): every kill hits the stage itself, at any moment,
in the middle of writing a checkpoint, or while its result is written and published; where it got finished before all
kills were spent, it begins anew. Both compare every file of weights. Exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}
STAGES: dict[str, dict[str, Any]] = {
    "input-rows": {"train": {"input_rows": "new"}},
    "output-rows": {"train": {"output_rows": "new"}},
    "rows": {"train": {"input_rows": "new", "output_rows": "new"}},
    "all-rows": {"train": {"output_rows": "all"}},
    "adam-8bit": {"train": {"input_rows": "all", "output_rows": "all"}, "optimizer": "adamw_8bit"},
    "layers": {"train": {"layers": "all"}, "gradient_checkpointing": True},
    "lora": {"train": {"layers": "lora"}, "lora": LORA},
    "qlora": {
        "train": {"input_rows": "all", "output_rows": "all", "layers": "lora"},
        "lora": LORA | {"quantise": "nf4"},
        "optimizer": "paged_adamw_8bit",
        "keep": "best",
    },
}
STAGE = "04-stage-1-kill"
# Where a kill of a stage hits, and how often.
MOMENTS = {"anywhere": 0.5, "checkpoint": 0.3, "end": 0.2}


def start(recipe: str | Path, folder: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """`lingraft run` in a process group of its own, logging to `folder/log`."""
    command = [sys.executable, "-m", "lingraft", "run", str(recipe), "--run-dir", str(folder / "run")]
    for override in overrides:
        command += ["--set", override]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"LINGRAFT_CACHE": str(folder / "cache")},
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"the run failed:\n{(folder / 'log').read_text()[-3000:]}")


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every published weight file: the base's, each stage's, the final model's."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for top in ("run", "cache")
        for path in sorted((folder / top).rglob("model.safetensors"))
        if ".work" not in path.parts
    }


def compare(whole: dict[str, str], broken: dict[str, str]) -> None:
    differing = sorted(name for name in whole.keys() | broken.keys() if whole.get(name) != broken.get(name))
    if differing or not whole:
        sys.exit(f"weights differ: {', '.join(differing) or 'none were written'}")


# ------------------------------------------------------------------------------------------------ a whole recipe


def disturbed_run(recipe: str, folder: Path, overrides: list[str], kills: int, seconds: float, seed: int) -> None:
    """Kill the run `kills` times after random parts of `seconds`, then let it finish."""
    chance = random.Random(seed)
    for number in range(1, kills + 1):
        process = start(recipe, folder, overrides)
        # a rerun spends some seconds on imports before it goes on, so shorter waits would only hit those
        wait = chance.uniform(5, 5 + 1.3 * seconds / kills)
        begin = time.monotonic()
        while time.monotonic() - begin < wait and process.poll() is None:
            time.sleep(0.05)
        if process.poll() is not None:
            finish(process, folder)
            sys.exit(f"the run ended before kill {number}: ask for fewer kills")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = len(list((folder / "run").rglob("manifest.json"))) + len(list((folder / "cache").rglob("manifest.json")))
        print(f"kill {number:2d} after {wait:5.1f} s, {done} steps published", flush=True)
    finish(start(recipe, folder, overrides), folder)


def kill_recipe(recipe: str, kills: int, seed: int, base_cache: Path | None, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch, "whole"), Path(scratch, "broken")
        for folder in (whole, broken):
            folder.mkdir()
            if base_cache:
                shutil.copytree(base_cache, folder / "cache")
        begin = time.monotonic()
        finish(start(recipe, whole, overrides), whole)
        seconds = time.monotonic() - begin
        print(f"undisturbed run: {seconds:.0f} s", flush=True)
        disturbed_run(recipe, broken, overrides, kills, seconds, seed)
        found = weights(whole)
        compare(found, weights(broken))
    print(f"{kills} kills: all {len(found)} weight files are bit-identical to the undisturbed run's")


# -------------------------------------------------------------------------------------------------- a single stage


def kill_stage(stage: str, kills: int, number: signal.Signals, seed: int, folder: Path) -> Counter[str]:
    """Kill one stage `kills` times with the signal `number`; returns how many kills hit where.

    Args:
        folder: an empty one to work in.
    """
    recipe = write_stage_recipe(folder, STAGES[stage])
    whole = folder / "whole"
    whole.mkdir()
    finish(start(recipe, whole, []), whole)
    return disturb(recipe, whole, kills, number, seed, folder)


def disturb(recipe: Path, whole: Path, kills: int, number: signal.Signals, seed: int, folder: Path) -> Counter[str]:
    """Kill copies of the run `whole/run`, which has finished its one stage, and compare their ends with its own."""
    chance = random.Random(seed)
    found = weights(whole)
    hits: Counter[str] = Counter()
    rounds = 0
    while hits.total() < kills:
        broken = folder / f"broken-{rounds}"
        begin_stage_anew(whole, broken)
        rounds += 1
        while hits.total() < kills:
            process = start(recipe, broken, [])
            [moment] = chance.choices(list(MOMENTS), list(MOMENTS.values()))
            if not hit(process, broken / "run", moment, chance) or last_line(broken / "log").startswith("report "):
                break
            os.killpg(process.pid, number)
            process.wait()
            hits[moment] += 1
            check_death(process.returncode, number, broken / "log")
        finish(start(recipe, broken, []), broken)
        compare(found, weights(broken))
        shutil.rmtree(broken)
    return hits


def write_stage_recipe(folder: Path, stage: dict[str, Any], tokens: int = 60_000) -> Path:
    """A recipe of this one stage over a tiny model, of a step for every 250 tokens and with many checkpoints."""
    import tiny

    tiny.write_tokenizer(folder / "tokenizer")
    model = tiny.write_checkpoint(folder / "model", folder / "tokenizer")
    return tiny.write_recipe(
        folder,
        model,
        training={
            "precision": "fp32",
            "gradient_checkpointing": False,
            "sequence_length": 64,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-3,
            "tokens": tokens,
            "checkpoint_seconds": 0.2,
        },
        stages=[{"name": "kill", **stage}],
    )


def begin_stage_anew(finished: Path, folder: Path) -> None:
    """A copy of the finished run that has yet to begin its stage."""
    run = folder / "run"
    shutil.copytree(finished / "run", run, symlinks=True)
    for name in (STAGE, f"scores/{STAGE}"):
        shutil.rmtree(run / name)
    model = run / "model"
    model.unlink() if model.is_symlink() else shutil.rmtree(model)


def hit(process: subprocess.Popen[bytes], run: Path, moment: str, chance: random.Random) -> bool:
    """Wait for a moment to kill the process in; False where it ended before."""
    work = run / ".work" / STAGE
    log, before = work / "log.jsonl", _stamp(work / "log.jsonl")
    # the stage goes on: its log is cut to the checkpoint first
    if not _wait(process, lambda: _stamp(log) != before):
        return False
    if moment == "anywhere":
        end = time.monotonic() + chance.uniform(0, 1.5)
        _wait(process, lambda: time.monotonic() > end)
    elif moment == "checkpoint":
        begins = time.monotonic() + chance.uniform(0, 1)
        _wait(process, lambda: time.monotonic() > begins and any(work.glob(".checkpoint-*")))
        time.sleep(chance.uniform(0, 0.01))
    else:
        _wait(process, lambda: any((work / "out").glob("*.safetensors")))
        time.sleep(chance.uniform(0, 0.1))
    return process.poll() is None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> bool:
    """Whether the condition came true while the process was alive."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def check_death(returncode: int, number: signal.Signals, log: Path) -> None:
    """A process that may say something before it ends, says one line."""
    if number == signal.SIGKILL:
        assert returncode == -signal.SIGKILL, returncode
        return
    last = last_line(log)
    assert (returncode, last.partition(";")[0]) == (130, "error: interrupted"), (returncode, last)


def last_line(log: Path) -> str:
    return log.read_text(encoding="utf-8").splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-cache", type=Path, help="a finished base cache: spend all kills on what follows it")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    if options.stage is None:
        kill_recipe(options.recipe, options.kills, options.seed, options.base_cache, options.overrides)
        return
    number = signal.Signals[f"SIG{options.signal}"]
    with tempfile.TemporaryDirectory() as scratch:
        hits = kill_stage(options.stage, options.kills, number, options.seed, Path(scratch))
    where = ", ".join(f"{count} {moment}" for moment, count in hits.items())
    print(f"{options.stage}: {hits.total()} × {options.signal} ({where}): bit-identical to the undisturbed run")


if __name__ == "__main__":
    main()
