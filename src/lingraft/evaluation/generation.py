"""What a model writes when left alone: greedy answers to fixed prompts, and signs of damage in them.

Likelihood and multiple choice can look fine while generation falls apart (loops, a foreign script, broken
UTF-8, silence), so every stage's answers are kept for reading and counted by rules that need no judge.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lingraft.evaluation.forward import context_id, measuring, padded
from lingraft.languages import in_scripts, language_of
from lingraft.progress import bar
from lingraft.prompts import answer_tokens, encode_prompt, is_special

PROMPTS_PER_BATCH = 16
NGRAM = 4
LOOP_REPETITION = 0.5  # a text is a loop when more than this share of its 4-grams repeats
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes that form no character decode to


@dataclass(frozen=True)
class Answer:
    ids: list[int]  # without the token that ended it
    text: str

    @property
    def ngrams(self) -> list[tuple[int, ...]]:
        return [tuple(self.ids[i : i + NGRAM]) for i in range(len(self.ids) - NGRAM + 1)]

    @property
    def repeats(self) -> int:
        """How many n-grams stood earlier in the same answer."""
        return len(self.ngrams) - len(set(self.ngrams))

    @property
    def is_loop(self) -> bool:
        return self.repeats > LOOP_REPETITION * len(self.ngrams)


def generate_checks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    language: str,
    max_new_tokens: int,
    new_token_ids: Collection[int],
    device: torch.device | str,
) -> dict[str, Any]:
    """Answer each prompt greedily and count signs of damage.

    Returns the number of `prompts`; shares between 0 and 1 (0 where there is nothing to count): `empty` of
    answers without text, `repetition` of 4-grams of tokens that stood earlier in the same answer, `loops` of
    answers where that is more than half, `target_script` of letters in a script of `language` (None for a
    language of unknown script), `new_token_share` of tokens in `new_token_ids`, `broken` of characters that
    are no valid UTF-8; and `samples`, each with `prompt`, `text` and `loop`.
    """
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, device=device)
    new = frozenset(new_token_ids)
    tokens = [token for answer in answers for token in answer.ids]
    text = "".join(answer.text for answer in answers)
    return {
        "prompts": len(prompts),
        "empty": _share(sum(not answer.text.strip() for answer in answers), len(answers)),
        "repetition": _share(sum(answer.repeats for answer in answers), sum(len(answer.ngrams) for answer in answers)),
        "loops": _share(sum(answer.is_loop for answer in answers), len(answers)),
        "target_script": _target_share(text, language),
        "new_token_share": _share(sum(token in new for token in tokens), len(tokens)),
        "broken": _share(text.count(BROKEN), len(text)),
        "samples": [
            {"prompt": prompt, "text": answer.text, "loop": answer.is_loop}
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
    }


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    device: torch.device | str,
) -> list[Answer]:
    """The likeliest token again and again, until the model ends its turn or has written `max_new_tokens`.

    No random numbers are drawn, and neither the model's generation config nor its mode changes.
    """
    stops, pad_id = _stop_ids(model, tokenizer), context_id(tokenizer)
    # The model's own generation config fills in whatever is left open here, and a repetition penalty or a
    # forbidden n-gram would hide the very damage that is looked for.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        use_cache=True,
        eos_token_id=sorted(stops),
        pad_token_id=pad_id,
    )
    generate: Any = model.generate
    answers = []
    with measuring(model), bar("generation", total=len(prompts), unit="prompts") as tick:
        for start in range(0, len(prompts), PROMPTS_PER_BATCH):
            batch = [encode_prompt(tokenizer, prompt) for prompt in prompts[start : start + PROMPTS_PER_BATCH]]
            ids_BT, mask_BT = padded(batch, pad_id, device, side="left")
            output = generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
            answers += [_answer(tokenizer, row, stops) for row in output[:, ids_BT.shape[1] :].tolist()]
            tick(len(batch))
    return answers


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every EOS: the model's, the tokenizer's, and the mark that ends a turn in the chat template."""
    end_of_turn = answer_tokens(tokenizer, "A")[-1]
    stops = {end_of_turn} if is_special(tokenizer, end_of_turn) else set()
    eos = model.generation_config.eos_token_id
    named = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    return stops | {token for token in named if token is not None}


def _answer(tokenizer: PreTrainedTokenizerBase, row: list[int], stops: set[int]) -> Answer:
    end = next((position for position, token in enumerate(row) if token in stops), None)
    text = tokenizer.decode(row[:end], skip_special_tokens=True)
    assert isinstance(text, str)
    if end is None:  # the limit may have cut through a character: not the model's fault
        text = text.rstrip(BROKEN)
    return Answer(row[:end], text)


def _target_share(text: str, language: str) -> float | None:
    scripts = language_of(language).scripts
    letters = [character for character in text if character.isalpha()]
    return _share(sum(in_scripts(letter, scripts) for letter in letters), len(letters)) if scripts else None


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
