"""`lora_linear` in plain torch: the same steps as the kernels, by hand, so that the CPU is fast too.

Where an operand must be widened (fp32 adapters on half-precision data) or masked (dropout), the rows are taken in
blocks that fit a CPU's cache: no M×K copy and no stored mask, forward or backward.
"""

import math
from collections.abc import Iterable

import torch

BLOCK_ELEMENTS = 1 << 18  # of an M×K operand, 1 MiB in fp32
MASKED_ELEMENTS = 1 << 20  # where dropout is drawn as well: twelve calls a block, which show if there are many


def draw_seed(x: torch.Tensor) -> torch.Tensor:
    """One int64 from the CPU generator, which checkpointing restores for a recomputation."""
    return torch.empty(1, dtype=torch.int64).random_()


def row_blocks(rows: int, columns: int, masked: bool = False) -> list[slice]:
    """Slices of rows, each of about BLOCK_ELEMENTS elements, or MASKED_ELEMENTS."""
    step = max(1, (MASKED_ELEMENTS if masked else BLOCK_ELEMENTS) // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class Dropout:
    """Which elements of consecutive row blocks are dropped, drawn again in the same order in backward.

    The gaps between dropped elements are geometric, so only the few that are dropped cost a draw: at p = 0.05 a
    quarter of the time of one draw an element, and the probability is p itself.
    """

    def __init__(self, seed: torch.Tensor, p: float, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(int(seed))
        self.p = p
        self.one = torch.ones((), device=self.generator.device)

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p)

    def next(self, rows: int, columns: int) -> torch.Tensor:
        """The flat places, in order, of the dropped elements of the next [rows, columns] block."""
        size = rows * columns
        # Ten standard deviations above the mean: that the draws do not reach the end has a chance below 1e-20.
        count = math.ceil(size * self.p + 10 * math.sqrt(size * self.p) + 16)
        draws = torch.empty(count, device=self.generator.device).uniform_(2.0**-25, 1.0, generator=self.generator)
        gaps = torch.add(self.one, draws.log_(), alpha=1 / math.log1p(-self.p)).to(torch.int64)
        gaps[0] -= 1
        places = gaps.cumsum_(0)
        return places[: int(torch.searchsorted(places, size))]


class Given:
    """In the place of `Dropout` a mask that somebody else has drawn: True where an element is kept, in parts, as blocks
    are taken."""

    def __init__(self, parts: Iterable[torch.Tensor], p: float):
        self.parts, self.p = iter(parts), p

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p)

    def next(self, rows: int, columns: int) -> torch.Tensor:
        """As of `Dropout`."""
        return next(self.parts).logical_not().flatten().nonzero().flatten()


def given_mask(mask: torch.Tensor, p: float) -> Given:
    """Of a mask [rows, columns]."""
    return Given((mask[block] for block in row_blocks(*mask.shape, masked=True)), p)


