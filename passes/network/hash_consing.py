"""Hash consing of arrays: equal arrays are one object, and a function of such objects is computed once.

Repeated layers make the same arrays again and again. So what a reduction takes grows with what is different in a network,
not with its size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
_T = TypeVar("_T")


class HashConsing:
    """Knows arrays by their contents, and results by what they were made of."""

    def __init__(self) -> None:
        self._by_content: dict[tuple[tuple[int, ...], str, bytes], Array] = {}
        self._numbers: dict[int, int] = {}  # id -> number
        self._known: list[Array] = []  # keeps what has a number
        self._results: dict[tuple[Any, ...], Any] = {}
        self._transposed: dict[int, Array] = {}
        self._lock = threading.Lock()  # numbers are given once, also where several threads reduce parts of a network

    def unique(self, values: Array) -> Array:
        """The one array with these contents. It must not be written to."""
        if id(values) in self._numbers:
            return values
        values = np.ascontiguousarray(values)
        key = values.shape, values.dtype.str, values.tobytes()
        found = self._by_content.get(key)
        if found is None:
            self._enter(values)
            found = self._by_content[key] = values
        return found

    def _enter(self, array: Array) -> None:
        with self._lock:
            self._known.append(array)
            self._numbers[id(array)] = len(self._known) - 1

    def number(self, array: Array) -> int:
        """The number of an array that came from here: equal arrays, and only they, have equal ones."""
        return self._numbers[id(array)]

    def transposed(self, matrix: Array) -> Array:
        """The transpose of a matrix that came from here, from here too."""
        number = self._numbers[id(matrix)]
        found = self._transposed.get(number)
        if found is None:
            found = self.unique(matrix.T)
            self._transposed[number] = found
            self._transposed.setdefault(self._numbers[id(found)], matrix)
        return found

    def apply(self, name: str, function: Callable[..., Array], *parts: Array | int) -> Array:
        """``function`` of arrays that came from here, computed once; the result is from here too."""
        return self.cached(name, lambda *values: self.unique(function(*values)), *parts)

    def cached(self, name: str, function: Callable[..., _T], *parts: Array | int) -> _T:
        """``function`` of arrays that came from here, or of integers, computed once.

        Args:
            name: of the function; two functions must not share it.
            function: has no other inputs.
            parts: its arguments.
        """
        numbers = self._numbers
        key = (name, *[part if isinstance(part, int) else numbers[id(part)] for part in parts])
        try:
            return self._results[key]
        except KeyError:
            found = self._results[key] = function(*parts)
            return found
