"""Optimisers: 8-bit Adam in parts is bitsandbytes' own but for rounding, and weight decay spares what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from lingraft.training import optimizer

bitsandbytes = pytest.importorskip("bitsandbytes")

SETTINGS = replace(tiny.STAGE_SETTINGS, optimizer="adamw_8bit")


def test_8_bit_adam_in_parts_is_the_librarys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and states after some steps, of a size that neither parts nor blocks of 256 divide."""
    monkeypatch.setattr(optimizer, "PART", 512)
    torch.manual_seed(0)
    start = torch.randn(97, 53)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = [{"params": [ours], "lr": 0.01, "weight_decay": 0.1}]
    in_parts = optimizer.make_optimizer(groups, SETTINGS)
    whole = bitsandbytes.optim.AdamW8bit([theirs], lr=0.01, weight_decay=0.1, betas=SETTINGS.betas)
    for _ in range(5):
        ours.grad = torch.randn(97, 53)
        theirs.grad = ours.grad.clone()
        in_parts.step()
        whole.step()
    assert not torch.equal(ours, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert in_parts.state[ours]["state1"].dtype == torch.uint8
    assert in_parts.state[ours].keys() == whole.state[theirs].keys()
    for key, state in whole.state[theirs].items():
        torch.testing.assert_close(in_parts.state[ours][key], state, rtol=1e-6, atol=0, msg=key)
