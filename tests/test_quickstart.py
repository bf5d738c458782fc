"""The built-in main job, for real: minutes long, so marked slow. CI runs the first test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_quickstart_keeps_its_promises(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lingraft.cli", "run", "quickstart", "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    assert "miniature" in done.stdout
    assert seconds < 20 * 60  # minutes on free cores; this only says that it ends
    stages = (json.loads(p.read_text())["results"] for p in (tmp_path / "run").glob("*-stage-*/manifest.json"))
    assert max(stage["peak_memory_gb"] for stage in stages) < 3
    print(done.stdout[-1500:], f"{seconds:.0f} s")
    entries = json.loads((tmp_path / "run" / "scoreboard.json").read_text())["entries"]
    base, final = entries[0], entries[-1]
    assert base["questions"]["english"]["accuracy"] >= 0.75
    assert base["questions"]["korean"]["accuracy"] <= 0.35, "the base never met Korean: near chance, 20 %"
    assert final["questions"]["korean"]["accuracy"] >= 0.55
    assert final["questions"]["english"]["accuracy"] >= 0.95 * base["questions"]["english"]["accuracy"]
    korean_before, korean_after = base["languages"]["ko"], final["languages"]["ko"]
    assert korean_before["tokens_per_character"] >= 2.5 * korean_after["tokens_per_character"]
    assert korean_after["bits_per_byte"] <= 0.5 * korean_before["bits_per_byte"]
    assert korean_after["bits_per_byte"] < korean_after["unigram_bits_per_byte"]
    english = [entry["languages"]["en"]["tokens"] for entry in entries]
    assert len(set(english)) == 1, "English text keeps its tokens through every step"


def test_ten_kills_end_in_the_same_bits() -> None:
    script = Path(__file__).with_name("kill_resume.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical" in done.stdout


def test_real_model_learns_real_korean(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`recipes/stories-korean.yaml`: a real trained English model and real Korean text."""
    monkeypatch.setenv("LINGRAFT_DATA", str(shared_data))
    command = [sys.executable, "-m", "lingraft.cli", "run", "stories-korean", "--run-dir", str(tmp_path / "run")]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 15 * 60
    entries = json.loads((tmp_path / "run" / "scoreboard.json").read_text())["entries"]
    base, final = entries[0]["languages"], entries[-1]["languages"]
    assert base["ko"]["tokens_per_character"] >= 2.5 * final["ko"]["tokens_per_character"]
    assert final["ko"]["bits_per_byte"] <= 2.5
    assert final["en"]["bits_per_byte"] <= 1.05 * base["en"]["bits_per_byte"]
    assert final["en"]["tokens"] == base["en"]["tokens"]
