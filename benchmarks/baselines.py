"""What the tables of implementations have in common; an op's own stands in `<op>_peers.py`."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastpeft.cost import Work

from .accuracy import MAX_RMS_RATIO, PEER_RMS_RATIO
from .harness import Call


class Missing(Exception):
    """An implementation cannot be had here; the message says why, and is printed in its place."""


@dataclass(frozen=True)
class Implementation:
    """`build` binds a cell's inputs, or raises `Missing`, as may the call's first run. `compiled` entries cost a
    compilation per cell and run in few cells. `peer`: ours are compared with it. `rms_bound`: how many times eager's
    error it may have. `serves`: whether a cell of these inputs is for it at all. `said`: what there is to say of it in
    such a cell, as which strategy it chose and why. `work(cell, pass)`: what it does, where that is not the cell's."""

    name: str
    label: str
    build: Callable[[Any], Call]
    strategy: str | None = None
    adapter_dtype: torch.dtype | None = None
    compiled: bool = False
    needs_gpu: bool = False
    peer: bool = True
    rms_bound: float = PEER_RMS_RATIO
    serves: Callable[[Any], bool] = lambda inputs: True
    said: Callable[[Any], str] = lambda inputs: ""
    work: Callable[[Any, str], Work] | None = None


def ours(name: str, label: str, build: Callable[[Any], Call], strategy: str = "auto", **others) -> Implementation:
    """One of fastpeft's own: no peer, and bound as fastpeft's tests bind it."""
    return Implementation(name, label, build, strategy, peer=False, rms_bound=MAX_RMS_RATIO, **others)


def in_force(backend: str, strategy: str | None) -> Callable[[], Any]:
    """A context for ours: the backend, and for Triton the strategy. Raises Missing where fastpeft is not to be had."""
    try:
        from fastpeft.dispatch import Plan, override_plan
        from fastpeft.dispatch import backend as chosen_backend
    except ImportError as error:
        raise Missing(f"fastpeft cannot be imported: {error}") from error
    plan = Plan(strategy, strategy, "the benchmark's") if strategy else None

    @contextlib.contextmanager
    def context():
        with chosen_backend(backend), override_plan(plan) if plan else contextlib.nullcontext():
            yield

    return context
