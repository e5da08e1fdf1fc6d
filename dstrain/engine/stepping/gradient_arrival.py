"""Prediction of the order in which a backward pass reaches parameters, from its graph."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch


def gradient_arrival_order(
    loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
) -> list[int]:
    """Return the indices of all parameters in the order in which their gradients will come.

    Walks through the graph as torch's engine does on one device: among the nodes whose inputs are
    ready, it takes the one that the forward pass created last. A parameter that is not in the graph
    (unused, or inside a re-entrant checkpoint) is placed directly after the parameter that is
    registered behind it. The time grows with the number of nodes and of parameters.

    Args:
        loss: tensor that backward() will be called on; without a graph the order is the reverse of
            registration.
        parameters: all parameters, in the order in which the model registers them.
    """
    index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
    found = [i for i in _reached(loss, index_of) if i is not None]
    seen = set(found)
    behind: dict[int, list[int]] = {}  # parameters that are not in the graph, by their predecessor
    after = -1  # the last parameter of the graph, going backwards; -1 at the start
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
    """Return the indices of the leaves of a graph in order; None for other tensors."""
    root: Any = loss.grad_fn
    if root is None:
        return []
    waits = _num_inputs(root)
    ready: list[tuple[int, int, Any]] = [(0, 0, root)]
    order: list[int | None] = []
    number = 0  # orders nodes of the same sequence number by the time at which they became ready
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
    """Count the edges that lead to each node of a graph."""
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
