"""`lora_linear` in plain torch: the same steps as the kernels, by hand, so that the CPU is fast too.

Where an operand must be widened (fp32 adapters on half-precision data) or masked (dropout), the rows are taken in
blocks that fit a CPU's cache: no M×K copy and no stored mask, forward or backward.
"""

import functools
import math
from collections.abc import Iterable

import torch
from torch.nn.utils.rnn import pad_sequence

from fastpeft.ops import _cpu_products as cpu

BLOCK_ELEMENTS = 1 << 18  # of an M×K operand, 1 MiB in fp32
MASKED_ELEMENTS = 1 << 20  # where dropout is drawn as well: twelve calls a block, which show if there are many
BLOCKS_AHEAD = 4  # of which all that is dropped is known at once: half a byte for an element at most
DRAWS = 1 << 16


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(M, K) of (..., K)."""
    if x.ndim == 2:
        return x
    if x.ndim > 2 and x.is_contiguous() and (columns := x.shape[-1]):
        return x.view(-1, columns)  # what `flatten` comes to, twice as fast
    return x[None] if x.ndim == 1 else x.flatten(0, -2)


def with_rows(x: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
    """x, or where it is not contiguous its rows, to which torch adds a bias in the step of the product, as of a
    contiguous x, and which nobody copies once more."""
    return x if x.is_contiguous() else x_MK


def draw_seed(x: torch.Tensor) -> torch.Tensor:
    """One int64 from the CPU generator, which checkpointing restores for a recomputation."""
    return torch.empty(1, dtype=torch.int64, device="cpu").random_()


def row_blocks(rows: int, columns: int, masked: bool = False) -> list[slice]:
    """Slices of rows, all but the last of one length: at most BLOCK_ELEMENTS elements each, or MASKED_ELEMENTS."""
    most = max(1, (MASKED_ELEMENTS if masked else BLOCK_ELEMENTS) // max(1, columns))
    step = -(-rows // max(1, -(-rows // most))) or 1
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def taken(tensor: torch.Tensor, block: slice) -> torch.Tensor:
    """These rows; where that is all of them, as most often, the tensor itself, which costs no view."""
    return tensor if block.stop - block.start == len(tensor) else tensor[block]


@functools.lru_cache(maxsize=8)
def gap_table(p: float, device: torch.device) -> torch.Tensor:
    """[65536] integers: from one dropped element to the next, for each of as many equally likely draws. These are the
    middles of the quantiles of the geometric distribution, which honours p to within 2**-16."""
    draws = (torch.arange(DRAWS, dtype=torch.float64, device="cpu") + 0.5) / DRAWS
    gaps = (draws.log_() / math.log1p(-p)).ceil_()
    return gaps.to(torch.int16 if gaps[0] < 2**15 else torch.int64).to(device)


class Dropout:
    """Which elements of consecutive row blocks are dropped, drawn again in the same order in backward.

    Only those that are dropped cost a draw, of 16 bits: the gaps between them are geometric. With `keep` the gaps are
    kept, block by block.
    """

    def __init__(self, seed: torch.Tensor, p: float, device: torch.device, keep: bool = False):
        self.generator = torch.Generator(device).manual_seed(int(seed))
        self.seed, self.p, self.gaps = seed, p, [] if keep else None

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p)

    def next(self, rows: int, columns: int) -> torch.Tensor:
        """The flat places, in order, of the dropped elements of the next [rows, columns] block."""
        size, device = rows * columns, self.generator.device
        # Ten standard deviations above the mean: that the draws do not reach the end has a chance below 1e-20.
        count = math.ceil(size * self.p + 10 * math.sqrt(size * self.p) + 16)
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
        draws = words.random_(-(2**63), None, generator=self.generator).view(torch.uint16)
        gaps = gap_table(self.p, device).index_select(0, draws.to(torch.int32))
        gaps[:1].sub_(1)
        places = _places(gaps)
        dropped = int(torch.searchsorted(places, size))
        if self.gaps is not None:
            self.gaps.append(gaps[:dropped])
        return places[:dropped]


def _places(gaps: torch.Tensor) -> torch.Tensor:
    """The first gap is a place, and 0 repeats one."""
    return gaps.cumsum(0, dtype=torch.int64)


class Given:
    """In the place of `Dropout` what is known already: the flat places by block, as blocks are taken."""

    def __init__(self, places: Iterable[torch.Tensor], p: float):
        self.places, self.p = iter(places), p

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p)

    def next(self, rows: int, columns: int) -> torch.Tensor:
        """As of `Dropout`."""
        return next(self.places)


def given_parts(parts: Iterable[torch.Tensor], p: float) -> Given:
    """Of a mask's parts, in the order of the blocks: True where an element is kept."""
    return Given((part.logical_not().flatten().nonzero().flatten() for part in parts), p)


