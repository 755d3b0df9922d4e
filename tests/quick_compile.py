"""torch.compile without what it does for those who measure it: a collection after every graph, and the latency of its
guards out of a cold cache. What it has read of functions is kept for the next graph: torch keeps fewer than are in a
model.

It knows the inside of one version; another is left as it is, slower and no less right."""

import functools

import torch

KNOWN = "2.13."
_shipped = torch.compile


def install() -> None:
    """Before the first call: what compiles is not imported for tests that compile nothing."""
    torch.compile = _first


@functools.wraps(_shipped)
def _first(*args, **kwargs):
    from torch._dynamo import bytecode_transformation, config, guards

    torch.compile = _shipped
    if torch.__version__.startswith(KNOWN):
        config.run_gc_after_compile = False
        guards.profile_guard_manager = lambda *args: 0.0
        instructions = bytecode_transformation._cached_cleaned_instructions.__wrapped__
        bytecode_transformation._cached_cleaned_instructions = functools.lru_cache(maxsize=4096)(instructions)
    return torch.compile(*args, **kwargs)
