"""ALiBi's slopes as transformers has them, which every release of it computes and not every one offers."""

import math

import torch


def alibi_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """(heads,) fp32: a geometric sequence that ends at 2^-8, and for a number of heads that is no power of two every
    other member of the next finer one (Press et al., 2022, arXiv 2108.12409, section 3)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = _sequence(power, torch.arange(1, 1 + power, device=device, dtype=torch.int32))
    if heads == power:
        return slopes
    odd = torch.arange(1, 1 + 2 * (heads - power), 2, device=device, dtype=torch.int32)
    return torch.cat((slopes, _sequence(2 * power, odd)))


def _sequence(heads: int, powers: torch.Tensor) -> torch.Tensor:
    base = torch.tensor(2.0 ** (-(2.0 ** (3 - math.log2(heads)))), device=powers.device, dtype=torch.float32)
    return torch.pow(base, powers)
