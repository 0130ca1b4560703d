"""Which values of a graph have buffers, and which are fused into their readers: what XLA's fusion for CPUs decides.

The rules are those of XLA's ``CpuInstructionFusion`` and of its base class ``InstructionFusion``: from the last op to the first,
a loose op is fused into its readers if it is cheap to duplicate or has one reader, unless duplicating it would read more than
it writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.ir.op_traits import NEVER_DUPLICATED, without_dialect
from bactrian.passes.peak.value_graph import ELSEWHERE, Graph, Kind, Node

_EXPENSIVE = without_dialect(NEVER_DUPLICATED)
_REDUCED = frozenset({"multiply", "add", "maximum"})
"""Ops that a reduction which alone reads them takes in."""


@dataclass
class Fused:
    """What has a buffer.

    Attributes:
        made: the nodes whose results have one, operands first.
        reads: of each of these, the ones that it reads, and whether each element of its result is computed from the element at
            the same position.
        results: the nodes whose buffers hold the graph's results.
        root: of each node, the one whose buffer it views.
    """

    made: list[int]
    reads: dict[int, dict[int, bool]]
    results: list[int]
    root: list[int]


def fuse(graph: Graph) -> Fused:
    """Decide for every node of a graph, the last first."""
    nodes = graph.nodes
    root = _roots(nodes)
    results = [root[number] for number in graph.results]
    users = _users(nodes, root, set(results))
    ends = set(results)
    fixed = _not_twice(nodes, root, users, set(graph.results))
    inside: list[dict[int, bool]] = [
        {} for _ in nodes
    ]  # the nodes with buffers that a node is fused into, and whether in place
    made, reads = list[int](), dict[int, dict[int, bool]]()
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        if node.kind is Kind.VIEW or not (users[number] or number in ends):
            continue
        readers = dict[int, bool]()
        for user in users[number]:
            in_place = nodes[user].name not in ELSEWHERE and nodes[user].nbytes == node.nbytes
            for head, same in inside[user].items():
                readers[head] = readers.get(head, True) and same and in_place
        takers = _takers(node, readers, users[number], nodes)
        once = len(readers) + (number in ends) == 1
        if not takers or not (once or (node.name not in _EXPENSIVE and number not in fixed)):
            takers = []
        taken = {head: readers[head] for head in takers}
        if len(taken) == len(readers) and number not in ends:
            inside[number] = taken
            continue
        inside[number] = taken | {number: True}
        made.append(number)
        reads.setdefault(number, {})
        for head, same in readers.items():
            if head not in taken:
                reads.setdefault(head, {})[number] = same
    return Fused(made[::-1], reads, results, root)


def _roots(nodes: list[Node]) -> list[int]:
    root = list(range(len(nodes)))
    for number, node in enumerate(nodes):
        if node.kind is Kind.VIEW:
            root[number] = root[node.operands[0]]
    return root


def _users(nodes: list[Node], root: list[int], results: set[int]) -> list[list[int]]:
    """The readers of each node, through views; only those that lead to a result."""
    users: list[list[int]] = [[] for _ in nodes]
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        if node.kind is not Kind.VIEW and (users[number] or number in results):
            for operand in dict.fromkeys(root[o] for o in node.operands):
                users[operand].append(number)
    return [each[::-1] for each in users]


def _takers(node: Node, readers: dict[int, bool], users: list[int], nodes: list[Node]) -> list[int]:
    """The readers with buffers that a loose node is fused into: loose ones, and a reduction that alone reads it."""
    if node.kind is not Kind.LOOSE:
        return []
    if len(readers) == 1 and len(users) == 1:
        head = next(iter(readers))
        if nodes[head].name == "reduce":
            repeats = node.name == "broadcast_in_dim" and set(node.dims) <= set(nodes[head].dims)
            return [head] if node.name in _REDUCED or repeats or not node.operands else []
    return [head for head in readers if nodes[head].kind is Kind.LOOSE]


def _not_twice(nodes: list[Node], root: list[int], users: list[list[int]], ends: set[int]) -> set[int]:
    """Nodes that would read more if they were computed twice, and that can't be fused into all of their readers: they are
    fused into none.

    A product that reads a view of a node does not count as a reader of the node.
    """
    reach = [0] * len(nodes)  # bits of the nodes that a node depends on
    fixed = set[int]()
    for number, node in enumerate(nodes):
        bits = 0
        for operand in node.operands:
            bits |= reach[root[operand]] | (1 << root[operand])
        reach[number] = bits
    for number, node in enumerate(nodes):
        several = len(users[number]) + (number in ends) > 1
        if node.kind is not Kind.LOOSE or not several or _few_reads(node, nodes):
            continue
        known = dict[int, bool]()
        direct = [user for user in users[number] if number in nodes[user].operands]  # what reads a view reads a copy
        if number in ends or not all(
            _on_all_paths(number, user, nodes, root, users, reach, fixed, known) for user in direct
        ):
            fixed.add(number)
    return fixed


def _few_reads(node: Node, nodes: list[Node]) -> bool:
    """Whether a node reads hardly more than it writes, so that it may be computed twice."""
    operands = [nodes[o] for o in dict.fromkeys(node.operands)]
    wide = [
        o
        for o in operands
        if len(o.shape) >= len(node.shape) and o.name not in ("broadcast_in_dim", "iota", "constant")
    ]
    return len(wide) <= 1 or sum(o.nbytes for o in operands) <= node.nbytes


def _on_all_paths(
    number: int, user: int, nodes: list[Node], root: list[int], users: list[list[int]], reach: list[int],
    fixed: set[int], known: dict[int, bool],
) -> bool:  # fmt: skip
    """Whether a node, and all that lies between the two, can be fused into a reader."""
    if user == number:
        return True
    if user not in known:
        found = nodes[user].kind is Kind.LOOSE
        for operand in (root[o] for o in nodes[user].operands) if found else ():
            if operand != number and not reach[operand] >> number & 1:
                continue
            shared = len(users[operand]) > 1 and (nodes[operand].name in _EXPENSIVE or operand in fixed)
            if shared or not _on_all_paths(number, operand, nodes, root, users, reach, fixed, known):
                found = False
                break
        known[user] = found
    return known[user]
