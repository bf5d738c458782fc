"""What a user can mend. Each error is one line: what is wrong, where, why, and how to mend it.

The CLI prints the line and exits with `exit_code`; nothing here is ever shown as a traceback.
"""


class LingraftError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 2


class RecipeError(LingraftError):
    """The recipe is unreadable or says something impossible. May hold several lines, one a fault."""


class CorpusError(LingraftError):
    """A text source is missing, unreadable, in another encoding, or empty after filtering."""


class TokenizerError(LingraftError):
    """The tokenizer is of an unknown kind, damaged, or cannot be grafted as asked."""


class ModelError(LingraftError):
    """The model's files are missing, damaged, unsafe (pickle), or do not fit the tokenizer."""


class TrainingError(LingraftError):
    """Training went wrong in a way that data or settings explain (NaN, exploding loss)."""


class RunError(LingraftError):
    """The run folder is in use, unwritable, full, or not a run folder."""


class GateFailed(LingraftError):
    """A stage cost more than its gate allows; everything is kept."""

    exit_code = 3
