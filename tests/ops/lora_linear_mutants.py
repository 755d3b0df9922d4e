"""Mistakes to plant in the kernels of `lora_linear`: (function, what goes wrong, text, text with the mistake).

A function is a kernel or its launcher; the text must occur in it exactly once. No mistake leaves the tensors' storages.
"""

ROUND_TO_HALF = ".to(tl.float16).to(tl.float32)"

SHRINK = [
    ("_shrink_kernel", "last column of x", "inner < K - k", "inner < K - k - 1"),
    ("_shrink_kernel", "one column too many", "inner < K - k", "inner <= K - k"),
    (
        "_shrink_kernel",
        "last block of columns",
        "(0, depth_per_program, BLOCK_K)",
        "(0, depth_per_program - BLOCK_K, BLOCK_K)",
    ),
    ("_shrink_kernel", "last rank", "& (ranks < R)[None, :], other", "& (ranks < R - 1)[None, :], other"),
    ("_shrink_kernel", "scale off by 1 %", "acc * scale", "acc * (scale * 0.99)"),
    ("_shrink_kernel", "no scale", "acc * scale", "acc"),
    ("_shrink_kernel", "sign", "acc * scale", "acc * -scale"),
    ("_shrink_kernel", "row stride of x", "rows[:, None] * stride_xm", "rows[:, None] * K"),
    ("_shrink_kernel", "column stride of x", "inner[None, :] * stride_xk", "inner[None, :]"),
    ("_shrink_kernel", "row stride of A", "ranks[None, :] * stride_ar", "ranks[None, :] * K"),
    ("_shrink_kernel", "step of x", "p_x += BLOCK_K * stride_xk", "p_x += BLOCK_K"),
    ("_shrink_kernel", "step of A", "p_a += BLOCK_K * stride_ak", "p_a += BLOCK_K"),
    ("_shrink_kernel", "mask of other rows", "keep_mask(seed_ptr, row_start,", "keep_mask(seed_ptr, row_start + 1,"),
    ("_shrink_kernel", "mask of other columns", "first + k, threshold", "first + k + 8, threshold"),
    ("_shrink_kernel", "mask of the first columns", "first + k, threshold", "first, threshold"),
    ("_shrink_kernel", "no dropout", "if DROPOUT:", "if False:"),
    ("_shrink_kernel", "fp16 sums", "MODE, HALF, UPCAST)\n", f"MODE, HALF, UPCAST){ROUND_TO_HALF}\n"),
    ("_shrink_kernel", "start of a run", "depth_run * depth_per_program", "depth_run * BLOCK_K"),
    ("_shrink_kernel", "S of one run", "(depth_run * M + rows)", "(depth_run * 0 + rows)"),
    ("shrink", "kept values not scaled", "scale * keep_scale", "scale"),
    ("tail", "kept values not scaled", "scale * keep_scale", "scale"),
    ("_shrink_launch", "last block of rows", "cdiv(rows, tiles.rows)", "max(1, rows // tiles.rows)"),
]

