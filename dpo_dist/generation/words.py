"""Words of texts in any script."""

import regex

# A letter of a script without spaces is a word of its own, with its marks (\X is a grapheme).
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"[[\w\p{{M}}]--[{_UNSPACED}]]+(?:['\u2019]\w+)*|(?!\s)\X", regex.VERSION1)
"""A word with its marks and apostrophes, or one sign that is neither a letter nor white space."""
