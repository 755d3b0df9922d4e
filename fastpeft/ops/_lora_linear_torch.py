"""`lora_linear` in plain torch: the same steps as the kernels, by hand, so that the CPU is fast too.

Where an operand must be widened (fp32 adapters on half-precision data) or masked (dropout), the rows are taken in
blocks that fit a CPU's cache: no M×K copy and no stored mask, forward or backward.
"""

import torch

BLOCK_ELEMENTS = 1 << 18  # of an M×K operand, 1 MiB in fp32
LEVELS = 65536  # dropout draws are 16 bits wide, as in the kernels; the kept values are scaled by the exact inverse


def draw_seed(x: torch.Tensor) -> torch.Tensor:
    """One int64 from the CPU generator, which checkpointing restores for a recomputation."""
    return torch.empty(1, dtype=torch.int64).random_()


def keep_scale(p: float) -> float:
    """The exact inverse of the probability that a draw is kept."""
    return LEVELS / (LEVELS - min(round(p * LEVELS), LEVELS - 1))


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices of rows, each of about BLOCK_ELEMENTS elements and of a multiple of four."""
    step = max(4, BLOCK_ELEMENTS // max(1, columns) // 4 * 4)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class Masks:
    """The masks of consecutive row blocks, drawn again in the same order in backward."""

    def __init__(self, seed: torch.Tensor, p: float, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(int(seed))
        self.lowest_kept = min(round(p * LEVELS), LEVELS - 1) - LEVELS // 2
        self.device = device

    def next(self, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] booleans, True where dropout keeps."""
        words = torch.empty((rows * columns + 3) // 4, dtype=torch.int64, device=self.device)
        draws = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)
        return draws[: rows * columns].view(rows, columns) >= self.lowest_kept


def keep_mask(seed: torch.Tensor, p: float, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """[rows, columns] booleans: the whole mask that forward and backward draw block by block."""
    masks = Masks(seed, p, device)
    blocks = row_blocks(rows, columns)
    drawn = [masks.next(block.stop - block.start, columns) for block in blocks]
    return torch.cat(drawn) if drawn else torch.empty(0, columns, dtype=torch.bool, device=device)


def _dropped(x: torch.Tensor, masks: Masks | None) -> torch.Tensor:
    return x if masks is None else torch.where(masks.next(*x.shape), x, 0)


def _masks(seed: torch.Tensor | None, p: float, x: torch.Tensor) -> Masks | None:
    return None if seed is None else Masks(seed, p, x.device)


def shrink(x: torch.Tensor, a: torch.Tensor, scale: float, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """scale·drop(x) aᵀ [M, R] in a's dtype: x [M, K], a [R, K]."""
    if seed is None and x.dtype == a.dtype:
        return (x @ a.t()).mul_(scale)
    masks = _masks(seed, p, x)
    out = torch.empty(len(x), len(a), dtype=a.dtype, device=x.device)
    for block in row_blocks(*x.shape):
        torch.mm(_dropped(x[block], masks).to(a.dtype), a.t(), out=out[block])
    return out.mul_(scale if seed is None else scale * keep_scale(p))


def add_product(
    out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, seed: torch.Tensor | None = None, probability: float = 0.0
) -> torch.Tensor:
    """out += mask⊙(p q), in place, rounded once: out [M, N], p [M, R], q [R, N]."""
    if seed is None and out.dtype == q.dtype:
        return out.addmm_(p, q)
    masks = _masks(seed, probability, out)
    for block in row_blocks(*out.shape):
        if masks is None:
            term = torch.addmm(out[block].to(q.dtype), p[block], q)
            out[block] = term
        else:
            term = (p[block] @ q).mul_(keep_scale(probability))
            out[block] += torch.where(masks.next(*out[block].shape), term, 0)
    return out


def transposed_product(
    t: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None = None, p: float = 0.0
) -> torch.Tensor:
    """tᵀ drop(x) [R, K] in t's dtype: t [M, R], x [M, K]."""
    if seed is None and x.dtype == t.dtype:
        return t.t() @ x
    masks = _masks(seed, p, x)
    out = torch.zeros(t.shape[1], x.shape[1], dtype=t.dtype, device=x.device)
    for block in row_blocks(*x.shape):
        out.addmm_(t[block].t(), _dropped(x[block], masks).to(t.dtype))
    return out if seed is None else out.mul_(keep_scale(p))


def forward(x, weight, bias, residual, a, b, scale, seed, p):
    """(y [M, N], S [M, R]): shapes as in `lora_linear`, flattened; `weight` None means y = residual + S Bᵀ."""
    y = residual.clone() if weight is None else torch.nn.functional.linear(x, weight, bias)
    s = shrink(x, a, scale, seed, p)
    return add_product(y, s, b.t()), s


def grad_b_and_t(dy, s, b, scale, need_b: bool, need_t: bool):
    """(dB = dYᵀ S [N, R] or None, T = s·dY B [M, R] or None)."""
    db = transposed_product(s, dy).t() if need_b else None
    return db, shrink(dy, b.t(), scale, None, 0.0) if need_t else None


def grad_a_and_x(dy, x, t, weight, a, seed, p, need_a: bool, need_x: bool):
    """(dA = Tᵀ drop(x) [R, K] or None, dX = dY W + mask⊙(T A) [M, K] or None); without `weight`, only the last term."""
    da = transposed_product(t, x, seed, p) if need_a else None
    if not need_x:
        return da, None
    dx = torch.zeros(len(t), a.shape[1], dtype=dy.dtype, device=dy.device) if weight is None else dy @ weight
    return da, add_product(dx, t, a, seed, p)
