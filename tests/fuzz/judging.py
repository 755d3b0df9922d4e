"""What must hold of any op on any example: the right numbers up to rounding, shapes and dtypes, and nothing touched.

One small example has a handful of roundings, so it cannot be asked to be as exact as eager's, which may be lucky, as
`fastpeft.oracle` asks of many. Here the bound is that of an error analysis: an element that is a sum of products may
be wrong by ε times the sum of their magnitudes, a few times over, and by the accumulator's ε for each term of its sums.
That is no statistic: it holds for every element of every example, and in float64 leaves room for no mistake.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.fuzz.layouts import Watch

# Roundings of one element besides those in its sums: of intermediate results, of the result, of a scale.
ROUNDINGS = 4.0


def unit(dtype: torch.dtype) -> float:
    """The relative error of a rounding."""
    return torch.finfo(dtype).eps / 2


def step(dtype: torch.dtype) -> float:
    """The absolute one, next to zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The one with the largest rounding."""
    return max(dtypes, key=unit)


def autocast_to(dtype: torch.dtype | None):
    """What autocast to this dtype does on a CPU; None: nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def outcome(function: Callable[..., Tensor], tensors: Mapping[str, Tensor | None], wanted, dout: Tensor) -> dict:
    """{"out": result, "dx": gradient, "dx again": that of a second pass over the graph, ...} of function(**tensors),
    whose tensors share the storages of what is given; where the result does not depend on one, it has no gradient."""
    leaves = {name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    out = function(**leaves)
    wanted = [name for name in leaves if name in wanted]
    if not wanted or not out.requires_grad:
        return {"out": out.detach()}
    asked = [leaves[name] for name in wanted]
    found = {"out": out.detach()}
    for which, keep in (("", True), (" again", False)):
        gradients = torch.autograd.grad(out, asked, dout.to(out.dtype), allow_unused=True, retain_graph=keep)
        pairs = zip(wanted, gradients, strict=True)
        found |= {f"d{name}{which}": gradient for name, gradient in pairs if gradient is not None}
    return found


def in_double(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def magnitudes(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """float64, of which a multilinear op makes the sum of the magnitudes of all products."""
    return {name: None if t is None else t.double().abs() for name, t in tensors.items()}


def tried_on(op, tensors: Mapping[str, Tensor | None], wanted: Sequence[str], dout: Tensor, besides=()) -> dict:
    """`outcome` of the op, which has touched neither its arguments nor what lies around them."""
    given = [t for t in (*tensors.values(), dout, *besides) if t is not None]
    watch = Watch(given)
    got = outcome(op, tensors, wanted, dout)
    watch.assert_untouched()
    for name, t in got.items():
        if name != "out":
            leaf = tensors[name.removesuffix(" again")[1:]]
            assert t.shape == leaf.shape and t.dtype == leaf.dtype, f"{name}: {t.dtype} of shape {tuple(t.shape)}"
    return got


def assert_rounded(
    got: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor],
    dtype: torch.dtype,
    terms: float,
) -> None:  # fmt: skip
    """Every element is the truth's up to rounding. sizes: the magnitudes that were added up, `terms` of them at most;
    dtype: in which intermediate results are kept at the least."""
    assert got.keys() == truth.keys(), f"{sorted(got)} instead of {sorted(truth)}"
    for name, t in got.items():
        assert t.shape == truth[name].shape, f"{name}: shape {tuple(t.shape)} instead of {tuple(truth[name].shape)}"
        if not t.numel():
            continue
        coarse = coarsest(dtype, t.dtype)
        fine = min(torch.float32, coarse, key=unit)  # of accumulators
        relative = ROUNDINGS * unit(coarse) + terms * unit(fine)
        # The steps of fp16 are the larger ones, and bf16 the coarser: of results on the way, and of a leaf at the end.
        tiny = 4 * max(step(coarse), step(dtype)) * max(1.0, terms) + step(t.dtype)
        size = sizes[name.removesuffix(" again")]
        excess = (t.double() - truth[name]).abs() / (relative * size + tiny)
        assert t.isfinite().all(), f"{name}: not finite"
        assert excess.max() <= 1, f"{name}: an error of {float(excess.max()):.3g} times what rounding explains"
