"""Which parts of many token sequences are the same, so that each is computed once.

MMLU puts the same few-shot block before every question of a subject, HellaSwag the same context before four endings.
Sharing is by token ids, not by text: two strings with a common beginning may be tokenised differently at its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# A shared stretch costs a forward pass of its own and a copy of its keys; below these it does not pay.
MIN_SHARED = 8
MIN_SAVED = 24


@dataclass
class Span:
    """Part of a request's targets: `targets[i]` is predicted at place `offset + i` of a node's tokens."""

    request: int
    offset: int
    targets: list[int]


@dataclass
class Node:
    """Tokens at places [start, start + len(tokens)) that all sequences below share, and what is to be scored there."""

    start: int
    tokens: list[int]
    spans: list[Span] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def cost(self) -> int:
        """Tokens to compute for this node and everything below it."""
        return len(self.tokens) + sum(child.cost() for child in self.children)


def build_tree(contexts: Sequence[list[int]], targets: Sequence[list[int]]) -> list[Node]:
    """The roots of a forest that computes every request (context, targets) once.

    A request's input is context + targets[:-1]; its targets are predicted from the last len(targets) places.
    """
    requests_of: dict[bytes, list[int]] = {}
    for number, (context, wanted) in enumerate(zip(contexts, targets)):
        # Big-endian bytes sort as the ids do, and compare as fast as memory allows.
        requests_of.setdefault(np.asarray(context + wanted[:-1], dtype=">u4").tobytes(), []).append(number)
    keys = sorted(requests_of)
    sequences = [np.frombuffer(key, dtype=">u4") for key in keys]
    requests = [requests_of[key] for key in keys]
    common = np.array([0, *(_common(a, b) for a, b in itertools.pairwise(sequences))])
    roots: list[Node] = []
    pending: list[tuple[int, int, int, list[Node]]] = [(0, len(keys), 0, roots)]  # rows [low, high) from place `depth`
    while pending:
        low, high, depth, siblings = pending.pop()
        if high == low:
            continue
        alone = high - low == 1
        shared = len(sequences[low]) if alone else int(common[low + 1 : high].min())
        saved = (shared - depth) * (high - low - 1)
        if alone or (shared - depth >= MIN_SHARED and saved >= MIN_SAVED):
            if shared == depth:  # the sequence ends with its parent, which has its targets
                continue
            node = Node(depth, sequences[low][depth:shared].tolist())
            for row in range(low, high):
                for number in requests[row]:
                    _add_span(node, number, len(contexts[number]) - 1, targets[number])
            siblings.append(node)
            if alone:
                continue
            siblings, depth = node.children, shared
        cuts = [low, *(low + 1 + np.flatnonzero(common[low + 1 : high] == shared)).tolist(), high]
        pending += [(a, b, depth, siblings) for a, b in itertools.pairwise(cuts)]
    return roots


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    return int(different.argmax()) if different.any() else size


def _add_span(node: Node, request: int, first: int, targets: list[int]) -> None:
    """Target i is predicted at place first + i; the node takes those that fall on its tokens."""
    begin = max(first, node.start)
    end = min(first + len(targets), node.start + len(node.tokens))
    if begin < end:
        node.spans.append(Span(request, begin - node.start, targets[begin - first : end - first]))
