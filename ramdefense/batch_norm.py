"""The gradient of batch normalisation for a batch of one image, which PyTorch gets wrong on a CPU.

`torch.nn.functional.batch_norm` returns a wrong gradient there, without a word, when the gradient that comes in is laid
out in another order than the image, as it is behind ``x.flatten(2).transpose(1, 2)``: a transformer's tokens after a
convolutional stem (seen in torch 2.15, float32 and float64, in `eval` and `train`; batches of two or more are right).
An attack on one image would follow it. Laid out in order first, the gradient is right.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def sound_gradients(model: nn.Module, inputs: Tensor) -> AbstractContextManager[Any]:
    """While it is on, batch normalisations of a single image on a CPU have the right gradient.

    Nothing in any other case, nor for a compiled model, which has kernels of its own.
    """
    concerned = len(inputs) == 1 and inputs.device.type == "cpu" and torch.is_grad_enabled()
    compiled = concerned and any(name.endswith("_orig_mod") for name, _ in model.named_modules())
    return _Ordered() if concerned and not compiled else nullcontext()


class _Ordered(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.batch_norm, torch.batch_norm) and isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(_in_order)
        return out


def _in_order(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()