def drop(block: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Zero these places of a block (contiguous, the caller's own), in place."""
    block.view(-1).index_fill_(0, places, 0)
    return block


def dropout_of(seed: torch.Tensor | Given | None, p: float, device: torch.device) -> Dropout | Given | None:
    """What is dropped under a seed, or as given."""
    return seed if seed is None or isinstance(seed, Given) else Dropout(seed, p, device)


def keep_mask(seed: torch.Tensor, p: float, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """[rows, columns] booleans: the whole mask that forward and backward draw block by block."""
    dropout = Dropout(seed, p, device)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=device)
    for block in row_blocks(rows, columns, masked=True):
        drop(mask[block], dropout.next(*mask[block].shape))
    return mask


def shrink(x: torch.Tensor, a: torch.Tensor, scale: float, dropout: Dropout | Given | None = None) -> torch.Tensor:
    """scale·drop(x) aᵀ [M, R] in a's dtype, rounded once: x [M, K], a [R, K]."""
    if dropout is None and x.dtype == a.dtype:
        return product(x, a.t(), scale)
    out = torch.empty(len(x), len(a), dtype=a.dtype, device=x.device)
    for block in row_blocks(*x.shape, masked=dropout is not None):
        if dropout is None:
            product(x[block].to(a.dtype), a.t(), scale, out[block])
        else:
            z = dropped(x[block], a.dtype, dropout.next(*x[block].shape))
            product(z, a.t(), scale * dropout.scale, out[block])
    return out


def dropped(block: torch.Tensor, dtype: torch.dtype, places: torch.Tensor) -> torch.Tensor:
    """A copy of the block in `dtype` without the elements at these places."""
    return drop(block.to(dtype, copy=True, memory_format=torch.contiguous_format), places)


def _factors(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """(q, scale), or of the same product what does not leave out its NaN, as BLAS does with a product times 0."""
    return (q, scale) if scale else (q * 0, 1.0)


def product(p: torch.Tensor, q: torch.Tensor, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """scale·p q [M, N], rounded once: p [M, R], q [R, N]."""
    q, scale = _factors(q, scale)
    return torch.addmm(p.new_zeros(1), p, q, beta=0, alpha=scale, out=out)


def drop_product(out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, scale: float, places: torch.Tensor) -> None:
    """out = scale·p q, in place, with zeros at these places: out [M, N] contiguous, p [M, R], q [R, N]."""
    if out.dtype == q.dtype:
        product(p, q, scale, out)
    else:
        out.copy_(product(p, q, scale))
    drop(out, places)


def add_product(out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """out += scale·p q, in place, rounded once: out [M, N], p [M, R], q [R, N]."""
    q, scale = _factors(q, scale)
    if out.dtype == q.dtype:
        return out.addmm_(p, q, alpha=scale)
    wide = torch.promote_types(out.dtype, q.dtype)
    q = q.to(wide)
    for block in row_blocks(*out.shape):
        out[block] = torch.addmm(out[block].to(wide), p[block].to(wide), q, alpha=scale)
    return out


def transposed_product(t: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale·tᵀ x [R, K] in t's dtype, rounded once: t [M, R], x [M, K]."""
    if x.dtype == t.dtype:
        return product(t.t(), x, scale)
    t, scale = _factors(t, scale)
    out = torch.zeros(t.shape[1], x.shape[1], dtype=t.dtype, device=x.device)
    for block in row_blocks(*x.shape):
        out.addmm_(t[block].t(), x[block].to(t.dtype), alpha=scale)
    return out


def forward(x, weight, bias, residual, a, b, scale, seed, p):
    """(y [M, N], S [M, R]): shapes as in `lora_linear`, flattened; `weight` None means y = residual + s·S Bᵀ."""
    y = residual.clone() if weight is None else torch.nn.functional.linear(x, weight, bias)
    s = shrink(x, a, 1.0, dropout_of(seed, p, x.device))
    return add_product(y, s, b.t(), scale), s


def grad_b_and_t(dy, s, b, scale, need_b: bool, need_t: bool):
    """(dB = s·dYᵀ S [N, R] or None, T = s·dY B [M, R] or None)."""
    db = transposed_product(s, dy, scale).t() if need_b else None
    return db, shrink(dy, b.t(), scale) if need_t else None


def grad_a_and_x(dy, x, t, weight, a, seed, p, dx_dtype: torch.dtype, need_a: bool, need_x: bool):
    """(dA = Tᵀ drop(x) [R, K] or None, dX = dY W + mask⊙(T A) [M, K] in `dx_dtype` or None); without `weight`, only
    the last term."""
    if not (need_a or need_x):
        return None, None
    if seed is not None:
        return _masked_grads(dy, x, t, weight, a, dropout_of(seed, p, dy.device), dx_dtype, need_a, need_x)
    da = transposed_product(t, x) if need_a else None
    if not need_x:
        return da, None
    dx = torch.zeros(len(t), a.shape[1], dtype=dy.dtype, device=dy.device) if weight is None else dy @ weight
    dx = dx.to(dx_dtype)
    return da, add_product(dx, t, a)


def _masked_grads(dy, x, t, weight, a, dropout: Dropout, dx_dtype: torch.dtype, need_a: bool, need_x: bool):
    """`grad_a_and_x` under dropout: one drawing of the mask serves both, and the masked term is written first, for the
    base product to accumulate onto."""
    da = torch.zeros_like(a, dtype=t.dtype) if need_a else None
    dx = torch.empty(len(t), a.shape[1], dtype=dx_dtype, device=dy.device) if need_x else None
    for block in row_blocks(len(t), a.shape[1], masked=True):
        places = dropout.next(len(t[block]), a.shape[1])
        if need_a:
            da.addmm_(t[block].t(), dropped(x[block], t.dtype, places), alpha=dropout.scale)
        if need_x:
            drop_product(dx[block], t[block], a, dropout.scale, places)
    if weight is None or dx is None:
        return da, dx
    return da, dx.addmm_(dy, weight) if dx.dtype == dy.dtype else dx.add_(dy @ weight)
