"""What the tests of the attention ops' torch path have in common: paths, problems, and how a result is judged."""

import contextlib
from unittest import mock

import torch

from fastpeft.attention_oracle import GRADIENTS, attention_differences, attention_outcomes, random_attention_problem
from fastpeft.dispatch import backend
from fastpeft.ops import _prefix_attention_blocks as blocks
from fastpeft.ops import _prefix_attention_flash as flash
from fastpeft.oracle import Bounds

FIVE = GRADIENTS[:5]
ONLY_IN_BLOCKS = {"softcap", "dropout"}

# CPU flash attention is as exact as scaled_dot_product_attention, which is the same code: in half precision within the
# yardstick of the materialised form but for rms, 1.25 (gradients of keys are added up in half); in fp32 at 1.2 to 1.5
# times its error, because weights are made from an L that is rounded to fp32. There the measure is SDPA on HF's
# concatenated keys, and 1.25 since the merged L is rounded once more.
FLASH = Bounds(rms=1.25)


@contextlib.contextmanager
def path(name: str):
    """The torch backend, where "flash" serves what it can, and "blocks" everything."""
    never = mock.patch.object(flash, "serves_forward", lambda *_: False)
    with backend("torch"), never if name == "blocks" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def small_blocks():
    """Blocks of a few rows, so that small problems are made of several, with a rest."""
    patches = [(blocks, "BLOCK_ELEMENTS", 700), (flash, "MASK_ROWS", 7), (flash, "WIDE_BYTES", 3000)]
    with contextlib.ExitStack() as stack:
        for module, name, size in patches:
            stack.enter_context(mock.patch.object(module, name, size))
        yield


def draws(modifiers=(), count=1, **options):
    return [random_attention_problem(modifiers, seed=seed, **options) for seed in range(count)]


def assert_right(problems, bounds: Bounds = Bounds(), wanted=None, eager=None) -> None:  # noqa: B008 (frozen)
    """Result and gradients obey the yardstick on the path in force."""
    differences = attention_differences(problems, wanted, eager)
    faults = [fault for difference in differences for fault in difference.faults(bounds)]
    assert not faults, "\n".join([*faults, *map(str, differences)])


def assert_exact(problem, wanted=None, tolerance: float = 1e-12) -> dict:
    """Of an fp64 problem: result and gradients are the reference's up to rounding, so that no formula, mask or sum is
    off by anything. Returns them."""
    assert problem.query.dtype == torch.float64
    got, expected, _ = attention_outcomes(problem, problem.present() if wanted is None else wanted)
    for name, t in expected.items():
        assert got[name].shape == t.shape and got[name].dtype == t.dtype, name
        error = (got[name] - t).abs().max() if t.numel() else 0.0
        assert error <= tolerance * max(1.0, t.abs().max() if t.numel() else 0.0), f"{name}: {error}"
    return got
