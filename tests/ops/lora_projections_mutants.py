"""Mistakes to plant in the kernels of `lora_projections`: (function, what goes wrong, text, text with the mistake).

A function is a kernel, a part of one, or its launcher; the text must occur in it exactly once.
"""

from tests.ops.lora_linear_mutants import ROUND_TO_HALF

SHRINK = [
    ("_shrunk", "last rank", "(ranks < R)", "(ranks < R - 1)"),
    ("_shrunk", "row of A", "ranks[None, :] * K", "ranks[None, :] * (K - 1)"),
    ("_shrunk", "x not masked", "threshold, BLOCK_M, BLOCK_K), x, 0.0)", "threshold, BLOCK_M, BLOCK_K), x, x)"),
    ("_shrunk", "sum forgotten", "dot(x, a, acc,", "dot(x, a, acc * 0,"),
    ("_shrunk", "fp16 sums", "MODE, HALF, UPCAST)", f"MODE, HALF, UPCAST){ROUND_TO_HALF}"),
    ("_store_rows", "last row", "(rows < M)", "(rows < M - 1)"),
    ("_store_rows", "last rank", "(ranks < R)", "(ranks < R - 1)"),
    ("_store_rows", "ranks of the next projection", "(ranks < R)", "(ranks < BLOCK_R)"),
    ("_store_rows", "kept values not scaled", "acc * scale", "acc"),
    ("_store_rows", "row of S", "rows[:, None] * R", "rows[:, None] * (R + 1)"),
    (
        "_shrink_all_kernel", "last block of columns",
        "(0, depth_per_program, BLOCK_K)",
        "(0, depth_per_program - 1, 2 * BLOCK_K)",
    ),
    ("_shrink_all_kernel", "last column of x", "inner < K\n", "inner < K - 1\n"),
    ("_shrink_all_kernel", "step of x", "p_x += BLOCK_K * stride_xk", "p_x += BLOCK_K"),
    ("_shrink_all_kernel", "step of A", "inner += BLOCK_K", "inner += 0"),
    ("_shrink_all_kernel", "row stride of x", "rows[:, None] * stride_xm", "rows[:, None] * K"),
    ("_shrink_all_kernel", "the first A for the second", "x, acc_1, a_1,", "x, acc_1, a_0,"),
    ("_shrink_all_kernel", "the second's mask for the third", "a_2, seed_2,", "a_2, seed_0,"),
    ("_shrink_all_kernel", "another's threshold", "seed_2, threshold_2,", "seed_2, threshold_0,"),
    ("_shrink_all_kernel", "a mask for the second", "DROPS // 2 % 2 == 1", "DROPS % 2 == 1"),
    ("_shrink_all_kernel", "no mask for the third", "DROPS // 4 % 2 == 1", "False"),
    ("_shrink_all_kernel", "another's scale", "scale_2, rows", "scale_0, rows"),
    (
        "_shrink_all_kernel", "the third where the second is",
        "p_out + M_64 * (R_0 + R_1), scale_2",
        "p_out + M_64 * R_0, scale_2",
    ),
    ("_shrink_all_kernel", "runs over one another", "depth_run * M_64 * (", "depth_run * 0 * ("),
    ("shrink_all", "runs not added up", "add_up(sums)", "sums.clear()"),
]  # fmt: skip

