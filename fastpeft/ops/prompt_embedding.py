"""Learned rows in front of a batch's embeddings (prompt tuning, Lester et al., arXiv 2104.08691, section 2; P-tuning,
Liu et al., arXiv 2103.10385, section 3), each written once where it belongs:

    out[b, :P] = prompt      out[b, P:] = table[ids[b]], or embeds[b]

    dprompt = Σ_b dout[b, :P] in fp32      dembeds = dout[:, P:]      dtable: as torch's own embedding has it

With a start (B,) the first start[b] rows of a sample, its padding, stay in front of its prompt; all else is the same. A
prompt of each sample's own has dout[:, :P]. The result has the table's dtype, as HF peft has it, and an fp32 prompt
gets fp32 gradients. Nothing is saved for backward but the start and the ids, and these only for a table that learns.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.dispatch import choose_backend
from fastpeft.errors import OpError
from fastpeft.fallback import is_demanded, kernels_or_torch
from fastpeft.ops import _prompt_embedding_torch as torch_path
from fastpeft.ops._first_order import applied, first_order

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)

# Letters of the shape suffixes: B batch, S tokens, T = P + S, P rows of the prompt, H hidden size, V entries.


class Call(NamedTuple):
    """What a call is besides its tensors. padding: the table's row without a gradient, or -1. The last two as in
    `lora_linear`."""

    padding: int
    triton: bool
    demanded: bool = False
    fell_back: bool = False


def prompt_embedding_reference(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, padding_idx: int | None = None, start: Tensor | None = None
) -> Tensor:
    """The definition, for autograd, as HF peft computes it where there is no start."""
    return prepend_prompt_reference(torch.nn.functional.embedding(input_ids, weight, padding_idx), prompt, start)


def prepend_prompt_reference(inputs_embeds: Tensor, prompt: Tensor, start: Tensor | None = None) -> Tensor:
    """The definition, for autograd. As in HF peft each sample's rows are cast, so the batch's gradients are summed in
    the prompt's dtype."""
    prompt_BPH = prompt.expand(len(inputs_embeds), -1, -1).to(inputs_embeds.dtype)
    if start is None:
        return torch.cat((prompt_BPH, inputs_embeds), 1)
    samples = zip(inputs_embeds, prompt_BPH, start.tolist(), strict=True)
    return torch.stack([torch.cat((rows[:at], own, rows[at:])) for rows, own, at in samples])


@functools.cache
def _path(triton: bool):
    if not triton:
        return torch_path
    from fastpeft.ops import _prompt_embedding_triton as triton_path

    return triton_path


class PromptEmbeddingFunction(torch.autograd.Function):
    """prompt (P, H) or (B, P, H); rows: a table (V, H) with ids (B, S), or embeddings (B, S, H) with None."""

    @staticmethod
    def forward(ctx, prompt, rows, ids_BS, start_B, call: Call):
        out_BTH, call = run_forward(ids_BS, rows, prompt, start_B, call)
        ctx.save_for_backward(ids_BS if ctx.needs_input_grad[1] else None, start_B)
        ctx.call, ctx.shape, ctx.dtype, ctx.entries = call, prompt.shape, prompt.dtype, len(rows)
        return out_BTH

    @staticmethod
    @first_order
    def backward(ctx, dout_BTH):
        need_prompt, need_rows, *_ = ctx.needs_input_grad
        ids_BS, start_B = ctx.saved_tensors
        dprompt = drows = None
        if need_prompt:
            dprompt = grad_prompt(dout_BTH, ctx.shape, ctx.dtype, start_B, ctx.call)
        if need_rows:
            drows = grad_rows(dout_BTH, ctx.shape[-2], ids_BS, start_B, ctx.entries, ctx.call.padding)
        return dprompt, drows, None, None, None


def run_forward(ids_BS, rows, prompt, start_B, call: Call) -> tuple[Tensor, Call]:
    """(out (B, T, H), the call as it was served)."""
    arguments = (ids_BS, rows, prompt, start_B)
    if not call.triton:
        return torch_path.forward(*arguments), call
    out_BTH, by_kernels = kernels_or_torch(
        lambda: _kind("forward", rows, prompt.dtype, prompt.shape),
        call.demanded,
        lambda: _path(True).forward(*arguments),
        lambda: torch_path.forward(*arguments),
    )
    return out_BTH, call if by_kernels else call._replace(fell_back=True)


