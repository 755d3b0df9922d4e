"""`prompt_embedding` in plain torch: every row is written where it belongs, with no second (B, P + S, H) buffer."""

import torch
from torch import Tensor


def forward(ids_BS: Tensor | None, rows: Tensor, prompt: Tensor, start_B: Tensor | None = None) -> Tensor:
    """out (B, P + S, H) in rows' dtype; rows is a table (V, H), or (B, S, H) where there are no ids. Raises IndexError
    on a CPU for an id outside the table."""
    batch, tokens = (rows if ids_BS is None else ids_BS).shape[:2]
    count = prompt.shape[-2]
    out = torch.empty(batch, count + tokens, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    if start_B is not None:
        place_BS = torch.arange(tokens, device=rows.device).expand(batch, tokens)
        place_BS = place_BS + count * (place_BS >= start_B[:, None])
        found = rows if ids_BS is None else torch.nn.functional.embedding(ids_BS, rows)
        out.scatter_(1, place_BS[..., None].expand_as(found), found)
        prompt = prompt.to(rows.dtype).expand(batch, -1, -1)
        return out.scatter_(1, _prompt_places(start_B, prompt), prompt)
    out[:, :count].copy_(prompt)
    if ids_BS is None:
        out[:, count:].copy_(rows)
        return out
    for ids_S, out_TH in zip(ids_BS, out, strict=True):  # of one sample, whose rows lie together
        torch.index_select(rows, 0, ids_S, out=out_TH[count:])
    return out


def _prompt_places(start_B: Tensor, like: Tensor) -> Tensor:
    """Of (B, P, H): the rows in which a prompt stands that begins at start[b]."""
    place_BP = start_B[:, None] + torch.arange(like.shape[1], device=like.device)
    return place_BP[..., None].expand_as(like)


def rows_of_prompt(dout: Tensor, count: int, start_B: Tensor | None) -> Tensor:
    """(B, P, H): what of dout (B, P + S, H) is the prompt's; a view where there is no start."""
    if start_B is None:
        return dout[:, :count]
    return dout.gather(1, _prompt_places(start_B, dout[:, :count]))


def grad_prompt(dout: Tensor, count: int, dtype: torch.dtype, start_B: Tensor | None = None) -> Tensor:
    """Σ_b dout[b, start[b] : start[b] + count] (P, H), summed in fp32 or wider and rounded once to `dtype`."""
    dout = rows_of_prompt(dout, count, start_B)
    return dout[:, :count].sum(0, dtype=torch.promote_types(dout.dtype, torch.float32)).to(dtype)
