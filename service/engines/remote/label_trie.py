"""Labels as a trie of token ids: which places a model must be asked about to score them all. Pure."""

from __future__ import annotations

from collections.abc import Sequence

Path = tuple[int, ...]
"""The token ids that lead from the trie's root to a node."""


class LabelTrie:
    """Over the labels' token ids, end-of-sequence tokens included. A node is what stands before a token of a label."""

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self._labels = [tuple(label) for label in labels]
        self._children: dict[Path, set[int]] = {}
        for label in self._labels:
            for place, token in enumerate(label):
                self._children.setdefault(label[:place], set()).add(token)

    def inner(self) -> list[Path]:
        """The nodes that something follows, the root first."""
        return sorted(self._children, key=lambda path: (len(path), path))

    def missing(self, known: dict[Path, dict[int, float]]) -> dict[int, list[Path]]:
        """The children whose log-probability is not known, by their token: behind which nodes they stand."""
        found: dict[int, list[Path]] = {}
        for path in self.inner():
            for token in sorted(self._children[path] - known.get(path, {}).keys()):
                found.setdefault(token, []).append(path)
        return found

    def totals(self, known: dict[Path, dict[int, float]]) -> tuple[float, ...]:
        """The log-probability of each label: the sum over its tokens. All of them must be known."""
        return tuple(sum(known[label[:place]][token] for place, token in enumerate(label)) for label in self._labels)
