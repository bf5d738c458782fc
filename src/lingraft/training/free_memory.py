"""How much memory a process may still take: of its GPU, or of the machine, its container and its batch job; and how
much of what it has freed it keeps at hand."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")  # Linux's control groups: limits of containers, services and Slurm's jobs
OWN_GROUPS = Path("/proc/self/cgroup")


# glibc's malloc.h, and what its own rule would come to at most: larger blocks are mapped, and given back when freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MAPPED_BYTES = 32 << 20
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class _Files:
    """Where a version of control groups keeps its limit, what is taken of it, and (in memory.stat) the part of that
    which the system gives back when memory is wanted: pages of files that were read."""

    folder: str
    limit: str
    taken: str
    given_back: str


# By the controllers in a line of /proc/self/cgroup. Source: Linux's admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst
_FILES = {
    "": _Files("", "memory.max", "memory.current", "inactive_file"),
    "memory": _Files("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_bytes(device: torch.device) -> float:
    """Memory that this process may still take on its device; its share where several train on one machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = min([psutil.virtual_memory().available, *_within_limits()])
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _within_limits() -> Iterator[int]:
    """What each limit that holds for this process leaves: that of its control group and of all around it."""
    lines: list[str] = []
    with suppress(OSError):  # not Linux
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in _FILES:
            continue
        files, inside = _FILES[controllers], PurePosixPath(path.lstrip("/"))
        for place in (inside, *inside.parents):  # in a container some, seen from outside, are not there
            with suppress(OSError, ValueError, KeyError):  # no such file, or no limit ("max")
                group = CGROUPS / files.folder / place
                limit, taken = (int((group / name).read_text(encoding="utf-8")) for name in (files.limit, files.taken))
                statistics = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
                yield limit - taken + int(dict(map(str.split, statistics))[files.given_back])


def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MiB of freed memory at the end of its heap.

    By its own rule it gives them back at once, and a step without a backward pass, which frees what it takes a layer
    at a time, spends up to a third of its trunk's time on new pages. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
