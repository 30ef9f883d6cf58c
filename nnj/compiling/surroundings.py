"""What torch's operators depend on beside their arguments, and where nothing can be replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as torch_module

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def surroundings() -> tuple[Any, ...]:
    """What torch's operators depend on beside their arguments."""
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        *(torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k) for k in kinds),
        torch.backends.cudnn.allow_tf32,
    )


def unusual() -> str | None:
    """Why nothing can be traced or replayed here and now; None if it can."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return "there are no gradients here (torch.no_grad or inference_mode)"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it is called inside a transform of torch.func"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "it is called inside a mode of torch"
    if any(_GLOBAL_HOOKS):
        return "there are hooks on all modules of torch"
    return None