def _kind(phase: str, rows: Tensor, dtype: torch.dtype, shape: torch.Size) -> tuple:
    """What kernels are compiled for, in words."""
    return "prompt_embedding", phase, rows.device, f"prompt {tuple(shape[-2:])}", dtype, f"embeddings {rows.dtype}"


def grad_prompt(dout_BTH: Tensor, shape: torch.Size, dtype: torch.dtype, start_B: Tensor | None, call: Call) -> Tensor:
    """(P, H) or (B, P, H), as `shape` is, in `dtype`; the latter is a view of dout where the dtypes are equal and there
    is no start."""
    if len(shape) == 3:
        return torch_path.rows_of_prompt(dout_BTH, shape[1], start_B).to(dtype)
    arguments = (dout_BTH, shape[0], dtype, start_B)
    if not call.triton or call.fell_back:
        return torch_path.grad_prompt(*arguments)
    return kernels_or_torch(
        lambda: _kind("backward", dout_BTH, dtype, shape),
        call.demanded,
        lambda: _path(True).grad_prompt(*arguments),
        lambda: torch_path.grad_prompt(*arguments),
    )[0]


def grad_rows(
    dout_BTH: Tensor, count: int, ids_BS: Tensor | None, start_B: Tensor | None, entries: int, padding: int
) -> Tensor:
    """The gradient of a table of `entries` rows, by torch's own backward; without ids that of embeddings, a view where
    there is no start."""
    dout_BSH = dout_BTH[:, count:]
    if start_B is not None:
        place_S = torch.arange(dout_BSH.shape[1], device=dout_BTH.device)
        dout_BSH = dout_BTH[:, : len(place_S)].where((place_S < start_B[:, None])[..., None], dout_BSH)
    if ids_BS is None:
        return dout_BSH
    return torch.ops.aten.embedding_dense_backward(dout_BSH, ids_BS, entries, padding, False)


def decide(rows: Tensor, ids: Tensor | None, prompt: Tensor, padding: int, patched: str | None) -> Call:
    """The call, and its backend by `dispatch`. A kernel has no grid over nothing: without elements it is the torch
    path. Raises BackendError where the kernels are demanded in vain."""
    if rows.shape[-1] == 0 or len(rows if ids is None else ids) == 0:
        return Call(padding, False)
    dtype = torch.promote_types(rows.dtype, prompt.dtype)
    triton = choose_backend(rows, dtype, patched=patched).backend == "triton"
    return Call(padding, triton, triton and is_demanded(patched))


def _apply(prompt: Tensor, rows: Tensor, ids: Tensor | None, start: Tensor | None, padding: int, patched) -> Tensor:
    if torch.compiler.is_compiling():
        from fastpeft.ops._prompt_embedding_compiled import compiled_prompt_embedding

        return compiled_prompt_embedding(prompt, rows, ids, start, padding, patched)
    call = decide(rows, ids, prompt, padding, patched)
    return applied(PromptEmbeddingFunction, prompt, rows, ids, start, call)


def _check_tensor(op: str, name: str, tensor, dtypes: tuple[torch.dtype, ...], like: tuple[str, Tensor]) -> None:
    """Raises OpError unless `tensor` is one, with values, of one of `dtypes`, on the device of `like`, named there."""
    if not isinstance(tensor, Tensor):
        raise OpError(f"{op}: {name} is of {type(tensor).__name__}; a tensor is needed")
    if tensor.is_meta:
        raise OpError(f"{op}: {name} is on the meta device and has no values; give it some")
    if tensor.dtype not in dtypes:
        kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        raise OpError(f"{op}: {name} is {tensor.dtype}; {', '.join(kinds[:-1])} or {kinds[-1]} is needed")
    if tensor.device != like[1].device:
        raise OpError(f"{op}: {name} is on {tensor.device}, {like[0]} on {like[1].device}; move one of them")


def _check_prompt(op: str, prompt: Tensor, batch: int, hidden: int) -> None:
    """Raises OpError unless prompt is (P, H) or (B, P, H) with at least one row."""
    fits = prompt.ndim in (2, 3) and prompt.shape[-1] == hidden and (prompt.ndim == 2 or len(prompt) == batch)
    if not fits:
        raise OpError(
            f"{op}: prompt has shape {tuple(prompt.shape)}; (P, {hidden}) or ({batch}, P, {hidden}) is needed"
        )
    if prompt.shape[-2] == 0:
        raise OpError(f"{op}: prompt has P = 0 rows; at least 1 is needed")


