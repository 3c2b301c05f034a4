"""Pseudo-random permutations of 0, 1, ..., count - 1, evaluated at some positions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

# Larger permutations are computed instead of stored: sorting this many random numbers takes seconds and 0.8 GB.
MAX_TABLE = 1 << 25
_ROUNDS = 8


class Permutation(Protocol):
    """A permutation of the numbers below `count`."""

    @property
    def count(self) -> int: ...

    def __getitem__(self, positions: Numbers) -> Numbers:
        """The numbers at some positions."""

    def positions_of(self, numbers: Numbers) -> Numbers:
        """The positions of some numbers, in any order."""


class Identity:
    """The numbers in ascending order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getitem__(self, positions: Numbers) -> Numbers:
        return positions

    def positions_of(self, numbers: Numbers) -> Numbers:
        return numbers


class Table:
    """A stored permutation: the order of random numbers of a Philox generator.

    Args:
        count: number of elements.
        key: seeds the generator.
    """

    def __init__(self, count: int, key: Sequence[int]) -> None:
        self.count = count
        # argsort of raw bits is stable across NumPy versions; Generator.permutation is not guaranteed to be.
        bits = np.random.Philox(np.random.SeedSequence(key))
        self.numbers: Numbers = np.argsort(bits.random_raw(count), kind="stable")

    def __getitem__(self, positions: Numbers) -> Numbers:
        return self.numbers[positions]

    def positions_of(self, numbers: Numbers) -> Numbers:
        wanted = np.zeros(self.count, bool)
        wanted[numbers] = True
        return np.flatnonzero(wanted[self.numbers])


class Feistel:
    """A permutation computed without a table, by a Feistel network on pairs (left, right).

    A number below `count` is written as left * columns + right, where rows * columns is the smallest rectangle that is
    nearly square and holds all numbers. Each round adds a hash of one half to the other, modulo its size. A result
    outside the range is permuted again until it is inside ("cycle walking"), so that the map stays one-to-one.

    Reference: J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002. The hash is the finaliser of
    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). All arithmetic is on integers, so results are the same everywhere.

    Args:
        count: number of elements.
        key: seeds the keys of the rounds.
    """

    def __init__(self, count: int, key: Sequence[int]) -> None:
        self.count = count
        rows = isqrt(max(count - 1, 0)) + 1
        self._sizes = (rows, -(-count // rows) if count else 1)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __getitem__(self, positions: Numbers) -> Numbers:
        return self._walk(positions, self._forward)

    def positions_of(self, numbers: Numbers) -> Numbers:
        return self._walk(numbers, self._backward)

    def _walk(self, numbers: Numbers, step: _Step) -> Numbers:
        values = step(np.asarray(numbers, np.int64))
        while len(outside := np.flatnonzero(values >= self.count)):
            values[outside] = step(values[outside])
        return values

    def _forward(self, numbers: Numbers) -> Numbers:
        halves = list(np.divmod(numbers, self._sizes[1]))
        for i, key in enumerate(self._keys):
            changed = i % 2
            halves[changed] = (halves[changed] + self._hash(halves[1 - changed], key, changed)) % self._sizes[changed]
        return np.asarray(halves[0] * self._sizes[1] + halves[1])

    def _backward(self, numbers: Numbers) -> Numbers:
        halves = list(np.divmod(numbers, self._sizes[1]))
        for i, key in reversed(list(enumerate(self._keys))):
            changed = i % 2
            halves[changed] = (halves[changed] - self._hash(halves[1 - changed], key, changed)) % self._sizes[changed]
        return np.asarray(halves[0] * self._sizes[1] + halves[1])

    def _hash(self, half: Numbers, key: np.uint64, changed: int) -> Numbers:
        """Hash of each number of a half, below the size of the other half."""
        z = half.astype(np.uint64) ^ key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return (z % np.uint64(self._sizes[changed])).astype(np.int64)


class _Step(Protocol):
    def __call__(self, numbers: Numbers, /) -> Numbers: ...


def permutation(count: int, key: Sequence[int]) -> Table | Feistel:
    """A random permutation that depends on its arguments alone: a table up to `MAX_TABLE` elements, else computed."""
    return Table(count, key) if count <= MAX_TABLE else Feistel(count, key)
