"""Where the base model comes from: a folder, the hub, or another recipe's finished run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from lingraft.artifact import Hashes, key_of
from lingraft.atomic import write_json
from lingraft.errors import ModelError
from lingraft.model import load as models
from lingraft.recipe import Recipe
from lingraft.tokenizer.load import load as load_tokenizer

PINNED = "base.json"
WANTED = ["*.safetensors", "*.json", "*.model", "*.jinja"]


class HubUnreachable(ModelError):
    """The base is a hub repository, and neither the hub nor a cached copy is at hand."""


@dataclass(frozen=True)
class Base:
    """A checkpoint folder to start from; `key` changes when its content does."""

    folder: Path
    key: str
    label: str


def cache_folder() -> Path:
    """Where results that several runs share are kept: `LINGRAFT_CACHE`, or `~/.cache/lingraft`."""
    named = os.environ.get("LINGRAFT_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lingraft"


def from_folder_or_hub(recipe: Recipe, run: Path, hashes: Hashes, weights: bool = True) -> Base:
    """The base named by `base.model`: a local folder where one exists, else a hub repository.

    Raises:
        ModelError: neither a folder nor a repository that can be fetched.
    """
    name = recipe.base.model or ""
    local = recipe.path(name)
    if local.is_dir():
        files = sorted(p for pattern in WANTED for p in local.glob(pattern))
        return Base(local, key_of(files=hashes.files(files)), name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"base.model: no such folder {local}; give a model folder or a hub id such as google/gemma-3-270m"
        )
    pinned = pinned_base(run, name, recipe.base.revision)
    try:
        folder = fetch(name, pinned["commit"] if pinned else recipe.base.revision, weights)
    except HubUnreachable:
        if weights or not pinned:
            raise
        folder = Path(pinned["folder"])
    return Base(folder, key_of(repository=name, commit=folder.name), name)


def pinned_base(run: Path, repository: str, revision: str | None) -> dict[str, str] | None:
    """The hub commit that this run began with: a repository that moves on must not make finished stages stale."""
    path = run / PINNED
    pinned = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return pinned if pinned and (pinned["repository"], pinned["revision"]) == (repository, revision) else None


def pin_base(run: Path, recipe: Recipe, base: Base) -> None:
    """Note the hub commit that the run starts from, for every later command on the same run folder."""
    if recipe.base.model and not recipe.path(recipe.base.model).is_dir():
        noted = {"repository": recipe.base.model, "revision": recipe.base.revision}
        write_json(run / PINNED, noted | {"commit": base.folder.name, "folder": str(base.folder)})


def check(folder: Path) -> None:
    """Raise before any work where the base is no whole, safe checkpoint with a tokenizer that fits it.

    Raises:
        ModelError: weights or config are missing, damaged, pickled, or too few for the tokenizer.
        TokenizerError: the tokenizer is missing, damaged, or of a kind that can't be grafted.
    """
    models.check(folder, tokens=len(load_tokenizer(folder)))
    models.check_logits(folder)


def fetch(repository: str, revision: str | None, weights: bool = True, where: str = "base.model") -> Path:
    """Download a hub repository's configs and tokenizer, and its safetensors if wanted (or find them in the cache).

    `where` is the place in the recipe that names it.

    Raises:
        ModelError: unknown, gated, or out of reach, with the cure.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=WANTED if weights else WANTED[1:]))
    except GatedRepoError as error:
        raise ModelError(
            f"{where}: {repository} asks you to accept its licence: open https://huggingface.co/{repository}, "
            "accept, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{where}: no folder and no public repository named {repository}; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise HubUnreachable(
            f"{where}: {repository} is not a local folder, and the hub can't be reached; "
            f"download it where there is a network and set {where} to its folder"
        ) from error
