"""What the CUDA tests of the attention ops have in common: problems at larger, odd sizes, and how they are judged."""

import contextlib
import math

import torch

from fastpeft.attention_oracle import GRADIENTS, attention_outcomes, random_attention_problem
from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.oracle import Bounds, compare

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {"batch": 4, "heads": 8, "groups": 4, "queries": 331, "depth": 64, "prefix": 30}
MODIFIERS = [  # which the kernels alone serve
    ("left",),
    ("holes", "packed"),
    ("window",),
    ("pin", "left"),
    ("alibi",),
    ("alibi", "left", "window"),
    ("positions", "left", "window"),
    ("softcap", "window"),
    ("bias", "prefix-bias"),
    ("bias-by-sample",),
    ("sinks", "window"),
    ("bidirectional", "right"),
    ("by-sample", "scale"),
    ("dropout",),
    ("dropout", "softcap", "left", "sinks"),
]
VENDORS = {  # name: torch's switches under which `_vendor_flash` picks it
    "its own choice": {},
    "flash": {"enable_cudnn_sdp": False},
    "efficient": {"enable_cudnn_sdp": False, "enable_flash_sdp": False},
}
VENDOR = Bounds(rms=1.25, row=3)  # flash attention's, as on CPUs; a merged result is rounded once more
SINGLE = Bounds(rms=1.25, peak=4, row=math.inf)  # one draw; the error of a row is that of one or two numbers
SINGLE_VENDOR = Bounds(rms=8, peak=16, row=math.inf, gain=1e-5)  # whose backward has the error of L, as on CPUs
BOUNDS = {"fused": Bounds(), "merge": VENDOR, "concat": VENDOR}
FEW = Bounds(rms=10, peak=10, row=10)  # and so are the gradients of sinks and gates
ONE = Bounds(rms=math.inf, peak=math.inf, row=math.inf)  # the error of one number: its gain judges it


@contextlib.contextmanager
def on(strategy: str | None = None):
    """The Triton backend, by this strategy or its own choice."""
    plan = Plan(strategy, strategy, "forced by a test")
    with backend("triton"), override_plan(plan) if strategy else contextlib.nullcontext():
        yield


def problem_of(*modifiers, dtype="bf16", **sizes):
    return random_attention_problem(modifiers, dtype=DTYPES[dtype], device=DEVICE, **SIZES | sizes)


def assert_right(problem, wanted=None, bounds: Bounds | None = None):
    """Every sample and head is a draw: the error of a row is mostly one number, that of its δ. So is that of a bias's
    gradient even then, where a head counts as one row."""
    bounds = bounds or (SINGLE if problem.query.dtype == torch.float32 else Bounds())
    outcomes = attention_outcomes(problem, problem.present() if wanted is None else wanted)

    def draws(name, tensor):
        heads = tensor.flatten(0, -3) if tensor.ndim > 2 else tensor[None]
        return list(heads.flatten(1) if "bias" in name else heads)

    few = {"dsinks": FEW, "dgate": ONE if problem.gate is not None and problem.gate.numel() == 1 else FEW}
    found = [compare(name, *(draws(name, outcome[name]) for outcome in outcomes)) for name in outcomes[0]]
    faults = [fault for each in found for fault in each.faults(few.get(each.name, bounds))]
    assert not faults, "\n".join([*faults, *map(str, found)])


def leaves_of(problem):
    """query, key, value, prefix_key, prefix_value, and of a gated problem the gate."""
    names = (*GRADIENTS[:5], *(() if problem.gate is None else ("gate",)))
    return [getattr(problem, name).detach().requires_grad_() for name in names]


def results_of(op, leaves, dout, **options):
    """The result and the gradients of all leaves."""
    out = op(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def assert_repeatable(run, strategy: str):
    """Twenty results are the first one, bit for bit."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strategy != "fused")  # the vendor's backward is not so by itself
    try:
        with on(strategy):
            first = run()
            for _ in range(20):
                for index, (one, other) in enumerate(zip(first, run(), strict=True)):
                    assert torch.equal(one, other), ("out", *GRADIENTS[:5], "gate")[index]
    finally:
        torch.use_deterministic_algorithms(deterministic)
