"""Multiple choice by likelihood: of the possible answers the likeliest one is the model's.

Two scorings. `letter`: the choices stand in the prompt, and the letters A, B, … are compared. `cloze`: the prompt is
the question alone, and the choices' texts are compared, each with the token that ends the turn. Small models can't
bind letters to choices however well they know the answer, so their knowledge only shows in the cloze form (OLMES,
arXiv 2406.08446, section 3.3). The two are not comparable with each other.

Nothing is generated and nothing has to be extracted, so the score neither depends on an answer's wording nor on a
parser. The tokens are exactly those that training on `encode_chat` sees for the same question and answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lingraft.errors import CorpusError
from lingraft.evaluation.forward import (
    batches_by_length,
    context_id,
    hidden_states,
    logits_in_chunks,
    measuring,
    padded,
)
from lingraft.progress import bar
from lingraft.prompts import LETTERS, answer_tokens, encode_chat, encode_prompt, multiple_choice_prompt

Scoring = Literal["letter", "cloze"]


class Question(Protocol):
    """What is asked, the choices, and the index of the right one."""

    @property
    def question(self) -> str: ...

    @property
    def choices(self) -> Sequence[str]: ...

    @property
    def answer(self) -> int: ...


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    language: str,
    scoring: Scoring = "letter",
    batch_tokens: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """Accuracy on the questions, asked in a language's prompt (a code of `lingraft.languages`).

    Returns `accuracy` with `correct`, `total` and its 95 % Wilson interval `low`, `high`; `chance`, the
    accuracy of guessing; `at_chance`, whether the interval holds it; `answers`, the chosen index of each
    question; `language`. Raises CorpusError without questions.
    """
    if not questions:
        raise CorpusError("a question set is empty, so there is nothing to measure; give it questions or remove it")
    score = _by_letter if scoring == "letter" else _by_text
    scores = score(model, tokenizer, questions, language=language, batch_tokens=batch_tokens, device=device)
    answers = [max(range(len(q.choices)), key=row.__getitem__) for q, row in zip(questions, scores, strict=True)]
    correct = sum(answer == q.answer for answer, q in zip(answers, questions, strict=True))
    low, high = wilson(correct, len(questions))
    chance = sum(1 / len(q.choices) for q in questions) / len(questions)
    return {
        "language": language,
        "scoring": scoring,
        "accuracy": correct / len(questions),
        "correct": correct,
        "total": len(questions),
        "low": low,
        "high": high,
        "chance": chance,
        "at_chance": low <= chance <= high,
        "answers": answers,
    }


def _by_letter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    language: str,
    batch_tokens: int,
    device: torch.device | str,
) -> list[list[float]]:
    """Log-likelihood of each letter after question and choices."""
    lead, letters = letter_tokens(tokenizer, max(len(q.choices) for q in questions))
    prompts = [
        encode_prompt(tokenizer, multiple_choice_prompt(q.question, q.choices, language)) + lead for q in questions
    ]
    return _letter_scores(
        model, prompts, letters, batch_tokens=batch_tokens, pad_id=context_id(tokenizer), device=device
    )


def _by_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    language: str,
    batch_tokens: int,
    device: torch.device | str,
) -> list[list[float]]:
    """Log-likelihood of each choice's whole text, and of stopping after it, as the answer to the question alone."""
    pairs = [(number, choice) for number, q in enumerate(questions) for choice in q.choices]
    encoded = [
        encode_chat(
            tokenizer,
            [{"role": "user", "content": questions[n].question}, {"role": "assistant", "content": choice}],
        )
        for n, choice in pairs
    ]
    scores: list[list[float]] = [[] for _ in questions]
    likelihoods = torch.zeros(len(pairs), dtype=torch.float64)
    pad_id = context_id(tokenizer)
    with measuring(model), bar("multiple choice", total=len(pairs), unit="answers") as tick:
        for batch in batches_by_length([len(ids) for ids, _ in encoded], batch_tokens):
            ids_BT, attention_BT = padded([encoded[i][0] for i in batch], pad_id, device)
            written_BT, _ = padded([[int(w) for w in encoded[i][1]] for i in batch], 0, device)
            hidden_BTD = hidden_states(model, ids_BT, attention_BT)
            predicts_BT = torch.zeros_like(written_BT, dtype=torch.bool)
            predicts_BT[:, :-1] = written_BT[:, 1:].bool()
            targets_N = ids_BT[written_BT.bool()]
            rows_N = torch.arange(len(batch), device=device).unsqueeze(1).expand_as(predicts_BT)[predicts_BT]
            chunks = logits_in_chunks(model, hidden_BTD[predicts_BT])
            log_likelihoods = torch.cat([logits.log_softmax(dim=-1) for logits in chunks])
            picked = log_likelihoods.gather(1, targets_N.unsqueeze(1)).squeeze(1).double()
            sums = torch.zeros(len(batch), dtype=torch.float64, device=device).index_add(0, rows_N, picked)
            likelihoods[batch] = sums.cpu()
            tick(len(batch))
    for (number, _), likelihood in zip(pairs, likelihoods.tolist(), strict=True):
        scores[number].append(likelihood)
    return scores


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion, (low, high). E. B. Wilson, JASA 22 (1927), 209–212."""
    share = correct / total
    centre = share + z * z / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - margin) / scale, (centre + margin) / scale


def letter_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[int], list[tuple[int, ...]]]:
    """(lead, letters): what every answer starts with after the prompt, and each letter's own tokens.

    Mostly no lead and one token a letter. Some templates open each answer with marks (Qwen 3's empty
    thought), and a small vocabulary may lack letters with a space before them. What every answer ends with is
    left out.
    """
    answers = [answer_tokens(tokenizer, letter) for letter in LETTERS[:count]]
    lead = _common_start(answers)
    letters = [answer[len(lead) :] for answer in answers]
    end = len(_common_start([letter[::-1] for letter in letters]))
    letters = [letter[: len(letter) - end] for letter in letters]
    return lead, [tuple(letter) for letter in letters]


def _common_start(sequences: list[list[int]]) -> list[int]:
    columns = zip(*sequences, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _letter_scores(
    model: PreTrainedModel,
    prompts: list[list[int]],
    letters: list[tuple[int, ...]],
    *,
    batch_tokens: int,
    pad_id: int,
    device: torch.device | str,
) -> list[list[float]]:
    """Log-likelihood of each letter after each prompt.

    The model runs once for each prompt with each start that letters share: once a prompt if letters are one
    token.
    """
    starts = sorted({letter[:length] for letter in letters for length in range(len(letter))})
    # Where in `starts` each letter's tokens are predicted, and which tokens they are.
    steps = [[(starts.index(letter[:i]), letter[i]) for i in range(len(letter))] for letter in letters]
    sequences = [[*prompt, *start] for prompt in prompts for start in starts]
    wanted = sorted({token for letter in letters for token in letter})
    column = {token: index for index, token in enumerate(wanted)}
    scores_SW = torch.zeros(len(sequences), len(wanted))
    with measuring(model), bar("multiple choice", total=len(sequences), unit="prompts") as tick:
        for batch in batches_by_length([len(ids) for ids in sequences], batch_tokens):
            ids_BT, mask_BT = padded([sequences[i] for i in batch], pad_id, device)
            last_B = mask_BT.sum(dim=1) - 1
            hidden_BD = hidden_states(model, ids_BT, mask_BT)[torch.arange(len(batch), device=device), last_B]
            chunks = [logits.log_softmax(dim=-1)[:, wanted] for logits in logits_in_chunks(model, hidden_BD)]
            scores_SW[batch] = torch.cat(chunks).cpu()
            tick(len(batch))
    scores_PSW = scores_SW.view(len(prompts), len(starts), len(wanted))
    by_letter = [
        torch.stack([scores_PSW[:, start, column[token]] for start, token in letter_steps]).sum(dim=0)
        for letter_steps in steps
    ]
    return torch.stack(by_letter, dim=1).tolist()
