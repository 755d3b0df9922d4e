"""`prompt_embedding` in plain torch: every row is written where it belongs, with no second (B, P + S, H) buffer."""

import torch
from torch import Tensor


def forward(ids_BS: Tensor | None, rows: Tensor, prompt: Tensor) -> Tensor:
    """out (B, P + S, H) in rows' dtype; rows is a table (V, H), or (B, S, H) where there are no ids. Raises IndexError
    on a CPU for an id outside the table."""
    batch, tokens = (rows if ids_BS is None else ids_BS).shape[:2]
    count = prompt.shape[-2]
    out = torch.empty(batch, count + tokens, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    out[:, :count].copy_(prompt)
    if ids_BS is None:
        out[:, count:].copy_(rows)
        return out
    for ids_S, out_TH in zip(ids_BS, out, strict=True):  # of one sample, whose rows lie together
        torch.index_select(rows, 0, ids_S, out=out_TH[count:])
    return out


def grad_prompt(dout: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Σ_b dout[b, :count] (P, H), summed in fp32 or wider and rounded once to `dtype`."""
    return dout[:, :count].sum(0, dtype=torch.promote_types(dout.dtype, torch.float32)).to(dtype)
