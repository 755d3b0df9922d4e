"""`prefix_attention` by matrix products over blocks of query rows, for everything: softcaps, dropout, the gradient of a
bias, any device. Scores of a block lie in one buffer, the prefix's columns first; half precision is widened to fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops._lora_linear_torch import Dropout, Given, drop, dropout_of, given_parts
from fastpeft.ops._prefix_attention_scores import Scores, Tensors, prefix_visible_block, visible_block

BLOCK_ELEMENTS = 1 << 20  # of a buffer of scores, 4 MiB in fp32; backward has three of them, with dropout four
FEW_ROWS = 16


class Block(NamedTuple):
    """Some samples and query rows, and the columns of the sequence that these rows may see."""

    batch: slice
    rows: slice
    keys: slice


def row_blocks(batch: int, heads: int, queries: int, columns: int) -> list[tuple[slice, slice]]:
    """(samples, rows) of blocks of about BLOCK_ELEMENTS scores: several samples if all of their rows fit in. Where only
    a few rows do, blocks are up to four times as large, for keys are read once for each block."""
    fit = max(1, BLOCK_ELEMENTS // max(1, heads * columns))
    fit = fit if fit >= FEW_ROWS else min(FEW_ROWS, max(1, 4 * BLOCK_ELEMENTS // max(1, heads * columns)))
    rows = max(1, min(fit, queries))
    samples = max(1, fit // rows)
    return [
        (slice(b, min(b + samples, batch)), slice(r, min(r + rows, queries)))
        for b in range(0, batch, samples)
        for r in range(0, queries, rows)
    ]


def keep_mask(seed: Tensor, p: float, batch: int, heads: int, queries: int, prefix: int, keys: int, device) -> Tensor:
    """(B, H, S, P + T) booleans, False where a weight is dropped: what forward and backward draw block by block."""
    dropout = Dropout(seed, p, torch.device(device))
    mask = torch.ones(batch, heads, queries, prefix + keys, dtype=torch.bool, device=device)
    for samples, rows in row_blocks(batch, heads, queries, prefix + keys):
        part = mask[samples, :, rows]
        part.copy_(drop(torch.ones_like(part, memory_format=torch.contiguous_format), _places(dropout, part)))
    return mask


def given_mask(mask: Tensor, p: float) -> Given:
    """Of a mask (B, H, S, P + T), in the place of the seed."""
    return given_parts((mask[samples, :, rows] for samples, rows in row_blocks(*mask.shape)), p)


def _places(dropout: Dropout | Given, block: Tensor) -> Tensor:
    return dropout.next(block.numel() // max(1, block.shape[-1]), block.shape[-1])


class Region(NamedTuple):
    """The prefix or the sequence in a block: what is multiplied, its columns in the buffer of scores, and where its
    gradients go: names in `Tensors` of keys, values and bias, and the columns in those."""

    keys: Tensor
    values: Tensor
    columns: slice
    names: tuple[str, str, str]
    own: slice


class Rows:
    """What the blocks of one call share, and the scores of each; B' samples and S' rows of a block are `rows` of a
    (B'·G, g·S', ·) batch of matrices, so that a group's heads read their keys together."""

    def __init__(self, tensors: Tensors, scores: Scores, p: float, seed: Tensor | None):
        self.tensors, self.scores = tensors, scores
        self.batch, self.heads, self.queries, self.depth = tensors.q_BHSD.shape
        self.groups, self.keys = tensors.k_BGTD.shape[1:3]
        self.prefix = tensors.pk_BGPD.shape[2]
        self.wide = torch.promote_types(tensors.q_BHSD.dtype, torch.float32)
        self.device = tensors.q_BHSD.device
        self.dropout = dropout_of(seed, p, self.device)

    def blocks(self):
        if self.tensors.q_BHSD.numel() == 0:
            return
        for samples, rows in row_blocks(self.batch, self.heads, self.queries, self.prefix + self.keys):
            yield Block(samples, rows, self._columns(rows))

    def _columns(self, rows: slice) -> slice:
        """Dropout counts all columns, whether visible or not."""
        return slice(0, self.keys) if self.dropout is not None else key_range(self.scores, rows, self.keys)

    def matrices(self, t: Tensor, block: Block) -> Tensor:
        """These rows of a (B, H, S, n) tensor, (B'·G, g·S', n) and wide."""
        part = t[block.batch, :, block.rows].to(self.wide)
        return part.reshape(part.shape[0] * self.groups, -1, part.shape[3])

    def keyed(self, t: Tensor, block: Block, columns: slice | None = None) -> Tensor:
        """(B'·G, n, D), wide, of the block's samples of a tensor of keys or values, which all of them may share."""
        part = t[block.batch if t.shape[0] > 1 else slice(None)]
        part = part if columns is None else part[:, :, columns]
        samples = block.batch.stop - block.batch.start
        return part.to(self.wide).expand(samples, -1, -1, -1).reshape(samples * self.groups, -1, self.depth)

    def regions(self, block: Block) -> list[Region]:
        """The prefix and the sequence, as far as there are any."""
        _, k, v, pk, pv, *_ = self.tensors
        found = []
        if self.prefix:
            keys, values, own = self.keyed(pk, block), self.keyed(pv, block), slice(0, self.prefix)
            found.append(Region(keys, values, own, ("pk_BGPD", "pv_BGPD", "pbias_BHSP"), own))
        if block.keys.stop > block.keys.start:
            keys, values = self.keyed(k, block, block.keys), self.keyed(v, block, block.keys)
            names = ("k_BGTD", "v_BGTD", "bias_BHST")
            found.append(Region(keys, values, slice(self.prefix, None), names, block.keys))
        return found

    def unfold(self, matrices: Tensor, block: Block) -> Tensor:
        """(B', H, S', n), a view."""
        samples, rows = block.batch.stop - block.batch.start, block.rows.stop - block.rows.start
        return matrices.view(samples, self.heads, rows, matrices.shape[-1])

    def scored(self, q: Tensor, regions, block: Block, keep_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """The scores (B'·G, g·S', P + columns) of a block, -inf where masked, and the derivative of the softcap."""
        scores, width = self.scores, self.prefix + block.keys.stop - block.keys.start
        s = torch.empty(*q.shape[:2], width, dtype=self.wide, device=self.device)
        for region in regions:
            s[..., region.columns].baddbmm_(q, region.keys.transpose(1, 2), beta=0, alpha=scores.scale)
        slope = None
        if scores.softcap is not None:
            s.div_(scores.softcap).tanh_()
            slope = s.square().neg_().add_(1) if keep_slope else None
            s.mul_(scores.softcap)
        self._add_and_mask(self.unfold(s, block), block)
        return s, slope

    def _add_and_mask(self, s_BHSC: Tensor, block: Block) -> None:
        scores, bias, pbias = self.scores, self.tensors.bias_BHST, self.tensors.pbias_BHSP
        a, s = s_BHSC[..., : self.prefix], s_BHSC[..., self.prefix :]
        if scores.slopes_H is not None:
            slopes = scores.slopes_H.to(self.wide)[:, None, None]
            a += slopes * torch.arange(-self.prefix, 0, device=self.device)
            s += slopes * scores.positions_BT[block.batch, None, None, block.keys].to(self.wide)
        if pbias is not None:
            a += _part(pbias, block)
        if bias is not None:
            s += _part(bias, block)[..., block.keys]
        scores = scores._replace(**{
            name: None if vector is None else vector[block.batch]
            for name in ("padding_BT", "segments_BT", "local_BT")
            for vector in (getattr(scores, name),)
        })  # fmt: skip
        see = prefix_visible_block(scores, block.rows, self.prefix, self.device)
        if see is not None:
            a.masked_fill_(~see, -torch.inf)
        s.masked_fill_(~visible_block(scores, block.rows, block.keys, self.device), -torch.inf)

    def exponentiate(self, s: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Makes exp(s - peak) of scores, in place; (peak, total) (B', H, S', 1) with L = peak + log(total), where the
        peak of a row that sees nothing is 0, and its total 0."""
        s_BHSC = self.unfold(s, block)
        peak = s_BHSC.amax(-1, keepdim=True) if s.shape[-1] else s_BHSC.new_full((*s_BHSC.shape[:3], 1), -torch.inf)
        if self.tensors.sinks_H is not None:
            peak = torch.maximum(peak, self.tensors.sinks_H.to(self.wide)[:, None, None])
        peak.masked_fill_(peak == -torch.inf, 0.0)
        total = s_BHSC.sub_(peak).exp_().sum(-1, keepdim=True)
        return peak, total if self.tensors.sinks_H is None else total + self.sink(peak)

    def sink(self, peak: Tensor) -> Tensor:
        """exp(sink - peak)."""
        return torch.exp(self.tensors.sinks_H.to(self.wide)[:, None, None] - peak)


def _part(t_BHSC: Tensor, block: Block) -> Tensor:
    """The block's rows of a bias, whose batch may be 1."""
    return t_BHSC[block.batch if t_BHSC.shape[0] > 1 else slice(None), :, block.rows]


def key_range(scores: Scores, rows: slice, keys: int) -> slice:
    """The columns that some of these rows may see by order and window."""
    first, last = scores.start + rows.start, scores.start + rows.stop - 1
    low, high = 0, keys
    if scores.causal:
        high = min(high, last + 1)
    if scores.window is not None:
        low = max(low, first - scores.window + 1)
        high = high if scores.causal else min(high, last + scores.window)
    low = min(low, keys)
    return slice(low, max(low, high))


def forward(tensors: Tensors, scores: Scores, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, L) as in `_prefix_attention_torch`."""
    rows = Rows(tensors, scores, p, seed)
    q = tensors.q_BHSD
    out = q.new_empty(rows.batch, rows.queries, rows.heads, rows.depth).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=rows.wide)
    for block in rows.blocks():
        regions = rows.regions(block)
        w, _ = rows.scored(rows.matrices(q, block), regions, block)
        peak, total = rows.exponentiate(w, block)
        lse[block.batch, :, block.rows] = (peak + total.log()).squeeze(-1)
        if rows.dropout is not None:
            drop(w, _places(rows.dropout, w))
            total *= 1 - p
        o = torch.zeros(*w.shape[:2], rows.depth, dtype=rows.wide, device=rows.device)
        for region in regions:
            o.baddbmm_(w[..., region.columns], region.values)
        out[block.batch, :, block.rows] = rows.unfold(o, block).div_(total.masked_fill_(total == 0, 1.0))
    return out, lse


class Gradients:
    """The sums over blocks, in the wide type, of what is needed."""

    def __init__(self, rows: Rows, needs: Tensors):
        names = ("k_BGTD", "v_BGTD", "pk_BGPD", "pv_BGPD", "bias_BHST", "pbias_BHSP", "sinks_H")
        self.sums = {
            name: torch.zeros(getattr(rows.tensors, name).shape, dtype=rows.wide, device=rows.device)
            for name in names
            if getattr(needs, name)
        }
        q = rows.tensors.q_BHSD
        self.dq = q.new_empty(rows.batch, rows.queries, rows.heads, rows.depth).transpose(1, 2)
        self.dq = self.dq if needs.q_BHSD else None
        self.group = rows.heads // rows.groups

    def keyed(self, name: str, block: Block, columns: slice, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
        """sum[samples, :, columns] += alpha·leftᵀ right, over the samples too if they share the tensor."""
        if name not in self.sums:
            return
        # Head by head, and then the sum: as exact as eager, which one sum over all rows of a group is not. Where that
        # is much memory, a block has few rows, and the sum over blocks is what counts.
        total, heads = self.sums[name], self.group
        if len(left) * heads * left.shape[2] * right.shape[2] > 4 * BLOCK_ELEMENTS:
            heads = 1
        left, right = (t.reshape(len(t) * heads, -1, t.shape[-1]) for t in (left, right))
        product = torch.bmm(left.transpose(1, 2), right)
        product = product.view(-1, total.shape[1], heads, *product.shape[1:]).sum(2)
        if total.shape[0] == 1:
            total[:, :, columns].add_(product.sum(0, keepdim=True), alpha=alpha)
        else:
            total[block.batch, :, columns].add_(product, alpha=alpha)

    def bias(self, name: str, block: Block, columns: slice, u_BHSC: Tensor) -> None:
        if name not in self.sums:
            return
        total = self.sums[name]
        alone = [d for d in (0, 1) if total.shape[d] == 1]
        part = u_BHSC.sum(alone, keepdim=True) if alone else u_BHSC
        _part(total, block)[..., columns] += part

    def sinks(self, rows: Rows, block: Block, delta: Tensor, share: Tensor | None) -> None:
        if "sinks_H" in self.sums:
            self.sums["sinks_H"] -= (share * rows.unfold(delta, block)).sum((0, 2, 3))

    def finished(self, tensors: Tensors) -> tuple[Tensor | None, ...]:
        sums = {name: total.to(getattr(tensors, name).dtype) for name, total in self.sums.items()}
        return self.dq, *(sums.get(name) for name in Tensors._fields[1:])


def backward(dout, tensors: Tensors, scores: Scores, p: float, seed, needs: Tensors):
    """The gradients of `Tensors`, None where not needed."""
    rows = Rows(tensors, scores, p, seed)
    gradients = Gradients(rows, needs)
    for block in rows.blocks():
        q, d = rows.matrices(tensors.q_BHSD, block), rows.matrices(dout, block)
        regions = rows.regions(block)
        w, slope = rows.scored(q, regions, block, keep_slope=True)
        # Not exp(s - L): that L is rounded to some 1e-7 would be an error of each weight, in fp32 the greatest of all.
        peak, total = rows.exponentiate(w, block)
        total.masked_fill_(total == 0, 1.0)
        sink_share = None if tensors.sinks_H is None else rows.sink(peak) / total
        rows.unfold(w, block).div_(total)
        _block_gradients(rows, gradients, block, regions, w, slope, q, d, sink_share, p)
    return gradients.finished(tensors)


def _block_gradients(rows: Rows, gradients: Gradients, block, regions, w, slope, q, d, sink_share, p) -> None:
    """Adds one block's share; w are its weights before dropout, q and d its rows of q and dout."""
    u = torch.empty_like(w)
    for region in regions:
        u[..., region.columns].baddbmm_(d, region.values.transpose(1, 2), beta=0)
    kept = w
    if rows.dropout is not None:
        places = _places(rows.dropout, w)
        kept = drop(w.clone(), places).div_(1 - p)
        drop(u, places).div_(1 - p)
    for region in regions:
        gradients.keyed(region.names[1], block, region.own, kept[..., region.columns], d)
    # δ as Σ p∘(dout Vᵀ), which is dout∘out but for the rounding of out.
    delta = (u * w).sum(-1, keepdim=True)
    u.sub_(delta).mul_(w)
    gradients.sinks(rows, block, delta, sink_share)
    for region in regions:
        gradients.bias(region.names[2], block, region.own, rows.unfold(u, block)[..., region.columns])
    if slope is not None:
        u.mul_(slope)
    dq = torch.zeros_like(q)
    for region in regions:
        gradients.keyed(region.names[0], block, region.own, u[..., region.columns], q, rows.scores.scale)
        dq.baddbmm_(u[..., region.columns], region.keys, alpha=rows.scores.scale)
    if gradients.dq is not None:
        gradients.dq[block.batch, :, block.rows] = rows.unfold(dq, block)
