"""Numbers below the smallest normal one, which a CPU computes with ten times as slowly, or more."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

__all__ = ["WIDE", "negligible", "without_subnormals"]

WIDE = (torch.float32, torch.float64, torch.bfloat16)  # of float16 no number is negligible

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward}
_NORMS = {_aten.native_batch_norm, _aten.cudnn_batch_norm}  # which change their running means, and do not say so
_MASKS = {_aten.relu, _aten.threshold_backward}  # whose values are zeros, or those of their first argument


def negligible(dtype: torch.dtype) -> float:
    """A number below which products and averages take all for zero: 1e8 times the smallest normal one.

    Example:
        >>> negligible(torch.float64)
        2.2250738585072014e-300
    """
    return torch.finfo(dtype).tiny * 1e8


def without_subnormals(graph: torch.fx.GraphModule) -> None:
    """Let a graph compute zero where it would compute subnormal numbers that make no difference.

    Where a decoder is sure of a pixel, the gradient of its logit is next to nothing, and products with it are
    subnormal: a hundred such pixels make a step five times as slow. So matrix products and convolutions take operands
    that are negligible for zero; so does the gradient of the cross entropy of bits exponentials that are subnormal, and
    the cross entropy itself those whose cubes are, which the logarithm of one and them is made of.

    Args:
        graph: A graph of ATen's operations, which is changed.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda x, w: (x * x) @ w)(torch.ones(1, 1), torch.ones(1, 1))
        >>> without_subnormals(graph)
        >>> graph(torch.tensor([[1e-18]]), torch.tensor([[1e-3]]))
        tensor([[0.]])
    """
    spared: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in list(graph.graph.nodes):
        if _packet(node) in _PRODUCTS:
            with graph.graph.inserting_before(node):
                node.args = torch.fx.node.map_arg(node.args, lambda argument: _spared(graph.graph, argument, spared))
        elif _changes_in_place(node):
            spared.clear()  # they are as they were before
        elif _packet(node) is _aten.binary_cross_entropy_with_logits and _is_wide(node.args[0]):
            _cut_gradient(graph.graph, node)
            _cut_cross_entropy(graph.graph, node)
    graph.recompile()


def _spared(graph: torch.fx.Graph, node: Any, spared: dict[torch.fx.Node, torch.fx.Node]) -> Any:
    """The same tensor with zeros in place of what is negligible; weights, data and other products stay as they are."""
    if _is_given(node) or not _is_wide(node):
        return node
    if node not in spared:
        if _is_view(node):  # viewed when spared, as a view would be copied
            whole = _spared(graph, node.args[0], spared)
            spared[node] = graph.node_copy(node, lambda argument: whole if argument is node.args[0] else argument)
        else:  # computed in the loop that computes the tensor
            of = (node, negligible(node.meta["val"].dtype))
            spared[node] = graph.call_function(_aten.hardshrink.default, of)
    return spared[node]


def _is_given(node: Any) -> bool:
    """Whether this is no result of arithmetic on single numbers: an input, a product, or what a mask leaves of one."""
    if node.op != "call_function" or _packet(node) in _PRODUCTS:
        return True
    same = _is_view(node) or _packet(node) in _MASKS or node.target is operator.getitem
    return same and _is_given(node.args[0])


def _changes_in_place(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return _packet(node) in _NORMS or (schema is not None and schema.is_mutable)


def _cut_gradient(graph: torch.fx.Graph, cross_entropy: torch.fx.Node) -> None:
    """The gradient is the sigmoid of the logits minus the bits."""
    logits, bits = map(_base, cross_entropy.args[:2])
    for node in list(graph.nodes):
        if _packet(node) is _aten.sigmoid and _base(node.args[0]) is logits:
            differences = [user for user in node.users if _packet(user) is _aten.sub and user.args[0] is node]
            if len(differences) == len(node.users) and all(_base(user.args[1]) is bits for user in differences):
                with graph.inserting_before(node):
                    node.args = (_cut(graph, node.args[0], _smallest(node.meta["val"].dtype)),)


def _cut_cross_entropy(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    r"""It is :math:`(1 - x)\,l - \min(0, l) + \log(1 + e^{-|l|})`, of bits x and logits l."""
    arguments: Any = node.args
    logits, bits, *options = arguments
    if options != [None, None, 0]:  # weights, or a reduction
        return

    def call(operation: Any, *operands: Any) -> Any:
        return graph.call_function(operation, operands)

    with graph.inserting_before(node):
        minus = call(_aten.neg.default, call(_aten.abs.default, logits))
        cut = _cut(graph, minus, _smallest(logits.meta["val"].dtype) / 3)  # a third, since log1p computes cubes
        positive = call(_aten.log1p.default, call(_aten.exp.default, cut))
        log_sigmoid = call(_aten.sub.Tensor, call(_aten.clamp_max.default, logits, 0.0), positive)
        of_zeros = call(_aten.mul.Tensor, call(_aten.rsub.Scalar, bits, 1.0), logits)
        found = call(_aten.sub.Tensor, of_zeros, log_sigmoid)
    found.meta = dict(node.meta)
    node.replace_all_uses_with(found)
    graph.erase_node(node)


def _smallest(dtype: torch.dtype) -> float:
    """The number whose exponential is the smallest normal one."""
    return math.log(torch.finfo(dtype).tiny)


def _cut(graph: torch.fx.Graph, x: Any, least: float) -> torch.fx.Node:
    """Minus infinity for what is less."""
    low = graph.call_function(_aten.lt.Scalar, (x, least))
    return graph.call_function(_aten.masked_fill.Scalar, (x, low, -math.inf))


def _is_wide(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in WIDE


def _is_view(node: torch.fx.Node) -> bool:
    return getattr(node.target, "is_view", False)


def _base(node: Any) -> Any:
    """What a tensor is a view of."""
    while isinstance(node, torch.fx.Node) and _is_view(node):
        node = node.args[0]
    return node


def _packet(node: torch.fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)
