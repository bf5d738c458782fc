"""lingraft: graft a language and a field onto an open language model, without harming what it already knows.

Everything the command line does is one call here:

    import lingraft

    result = lingraft.run("quickstart")
    lingraft.plan("my-recipe.yaml")
    lingraft.status(result.run)

Importing this module loads nothing heavy.
"""

from lingraft.api import (
    check,
    compare_embeddings,
    diagnose,
    graft_model,
    graft_tokenizer,
    load_recipe,
    plan,
    report_tokenizer,
    run,
    status,
    write_report,
)
from lingraft.errors import GateFailed, LingraftError
from lingraft.version import VERSION as __version__

__all__ = [
    "GateFailed",
    "LingraftError",
    "__version__",
    "check",
    "compare_embeddings",
    "diagnose",
    "graft_model",
    "graft_tokenizer",
    "load_recipe",
    "plan",
    "report_tokenizer",
    "run",
    "status",
    "write_report",
]
