"""What must hold of any op on any example: the right numbers up to rounding, shapes and dtypes, and nothing touched.

One small example has a handful of roundings, so it cannot be asked to be as exact as eager's, which may be lucky, as
`fastpeft.oracle` asks of many. Here the bound is that of an error analysis: an element that is a sum of products may
be wrong by ε times the sum of their magnitudes, a few times over, and by the accumulator's ε for each term of its sums.
That is no statistic: it holds for every element of every example, and in float64 leaves room for no mistake.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

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


def outcome(function: Callable[..., Tensor | Sequence[Tensor]], tensors: Mapping[str, Tensor | None], wanted, dout):
    """{"out": result, "dx": gradient, "dx again": that of a second pass over the graph, ...} of function(**tensors),
    whose tensors share the storages of what is given; where the result does not depend on one, it has no gradient.

    Several results are "out0", "out1" and so on; dout has a gradient for each, or None where nothing uses it."""
    leaves = {name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    out = function(**leaves)
    named = {"out": out} if isinstance(out, Tensor) else {f"out{i}": each for i, each in enumerate(out)}
    found = {name: each.detach() for name, each in named.items()}
    pairs = zip(named.values(), [dout] if isinstance(dout, Tensor) else dout, strict=True)
    used = [(each, grad.to(each.dtype)) for each, grad in pairs if grad is not None and each.requires_grad]
    wanted = [name for name in leaves if name in wanted]
    if not wanted or not used:
        return found
    asked, (ends, grads) = [leaves[name] for name in wanted], zip(*used, strict=True)
    for which, keep in (("", True), (" again", False)):
        gradients = torch.autograd.grad(ends, asked, grads, allow_unused=True, retain_graph=keep)
        pairs = zip(wanted, gradients, strict=True)
        found |= {f"d{name}{which}": gradient for name, gradient in pairs if gradient is not None}
    return found


def in_double(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def magnitudes(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """float64, of which a multilinear op makes the sum of the magnitudes of all products."""
    return {name: None if t is None else t.double().abs() for name, t in tensors.items()}


def tried_on(op, tensors: Mapping[str, Tensor | None], wanted: Sequence[str], dout, besides=()) -> dict:
    """`outcome` of the op, which has touched neither its arguments nor what lies around them."""
    grads = [dout] if isinstance(dout, Tensor) else dout
    watch = Watch([t for t in (*tensors.values(), *grads, *besides) if t is not None])
    got = outcome(op, tensors, wanted, dout)
    watch.assert_untouched()
    for name, t in got.items():
        if name[0] == "d":
            leaf = tensors[name.removesuffix(" again")[1:]]
            assert t.shape == leaf.shape and t.dtype == leaf.dtype, f"{name}: {t.dtype} of shape {tuple(t.shape)}"
    return got


def tried_twice(op, tensors: Mapping[str, Tensor | None], wanted: Sequence[str], dout, seed: int, besides=()) -> dict:
    """`tried_on` under this seed of torch's generator, and once more for the same bits."""
    torch.manual_seed(seed)
    first = tried_on(op, tensors, wanted, dout, besides)
    torch.manual_seed(seed)
    second = tried_on(op, tensors, wanted, dout, besides)
    assert first.keys() == second.keys()
    for name, each in first.items():
        same = torch.equal(*(t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in
            (each, second[name])))  # fmt: skip
        assert same, f"{name}: other bits under the same seed"
    return first


def assert_rounded(
    got: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor],
    dtype: torch.dtype,
    terms: float,
    parts: Mapping[str, int] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Every element is the truth's up to rounding. sizes: the magnitudes that were added up, `terms` of them at most;
    dtype: in which intermediate results are kept at the least; parts: of those that are made of several sums how many,
    each of two terms at most that are added in place with a rounding: a gradient of x that several projections share.
    """
    assert got.keys() == truth.keys(), f"{sorted(got)} instead of {sorted(truth)}"
    for name, t in got.items():
        assert t.shape == truth[name].shape, f"{name}: shape {tuple(t.shape)} instead of {tuple(truth[name].shape)}"
        if not t.numel():
            continue
        coarse = coarsest(dtype, t.dtype)
        fine = min(torch.float32, coarse, key=unit)  # of accumulators
        count = parts.get(name.removesuffix(" again"), 1)
        relative = (ROUNDINGS + 2 * (count - 1)) * unit(coarse) + count * terms * unit(fine)
        # The steps of fp16 are the larger ones, and bf16 the coarser: of results on the way, and of a leaf at the end.
        tiny = 4 * max(step(coarse), step(dtype)) * max(1.0, terms) + step(t.dtype)
        size = sizes[name.removesuffix(" again")]
        excess = (t.double() - truth[name]).abs() / (relative * size + tiny)
        assert t.isfinite().all(), f"{name}: not finite"
        assert excess.max() <= 1, f"{name}: an error of {float(excess.max()):.3g} times what rounding explains"
