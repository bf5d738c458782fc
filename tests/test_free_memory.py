"""Free memory: what the machine, a container or a batch job leaves to a process, and what it keeps of its own."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lingraft.training import free_memory

CPU = torch.device("cpu")


def limited(folder: Path, limit: str, *, taken: int, given_back: int, version: int = 2) -> None:
    """Write a control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    if version == 2:
        names = ("memory.max", "memory.current", "inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {given_back}\nother 7\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(free_memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(free_memory, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("4:memory:/slurm/job_7\n1:cpu:/slurm\n0::/system.slice/job_7/step\n")
    return tmp_path / "cgroup"


def test_without_limits_it_is_the_machines(groups: Path) -> None:
    assert free_memory.free_bytes(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_off_linux_it_is_the_machines(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "OWN_GROUPS", groups / "none")
    assert free_memory.free_bytes(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_the_limit_of_a_job_holds_for_its_steps(groups: Path) -> None:
    limited(groups / "system.slice/job_7", "5000000", taken=2_000_000, given_back=500_000)
    assert free_memory.free_bytes(CPU) == 3_500_000, "pages of files that were read are given back"
    limited(groups / "system.slice/job_7/step", "max", taken=2_000_000, given_back=0)
    assert free_memory.free_bytes(CPU) == 3_500_000
    limited(groups / "system.slice/job_7/step", "3000000", taken=2_000_000, given_back=0)
    assert free_memory.free_bytes(CPU) == 1_000_000


def test_a_containers_limit_is_the_groups_root(groups: Path) -> None:
    limited(groups, "5000000", taken=1_000_000, given_back=0)
    assert free_memory.free_bytes(CPU) == 4_000_000


def test_the_first_version_of_groups(groups: Path) -> None:
    limited(groups / "memory/slurm/job_7", "5000000", taken=2_000_000, given_back=500_000, version=1)
    assert free_memory.free_bytes(CPU) == 3_500_000


def test_processes_on_one_machine_share_it(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(groups, "5000000", taken=1_000_000, given_back=0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory.free_bytes(CPU) == 1_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_freed_memory_is_kept() -> None:
    """Blocks that are freed and taken again bring no new pages; by glibc's own rule they would."""
    program = """
import resource, torch
from lingraft.training.free_memory import keep_freed_memory
keep_freed_memory()
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    before = pages()
    blocks = [torch.ones(2**20) for _ in range(8)]  # 32 MiB
    del blocks
print(pages() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 8,192 pages of 4 KiB
