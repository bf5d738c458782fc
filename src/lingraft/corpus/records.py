"""From rows to records: documents `{"text": …}` or chats `{"messages": [{"role": …, "content": …}, …]}`.

The chat shapes known are those of OpenAI (`messages`), ShareGPT (`conversations`), Alpaca (`instruction`,
`input`, `output`) and plain pairs of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any, Literal

from lingraft.corpus.files import Row, closest, listed
from lingraft.errors import CorpusError

Record = dict[str, Any]
Message = dict[str, str]
Format = Literal["text", "chat"]

TURN_COLUMNS = ("messages", "conversations")
PAIR_COLUMNS = (
    ("instruction", "output"),
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
ROLES = ("system", "user", "assistant")
ROLE_SYNONYMS = {"human": "user", "gpt": "assistant", "model": "assistant"} | {role: role for role in ROLES}


class Template:
    """Text made of a row: one column's name, or a format string such as `"{question}\\n{context.contexts}"`."""

    def __init__(self, column: str, where: str) -> None:
        self.where = where
        try:
            pieces = list(Formatter().parse(column)) if "{" in column else [("", column, "", None)]
        except ValueError as error:
            raise CorpusError(
                f"{where}: {column!r} does not combine columns ({error}); write it like '{{title}} {{body}}'"
            ) from error
        self.pieces = [(literal, name) for literal, name, _, _ in pieces]
        self.columns = [name for _, name in self.pieces if name is not None]

    def fill(self, row: Row) -> str:
        """The text; empty when one of the columns is, since half a document teaches the wrong thing."""
        filled = {name: _text(row, name, self.where) for name in self.columns}
        if not all(filled.values()):
            return ""
        return "".join(literal + filled.get(name or "", "") for literal, name in self.pieces)


def cell(row: Row, column: str) -> Any:
    """The value of a column; `a.b` is the field `b` of the object in the column `a`, if no column is named so.

    Raises KeyError where the row has no such column or field.
    """
    if column in row.values:
        return row.values[column]
    value: Any = row.values
    for name in column.split("."):
        if not isinstance(value, dict):
            raise KeyError(column)
        value = value[name]
    return value


def _text(row: Row, column: str, where: str) -> str:
    """A cell as text: a list of texts is joined by newlines, a missing one is empty."""
    try:
        value = cell(row, column)
    except KeyError:
        return ""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, str | int | float):
        return str(value)
    raise CorpusError(
        f"{where}: column '{column}' at {row.place} holds a {type(value).__name__}, not text; name another"
    )


def require_columns(row: Row, columns: Iterable[str], where: str) -> None:
    """Raise a CorpusError that lists the columns there are, if one of `columns` is not among them."""
    for column in columns:
        try:
            cell(row, column)
        except KeyError:
            names = _fields(row, column)
            raise CorpusError(
                f"{where}: no column '{column}' in {row.file}{closest(column, names)}; it has {listed(names)}"
            ) from None


def _fields(row: Row, column: str) -> list[str]:
    """The names to choose from instead of `column`: the row's, or for `a.b` the fields of its object `a`."""
    parent, _, _ = column.rpartition(".")
    value = row.values.get(parent)
    return [f"{parent}.{name}" for name in value] if isinstance(value, dict) else list(row.values)


def columns_of(column: str | Mapping[str, str] | None, where: str) -> list[str] | None:
    """The columns that `column` speaks of; None when that depends on the rows."""
    if column is None:
        return None
    templates = [column] if isinstance(column, str) else column.values()
    return [name for template in templates for name in Template(template, where).columns]


