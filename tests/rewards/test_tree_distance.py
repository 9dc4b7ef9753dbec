"""Tree edit distance against the definition: the cheapest mapping that keeps order and descent."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.rewards.tree_distance import Tree, relabel_cost, tree_distance

NODES = st.builds(Tree, st.sampled_from("ab"), st.sampled_from("xy"))


def trees(most: int) -> st.SearchStrategy[Tree]:
    grown = st.recursive(
        NODES,
        lambda below: st.builds(
            Tree,
            st.sampled_from("ab"),
            st.sampled_from("xy"),
            st.lists(below, min_size=1, max_size=3).map(tuple),
        ),
        max_leaves=3,
    )
    return grown.filter(lambda tree: len(tree) <= most)


def numbered(tree: Tree, depth_first: list[tuple[Tree, int, int]], start: int = 0) -> int:
    """Nodes with their preorder and postorder numbers; returns the next postorder number."""
    place = len(depth_first)
    depth_first.append((tree, place, -1))
    for child in tree.children:
        start = numbered(child, depth_first, start)
    depth_first[place] = (tree, place, start)
    return start + 1


def by_definition(one: Tree, other: Tree) -> float:
    """Every one-to-one mapping that keeps ancestors and left-to-right order; the cheapest."""
    left: list[tuple[Tree, int, int]] = []
    right: list[tuple[Tree, int, int]] = []
    numbered(one, left)
    numbered(other, right)
    best = float(len(left) + len(right))
    for size in range(1, min(len(left), len(right)) + 1):
        for chosen in itertools.combinations(left, size):
            for image in itertools.permutations(right, size):
                pairs = list(zip(chosen, image, strict=True))
                if all(
                    (a[1] < b[1]) == (x[1] < y[1]) and (a[2] < b[2]) == (x[2] < y[2])
                    for (a, x), (b, y) in itertools.combinations(pairs, 2)
                ):
                    cost = sum(relabel_cost(a[0], x[0]) for a, x in pairs)
                    best = min(best, cost + len(left) + len(right) - 2 * size)
    return best


@settings(max_examples=150)
@given(trees(5), trees(5))
def test_equals_the_definition(one: Tree, other: Tree) -> None:
    assert tree_distance(one, other) == by_definition(one, other)


@settings(max_examples=60)
@given(trees(8), trees(8), trees(8))
def test_is_a_distance(one: Tree, other: Tree, third: Tree) -> None:
    assert tree_distance(one, one) == 0
    assert (tree_distance(one, other) == 0) == (one == other)
    assert tree_distance(one, other) == tree_distance(other, one)
    there = tree_distance(one, third) + tree_distance(third, other)
    assert tree_distance(one, other) <= there + 1e-9


def test_the_example_of_the_paper() -> None:
    # Zhang & Shasha 1989, figure 4: f(d(a c(b)) e) and f(c(d(a b)) e) are two edits apart.
    def node(name: str, *children: Tree) -> Tree:
        return Tree(name, "", children)

    one = node("f", node("d", node("a"), node("c", node("b"))), node("e"))
    other = node("f", node("c", node("d", node("a"), node("b"))), node("e"))
    assert tree_distance(one, other) == 2


def test_a_canonical_order_makes_order_free() -> None:
    one = Tree("e", "sad", (Tree("face", "sad"), Tree("voice", "angry", (Tree("cue", "b"),))))
    other = Tree("e", "sad", (Tree("voice", "angry", (Tree("cue", "b"),)), Tree("face", "sad")))
    assert tree_distance(one, other) > 0
    assert tree_distance(one.ordered(), other.ordered()) == 0
    assert len(one) == 4


@pytest.mark.parametrize(
    ("one", "other", "cost"),
    [
        (Tree("face", "sad"), Tree("face", "happy"), 0.5),
        (Tree("face", "sad"), Tree("voice", "sad"), 1.0),
        (Tree("face", "sad"), Tree("face", "sad"), 0.0),
    ],
)
def test_changing_a_value_costs_half(one: Tree, other: Tree, cost: float) -> None:
    assert tree_distance(one, other) == cost
