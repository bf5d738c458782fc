"""The version, readable without importing anything heavy."""

import platform

VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "sentencepiece", "peft", "accelerate", "numpy")
    return {"lingraft": VERSION, "python": platform.python_version()} | {p: version(p) for p in packages}
