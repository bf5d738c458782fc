"""From questions and conversations to token ids: the one place that training, evaluation and serving share.

Whatever is scored must be cut into tokens exactly as it was trained, so the rules live here once. A
conversation is rendered by the model's own chat template, piece by piece: what the model reads, then what it
has to write. The two kinds of piece are tokenised apart, as they are when the model answers live, and the
mask follows from the pieces; the template needs no generation marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lingraft.errors import CorpusError, ModelError
from lingraft.languages import language_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = ascii_uppercase

Messages = Sequence[dict[str, str]]  # [{"role": "user" | "assistant" | "system", "content": …}, …]


def multiple_choice_prompt(question: str, choices: Sequence[str], language: str = "en") -> str:
    """The question, its lettered choices and the language's answer label; the answer is a letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, language_of(language).answer_label])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, with a mask that is True on what the model has to write.

    The mask covers the answers' tokens and the token that ends each answer's turn, nothing else. Without a
    chat template the text is plain: BOS if there is one, the messages joined by blank lines, each answer
    after a space and with EOS behind it.

    Raises CorpusError if the template refuses the conversation (Gemma wants strict alternation) and
    ModelError if it rewrites earlier turns, so that answers can't be located.
    """
    ids = _opening(tokenizer)
    mask = [False] * len(ids)
    for position, (text, is_answer) in enumerate(_pieces(tokenizer, messages)):
        piece = _encode_continuation(tokenizer, text) if position else _encode(tokenizer, text)
        answer_length = _answer_length(tokenizer, piece) if is_answer else 0
        ids += piece
        mask += [True] * answer_length + [False] * (len(piece) - answer_length)
    return ids, mask


def encode_prompt(tokenizer: PreTrainedTokenizerBase, user_text: str) -> list[int]:
    """Ids of one user message up to where the model has to answer: the start of `encode_chat`'s ids."""
    message = {"role": "user", "content": user_text}
    return _opening(tokenizer) + _encode(tokenizer, _render(tokenizer, [message], to_answer=True))


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The tokens a model writes to give this answer, through the one that ends its turn."""
    ids, mask = encode_chat(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])
    return [token for token, written in zip(ids, mask, strict=True) if written]


def _pieces(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[tuple[str, bool]]:
    """The rendered conversation as (text, is_answer) pieces whose texts join to the whole."""
    pieces: list[tuple[str, bool]] = []
    done = ""

    def advance(rendered: str, is_answer: bool) -> None:
        nonlocal done
        if not rendered.startswith(done):
            raise ModelError(
                "the model's chat template rewrites earlier turns, so the answers of a longer conversation "
                "can't be located; split conversations into single question-answer pairs"
            )
        if rendered != done:
            pieces.append((rendered[len(done) :], is_answer))
        done = rendered

    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            advance(_render(tokenizer, messages[:position], to_answer=True), is_answer=False)
            advance(_render(tokenizer, messages[: position + 1]), is_answer=True)
    advance(_render(tokenizer, messages), is_answer=False)
    return pieces


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, to_answer: bool = False) -> str:
    if not tokenizer.chat_template:
        return _render_plain(tokenizer, messages)
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise CorpusError(
            f"the model's chat template refuses a conversation with the roles {roles}: {error}; "
            "mend the conversation's order or leave it out"
        ) from error
    assert isinstance(text, str)
    return text


def _render_plain(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    text = ""
    for message in messages:
        if message["role"] == "assistant":
            text += f" {message['content']}{tokenizer.eos_token or ''}"
        else:
            text += f"\n\n{message['content']}" if text else message["content"]
    return text


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS for plain text; a chat template writes its own.

    As an id, not as text: a mark in front costs SentencePiece tokenizers the space before the first word.
    """
    return [] if tokenizer.chat_template or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that stands in the middle of another one.

    Encoded alone, it would get the space that SentencePiece tokenizers put before the first word, so it is
    encoded after a line break, whose tokens are taken off again. Tokenizers that merge the break with the
    text (byte-level ones, where the text starts with a break) add no such space, and there the text alone is
    right.
    """
    anchor = _encode(tokenizer, "\n")
    anchored = _encode(tokenizer, "\n" + text)
    if anchored[: len(anchor)] == anchor:
        return anchored[len(anchor) :]
    return _encode(tokenizer, text)


def _answer_length(tokenizer: PreTrainedTokenizerBase, piece: list[int]) -> int:
    """How many of a turn's tokens the model writes: through its last special token, which ends the turn.

    What follows that token is the template's (Gemma puts a line break). A turn without one counts in full.
    """
    return next((end for end in range(len(piece), 0, -1) if is_special(tokenizer, piece[end - 1])), len(piece))


def is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether decoding may leave the token out: a mark of the format, not text.

    `all_special_ids` misses marks that have no named role, such as Gemma's <end_of_turn>.
    """
    return tokenizer.decode([token_id], skip_special_tokens=True) != tokenizer.decode([token_id])