TAIL = [
    ("_tail_kernel", "last row", "rows < M", "rows < M - 1"),
    ("_tail_kernel", "last column", "columns < N", "columns < N - 1"),
    ("_tail_kernel", "last rank of S", "m_m[:, None] & (ranks < R)", "m_m[:, None] & (ranks < R - 1)"),
    ("_tail_kernel", "last chunk of ranks", "(0, R, BLOCK_R,", "(0, min(R, BLOCK_R), BLOCK_R,"),
    ("_tail_kernel", "last input", "inner < K - k", "inner < K - k - 1"),
    ("_tail_kernel", "last block of inputs", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    ("_tail_kernel", "no scale", "acc *= scale", "acc *= 1"),
    ("_tail_kernel", "scale off by 1 %", "acc *= scale", "acc *= scale * 0.99"),
    ("_tail_kernel", "mask inverted", "tl.where(keep, acc, 0.0)", "tl.where(keep, 0.0, acc)"),
    ("_tail_kernel", "mask of other rows", "row_start, column_start, th", "row_start + BLOCK_M, column_start, th"),
    ("_tail_kernel", "mask of other columns", "column_start, threshold", "column_start + 8, threshold"),
    ("_tail_kernel", "no bias", "if HAS_BIAS:", "if False:"),
    ("_tail_kernel", "one bias for all", "bias_ptr + columns,", "bias_ptr + columns * 0,"),
    ("_tail_kernel", "no residual", "if HAS_RESIDUAL:", "if False:"),
    ("_tail_kernel", "first row of the residual", "rows[:, None] * stride_rm", "rows[:, None] * 0"),
    ("_tail_kernel", "group of tiles", "within % group_rows", "within % GROUP"),
    ("_tail_kernel", "row stride of B", "columns[None, :] * stride_qn", "columns[None, :] * R"),
    ("_tail_kernel", "column stride of W", "inner[:, None] * stride_wk", "inner[:, None]"),
    ("_tail_kernel", "step of W", "p_w += BLOCK_K * stride_wk", "p_w += BLOCK_K"),
    ("_tail_kernel", "sign", "dot(p, q, acc,", "dot(-p, q, acc,"),
    ("_tail_kernel", "fp16 sums", "BASE_MODE, HALF, UPCAST)\n", f"BASE_MODE, HALF, UPCAST){ROUND_TO_HALF}\n"),
]

GRAD_B_AND_T = [
    ("_grad_b_and_t_kernel", "last row", "rows < M", "rows < M - 1"),
    ("_grad_b_and_t_kernel", "last output", "columns < N", "columns < N - 1"),
    ("_grad_b_and_t_kernel", "last rank", "ranks < R", "ranks < R - 1"),
    ("_grad_b_and_t_kernel", "T of one block of columns", "(column_block * M + rows)", "(column_block * 0 + rows)"),
    ("_grad_b_and_t_kernel", "start of a run", "row_run * rows_per_program", "row_run * BLOCK_M"),
    (
        "_grad_b_and_t_kernel",
        "last block of rows",
        "(0, rows_per_program, BLOCK_M)",
        "(0, rows_per_program - BLOCK_M, BLOCK_M)",
    ),
    ("_grad_b_and_t_kernel", "sum forgotten", "dot(s, dy, acc,", "dot(s, dy, acc * 0,"),
    ("_grad_b_and_t_kernel", "sign of T", "dot(b, tl.trans(dy),", "dot(-b, tl.trans(dy),"),
    ("_grad_b_and_t_kernel", "bias' sum forgotten", "total += ", "total = "),
    ("_grad_b_and_t_kernel", "row stride of dY", "rows[:, None] * stride_dm", "rows[:, None] * N"),
    ("_grad_b_and_t_kernel", "column stride of dY", "columns[None, :] * stride_dn", "columns[None, :]"),
    ("_grad_b_and_t_kernel", "row stride of B", "columns[None, :] * stride_bn", "columns[None, :] * R"),
    ("_grad_b_and_t_kernel", "column stride of B", "ranks[:, None] * stride_br", "ranks[:, None]"),
    ("_grad_b_and_t_kernel", "dB of one run", "(row_run * N + columns)[", "(row_run * 0 + columns)["),
    ("_grad_b_and_t_kernel", "bias of one run", "dbias_ptr + row_run * N + columns", "dbias_ptr + columns"),
    (
        "_grad_b_and_t_kernel",
        "fp16 sums",
        "dy, acc, MODE, HALF, UPCAST)",
        f"dy, acc, MODE, HALF, UPCAST){ROUND_TO_HALF}",
    ),
    ("grad_b_and_t", "no scale of T", "s.dtype, device, scale,", "s.dtype, device, 1.0,"),
    ("grad_b_and_t", "scale of T off by 1 %", "s.dtype, device, scale,", "s.dtype, device, scale * 0.99,"),
    ("grad_b_and_t", "no scale of dB", "b.dtype, device, scale,", "b.dtype, device, 1.0,"),
    ("grad_b_and_t", "scale of dB off by 1 %", "b.dtype, device, scale,", "b.dtype, device, scale * 0.99,"),
    ("grad_b_and_t", "sums not added up", "add_up(own)", "own.clear()"),
]

GRAD_COLUMNS = [
    ("_grad_columns_kernel", "last row", "rows < M", "rows < M - 1"),
    ("_grad_columns_kernel", "last input", "columns < K", "columns < K - 1"),
    ("_grad_columns_kernel", "last rank", "ranks < R", "ranks < R - 1"),
    ("_grad_columns_kernel", "start of a run", "row_run * rows_per_program", "row_run * BLOCK_M"),
    (
        "_grad_columns_kernel",
        "last block of rows",
        "(0, rows_per_program, BLOCK_M)",
        "(0, rows_per_program - BLOCK_M, BLOCK_M)",
    ),
    ("_grad_columns_kernel", "sum forgotten", "dot(t, x, acc,", "dot(t, x, acc * 0,"),
    ("_grad_columns_kernel", "sign of dA", "dot(t, x, acc,", "dot(-t, x, acc,"),
    ("_grad_columns_kernel", "mask of the first rows", "first + offset, column_start", "first, column_start"),
    ("_grad_columns_kernel", "mask of other columns", "column_start, threshold", "column_start + 8, threshold"),
    ("_grad_columns_kernel", "tail's kept values not scaled", "tail * keep_scale", "tail"),
    ("_grad_columns_kernel", "tail not masked", "tl.where(keep, tail * keep_scale, 0.0)", "tail * keep_scale"),
    ("_grad_columns_kernel", "x not masked", "tl.where(keep, x, 0.0)", "tl.where(keep, x, x)"),
    ("_grad_columns_kernel", "row stride of x", "rows[:, None] * stride_xm", "rows[:, None] * K"),
    ("_grad_columns_kernel", "column stride of x", "columns[None, :] * stride_xk", "columns[None, :]"),
    ("_grad_columns_kernel", "row stride of A", "ranks[:, None] * stride_ar", "ranks[:, None] * K"),
    ("_grad_columns_kernel", "dA of one run", "row_run * R * K", "row_run * 0"),
    ("_grad_columns_kernel", "bias' sum forgotten", "total += ", "total = "),
    ("_grad_columns_kernel", "fp16 sums", "x, acc, MODE, HALF, UPCAST)", f"x, acc, MODE, HALF, UPCAST){ROUND_TO_HALF}"),
    ("grad_columns", "kept values not scaled", "shares, scale * keep_scale", "shares, scale"),
    ("grad_columns", "no scale", "shares, scale * keep_scale", "shares, keep_scale"),
    ("grad_columns", "sums not added up", "add_up(sums)", "sums.clear()"),
    ("_grad_columns_kernel", "no scale of the whole dA", "acc *= keep_scale", "acc *= 1"),
    ("_grad_columns_kernel", "shares scaled too", "if WHOLE:", "if True:"),
    ("grad_columns", "dB not transposed", "(1, rank) if transposed", "(columns, 1) if transposed"),
]

SUM_PARTIALS = [
    ("_sum_block", "last part", "range(parts)", "range(parts - 1)"),
    ("_sum_block", "one part each", "acc += ", "acc = "),
    ("_sum_block", "first part only", "p_part += size", "p_part += 0"),
    ("_sum_block", "parts overlap", "p_part += size", "p_part += size - 1"),
    (
        "_sum_block",
        "starts at one",
        "acc = tl.zeros([BLOCK], dtype=tl.float32)",
        "acc = tl.full([BLOCK], 1.0, tl.float32)",
    ),
    ("_sum_block", "no scale", "acc * scale", "acc"),
    ("_sum_block", "scale off by 1 %", "acc * scale", "acc * (scale * 0.99)"),
    ("_sum_block", "sign", "acc * scale", "acc * -scale"),
    (
        "_sum_block",
        "last place not read",
        "tl.load(p_part, mask=places < size",
        "tl.load(p_part, mask=places < size - 1",
    ),
    (
        "_sum_block",
        "last place not written",
        "acc * scale, mask=places < size",
        "acc * scale, mask=places < size - 1",
    ),
    ("_sum_block", "every second block", "tl.program_id(0).to(tl.int64)", "(tl.program_id(0) // 2 * 2)"),
    ("_sum_block", "fp16 sums", "p_part += size", f"acc = acc{ROUND_TO_HALF}\n        p_part += size"),
    ("_sum_partials_kernel", "the second sum left out", "if COUNT > 1:", "if False:"),
    ("_sum_partials_kernel", "the third sum left out", "if COUNT > 2:", "if False:"),
    ("_sum_partials_kernel", "another's scale", "out_1, scale_1, count_1", "out_1, scale_2, count_1"),
    ("_sum_partials_kernel", "another's parts", "_sum_block(parts_1,", "_sum_block(parts_0,"),
    ("_sum_partials_kernel", "another's size", "scale_1, count_1, size_1", "scale_1, count_1, size_0"),
    ("add_up", "last block", "cdiv(max(sizes), BLOCK)", "max(1, max(sizes) // BLOCK)"),
    ("add_up", "blocks of the smallest sum", "cdiv(max(sizes), BLOCK)", "cdiv(min(sizes), BLOCK)"),
    ("add_up", "one sum too few", "BLOCK), number)", "BLOCK), max(1, number - 1))"),
    ("add_up", "one part too few", "*counts, *zeros", "*(each - 1 for each in counts), *zeros"),
    ("shares_or_whole", "a whole one added up", "if runs > 1:", "if runs > 0:"),
    ("shares", "not scaled", "out, scale, runs", "out, 1.0, runs"),
]

SHARED = [
    ("keep_mask", "stale seed", "tl.load(seed_ptr)", "tl.load(seed_ptr) * 0"),
    ("keep_mask", "half of the seed", "tl.load(seed_ptr)", "tl.load(seed_ptr) & 0xFFFFFFFF"),
    (
        "keep_mask",
        "halves of a word swapped",
        "tl.join(words & 0xFFFF, words >> 16)",
        "tl.join(words >> 16, words & 0xFFFF)",
    ),
    ("keep_mask", "order of the words", "tl.join(word_0, word_2)", "tl.join(word_2, word_0)"),
    ("keep_mask", "columns repeat", "column_start // 8 + ", "column_start // 64 + "),
    ("keep_mask", "rows shifted", "row_start.to(tl.int64) + ", "row_start.to(tl.int64) + 1 + "),
    ("keep_mask", "keeps what it should drop", ">= threshold", "< threshold"),
    ("keep_mask", "one round of Philox", "PHILOX_ROUNDS,", "1,"),
    ("dot", "low half of B in bf16", "b_rest = b - b_high.to(tl.float32)", "b_rest = b - b"),
    ("dot", "high halves in bf16", "acc = _product(a_high, b_high, acc, UPCAST)", "acc = acc"),
    ("rank_block", "ranks beyond 16", "max(16, 1 << (rank - 1).bit_length())", "16"),
    (
        "Dropout",
        "scaled by another rate",
        "(DROPOUT_LEVELS - self.threshold)",
        "(DROPOUT_LEVELS - self.threshold // 2)",
    ),
]

KERNELS = {"shrink": SHRINK, "tail": TAIL, "grad_b_and_t": GRAD_B_AND_T, "grad_columns": GRAD_COLUMNS}
KERNELS |= {"sum_partials": SUM_PARTIALS, "shared": SHARED}

# In which problem of the test and with which gradients each mistake is found soonest, by what goes wrong or the
# function; the others of a kernel by its first.
SOONEST = {
    "shrink": {(0, ()): (), (0, ("x",)): ("tail",), (5, ()): ("start of a run", "S of one run")},
    "tail": {
        (0, ()): (),
        (0, ("x",)): ("mask inverted", "mask of other rows", "mask of other columns"),
        (2, ()): ("no residual", "first row of the residual"),
        (3, ()): ("last chunk of ranks",),
    },
    "grad_b_and_t": {
        (0, ("bias", "lora_B")): (),
        (0, ("lora_A",)): (
            "T of one block of columns", "sign of T", "row stride of B", "column stride of B", "no scale of T",
            "scale of T off by 1 %",
        ),
    },
    "grad_columns": {
        (0, ("lora_A",)): (),
        (1, ("x", "lora_A")): ("tail's kept values not scaled", "tail not masked", "row stride of A"),
        (3, ("bias", "lora_B")): ("bias' sum forgotten", "no scale", "dB not transposed"),
        (6, ("lora_A",)): ("no scale of the whole dA",),
    },
    "sum_partials": {
        (0, ("bias", "lora_A", "lora_B")): (),
        (0, ("lora_A",)): ("every second block", "last block"),
        (6, ("lora_A",)): ("a whole one added up",),
    },
    "shared": {
        (0, ()): (),
        (2, ()): ("high halves in bf16",),
        (2, ("lora_B",)): ("low half of B in bf16",),
        (3, ()): ("ranks beyond 16",),
    },
}  # fmt: skip