def _checked_start(op: str, start: Tensor | None, batch: int, rows: Tensor) -> Tensor | None:
    """`start`, contiguous. Raises OpError unless it is (B,), of integers, with the rows, or None."""
    if start is None:
        return None
    _check_tensor(op, "start", start, ID_DTYPES, ("the embeddings", rows))
    if start.shape != (batch,):
        raise OpError(f"{op}: start has shape {tuple(start.shape)}; ({batch},) is needed")
    return start.contiguous()


def prompt_embedding(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    *,
    padding_idx: int | None = None,
    start: Tensor | None = None,
    patched_backend: str | None = None,
) -> Tensor:
    """The prompt's rows, then those of the table that the ids name; with the gradients of prompt and weight.

    For a table that is looked up and nothing else: a model whose embedding scales (Gemma 3, BART), normalises or adds
    positions goes through `prepend_prompt`.

    Args:
        input_ids: (B, S), int32 or int64, any strides; S may be 0. An id outside the table is an IndexError on the
            torch backend on a CPU, a failed device assertion on a GPU's; the kernels read nothing for it and give a
            row of NaN, as they cannot raise.
        weight: (V, H), fp32, fp16 or bf16 (fp64 on the torch backend). If it wants a gradient, that is torch's own
            dense one, the torch path's on either backend.
        prompt: (P, H), shared by the batch, or (B, P, H), any of these dtypes; rounded to weight's.
        padding_idx: as of nn.Embedding, the row of weight that gets no gradient.
        start: (B,) int32 or int64, from 0 to S: how many of a sample's ids, its padding, stay in front of its prompt.
            None is 0. A value outside is an error of scatter's on the torch backend, and not looked for by the kernels.
        patched_backend: as `patch(backend=)` was given.

    Returns:
        (B, P + S, H), contiguous, in weight's dtype, under autocast too.

    Raises:
        OpError (a ValueError): a shape, device, dtype, type or number does not fit.
        BackendError: the triton backend was demanded and cannot serve the call.
    """
    op = "prompt_embedding"
    _check_tensor(op, "weight", weight, DTYPES, ("weight", weight))
    _check_tensor(op, "input_ids", input_ids, ID_DTYPES, ("weight", weight))
    _check_tensor(op, "prompt", prompt, DTYPES, ("weight", weight))
    if weight.ndim != 2:
        raise OpError(f"{op}: weight has shape {tuple(weight.shape)}; (V, H) is needed")
    if input_ids.ndim != 2:
        raise OpError(f"{op}: input_ids has shape {tuple(input_ids.shape)}; (B, S) is needed")
    _check_prompt(op, prompt, len(input_ids), weight.shape[1])
    start = _checked_start(op, start, len(input_ids), weight)
    entries, padding = len(weight), -1
    if padding_idx is not None:
        if not isinstance(padding_idx, int) or not -entries <= padding_idx < entries:
            raise OpError(f"{op}: padding_idx is {padding_idx!r}; a row of weight's {entries}, or None is needed")
        padding = padding_idx % entries
    return _apply(prompt, weight, input_ids, start, padding, patched_backend)


def prepend_prompt(
    inputs_embeds: Tensor, prompt: Tensor, *, start: Tensor | None = None, patched_backend: str | None = None
) -> Tensor:
    """The prompt's rows, then those of embeddings that were made elsewhere; with the gradients of both.

    Args:
        inputs_embeds: (B, S, H), any strides; S may be 0. Its gradient is a view of the result's, where there is no
            start.
        prompt, start, patched_backend: as in `prompt_embedding`, with inputs_embeds in the place of weight.

    Returns:
        (B, P + S, H), contiguous, in inputs_embeds' dtype.

    Raises:
        As `prompt_embedding`.
    """
    op = "prepend_prompt"
    _check_tensor(op, "inputs_embeds", inputs_embeds, DTYPES, ("inputs_embeds", inputs_embeds))
    _check_tensor(op, "prompt", prompt, DTYPES, ("inputs_embeds", inputs_embeds))
    if inputs_embeds.ndim != 3:
        raise OpError(f"{op}: inputs_embeds has shape {tuple(inputs_embeds.shape)}; (B, S, H) is needed")
    _check_prompt(op, prompt, len(inputs_embeds), inputs_embeds.shape[2])
    start = _checked_start(op, start, len(inputs_embeds), inputs_embeds)
    return _apply(prompt, inputs_embeds, None, start, -1, patched_backend)
