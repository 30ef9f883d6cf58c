"""What torch is set to, and where nothing can be replayed."""

from __future__ import annotations

import torch
from torch import nn

from nnj.compiling.surroundings import surroundings, unusual


def test_surroundings_and_what_is_unusual():
    before = surroundings()
    with torch.autocast("cpu"):
        assert surroundings() != before
    with torch.no_grad():
        assert "gradients" in unusual()
    assert unusual() is None
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert "hooks" in unusual()
    handle.remove()
    with torch.overrides.TorchFunctionMode():
        assert "mode" in unusual()
