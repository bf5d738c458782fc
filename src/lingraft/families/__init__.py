"""What differs between model families, as rows of one table: `family("gemma3").projections`.

Code elsewhere asks the row and never the name, so that a new family is a new row and no new `if`.
"""

from lingraft.families.tables import Family, family, family_of_pieces

__all__ = ["Family", "family", "family_of_pieces"]
