"""Kill a run at random moments with kill -9, and prove that the rerun ends in the same bits as an undisturbed run.

    python tests/kill_resume.py [--recipe quickstart] [--kills 10] [--seed 0] [--base-cache DIR] [--set key=value …]

Runs the recipe once undisturbed and once with `--kills` kills spread at random over the same length, each in folders
(and a base cache) of its own, then compares every file of weights. Exit code 1 where they differ.
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
from pathlib import Path


def start(recipe: str, folder: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """`lingraft run` in a process group of its own, logging to `folder/log`."""
    command = [sys.executable, "-m", "lingraft.cli", "run", recipe, "--run-dir", str(folder / "run")]
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
        for path in sorted(folder.rglob("model.safetensors"))
        if ".work" not in path.parts
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-cache", type=Path, help="a finished base cache: spend all kills on what follows it")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch, "whole"), Path(scratch, "broken")
        for folder in (whole, broken):
            folder.mkdir()
            if options.base_cache:
                shutil.copytree(options.base_cache, folder / "cache")
        begin = time.monotonic()
        finish(start(options.recipe, whole, options.overrides), whole)
        seconds = time.monotonic() - begin
        print(f"undisturbed run: {seconds:.0f} s", flush=True)
        disturbed_run(options.recipe, broken, options.overrides, options.kills, seconds, options.seed)
        one, other = weights(whole), weights(broken)
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if differing or not one:
        sys.exit(f"weights differ: {', '.join(differing) or 'none were written'}")
    print(f"{options.kills} kills: all {len(one)} weight files are bit-identical to the undisturbed run's")


if __name__ == "__main__":
    main()
