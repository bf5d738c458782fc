"""Who may import whom: `cli → api → pipeline → steps → domain folders → families → errors`."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "lingraft"
DOMAINS = {
    "corpus",
    "tokenizer",
    "embeddings",
    "model",
    "training",
    "evaluation",
    "report",
    "miniature",
    "families",
    "doctor",
}
SHARED = {"atomic", "errors", "processes", "progress", "languages", "prompts", "version"}
ALLOWED = {
    "corpus": set(),
    "tokenizer": {"families"},
    "embeddings": {"tokenizer"},
    "model": {"families"},
    "training": {"model"},
    "evaluation": set(),
    "report": set(),
    "miniature": set(),
    "families": set(),
    "doctor": {"tokenizer", "model", "families"},
}


def imports(path: Path) -> set[str]:
    """The lingraft parts that a file imports: `lingraft.model.load` → `model`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [node.module or ""]
            if node.module == "lingraft":
                names = [f"lingraft.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lingraft.")}
    return found


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_domain_folders_know_neither_recipes_nor_each_other(domain: str) -> None:
    for path in (PACKAGE / domain).rglob("*.py"):
        foreign = imports(path) - SHARED - ALLOWED[domain] - {domain}
        assert not foreign, f"{path.relative_to(PACKAGE)} imports {sorted(foreign)}"


def test_every_folder_has_its_rule() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    assert folders == DOMAINS | {"steps"}


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "lingraft.cli", "--help"], check=True, capture_output=True)
        times.append(time.monotonic() - begin)
    assert min(times) < 0.6, "heavy imports belong inside the verbs"


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, lingraft, lingraft.cli, lingraft.recipe_file; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"