COLUMNS = [
    ("_load_columns", "last rank", "(ranks < R)", "(ranks < R - 1)"),
    ("_load_columns", "row of A", "ranks[:, None] * K", "ranks[:, None] * (K - 1)"),
    ("_with_rows", "last row", "(rows < M)", "(rows < M - 1)"),
    ("_with_rows", "last rank", "(ranks < R)", "(ranks < R - 1)"),
    ("_with_rows", "row of T", "rows[None, :] * R", "rows[None, :] * (R - 1)"),
    ("_with_rows", "x not masked", "tl.where(keep, x, 0.0)", "tl.where(keep, x, x)"),
    ("_with_rows", "the term not masked", "tl.where(keep, term * keep_scale, 0.0)", "term * keep_scale"),
    ("_with_rows", "the term not scaled", "term * keep_scale", "term"),
    ("_with_rows", "the term in the place of the sum", "tail += tl.where", "tail = tl.where"),
    ("_with_rows", "a sum forgotten", "acc = dot(t, x, acc,", "acc = dot(t, x, acc * 0,"),
    ("_store_columns", "last column", "(columns < K)", "(columns < K - 1)"),
    ("_store_columns", "kept values not scaled", "acc * keep_scale", "acc"),
    (
        "_grad_all_columns_kernel", "last block of rows",
        "(0, rows_per_program, BLOCK_M)",
        "(0, rows_per_program - BLOCK_M, BLOCK_M)",
    ),
    ("_grad_all_columns_kernel", "row stride of x", "rows[:, None] * stride_xm", "rows[:, None] * K"),
    ("_grad_all_columns_kernel", "mask of the first rows", "first + offset\n", "first + offset * 0\n"),
    ("_grad_all_columns_kernel", "the first T for the second", "b_1, t_1,", "b_1, t_0,"),
    ("_grad_all_columns_kernel", "the first A for the third", "_load_columns(a_2,", "_load_columns(a_0,"),
    ("_grad_all_columns_kernel", "another's seed", "t_2, seed_2,", "t_2, seed_0,"),
    ("_grad_all_columns_kernel", "another's scale of the term", "scale_2, threshold_2,", "scale_0, threshold_2,"),
    ("_grad_all_columns_kernel", "a mask for the second", "DROPS // 2 % 2 == 1", "DROPS % 2 == 1"),
    ("_grad_all_columns_kernel", "tail of the last rows", "rows[:, None] * K_64", "(rows % BLOCK_M)[:, None] * K_64"),
    (
        "_grad_all_columns_kernel", "dA of the third in the second's place",
        "p_out + K_64 * (R_0 + R_1),",
        "p_out + K_64 * R_0,",
    ),
    ("_grad_all_columns_kernel", "runs over one another", "row_run * K_64 * (", "row_run * 0 * ("),
    ("_grad_all_columns_launch", "places of columns", "ranks, by_rank=True)", "ranks, by_rank=False)"),
]  # fmt: skip

TAIL = [
    ("_with_term", "last row", "(rows < M)", "(rows < M - 1)"),
    ("_with_term", "last column", "(columns < K)", "(columns < K - 1)"),
    ("_with_term", "row of T", "rows[:, None] * R", "rows[:, None] * (R - 1)"),
    ("_with_term", "row of A", "ranks[:, None] * K", "ranks[:, None] * (K - 1)"),
    ("_with_term", "last chunk of ranks", "tl.range(0, R, BLOCK_R,", "tl.range(0, min(R, BLOCK_R), BLOCK_R,"),
    ("_with_term", "not masked", "tl.where(keep, term * keep_scale, 0.0)", "term * keep_scale"),
    ("_with_term", "not scaled", "term * keep_scale", "term"),
    ("_with_term", "the others forgotten", "term = acc + tl.where", "term = tl.where"),
    ("_with_term", "sign", "dot(t, a, term,", "dot(-t, a, term,"),
    (
        "_with_term", "mask of other columns",
        "row_start, column_start, threshold",
        "row_start, column_start + 8, threshold",
    ),
    ("_tail_all_kernel", "the first T for the third", "acc, t_2,", "acc, t_0,"),
    ("_tail_all_kernel", "another's seed", "a_2, seed_2,", "a_2, seed_0,"),
    ("_tail_all_kernel", "a mask for the second", "DROPS // 2 % 2 == 1", "DROPS % 2 == 1"),
    ("_tail_all_kernel", "not added", "if ONTO:", "if False:"),
    ("_tail_all_kernel", "tiles in a square", "// blocks).to", "// blocks * 0).to"),
    ("_tail_all_kernel", "row of dX", "rows[:, None] * K_64", "rows[:, None] * (K_64 - 1)"),
    ("_tail_all_launch", "last tile", "cdiv(columns, tiles.columns)", "max(1, columns // tiles.columns)"),
]  # fmt: skip

KERNELS = {"shrink": SHRINK, "columns": COLUMNS, "tail": TAIL}

SEVERAL = [  # in what their launches are made of
    ("four", "the rest first", "[*values, *_PADDING[rest][len(values)]]", "[*_PADDING[rest][len(values)], *values]"),
    ("mask_arguments", "the first's mask alone", "1 << p for", "1 for"),
    ("mask_arguments", "another's threshold", "each.threshold for each in dropouts", "0 for each in dropouts"),
    ("places_of", "one over the other", "start += rank * length", "start += length"),
    ("places_of", "rows of columns", "((rank, length), (length, 1), start)", "((rank, length), (1, rank), start)"),
    ("matrices_of", "all in the first's place", "first + start)", "first)"),
    ("block_and_rank", "the smallest rank", "rank_block(max(ranks))", "rank_block(min(ranks))"),
]
