"""Every request is found whole in the tree, and what is shared is there once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.prefix_tree import MIN_SHARED, Node, build_tree


def paths(node: Node, before: tuple = ()):
    """(request, offset in the whole sequence, target, the sequence up to that place) for all targets below a node."""
    tokens = [*before, *node.tokens]
    assert node.start == len(before) and node.tokens
    for span in node.spans:
        for i, target in enumerate(span.targets):
            place = node.start + span.offset + i
            assert place < len(tokens)
            yield span.request, place, target, tuple(tokens[: place + 1])
    for child in node.children:
        yield from paths(child, tuple(tokens))


def check(contexts, targets) -> list[Node]:
    roots = build_tree(contexts, targets)
    found = sorted(p for root in roots for p in paths(root))
    wanted = sorted(
        (n, len(c) - 1 + i, target, tuple((c + t)[: len(c) + i]))
        for n, (c, t) in enumerate(zip(contexts, targets))
        for i, target in enumerate(t)
    )
    assert found == wanted
    return roots


def test_one_token_choices_cost_one_sequence():
    roots = check([[1, 2, 3]] * 4, [[7], [8], [9], [7]])
    assert len(roots) == 1 and roots[0].cost() == 3 and not roots[0].children


def test_a_few_shot_block_and_a_context_are_shared_on_two_levels():
    block, questions = list(range(50)), [[100 + q] * 10 for q in range(3)]
    contexts = [block + q for q in questions for _ in range(4)]
    targets = [[200 + c] * 5 for _ in questions for c in range(4)]
    (root,) = check(contexts, targets)
    assert root.tokens == block and len(root.children) == 3
    assert root.cost() == 50 + 3 * (10 + 4 * 4)


def test_short_common_beginnings_are_not_worth_a_pass():
    few = list(range(MIN_SHARED - 1))
    roots = check([[*few, 50], [*few, 60]], [[1], [2]])
    assert len(roots) == 2


def test_a_sequence_that_is_the_beginning_of_another():
    long = list(range(60))
    roots = check([long[:30], long[:30], long], [[500], [501], [502, 503]])
    assert sum(r.cost() for r in roots) == 61


def test_thousands_of_nested_sequences_do_not_exhaust_the_stack():
    long = list(range(1500))
    check([long[:n] for n in range(1, 1500)], [[0]] * 1499)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 9, 25]), st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 4)),
        min_size=1,
        max_size=12,
    )
)
def test_any_requests(parts):
    contexts = [[3] * shared + own for shared, own, _ in parts]
    targets = [[4 + i for i in range(n)] for *_, n in parts]
    roots = check(contexts, targets)
    assert sum(r.cost() for r in roots) <= sum(len(c) + len(t) - 1 for c, t in zip(contexts, targets))
