"""What PyTorch's operations do to the channels of their arguments, by name, and where a graph has them.

The list need not be complete: an operation in none of the sets ends the channels that it reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from mpfx.graph.live import node_info

METADATA = frozenset(
    {
        "size",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_tensor",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "is_floating_point",
    }
)
"""Read the form of their arguments but not their values."""

SAME_VALUES = frozenset(
    {
        "to",
        "float",
        "half",
        "bfloat16",
        "double",
        "type",
        "type_as",
        "clone",
        "detach",
        "contiguous",
        "alias",
        "requires_grad",
    }
)
"""Return the values of their first argument, perhaps in another type of number."""

LIKE_ANOTHER = {"expand_as": "expand", "view_as": "reshape", "reshape_as": "reshape"}
"""Take the form of their second argument: what does the same for sizes."""

MOVEMENT = frozenset(
    {
        "view",
        "reshape",
        "transpose",
        "permute",
        "expand",
        "getitem",
        "chunk",
        "split",
        "tensor_split",
        "split_with_sizes",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "repeat",
        "tile",
        "repeat_interleave",
        "narrow",
        "select",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "unbind",
        "flip",
        "roll",
        "t",
        "broadcast_to",
    }
)
"""Move values and change none."""

VIEWS = frozenset({"T", "mT"})
"""Attributes of a tensor that move its values."""

JOINING = frozenset({"cat", "concat", "concatenate", "stack"})
"""Put several tensors into one."""

PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__"})
"""Linear in every factor."""

QUOTIENTS = frozenset({"div", "divide", "true_divide", "__truediv__"})
"""Linear in the first argument."""

SUMS = frozenset({"add", "sub", "subtract", "__add__", "__radd__", "__sub__", "maximum", "minimum"})
"""Homogeneous in all arguments together."""

_OTHER_PAIRS = frozenset({"rsub", "__rsub__", "__rtruediv__", "where"})
PAIRS = PRODUCTS | QUOTIENTS | SUMS | _OTHER_PAIRS
"""Everything that works position by position on several tensors."""

MATRIX_PRODUCTS = frozenset({"matmul", "bmm", "__matmul__"})
"""Sum over the last dimension of the first and the one before the last of the second argument."""

REDUCTIONS = frozenset({"sum", "mean"})
"""Sum over dimensions with equal weights."""


def operation_name(node: fx.Node) -> str:
    """The name of an operation, the same for the one in place (``add`` for ``add_`` and ``__iadd__``)."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name.startswith("__i") and f"__{name[3:]}" in PAIRS:
        return f"__{name[3:]}"
    return name if name.endswith("__") else name.removesuffix("_")


def harmless_writers(graph: fx.Graph) -> set[fx.Node]:
    """Operations in place after which nothing reads the old value, such as an activation on a fresh result."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    sharing = defaultdict(list)
    for node in graph.nodes:
        sharing[node_info(node).storage].append(node)
    found = set()
    for node in (node for node in graph.nodes if node_info(node).mutates):
        storage = node_info(node).storage
        older = [other for other in sharing[storage] if order[other] < order[node]]
        if node_info(node).mutates == {storage} and all(order[u] <= order[node] for o in older for u in o.users):
            found.add(node)
    return found


def place_of(node: fx.Node) -> str:
    """Where a user finds an operation."""
    stack = node_info(node).stack
    inside = f"`{stack[-1]}`" if stack and stack[-1] else "the traced module's own forward"
    return f"module `{node.target}`" if node.op == "call_module" else f"`{operation_name(node)}` in {inside}"


def unknown_reason(node: fx.Node) -> str:
    """Why channels are lost in an operation that is not known to pass them on."""
    return f"it goes through {place_of(node)}, which is not known to keep channels apart"


def summed_reason(node: fx.Node) -> str:
    """Why channels are lost in an operation that adds different channels of one value."""
    return f"its channels are summed by {place_of(node)}"


def added_reason(node: fx.Node) -> str:
    """Why channels are lost in an operation on this and another value."""
    return f"it is combined with another value by {place_of(node)}, as in a residual stream"


def is_float(node: fx.Node) -> bool:
    """Whether the result of a node is a tensor of real numbers in floating point."""
    dtype = node_info(node).dtype
    return dtype is not None and dtype.is_floating_point


def call_again(node: fx.Node, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run the operation of a node on another tensor."""
    if isinstance(node.target, str):
        # Ids may lie in memory in another way than the values do, so what is a view of these may be a copy of them.
        name = "reshape" if node.target == "view" else node.target
        return getattr(x, name)(*args, **kwargs)
    return node.target(x, *args, **kwargs)
