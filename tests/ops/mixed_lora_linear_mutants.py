"""Mistakes to plant in the kernels of `mixed_lora_linear`: (function, what goes wrong, text, text with the mistake).

A function is a kernel, its launcher or one that makes a table; the text must occur in it exactly once.
"""

from tests.ops.lora_linear_mutants import ROUND_TO_HALF

SHRINK = [
    ("_mixed_shrink_kernel", "last column of x", "inner < K - k", "inner < K - k - 1"),
    ("_mixed_shrink_kernel", "last row", "inside < count", "inside < count - 1"),
    ("_mixed_shrink_kernel", "last rank", "ranks < R\n", "ranks < R - 1\n"),
    ("_mixed_shrink_kernel", "ranks of the next adapter", "ranks < R\n", "ranks < BLOCK_R\n"),
    (
        "_mixed_shrink_kernel",
        "last block of columns",
        "(0, depth_per_program, BLOCK_K)",
        "(0, depth_per_program - BLOCK_K, BLOCK_K)",
    ),
    ("_mixed_shrink_kernel", "the first adapter for all", "tl.load(p_segment + RANKS_BEFORE)", "0"),
    ("_mixed_shrink_kernel", "no scale", "factors_ptr + 2 * segment)", "factors_ptr + 2 * segment) * 0 + 1"),
    ("_mixed_shrink_kernel", "scale off by 1 %", "factors_ptr + 2 * segment)", "factors_ptr + 2 * segment) * 0.99"),
    ("_mixed_shrink_kernel", "another's scale", "factors_ptr + 2 * segment)", "factors_ptr)"),
    ("_mixed_shrink_kernel", "S scaled", "    if OF_B:\n        acc *= ", "    if True:\n        acc *= "),
    ("_mixed_shrink_kernel", "kept values not scaled", "if DROPOUT:\n        acc *=", "if False:\n        acc *="),
    ("_mixed_shrink_kernel", "row stride of x", "rows[:, None] * stride_xm", "rows[:, None] * K"),
    ("_mixed_shrink_kernel", "step of x", "p_x += BLOCK_K * stride_xk", "p_x += BLOCK_K"),
    ("_mixed_shrink_kernel", "step of B", "step = BLOCK_K * R", "step = BLOCK_K + 0 * R"),
    ("_mixed_shrink_kernel", "rank stride of A", "ranks[None, :] * K", "ranks[None, :] * R"),
    ("_mixed_shrink_kernel", "mask of other rows", "keep_mask(seed_ptr, first_row,", "keep_mask(seed_ptr, local,"),
    ("_mixed_shrink_kernel", "mask of other columns", "first + k, threshold", "first + k + 8, threshold"),
    (
        "_mixed_shrink_kernel",
        "another's threshold",
        "tl.load(p_segment + THRESHOLD)",
        "tl.load(segments_ptr + THRESHOLD)",
    ),
    ("_mixed_shrink_kernel", "S of one run", "depth_run * elements", "depth_run * 0"),
    ("_mixed_shrink_kernel", "S where another's is", "tl.load(p_segment + ELEMENTS_BEFORE)", "0"),
    ("_mixed_shrink_kernel", "fp16 sums", "MODE, HALF, UPCAST)\n", f"MODE, HALF, UPCAST){ROUND_TO_HALF}\n"),
]

EXPAND = [
    ("_mixed_expand_kernel", "last row", "inside < count", "inside < count - 1"),
    ("_mixed_expand_kernel", "last column", "columns < N\n", "columns < N - 1\n"),
    ("_mixed_expand_kernel", "last rank", "ranks < R\n", "ranks < R - 1\n"),
    ("_mixed_expand_kernel", "last chunk of ranks", "(0, R.to(tl.int32),", "(0, min(R, BLOCK_R).to(tl.int32),"),
    ("_mixed_expand_kernel", "the first adapter for all", "tl.load(p_segment + RANKS_BEFORE)", "0"),
    ("_mixed_expand_kernel", "S of the first adapter", "tl.load(p_segment + ELEMENTS_BEFORE)", "0"),
    ("_mixed_expand_kernel", "no residual", "if HAS_RESIDUAL:", "if False:"),
    ("_mixed_expand_kernel", "row stride of the residual", "rows[:, None] * stride_rm", "rows[:, None] * N"),
    ("_mixed_expand_kernel", "written to sorted rows", "out_ptr + rows[:, None] * N", "out_ptr + inside[:, None] * N"),
    ("_mixed_expand_kernel", "no scale", "factors_ptr + 2 * segment)", "factors_ptr + 2 * segment) * 0 + 1"),
    ("_mixed_expand_kernel", "another's scale", "factors_ptr + 2 * segment)", "factors_ptr)"),
    ("_mixed_expand_kernel", "dX scaled twice", "    if OF_B:\n        acc *= ", "    if True:\n        acc *= "),
    ("_mixed_expand_kernel", "kept values not scaled", "acc * tl.load(factors_ptr + 2 * segment + 1)", "acc"),
    ("_mixed_expand_kernel", "mask of other rows", "keep_mask(seed_ptr, first_row,", "keep_mask(seed_ptr, local,"),
    ("_mixed_expand_kernel", "mask of other columns", "column_start, threshold", "column_start + 8, threshold"),
    (
        "_mixed_expand_kernel",
        "row of B",
        "columns[None, :] * R + ranks[:, None]",
        "columns[None, :] * R + ranks[:, None] * 0",
    ),
    ("_mixed_expand_kernel", "row of A", "ranks[:, None] * N + columns", "ranks[:, None] * R + columns"),
    ("_mixed_expand_kernel", "sign", "dot(p, q, acc,", "dot(-p, q, acc,"),
    ("expand", "no rows of no adapter", "residual is out else (", "True else ("),
]

