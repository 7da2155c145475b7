"""Cutting a text into words, for token classification of texts that arrive whole.

The cut follows the newswire corpora that taggers are trained on. One word is:

- a web address, a ``@handle`` or a ``#tag``;
- an abbreviation with inner full stops (``U.S.``), or a number with ``.``, ``,`` or ``:`` inside (``1,000.5``);
- a run of letters, digits, marks and underscores, hyphens and apostrophes inside it included (``Jean-Luc``,
  ``O'Brien``), but for the clitics ``'s 'm 'd 're 've 'll``, which are words of their own;
- a single ideograph;
- any other single character that is not white space.
"""

from __future__ import annotations

import re
import unicodedata

Span = tuple[int, int]

_MARKS = "".join(chr(code) for code in range(0x300, 0x3100) if unicodedata.category(chr(code)).startswith("M"))
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_RUN = rf"(?:(?![{_IDEOGRAPHS}])[\w{_MARKS}\u200c\u200d])+"
_CLITIC = r"['\u2019](?:s|m|d|re|ve|ll)\b"
_WORD = re.compile(
    rf"""(?:https?://|www\.)\S*[^\s.,;:!?)\]}}>"'\u2019]
    | (?<!\w)[@\#]{_RUN}
    | (?<!\w)(?:[^\W\d_]\.){{2,}}
    | (?<!\w)\d+(?:[.,:]\d+)+(?!\w)
    | (?<=\w){_CLITIC}
    | {_RUN}(?:(?!{_CLITIC})[-'\u2019]{_RUN})*
    | \S""",
    re.VERBOSE | re.IGNORECASE,
)


def split_words(text: str) -> list[Span]:
    """Character spans of the words of a text, in order."""
    return [match.span() for match in _WORD.finditer(text)]


def join_words(words: tuple[str, ...]) -> tuple[str, list[Span]]:
    """The words joined by one space, and the character span of each."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans
