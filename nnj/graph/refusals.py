"""What of torch's own machinery hides the layers, the parameters or the numbers of a model, and is
refused by its name before a node is called.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from nnj.errors import Coupled, NNJError
from nnj.graph.traverse import children, reachable
from nnj.recording.scope import modules_of
from nnj.recording.tensor_parallel import is_passage, may_be_part
from nnj.recording.wrappers import check_not_flat, flat_error


def refuse_node(node: Any) -> None:
    """Errors: `NNJError` for functions in Python of torch, in whose nodes layers cannot be told
    apart, or that are run with side effects.
    """
    name = node.name()
    if not name.endswith("Backward"):
        return  # of torch in C++
    module = getattr(type(node), "_forward_cls", type(node)).__module__
    if not module.startswith("torch."):
        return  # a function of somebody else that has the same name
    if "CompiledFunction" in name:
        raise NNJError(
            "the model runs under torch.compile, which leaves no calls of layers in the graph. "
            "Collect with the model that was given to torch.compile (model._orig_mod)"
        )
    if "CheckpointFunctionBackward" in name:
        raise NNJError(
            "torch.utils.checkpoint runs with use_reentrant=True, whose backward is a backward "
            "pass of its own and adds to .grad. Use use_reentrant=False"
        )
    if module == "torch.nn.parallel._functions":
        raise NNJError(
            "the model runs under torch.nn.DataParallel on several devices, where the layers are "
            "copies that are thrown away. Use one device (device_ids=[0]), or "
            "DistributedDataParallel"
        )
    if is_passage(node):
        raise NNJError(
            "a DTensor goes in or out where nnj takes none: it takes linear layers under "
            "ColwiseParallel and RowwiseParallel between plain tensors (as they are by default: a "
            "whole input and a part of the output, or a part of the input and a whole output). "
            "Distribute these, and leave other layers whole on all ranks"
        )
    if name.startswith("SyncBatchNorm"):
        raise Coupled.at("SyncBatchNorm")
    if module.startswith("torch.distributed.fsdp"):
        raise flat_error("the model")


def refuse_model(module: nn.Module, parallel: bool = False) -> None:
    """Errors: `NNJError` for a model that is sharded or distributed, and not whole now.

    Args:
        parallel: whether layers may be distributed by tensor parallelism.
    """
    parts = modules_of(module)
    check_not_flat(parts)
    for part in parts:
        for p in part._parameters.values() if part._parameters else ():
            if p is not None:
                refuse_leaf(p, parallel and (may_be_part(part) or not p.requires_grad))


def refuse_leaf(leaf: Tensor, parallel: bool = False) -> None:
    """Errors: `NNJError` for what holds a part of a parameter, or many of them.

    Args:
        parallel: whether it may be a DTensor.
    """
    own = leaf.__dict__
    if "_is_flat_param" in own or "_fsdp_flattened" in own:
        raise flat_error("the model")
    if "_mp_param" in own:
        raise NNJError(
            "the model is under DistributedDataParallel with mixed_precision=, which puts other "
            "data into its parameters for a while. Use torch.autocast"
        )
    if not parallel and type(leaf).__module__.startswith("torch.distributed.tensor"):
        raise NNJError(
            "a parameter is a DTensor, of which each process has a part, and takes part where nnj "
            "takes none: it collects at linear layers under ColwiseParallel and RowwiseParallel, "
            "and in models that fully_shard shards. Distribute others on one process, or under "
            "DistributedDataParallel"
        )


def refuse_tensor(nested: bool, device: torch.device) -> None:
    """Errors: `NNJError` for a tensor that has no numbers, or no shape."""
    if nested:
        raise NNJError(
            "the model computes with nested tensors, which have no axis of samples of one shape. "
            "Give it padded tensors with a mask (torch.nested.to_padded_tensor), or one sample at "
            "a time"
        )
    if device.type == "meta":
        raise NNJError(
            "the model is on the device 'meta', where tensors have no numbers. Give it some first "
            "(model.to_empty(device=...), and a state dict)"
        )


IN_COMPILED = (
    "nnj cannot work in or through what torch.compile has compiled. Compile neither the loss nor "
    "the step around the backward pass, at least for the passes that collect"
)


def refuse_compiled_step(who: str) -> None:
    """Errors: `NNJError` where torch.compile would compile what runs now. What it makes of nnj may
    write wrong things into tables of nnj, for good (of torch 2.15 into sets of weak references).
    """
    if callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):
        raise NNJError(f"{who}: {IN_COMPILED}")


def under_compile(error: Exception, loss: Any, ends: Container[Any]) -> bool:
    """Whether torch.compile is what an error comes from: it was about to compile what runs, or has
    compiled a loss.

    Args:
        loss: autograd's node of the loss.
        ends: the nodes of its arguments.
    """
    if type(error).__module__.startswith("torch._dynamo"):
        return True
    above: Callable[[Any], list[Any]] = lambda n: [] if n in ends else children(n)
    return any("CompiledFunction" in node.name() for node in reachable([loss], above))
