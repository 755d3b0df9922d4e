"""Mistakes to plant in the kernels of `prompt_embedding`: (function, what goes wrong, text, text with the mistake).

A function is a kernel or its launcher; the text must occur in it exactly once. Some would leave the tensors' storages:
to be run under tests/traffic.py alone, which stops them.
"""

PREPEND = [
    ("_prepend_kernel", "last column of the prompt", "m_h = columns < H", "m_h = columns < H - 1"),
    ("_prepend_kernel", "last block of the prompt", "blocks = tl.cdiv(H, BLOCK_H)", "blocks = H // BLOCK_H"),
    ("_prepend_kernel", "first sample alone", "range(copies)", "range(1)"),
    ("_prepend_kernel", "last sample left out", "range(copies)", "range(max(1, copies - 1))"),
    ("_prepend_kernel", "step of a copy", "p_copy += length * H", "p_copy += (length - 1) * H"),
    ("_prepend_kernel", "one prompt for all samples", "sample = row // P ", "sample = row // P * 0 "),
    ("_prepend_kernel", "first row of the prompt", "row = row % P", "row = row % P * 0"),
    ("_prepend_kernel", "sample stride of the prompt", "sample * stride_pb", "sample * P * H"),
    ("_prepend_kernel", "row stride of the prompt", "row * stride_pp", "row * H"),
    ("_prepend_kernel", "column stride of the prompt", "columns * stride_ph", "columns"),
    ("_prepend_kernel", "prompt rounded to fp16", ".to(out_ptr.dtype.element_ty)", ".to(tl.float16)"),
    ("_prepend_kernel", "sign of the prompt", "tl.store(p_copy, prompt,", "tl.store(p_copy, -prompt,"),
    (
        "_prepend_kernel",
        "tokens one row too early",
        "sample * length + moved + place",
        "sample * length + moved - 1 + place",
    ),
    (
        "_prepend_kernel",
        "tokens where there is no prompt",
        "sample * length + moved + place",
        "sample * length + place",
    ),
    ("_prepend_kernel", "sample stride of the ids", "sample * stride_ib", "sample * S"),
    ("_prepend_kernel", "token stride of the ids", "place * stride_is", "place"),
    ("_prepend_kernel", "ids of the first sample", "sample * stride_ib", "sample * 0"),
    ("_prepend_kernel", "first entry is none", "(row >= 0)", "(row > 0)"),
    ("_prepend_kernel", "last entry is none", "(row < entries)", "(row < entries - 1)"),
    ("_prepend_kernel", "an id behind the table is read by", "(row < entries)", "(row <= entries)"),
    ("_prepend_kernel", "an id before the table is read by", "(row >= 0)", "(row >= -1)"),
    ("_prepend_kernel", "row stride of the table", "row * stride_rs", "row * H"),
    ("_prepend_kernel", "sample stride of the embeddings", "sample * stride_rb", "sample * S * H"),
    ("_prepend_kernel", "column stride of the rows", "inner * stride_rh", "inner"),
    ("_prepend_kernel", "last column of a token", "mask=inner < H)", "mask=inner < H - 1)"),
    ("_prepend_kernel", "last block of a token", "range(0, H, BLOCK_H)", "range(0, H - BLOCK_H, BLOCK_H)"),
    ("_prepend_kernel", "unknown rows are zero", 'other=float("nan")', "other=0.0"),
    ("_prepend_kernel", "start of the first sample", "p_start += 1", "p_start += 0"),
    ("_prepend_kernel", "start of another sample", "p_start = start_ptr + sample", "p_start = start_ptr"),
    ("_prepend_kernel", "prompt one row before its start", "tl.load(p_start).to(", "(tl.load(p_start) - 1).to("),
    ("_prepend_kernel", "no prompt behind padding", "tl.load(p_start).to(tl.int64) * H", "0"),
    ("_prepend_kernel", "first token in front", "place >= tl.load(", "place > tl.load("),
    ("_prepend_kernel", "padding behind the prompt", ", moved, 0)", ", moved, moved)"),
    ("_prepend_kernel", "start of one sample for all", "tl.load(start_ptr + sample)", "tl.load(start_ptr)"),
    ("prepend", "last token", "batch * tokens + count", "batch * tokens - 1 + count"),
    ("prepend", "prompts of other samples", "* (batch if by_sample else 1)", "* 1"),
]

GRAD_PROMPT = [
    ("_grad_prompt_kernel", "last sample", "(samples < B - first)", "(samples < B - first - 1)"),
    ("_grad_prompt_kernel", "last block of samples", "range(0, B, BLOCK_B)", "range(0, B - BLOCK_B, BLOCK_B)"),
    ("_grad_prompt_kernel", "first block of samples", "range(0, B, BLOCK_B)", "range(0, min(B, BLOCK_B), BLOCK_B)"),
    ("_grad_prompt_kernel", "last block alone", "acc += tl.load", "acc = tl.load"),
    ("_grad_prompt_kernel", "one sample of a block", "tl.sum(acc, axis=0)", "tl.max(acc, axis=0)"),
    ("_grad_prompt_kernel", "mean", "tl.sum(acc, axis=0)", "tl.sum(acc, axis=0) / B"),
    ("_grad_prompt_kernel", "sign", "tl.sum(acc, axis=0)", "-tl.sum(acc, axis=0)"),
    ("_grad_prompt_kernel", "scale off by 1 %", "tl.sum(acc, axis=0)", "tl.sum(acc, axis=0) * 0.99"),
    ("_grad_prompt_kernel", "fp16 sums", ".to(tl.float32)  #", ".to(tl.float32).to(tl.float16).to(tl.float32)  #"),
    ("_grad_prompt_kernel", "step of the samples", "step = BLOCK_B * ", "step = "),
    ("_grad_prompt_kernel", "row stride", "row * stride_dp", "row * H"),
    ("_grad_prompt_kernel", "column stride", "columns[None, :] * stride_dh", "columns[None, :]"),
    ("_grad_prompt_kernel", "sample stride", "samples[:, None] * stride_db", "samples[:, None] * 0"),
    ("_grad_prompt_kernel", "last column", "mask=columns < H)", "mask=columns < H - 1)"),
    ("_grad_prompt_kernel", "row of the result", "row * H + columns,", "row * 0 + columns,"),
    ("_grad_prompt_kernel", "starts of the first block", "start_ptr + first + samples", "start_ptr + samples"),
    ("_grad_prompt_kernel", "start not moved by", "p_dout + starts[:, None] * stride_dp", "p_dout"),
    ("_grad_prompt_kernel", "start in columns", "starts[:, None] * stride_dp", "starts[:, None] * stride_dh"),
    ("grad_prompt", "last row", "count * cdiv", "(count - 1) * cdiv"),
]  # fmt: skip

KERNELS = {"_prepend_kernel": PREPEND, "_grad_prompt_kernel": GRAD_PROMPT}
