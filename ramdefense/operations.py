"""Multiply-adds of a tensor function, from the shapes of its arguments and its output.

PyTorch's `FlopCounterMode` counts the same, and pulls in its compiler, seven seconds of import, to do so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def multiply_adds(func: Callable[..., Any], tensors: Sequence[Tensor], output: Any) -> int:
    """Multiply-adds of a convolution, a matrix product or an attention; 0 for what is not known to have many.

    Args:
        func: the function, as `__torch_function__` is told it.
        tensors: its tensor arguments, in their order.
        output: what it returned.
    """
    count = _COUNTS.get(getattr(func, "__name__", ""))
    if count is None or len(tensors) < 2 or not isinstance(output, Tensor):
        return 0
    return count(tensors, output)


def _convolution(tensors: Sequence[Tensor], output: Tensor) -> int:
    return output.numel() * tensors[1][0].numel()


def _transposed_convolution(tensors: Sequence[Tensor], output: Tensor) -> int:
    return tensors[0].numel() * tensors[1][0].numel()


def _product(tensors: Sequence[Tensor], output: Tensor) -> int:
    return output.numel() * tensors[0].shape[-1]


def _attention(tensors: Sequence[Tensor], output: Tensor) -> int:
    queries, keys = tensors[:2]
    return keys.shape[-2] * (queries.numel() + output.numel())


_COUNTS: dict[str, Callable[[Sequence[Tensor], Tensor], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("linear", "matmul", "__matmul__", "bmm", "mm", "mv"), _product),
    "scaled_dot_product_attention": _attention,
    "refined_attention": _attention,  # the operator
}
