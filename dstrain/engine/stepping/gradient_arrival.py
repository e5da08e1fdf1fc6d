"""The order in which a backward pass will reach parameters, computed from its graph."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch


def gradient_arrival_order(
    loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
) -> list[int]:
    """Return all indices of ``parameters`` in the order in which gradients of ``loss`` will come.

    Runs through the graph as torch's engine does on one device: among the nodes whose inputs are
    ready, it takes the node that the forward pass made last. A parameter that is not in the graph
    (unused, or inside a re-entrant checkpoint) comes behind the parameter that is registered after
    it. The time grows with the number of nodes and of parameters.

    Args:
        loss: tensor that backward() is called on; without a graph the order is that of
            registration, backwards.
        parameters: all parameters, in the order in which the model registers them.
    """
    index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
    found = [i for i in _reached(loss, index_of) if i is not None]
    seen = set(found)
    behind: dict[int, list[int]] = {}
    after = -1  # the last parameter seen, going backwards; -1 for the start
    for index in reversed(range(len(parameters))):
        if index in seen:
            after = index
        else:
            behind.setdefault(after, []).append(index)
    order = behind.get(-1, [])
    for index in found:
        order.append(index)
        order.extend(behind.get(index, ()))
    return order


def _reached(loss: torch.Tensor, index_of: dict[int, int]) -> list[int | None]:
    root: Any = loss.grad_fn
    if root is None:
        return []
    waits = _num_inputs(root)
    ready: list[tuple[int, int, Any]] = [(0, 0, root)]
    order: list[int | None] = []
    number = 0  # of two nodes made at once, the one that was ready first
    while ready:
        node = heapq.heappop(ready)[2]
        parameter = getattr(node, "variable", None)
        if parameter is not None:
            order.append(index_of.get(id(parameter)))
            continue
        for child, _ in node.next_functions:
            if child is None:
                continue
            waits[child] -= 1
            if not waits[child]:
                number += 1
                heapq.heappush(ready, (-child._sequence_nr(), number, child))
    return order


def _num_inputs(root: Any) -> dict[Any, int]:
    """Count the edges that lead to each node of a graph; the nodes are kept alive as keys."""
    waits = {root: 0}
    stack = [root]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is None:
                continue
            if child not in waits:
                waits[child] = 0
                stack.append(child)
            waits[child] += 1
    return waits
