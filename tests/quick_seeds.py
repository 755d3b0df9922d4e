"""torch.manual_seed without what it does for accelerators that are not there: for each kind it keeps the seed and the
whole stack of its caller as text, which takes half a millisecond out of a deep stack."""

import types

import torch


def install() -> None:
    """Where torch sees no accelerator: stacks are empty, seeds are kept as before."""
    if not torch.accelerator.is_available():
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            kind.traceback = types.SimpleNamespace(format_stack=list)
