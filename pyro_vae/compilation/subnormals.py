"""Numbers below the smallest normal one, which a CPU computes with ten times as slowly, or more."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["COMPOSED", "negligible", "without_subnormals"]

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward}
COMPOSED = [_aten.binary_cross_entropy_with_logits, _aten.log_sigmoid_forward, _aten.softplus]  # of exponentials
_ADDED = {  # what is computed, and what it does not matter for
    _aten.exp: {_aten.log1p},
    _aten.sigmoid: {_aten.sub, _aten.add},
}


def negligible(dtype: torch.dtype) -> float:
    """A number below which all are taken for zero: 1e8 times the smallest normal one, 1e-30 in float32.

    Example:
        >>> negligible(torch.float64)
        2.2250738585072014e-300
    """
    return torch.finfo(dtype).tiny * 1e8


def without_subnormals(graph: torch.fx.GraphModule) -> None:
    """Let a graph compute zero where it would compute subnormal numbers that make no difference.

    Where a decoder is sure of a pixel, the gradient of its logit is next to nothing, and products with it are
    subnormal: a hundred such pixels make a step five times as slow. So matrix products and convolutions take operands
    that are negligible for zero. And where the exponential of a logit, or its sigmoid, is added to another number, it
    is zero if it would be subnormal.

    Args:
        graph: A graph of ATen's operations, which is changed.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda x, w: (x * x) @ w)(torch.ones(1, 1), torch.ones(1, 1))
        >>> without_subnormals(graph)
        >>> graph(torch.tensor([[1e-18]]), torch.tensor([[1e-3]]))
        tensor([[0.]])
    """
    spared: dict[Any, Any] = {}
    for node in list(graph.graph.nodes):
        if _packet(node) in _PRODUCTS:
            node.args = torch.fx.node.map_arg(node.args, lambda argument: _spared(graph.graph, argument, spared))
        elif _is_only_added(node):
            _cut(graph.graph, node)
    graph.recompile()


def _is_only_added(node: torch.fx.Node) -> bool:
    added = _ADDED.get(_packet(node), set())
    return bool(node.users) and all(_packet(user) in added for user in node.users)


def _cut(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Let an exponential or a sigmoid be that of minus infinity where it would be subnormal."""
    x, value = node.args[0], node.meta["val"]
    with graph.inserting_before(node):
        low = graph.call_function(_aten.lt.Scalar, (x, math.log(torch.finfo(value.dtype).tiny)))
        node.args = (graph.call_function(_aten.masked_fill.Scalar, (x, low, -math.inf)),)


def _spared(graph: torch.fx.Graph, node: Any, spared: dict[Any, Any]) -> Any:
    """The same tensor with zeros in place of what is negligible; weights, data and other products stay as they are."""
    value = node.meta.get("val")
    if node.op != "call_function" or _packet(node) in _PRODUCTS or not isinstance(value, Tensor):
        return node
    if not value.is_floating_point():
        return node
    if node not in spared:
        with graph.inserting_after(node):
            if not node.target.is_view:  # in the loop that computes it
                spared[node] = graph.call_function(_aten.hardshrink.default, (node, negligible(value.dtype)))
            else:  # the view of what is spared, as it would be copied otherwise
                whole = _spared(graph, node.args[0], spared)
                spared[node] = graph.node_copy(node, lambda argument: whole if argument is node.args[0] else argument)
    return spared[node]


def _packet(node: torch.fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)