GRAD_COLUMNS = [
    ("_mixed_grad_columns_kernel", "last row", "inside < length", "inside < length - 1"),
    ("_mixed_grad_columns_kernel", "last column", "columns < K,", "columns < K - 1,"),
    ("_mixed_grad_columns_kernel", "last rank", "ranks < R\n", "ranks < R - 1\n"),
    ("_mixed_grad_columns_kernel", "last block of rows", "(0, length, BLOCK_M)", "(0, length - BLOCK_M, BLOCK_M)"),
    ("_mixed_grad_columns_kernel", "sum forgotten", "dot(t, x, acc,", "dot(t, x, acc * 0,"),
    ("_mixed_grad_columns_kernel", "sign", "dot(t, x, acc,", "dot(-t, x, acc,"),
    ("_mixed_grad_columns_kernel", "T of the first adapter", "tl.load(p_segment + ELEMENTS_BEFORE)", "0"),
    ("_mixed_grad_columns_kernel", "T of the first run", "+ start * R", "+ start * 0"),
    ("_mixed_grad_columns_kernel", "x of the first run", "tl.load(p_segment) + start\n", "tl.load(p_segment)\n"),
    ("_mixed_grad_columns_kernel", "row stride of x", "rows[:, None] * stride_xm", "rows[:, None] * K"),
    (
        "_mixed_grad_columns_kernel",
        "mask of the first rows",
        "first_row + offset, column_start",
        "first_row, column_start",
    ),
    ("_mixed_grad_columns_kernel", "x not masked", "tl.where(keep, x, 0.0)", "tl.where(keep, x, x)"),
    ("_mixed_grad_columns_kernel", "one run's place", "run * size", "run * 0"),
    ("_mixed_grad_columns_kernel", "dB not transposed", "columns[None, :] * R + ranks", "columns[None, :] + ranks"),
    (
        "_mixed_grad_columns_kernel",
        "fp16 sums",
        "x, acc, MODE, HALF, UPCAST)",
        f"x, acc, MODE, HALF, UPCAST){ROUND_TO_HALF}",
    ),
]

SUM = [
    ("_mixed_sum_kernel", "last run", "range((after - first).to(tl.int32))", "range((after - first - 1).to(tl.int32))"),
    ("_mixed_sum_kernel", "one run each", "acc += ", "acc = "),
    ("_mixed_sum_kernel", "first run only", "p_part += size", "p_part += 0"),
    ("_mixed_sum_kernel", "runs of the first adapter", "first * size", "first * 0"),
    ("_mixed_sum_kernel", "no scale of dB", "factors_ptr + 2 * segment)", "factors_ptr + 2 * segment) * 0 + 1"),
    ("_mixed_sum_kernel", "dA scaled twice", "if OF_B:", "if True:"),
    ("_mixed_sum_kernel", "kept values not scaled", "if DROPOUT:", "if False:"),
    ("_mixed_sum_kernel", "another's rate", "factors_ptr + 2 * segment + 1", "factors_ptr + 1"),
    ("_mixed_sum_kernel", "written over the first adapter", "tl.load(p_segment + RANKS_BEFORE)", "0"),
    ("_mixed_sum_kernel", "last rank", "tl.load(p_segment + RANK) * K", "(tl.load(p_segment + RANK) - 1) * K"),
    ("_mixed_sum_kernel", "every second block", "tl.program_id(0).to(tl.int64)", "(tl.program_id(0) // 2 * 2)"),
    ("grad_columns", "last block of places", "cdiv(size, block)", "max(1, size // block)"),
    ("_mixed_sum_kernel", "sign", "places, acc, mask=mask", "places, -acc, mask=mask"),
    ("_mixed_sum_kernel", "starts at one", "tl.zeros([BLOCK], dtype=tl.float32)", "tl.full([BLOCK], 1.0, tl.float32)"),
]

SHARED = [
    (
        "_rows_at",
        "sorted rows for the batch's",
        "sorted_rows // S, mask=mask, other=0) * S",
        "0 * S, mask=mask, other=0) * S",
    ),
    ("_rows_at", "one token", "+ sorted_rows % S", "+ 0 * S"),
    ("_multiple", "ranks rounded down", "x // UNIT * UNIT", "x // (2 * UNIT) * (2 * UNIT)"),
    ("order", "samples in the batch's order", "[*(each for", "[*(0 * each for"),
    ("segments", "rows before", "first + count, ranks", "first + 1, ranks"),
    ("segments", "ranks before", "ranks + rank", "ranks + 1"),
    ("segments", "elements before", "elements + count * rank", "elements + count"),
    ("segments", "no dropout", "dropout_threshold(p))", "0)"),
    ("factors", "one scaling", "zip(layout.scalings, keep", "zip(layout.scalings[:1] * len(keep), keep"),
    ("blocks", "last block of rows", "range(0, count, size)", "range(0, max(1, count - size), size)"),
    ("runs", "last run", "range(0, count, length)", "range(0, max(1, count - length), length)"),
    ("runs", "rows of a run", "min(length, count - first)", "min(length, count)"),
]

KERNELS = {"shrink": SHRINK, "expand": EXPAND, "grad_columns": GRAD_COLUMNS, "sum": SUM, "shared": SHARED}
