"""Edit distance between small ordered trees, with the algorithm of Zhang & Shasha (SIAM J. Comput.
18(6), 1989).

It is implemented here because the packages on PyPI that implement it have had no release since
2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tree:
    """A node with its subtrees. ``slot``: the attribute that it describes; ``value``: its value."""

    slot: str
    value: str
    children: tuple[Tree, ...] = ()

    def __len__(self) -> int:
        """The number of nodes."""
        return 1 + sum(len(child) for child in self.children)

    def ordered(self) -> Tree:
        """The same tree with children in a canonical order, so that their order costs nothing."""
        children = [child.ordered() for child in self.children]
        return Tree(self.slot, self.value, tuple(sorted(children, key=_order)))


def relabel_cost(one: Tree, other: Tree) -> float:
    """0 for equal nodes, 0.5 for two values of one slot, 1 for nodes of different slots."""
    if one.slot != other.slot:
        return 1.0
    return 0.0 if one.value == other.value else 0.5


def unit_cost(node: Tree) -> float:
    """1 for every node."""
    return 1.0


def tree_distance(
    one: Tree,
    other: Tree,
    relabel: Callable[[Tree, Tree], float] = relabel_cost,
    weight: Callable[[Tree], float] = unit_cost,
) -> float:
    """The minimum cost of edits that turn ``one`` into ``other``.

    Inserting or deleting a node costs ``weight``, changing one costs ``relabel``. Children are
    compared in their given order. Time O(n² · min(depth, leaves)²) for n nodes.
    """
    left, right = _Postorder(one), _Postorder(other)
    table = [[0.0] * len(right.nodes) for _ in left.nodes]
    # Both ascend, because each fill reads distances of subtrees that the earlier ones have stored.
    for first in left.keyroots:
        for second in right.keyroots:
            _fill(table, left, right, (first, second), relabel, weight)
    return table[-1][-1]


class _Postorder:
    """Nodes in postorder, each with the index of its leftmost leaf, and the keyroots: the root
    and every node that has a left sibling, in ascending order."""

    def __init__(self, tree: Tree) -> None:
        self.nodes: list[Tree] = []
        self.leftmost: list[int] = []
        for node, leaf in _postorder(tree, 0):
            self.nodes.append(node)
            self.leftmost.append(leaf)
        # In postorder, the last node with a given leftmost leaf is the highest one, which is the
        # keyroot.
        last = {leaf: index for index, leaf in enumerate(self.leftmost)}
        self.keyroots = sorted(last.values())


def _postorder(tree: Tree, start: int) -> Iterator[tuple[Tree, int]]:
    position = start
    for child in tree.children:
        yield from _postorder(child, position)
        position += len(child)
    yield tree, start


def _fill(
    table: list[list[float]],
    left: _Postorder,
    right: _Postorder,
    keyroots: tuple[int, int],
    relabel: Callable[[Tree, Tree], float],
    weight: Callable[[Tree], float],
) -> None:
    """Fill in the distances of all pairs of subtrees on the left paths of two keyroots."""
    i, j = keyroots
    a, b = left.leftmost[i], right.leftmost[j]
    rows, columns = i - a + 2, j - b + 2
    forest = [[0.0] * columns for _ in range(rows)]
    for x in range(1, rows):
        forest[x][0] = forest[x - 1][0] + weight(left.nodes[a + x - 1])
    for y in range(1, columns):
        forest[0][y] = forest[0][y - 1] + weight(right.nodes[b + y - 1])
    for x in range(1, rows):
        for y in range(1, columns):
            m, n = a + x - 1, b + y - 1
            deleted = forest[x - 1][y] + weight(left.nodes[m])
            edits = min(deleted, forest[x][y - 1] + weight(right.nodes[n]))
            # Both forests are whole trees here, so their distance is also that of the two subtrees.
            if left.leftmost[m] == a and right.leftmost[n] == b:
                same = forest[x - 1][y - 1] + relabel(left.nodes[m], right.nodes[n])
                forest[x][y] = table[m][n] = min(edits, same)
            else:
                before = forest[left.leftmost[m] - a][right.leftmost[n] - b]
                forest[x][y] = min(edits, before + table[m][n])


def _order(tree: Tree) -> tuple[str, str, int]:
    return tree.slot, tree.value, len(tree)