def given_mask(mask: torch.Tensor, p: float) -> Given:
    """Of a mask [rows, columns]."""
    return given_parts((mask[block] for block in row_blocks(*mask.shape, masked=True)), p)


def keeps(p: float) -> bool:
    """Whether backward is spared the drawing: where that is about an eighth of a byte for an element of x at most, and
    the gaps are of 16 bits."""
    return 2.0**-10 <= p <= 2.0**-4


def keeping(seed: torch.Tensor | None, p: float, device: torch.device) -> torch.Tensor | Dropout | None:
    """For forward in the place of a seed, whose gaps `kept` then has for backward where it `keeps` them."""
    return Dropout(seed, p, device, keep=True) if seed is not None and keeps(p) else seed


def ahead(seed: torch.Tensor, p: float, x: torch.Tensor, keep: bool, known: bool) -> tuple:
    """(what forward takes in the place of the seed, what is drawn before it begins).

    Where the call is `known`, and backward is to `keep` what is dropped of x (..., K), in few blocks, that is the gaps,
    and the places of each block: what follows has then nothing to ask. Else nothing is drawn, and forward does that
    block by block."""
    if not keep:
        return seed, ()
    dropout = keeping(seed, p, x.device)
    if known and isinstance(dropout, Dropout):
        blocks = row_blocks(x.shape[:-1].numel(), x.shape[-1], masked=True)
        if len(blocks) <= BLOCKS_AHEAD:
            places = [dropout.next(block.stop - block.start, x.shape[-1]) for block in blocks]
            if (gaps := kept(dropout)).dtype is torch.int16:
                return None, (gaps, *places)
            return seed, ()
    return dropout, ()


def kept(seed: torch.Tensor | Dropout | None) -> torch.Tensor | None:
    """For backward, of what `keeping` returned: the gaps in int16, a row for each block filled up with zeros, which
    repeat a place; or the seed, where there is no block or one that has dropped nothing."""
    if not isinstance(seed, Dropout):
        return seed
    if len(seed.gaps) == 1:
        return seed.gaps[0][None]
    return pad_sequence(seed.gaps, batch_first=True) if seed.gaps and all(map(len, seed.gaps)) else seed.seed


