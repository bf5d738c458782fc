"""Attention by blocks on a CPU gives what torch's own gives, and meets no keys that a block does not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3TextConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lingraft.model.load import load
from lingraft.training import attention
from lingraft.training.attention import Block, blocks_on_cpu

# Rows of several documents: positions begin again at 0 with each.
DOCUMENTS = [[3, 20, 14], [37], [1, 1, 35]]
LENGTH = 37


def positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in DOCUMENTS])


def states_and_gradients(model: Any, ids_BT: Tensor, position_ids_BT: Tensor) -> list[Tensor]:
    model.zero_grad()
    states = model.base_model(input_ids=ids_BT, position_ids=position_ids_BT, use_cache=False).last_hidden_state
    (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
    return [states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 8)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_torchs_attention(family: str, checkpointing: bool) -> None:
    model = tiny.FAMILIES[family](False).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 600, (len(DOCUMENTS), LENGTH), generator=torch.Generator().manual_seed(0))
    usual = states_and_gradients(model, ids, positions())
    before = model.config.get_text_config()._attn_implementation
    with blocks_on_cpu(model):
        changed = model.config.get_text_config()._attn_implementation == attention.NAME
        assert changed == (before == "sdpa")
        blocked = states_and_gradients(model, ids, positions())
    assert model.config.get_text_config()._attn_implementation == before
    assert len(usual) == len(blocked) > 10
    for one, other in zip(usual, blocked, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def blocks(kind: Any, position_ids_BT: Tensor, window: int = 6) -> list[Block]:
    config = Gemma3TextConfig(sliding_window=window, num_hidden_layers=1)
    config._attn_implementation = attention.NAME
    B, T = position_ids_BT.shape
    embeds = torch.zeros(B, T, 1)
    return kind(
        config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=position_ids_BT
    )


def ranges(found: list[Block]) -> list[tuple[int, int, int, int]]:
    return [(b.queries.start, b.queries.stop, b.keys.start, b.keys.stop) for b in found]


def test_a_block_meets_the_keys_that_it_sees() -> None:
    one = torch.arange(20).unsqueeze(0)
    assert ranges(blocks(create_causal_mask, one)) == [(0, 8, 0, 8), (8, 16, 0, 16), (16, 20, 0, 20)]
    assert ranges(blocks(create_sliding_window_causal_mask, one)) == [(0, 8, 0, 8), (8, 16, 3, 16), (16, 20, 11, 20)]
    # documents of 8, 6 and 6: the second block sees nothing of the first one's document
    three = torch.cat([torch.arange(8), torch.arange(6), torch.arange(6)]).unsqueeze(0)
    found = blocks(create_causal_mask, three)
    assert ranges(found) == [(0, 8, 0, 8), (8, 16, 8, 16), (16, 20, 14, 20)]
    hidden = found[1].hidden
    assert hidden is not None
    document = torch.tensor([0] * 6 + [1] * 2)
    assert torch.equal(~hidden[0, 0], (document[:, None] == document) & torch.ones(8, 8).bool().tril())


def test_a_block_that_sees_all_of_its_keys_hides_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 1)
    assert all(block.hidden is None for block in blocks(create_causal_mask, torch.arange(5).unsqueeze(0)))


def test_soft_capped_attention_is_not_left_to_kernels_that_drop_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=640, head_dim=16, num_key_value_heads=1, attn_logit_softcapping=0.5, **sizes)
    ).eval()
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(100)  # scores large enough to be capped
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 600, (1, 20), generator=torch.Generator().manual_seed(0))
    capped, loaded = (m.eval() for m in (model, load(tmp_path / "model")))
    capped.set_attn_implementation("eager")
    with torch.no_grad(), blocks_on_cpu(loaded):
        found = loaded(ids).logits
        torch.testing.assert_close(found, capped(ids).logits)
        capped.set_attn_implementation("sdpa")
        assert not torch.allclose(found, capped(ids).logits, rtol=1e-3, atol=1e-4)
