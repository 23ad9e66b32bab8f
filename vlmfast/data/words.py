"""Words of a caption without Java: nearly those of the COCO evaluation."""

from __future__ import annotations

import re

PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())  # noqa: SIM905
"""What the COCO evaluation leaves out."""
WORD = re.compile(r"\w+(?:[-./]\w+)*|'\w+|[^\w\s]")


def words_of(caption: str) -> list[str]:
    """Words in lower case, punctuation among them; see `PUNCTUATION`."""
    return WORD.findall(caption.lower())
