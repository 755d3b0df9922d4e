"""A mistake for the fuzzing to find, planted by `-p tests.fuzz.planted`: above rank 2 the last row of `lora_linear` on
the torch path goes without its low-rank term."""

import torch

from fastpeft.ops import _lora_linear_torch as path

_add_product = path.add_product


def forgetful(out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    if len(q) > 2:
        p = p.clone()
        p[-1:] = 0
    return _add_product(out, p, q, scale)


path.add_product = forgetful
