"""Mistakes to plant in `lora_linear`'s persistent kernel: (function, what goes wrong, text, text with the mistake).

The text must occur in the function exactly once. No mistake leaves the tensors' storages.
"""

ROUND_TO_HALF = ".to(tl.float16).to(tl.float32)"
KERNEL = "_persistent_tail_kernel"

MUTANTS = [
    (KERNEL, "tiles of the first round alone", "tiles_m * tiles_n, tl.num_programs(0))", "tl.num_programs(0))"),
    (KERNEL, "the last tile", "tiles_m * tiles_n, tl.num", "tiles_m * tiles_n - 1, tl.num"),
    (KERNEL, "group of tiles", "within % group_rows", "within % GROUP"),
    (KERNEL, "last row of S", "rows < M", "rows < M - 1"),
    (KERNEL, "last column of B", "columns < N", "columns < N - 1"),
    (KERNEL, "last rank of S", "m_m[:, None] & (ranks < R)", "m_m[:, None] & (ranks < R - 1)"),
    (KERNEL, "last chunk of ranks", "(0, R, BLOCK_R,", "(0, min(R, BLOCK_R), BLOCK_R,"),
    (KERNEL, "row stride of B", "columns[None, :] * stride_qn", "columns[None, :] * R"),
    (KERNEL, "column stride of B", "ranks[:, None] * stride_qr", "ranks[:, None]"),
    (KERNEL, "sign", "dot(p, q, acc,", "dot(-p, q, acc,"),
    (KERNEL, "no scale", "acc *= scale", "acc *= 1"),
    (KERNEL, "scale off by 1 %", "acc *= scale", "acc *= scale * 0.99"),
    (KERNEL, "no dropout", "if DROPOUT:", "if False:"),
    (KERNEL, "mask inverted", "tl.where(keep, acc, 0.0)", "tl.where(keep, 0.0, acc)"),
    (KERNEL, "mask of other rows", "row_start, column_start, th", "row_start + BLOCK_M, column_start, th"),
    (KERNEL, "mask of other columns", "column_start, threshold", "column_start + 8, threshold"),
    (KERNEL, "last block of inputs", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    (KERNEL, "first block of inputs", "x_desc.load([row_start, k])", "x_desc.load([row_start, 0])"),
    (KERNEL, "other rows of W", "w_desc.load([column_start, k])", "w_desc.load([column_start + 1, k])"),
    (KERNEL, "other depth of W", "w_desc.load([k, column_start])", "w_desc.load([k + 1, column_start])"),
    (KERNEL, "no bias", "if HAS_BIAS:", "if False:"),
    (KERNEL, "one bias for all", "bias_ptr + columns,", "bias_ptr + columns * 0,"),
    (KERNEL, "fp16 sums", "BASE_MODE, HALF, UPCAST)\n", f"BASE_MODE, HALF, UPCAST){ROUND_TO_HALF}\n"),
    (KERNEL, "stored at other columns", "[row_start, column_start], acc", "[row_start, column_start + 8], acc"),
    ("tail", "kept values not scaled", "scale * keep_scale", "scale"),
]
