"""Old-language text sampled from the base model itself.

A base's training data is never available, but the base is: what it writes when left alone is text from its own
distribution. Trained on beside the new language, and held out to measure, it keeps and checks the old knowledge
(self-replay, as in arXiv 2403.01244).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from lingraft.errors import ModelError
from lingraft.model.load import to_device
from lingraft.progress import bar

BATCH = 64


def sample_texts(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    documents: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Yield `documents` texts that the model writes after BOS, each ended at its EOS or at `max_tokens`.

    The same seed gives the same texts on the same hardware.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ModelError("corpus: replay needs a tokenizer with a BOS or EOS token to start from")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generate: Any = to_device(model, device).generate
    with bar("replay: sampling the base", total=documents, unit="texts") as tick:
        for first in range(0, documents, BATCH):
            torch.manual_seed(seed * 1_000_003 + first)
            count = min(BATCH, documents - first)
            prompt = torch.full((count, 1), start, device=device)
            with torch.inference_mode():
                output = generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=max_tokens,
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start,
                )
            for row in output[:, 1:].tolist():
                ids = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
                if start in ids:  # some bases begin the next document with BOS instead of ending one with EOS
                    ids = ids[: ids.index(start)]
                yield tokenizer.decode(ids, skip_special_tokens=True)
            tick(count)
