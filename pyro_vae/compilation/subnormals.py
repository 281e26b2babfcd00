"""Numbers below the smallest normal one, which a CPU computes with ten times as slowly, or more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["negligible", "spare_products"]

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward}


def negligible(dtype: torch.dtype) -> float:
    """A number below which all are taken for zero: 1e8 times the smallest normal one, 1e-30 in float32.

    Example:
        >>> negligible(torch.float64)
        2.2250738585072014e-300
    """
    return torch.finfo(dtype).tiny * 1e8


def spare_products(graph: torch.fx.GraphModule) -> None:
    """Let matrix products and convolutions take what is negligible for zero.

    Where a decoder is sure of a pixel, the gradient of its logit is next to nothing, and products with it are
    subnormal: a hundred such pixels make a step five times as slow.

    Args:
        graph: A graph of ATen's operations, which is changed.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda x, w: (x * x) @ w)(torch.ones(1, 1), torch.ones(1, 1))
        >>> spare_products(graph)
        >>> graph(torch.tensor([[1e-18]]), torch.tensor([[1e-3]]))
        tensor([[0.]])
    """
    spared: dict[Any, Any] = {}
    for node in list(graph.graph.nodes):
        if _packet(node) in _PRODUCTS:
            node.args = torch.fx.node.map_arg(node.args, lambda argument: _spared(graph.graph, argument, spared))
    graph.recompile()


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
