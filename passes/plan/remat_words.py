"""What a layer keeps from its forward to its backward phase, in one word. No MLIR."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from bactrian.passes.frame.errors import ConfigError

NO_REMAT = "none"
"""The cheapest residuals: what ``select-residuals`` finds."""
KEEP_PRODUCTS = "products"
"""What comes into the layer, and its products without batch dims; the rest is computed again."""
REMAT_ALL = "all"
"""What comes into the layer; all of it is computed again."""
WORDS = (NO_REMAT, KEEP_PRODUCTS, REMAT_ALL)


def parse_remat(text: str) -> tuple[str, ...]:
    """The words of a text: one for all layers, or one for each; none where the text is empty.

    >>> parse_remat("none, all")
    ('none', 'all')

    Raises:
        ConfigError: there is no such word.
    """
    words = tuple(word.strip() for word in text.split(",")) if text.strip() else ()
    check_words(words)
    return words


def check_words(words: Sequence[str]) -> None:
    """Refuse what is none of `WORDS`.

    Raises:
        ConfigError: there is no such word.
    """
    for word in words:
        if word not in WORDS:
            close = difflib.get_close_matches(word.lower(), WORDS, n=1, cutoff=0.5)
            raise ConfigError(
                f"unknown word {word!r} for remat",
                fix=(f"did you mean {close[0]}? " if close else "") + f"the words are {', '.join(WORDS)}",
            )


def words_of_layers(words: Sequence[str], num_layers: int) -> tuple[str, ...]:
    """One word for each layer, from one for all of them, or one for each; nothing where none asks for anything.

    >>> words_of_layers(("all",), 2)
    ('all', 'all')

    Raises:
        ConfigError: there are more or fewer.
    """
    if len(words) not in (0, 1, num_layers):
        raise ConfigError(
            f"remat has {len(words)} words, the program has {num_layers} layer{'s' * (num_layers > 1)}",
            fix="give one word for all layers, or one for each",
        )
    found = tuple(words) * num_layers if len(words) == 1 else tuple(words)
    return () if all(word == NO_REMAT for word in found) else found