def to_records(
    rows: Iterable[Row],
    *,
    column: str | Mapping[str, str] | None = None,
    format: Format | None = None,
    where: str,
) -> Iterator[Record]:
    """Turn rows into documents or chats.

    `column` is a column's name or a format string over several; for a chat the column of its turns, or a
    mapping of role to column such as `{"user": "Q", "assistant": "A"}`. Without it a document is the column
    `text`, or the only one. Without `format` a row is a chat if it has no `text` and the shape of one.

    Raises CorpusError when the first row of a file lacks a column, and when a row holds something else.
    """
    file = None
    for row in rows:
        if row.file != file:
            file = row.file
            convert = _converter(row, column, format, where)
        yield convert(row)


def _converter(
    first: Row, column: str | Mapping[str, str] | None, format: Format | None, where: str
) -> Callable[[Row], Record]:
    """How to turn the rows of the file that starts with `first` into records."""
    if isinstance(column, Mapping):
        return _chat_of_columns(first, column, where)
    if format == "chat" or (format is None and column is None and _is_chat(first)):
        require_columns(first, [column] if column else [], where)
        return lambda row: {"messages": _messages(row, column, where)}
    template = Template(column or _text_column(first, where), where)
    require_columns(first, template.columns, where)
    return lambda row: {"text": template.fill(row)}


def _is_chat(row: Row) -> bool:
    names = row.values.keys()
    has_shape = any(name in names for name in TURN_COLUMNS) or any(names >= set(pair) for pair in PAIR_COLUMNS)
    return has_shape and "text" not in names


def _text_column(row: Row, where: str) -> str:
    if "text" in row.values:
        return "text"
    if len(row.values) == 1:
        return next(iter(row.values))
    raise CorpusError(f"{where}: no column 'text' in {row.file}; name another as `column`: it has {listed(row.values)}")


def _chat_of_columns(first: Row, column: Mapping[str, str], where: str) -> Callable[[Row], Record]:
    for role in column:
        if role not in ROLES:
            raise CorpusError(f"{where}: unknown role '{role}'{closest(role, ROLES)}; known are {', '.join(ROLES)}")
    templates = {role: Template(column[role], where) for role in ROLES if role in column}
    for template in templates.values():
        require_columns(first, template.columns, where)
    return lambda row: {
        "messages": [{"role": role, "content": template.fill(row)} for role, template in templates.items()]
    }


def _messages(row: Row, column: str | None, where: str) -> list[Message]:
    for name in [column] if column else TURN_COLUMNS:
        if name in row.values:
            return _turns(row, name, where)
    for prompt, answer in PAIR_COLUMNS:
        if prompt in row.values and answer in row.values:
            return _pair(row, prompt, answer, where)
    raise CorpusError(
        f"{where}: {row.place} is not a chat: it has {listed(row.values)}; "
        "name its columns like `column: {user: question, assistant: answer}`"
    )


def _turns(row: Row, column: str, where: str) -> list[Message]:
    """The messages of an OpenAI or ShareGPT list, without empty system messages."""
    turns = row.values[column]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise CorpusError(f"{where}: column '{column}' at {row.place} is not a list of messages")
    messages = [_message(turn, row, where) for turn in turns]
    return [message for message in messages if message["content"] or message["role"] != "system"]


def _message(turn: dict[str, Any], row: Row, where: str) -> Message:
    role = turn.get("role", turn.get("from"))
    if role not in ROLE_SYNONYMS:
        raise CorpusError(
            f"{where}: a message at {row.place} has the role {role!r}; known are {', '.join(ROLE_SYNONYMS)}"
        )
    content = turn.get("content", turn.get("value"))
    if not isinstance(content, str | None):
        raise CorpusError(
            f"{where}: a message at {row.place} holds a {type(content).__name__}; only text can be trained on"
        )
    return {"role": ROLE_SYNONYMS[role], "content": content or ""}


def _pair(row: Row, prompt: str, answer: str, where: str) -> list[Message]:
    system = _text(row, "system", where)
    asked = [_text(row, prompt, where), _text(row, "input", where) if prompt == "instruction" else ""]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": "\n\n".join(filter(None, asked))},
        {"role": "assistant", "content": _text(row, answer, where)},
    ]
    return messages if system else messages[1:]