def drop(block: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Zero these places of a block (contiguous, the caller's own), in place. In a loop of nothing else `scatter_` takes
    two thirds of the time; between a step's large products, where each operation begins with a cold cache, it needs a
    zero to be made first."""
    block.view(-1).index_fill_(0, places, 0.0)
    return block


def dropout_of(seed: torch.Tensor | Dropout | Given | None, p: float, device: torch.device) -> Dropout | Given | None:
    """What is dropped under a seed, or as given, or as `kept`."""
    if not isinstance(seed, torch.Tensor):
        return seed
    return Given(places_of(seed), p) if seed.dtype is torch.int16 else Dropout(seed, p, device)


def places_of(gaps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of gaps as `kept`, by block."""
    return tuple(map(_places, gaps))


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
        return scaled_linear(x, a, scale)
    out = torch.empty(len(x), len(a), dtype=a.dtype, device=x.device)
    for block in row_blocks(*x.shape, masked=dropout is not None):
        part = taken(x, block)
        if dropout is None:
            product(part.to(a.dtype), a.t(), scale, taken(out, block))
        else:
            z = dropped(part, a.dtype, dropout.next(*part.shape))
            scaled_linear(z, a, scale * dropout.scale, taken(out, block))
    return out


def scaled_linear(x: torch.Tensor, a: torch.Tensor, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """scale·x aᵀ [M, R], in half precision rounded once: x [M, K], a [R, K], of one dtype."""
    if not cpu.is_onednns(x, a):
        return product(x, a.t(), scale, out)
    s = cpu.linear(x, a)
    return s if scale == 1 and out is None else torch.mul(s, scale, out=s if out is None else out)


def dropped(block: torch.Tensor, dtype: torch.dtype, places: torch.Tensor) -> torch.Tensor:
    """A copy of the block in `dtype` without the elements at these places."""
    return drop(block.to(dtype, copy=True, memory_format=torch.contiguous_format), places)


def product(p: torch.Tensor, q: torch.Tensor, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """scale·p q [M, N], rounded once: p [M, R], q [R, N]."""
    q, scale = (q, scale) if scale else (q * 0, 1.0)  # BLAS leaves out a product times 0, and its NaN
    if cpu.widens(p, q):
        return cpu.widened(p, q, scale, out)
    if scale == 1:
        return torch.mm(p, q, out=out)
    out = p.new_empty(len(p), q.shape[1]) if out is None else out
    return out.addmm_(p, q, beta=0, alpha=scale)


def add_dropped_product(
    out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, scale: float, places: torch.Tensor
) -> None:
    """`add_product` but at these flat places of `out`, which is contiguous."""
    flat = out.view(-1)
    before = flat.take(places)
    add_product(out, p, q, scale)
    flat.scatter_(0, places, before)


def add_product(out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """out += scale·p q, in place, rounded once: out [M, N], p [M, R], q [R, N]."""
    if not scale:
        q, scale = q * 0, 1.0
    if out.dtype is q.dtype:
        return cpu.add_widened(out, p, q, scale) if cpu.widens(p, q) else out.addmm_(p, q, alpha=scale)
    wide = torch.promote_types(out.dtype, q.dtype)
    q = q.to(wide)
    for block in row_blocks(*out.shape):
        out[block] = torch.addmm(out[block].to(wide), p[block].to(wide), q, alpha=scale)
    return out


def transposed_product(t: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale·tᵀ x [R, K] in t's dtype, rounded once: t [M, R], x [M, K]."""
    if x.dtype is t.dtype and not cpu.widens(x, t):
        return product(x.t(), t, scale).t() if lies_down(t, x.shape[1]) else product(t.t(), x, scale)
    t, scale = (t, scale) if scale else (t * 0, 1.0)
    total = Sum(t, x.shape[1])
    for block in row_blocks(*x.shape):
        total.add(t[block], x[block], scale)
    return total.result()


def lies_down(t: torch.Tensor, columns: int) -> bool:
    """Whether tᵀ x is asked of the vendor as (xᵀ t)ᵀ: in fp32 a third faster for a rank of 16 and wide rows, and for
    ranks below that several times slower."""
    return columns >= 512 and t.shape[1] >= 16 and t.dtype is torch.float32


class Sum:
    """Σ scale·tᵀ x [R, columns] over row blocks, in at least fp32 until it is rounded to t's dtype."""

    def __init__(self, t: torch.Tensor, columns: int):
        self.dtype, self.lies = t.dtype, lies_down(t, columns)
        self.wide = torch.promote_types(t.dtype, torch.float32)
        shape = (columns, t.shape[1]) if self.lies else (t.shape[1], columns)
        self.sum = torch.zeros(shape, dtype=self.wide, device=t.device)

    def add(self, t: torch.Tensor, x: torch.Tensor, scale: float) -> None:
        """t [M, R], x [M, columns]."""
        t, x = t.to(self.wide), x.to(self.wide)
        if self.lies:
            self.sum.addmm_(x.t(), t, alpha=scale)
        else:
            self.sum.addmm_(t.t(), x, alpha=scale)

    def result(self) -> torch.Tensor:
        return (self.sum.t() if self.lies else self.sum).to(self.dtype)


def copied(base: torch.Tensor) -> torch.Tensor:
    """A base product in memory of its own, contiguous whatever it was, as graphs expect it."""
    return base.clone(memory_format=torch.contiguous_format)


def forward(x, weight, bias, residual, a, b, scale, seed, p):
    """(y (..., N) or [M, N], S [M, R]): shapes as in `lora_linear`; `weight` None means y = residual + s·S Bᵀ."""
    x_MK = as_rows(x)
    y = copied(residual) if weight is None else cpu.linear(with_rows(x, x_MK), weight, bias)
    s = shrink(x_MK, a, 1.0, seed if seed is None else dropout_of(seed, p, x.device))
    add_product(as_rows(y), s, b.t(), scale)
    return y, s


def grad_b_and_t(dy, s, b, scale, need_b: bool, need_t: bool):
    """(dB = s·dYᵀ S [N, R] or None, T = s·dY B [M, R] or None)."""
    db = transposed_product(s, dy, scale).t() if need_b else None
    return db, shrink(dy, b.t(), scale) if need_t else None


def base_grad(dy, weight, columns: int) -> torch.Tensor:
    """dY W [M, columns], or zeros where somebody else has the base product."""
    return dy.new_zeros(len(dy), columns) if weight is None else cpu.through(dy, weight)


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
    dx = base_grad(dy, weight, a.shape[1])
    return da, add_product(dx if dx.dtype is dx_dtype else dx.to(dx_dtype), t, a)


def _masked_grads(dy, x, t, weight, a, dropout, dx_dtype: torch.dtype, need_a: bool, need_x: bool):
    """`grad_a_and_x` under dropout: one drawing of the mask serves both."""
    da = Sum(t, a.shape[1]) if need_a else None
    dx = base_grad(dy, weight, a.shape[1]).to(dx_dtype) if need_x else None
    for block in row_blocks(len(t), a.shape[1], masked=True):
        part = taken(t, block)
        places = dropout.next(len(part), a.shape[1])
        if need_a:
            da.add(part, dropped(taken(x, block), t.dtype, places), dropout.scale)
        if need_x:
            add_dropped_product(taken(dx, block), part, a, dropout.scale, places)
    return da.result() if need_a else None, dx
