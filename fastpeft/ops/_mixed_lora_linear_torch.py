"""`mixed_lora_linear` in plain torch: adapter by adapter, each on the rows of its samples, by `lora_linear`'s steps.

Rows that lie together are a view and are written in place; others are gathered and scattered once. The segments of S
and T are kept one behind the other, as the kernels keep them.
"""

import torch

from fastpeft.ops import _cpu_products as cpu
from fastpeft.ops._lora_linear_torch import (
    Dropout,
    Given,
    Sum,
    add_dropped_product,
    add_product,
    copied,
    drop,
    dropped,
    given_mask,
    row_blocks,
    shrink,
    transposed_product,
)


def draw_seeds(x: torch.Tensor, adapters: int) -> torch.Tensor:
    """One int64 for each adapter from the CPU generator, which checkpointing restores for a recomputation."""
    return torch.empty(adapters, dtype=torch.int64, device="cpu").random_()


class Rows:
    """The rows of some samples of [M, columns] tensors, `tokens` for each sample."""

    def __init__(self, samples: tuple[int, ...], tokens: int, device: torch.device):
        together = samples[-1] - samples[0] + 1 == len(samples)  # they are in order
        self.slice = slice(samples[0] * tokens, (samples[-1] + 1) * tokens) if together else None
        self.places = None if together else _places(samples, tokens, device)

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """A view, or a copy."""
        return t[self.slice] if self.places is None else t.index_select(0, self.places)

    def put(self, t: torch.Tensor, rows: torch.Tensor) -> None:
        """Back into t what `of` has given and was written into."""
        if self.places is not None:
            t.index_copy_(0, self.places, rows)


def _places(samples: tuple[int, ...], tokens: int, device: torch.device) -> torch.Tensor:
    first = torch.tensor(samples, device=device) * tokens
    return (first[:, None] + torch.arange(tokens, device=device)).flatten()


def given_masks(mask: torch.Tensor, samples: tuple[tuple[int, ...], ...], tokens: int, dropouts) -> list[Given | None]:
    """Of a mask [M, K] what each adapter drops, in the place of the seeds."""
    own = [Rows(each, tokens, mask.device).of(mask) for each in samples]
    return [given_mask(part, p) if p else None for part, p in zip(own, dropouts, strict=True)]


def _dropouts(seeds, dropouts: tuple[float, ...], device: torch.device) -> list[Dropout | Given | None]:
    """Of each adapter what it drops, in the order of its own rows."""
    if isinstance(seeds, list):
        return seeds
    return [
        None if seeds is None or not p else Dropout(seed, p, device)
        for seed, p in zip([None] * len(dropouts) if seeds is None else seeds.tolist(), dropouts, strict=True)
    ]


def keep_mask(
    seeds: torch.Tensor, samples: tuple[tuple[int, ...], ...], tokens: int, dropouts: tuple[float, ...],
    shape: tuple[int, int], device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """[M, K] booleans, the whole mask; True in rows of no adapter."""
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    for each, dropout in zip(samples, _dropouts(seeds, dropouts, device), strict=True):
        rows = Rows(each, tokens, device)
        own = torch.ones_like(rows.of(mask))
        if dropout is not None:
            for block in row_blocks(*own.shape, masked=True):
                drop(own[block], dropout.next(*own[block].shape))
        mask[torch.arange(len(mask), device=device)[rows.slice] if rows.places is None else rows.places] = own
    return mask


def _segments(t: torch.Tensor, samples, tokens: int, ranks) -> list[torch.Tensor]:
    """The (rows, r) matrices that lie one behind the other in t."""
    counts = [len(each) * tokens for each in samples]
    parts = t.split([count * rank for count, rank in zip(counts, ranks, strict=True)])
    return [part.view(count, rank) for part, count, rank in zip(parts, counts, ranks, strict=True)]


def forward(x, weight, bias, residual, a, b, seeds, call):
    """(y [M, N], S [elements]): a, b the adapters' matrices, (r, K) and (N, r); `weight` None means y = residual + the
    low-rank terms."""
    y = copied(residual) if weight is None else cpu.linear(x, weight, bias)
    s = [a[0].new_empty(0)] if a else [x.new_empty(0)]
    for i, dropout in enumerate(_dropouts(seeds, call.dropouts, x.device)):
        rows = Rows(call.samples[i], call.tokens, x.device)
        s.append(shrink(rows.of(x), a[i], 1.0, dropout))
        own = rows.of(y)
        rows.put(y, add_product(own, s[-1], b[i].t(), call.scalings[i]))
        s[-1] = s[-1].flatten()
    return y, torch.cat(s)


def grad_b_and_t(dy, s, b, call, need_b: bool, need_t: bool):
    """(dB [N, r] of each adapter, T [elements]), each None where not wanted."""
    db, t = [], [dy.new_empty(0, dtype=b[0].dtype)]
    shrunk = _segments(s, call.samples, call.tokens, call.ranks) if need_b else [None] * len(b)
    for i, s_i in enumerate(shrunk):
        own = Rows(call.samples[i], call.tokens, dy.device).of(dy)
        if need_b:
            db.append(transposed_product(s_i, own, call.scalings[i]).t())
        if need_t:
            t.append(shrink(own, b[i].t(), call.scalings[i]).flatten())
    return db if need_b else None, torch.cat(t) if need_t else None


def grad_a_and_x(dy, x, t, weight, a, seeds, call, need_a: bool, need_x: bool):
    """(dA [r, K] of each adapter, dX [M, K] in `call.dx_dtype`), each None where not wanted: dA = Tᵀ drop(x), dX = dY W
    + mask⊙(T A)/(1 - p); without `weight`, only the last term."""
    da, dx = [], None
    if need_x:
        dx = dy.new_zeros(len(dy), a[0].shape[1]) if weight is None else cpu.through(dy, weight)
        dx = dx.to(call.dx_dtype)
    parts = _segments(t, call.samples, call.tokens, call.ranks)
    for i, dropout in enumerate(_dropouts(seeds, call.dropouts, dy.device)):
        rows = Rows(call.samples[i], call.tokens, dy.device)
        x_i, dx_i = rows.of(x) if need_a else None, rows.of(dx) if need_x else None
        if dropout is not None:
            da_i = _masked_grads(x_i, dx_i, parts[i], a[i], dropout)
        else:
            da_i = transposed_product(parts[i], x_i) if need_a else None
            if need_x:
                add_product(dx_i, parts[i], a[i])
        da.append(da_i)
        if need_x:
            rows.put(dx, dx_i)
    return da if need_a else None, dx


def _masked_grads(x, dx, t, a, dropout: Dropout):
    """dA of one adapter under dropout, and mask⊙(T A) added to dx in place: one drawing of the mask serves both."""
    da = None if x is None else Sum(t, a.shape[1])
    for block in row_blocks(len(t), a.shape[1], masked=True):
        places = dropout.next(len(t[block]), a.shape[1])
        if da is not None:
            da.add(t[block], dropped(x[block], t.dtype, places), dropout.scale)
        if dx is not None:
            add_dropped_product(dx[block], t[block], a, dropout.scale, places)
    return None if da is None else da.result()
