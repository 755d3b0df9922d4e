"""`prompt_embedding` and `prepend_prompt` as one torch.library operator, so that torch.compile sees one node forward
and one backward. Inside a compiled graph the backend is chosen when the graph runs, not when it is traced."""

import torch
from torch import Tensor

from fastpeft.fallback import code_of, served
from fastpeft.ops._prompt_embedding_torch import rows_of_prompt
from fastpeft.ops.prompt_embedding import Call, decide, grad_prompt, grad_rows, run_forward


def compiled_prompt_embedding(
    prompt: Tensor, rows: Tensor, ids: Tensor | None, start: Tensor | None, padding: int, patched: str | None
) -> Tensor:
    """out (B, P + S, H) of tensors as in the Function's `apply`, through the operator."""
    return torch.ops.fastpeft.prompt_embedding(prompt, rows, ids, start, padding, patched or "")[0]


@torch.library.custom_op("fastpeft::prompt_embedding", mutates_args=())
def _forward(
    prompt: Tensor, rows: Tensor, ids: Tensor | None, start: Tensor | None, padding: int, patched: str
) -> tuple[Tensor, Tensor]:
    """(out, how it was served): the latter for backward, see `fastpeft.fallback.served`."""
    out, call = run_forward(ids, rows, prompt, start, decide(rows, ids, prompt, padding, patched or None))
    return out, torch.tensor([code_of(call.triton, call)])


@_forward.register_fake
def _(prompt, rows, ids, start, padding, patched):
    batch, tokens = (rows if ids is None else ids).shape[:2]
    out = rows.new_empty(batch, prompt.shape[-2] + tokens, rows.shape[-1])
    return out, torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("fastpeft::prompt_embedding_backward", mutates_args=())
def _backward(dout: Tensor, like: Tensor, start: Tensor | None, how: Tensor) -> Tensor:
    """The gradient of a prompt that the batch shares, of the shape and dtype of `like`, which is not read."""
    triton, fields = served(how.item())
    return grad_prompt(dout, like.shape, like.dtype, start, Call(-1, triton, **fields))


@_backward.register_fake
def _(dout, like, start, how):
    return like.new_empty(like.shape)


def _setup_context(ctx, inputs, output):
    prompt, rows, ids, start, ctx.padding, _ = inputs
    ctx.save_for_backward(prompt, ids, start, output[1])
    ctx.entries = len(rows)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, dout, _):
    """What is no sum is no node of its own: torch's operators, which the graph may fuse with others."""
    prompt, ids, start, how = ctx.saved_tensors
    need_prompt, need_rows, *_ = ctx.needs_input_grad
    dprompt = drows = None
    if need_prompt and prompt.ndim == 3:
        dprompt = rows_of_prompt(dout, prompt.shape[1], start).to(prompt.dtype)
    elif need_prompt:
        dprompt = torch.ops.fastpeft.prompt_embedding_backward(dout, prompt, start, how)
    if need_rows:
        drows = grad_rows(dout, prompt.shape[-2], ids, start, ctx.entries, ctx.padding)
    return dprompt, drows, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
