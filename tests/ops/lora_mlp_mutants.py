"""Mistakes to plant in the kernels of `lora_mlp`: (function, what goes wrong, text, text with the mistake).

A function is a kernel, a part of one or its launcher; the text must occur in it exactly once. Those of an activation
begin with its name.
"""

from tests.ops.lora_linear_mutants import ROUND_TO_HALF

FORWARD_KERNEL, BACKWARD_KERNEL = "_gated_forward_kernel", "_gated_backward_kernel"
STORE = "tl.store(h_ptr + places, h, mask=m_h)"
KEEP = "keep_mask(seed_ptr, row_start, first + offset, threshold, BLOCK_M, BLOCK_H)"
MASK = "first + offset, column_start, threshold"
SUM = "dot(t, h, da, MODE, HALF, UPCAST)"

ACTIVATION = [
    (
        "_activation",
        "silu: twice as steep",
        "(1.0 + tl.exp(-g))\n        return g * gate, gate * (1",
        "(1.0 + tl.exp(-2 * g))\n        return g * gate, gate * (1",
    ),
    ("_activation", "silu: sign of the exponent", "1.0 / (1.0 + tl.exp(-g))", "1.0 / (1.0 + tl.exp(g))"),
    ("_activation", "silu: act' without its second term", "gate * (1.0 + g * (1.0 - gate))", "gate"),
    ("_activation", "silu: sign in act'", "gate * (1.0 + g * (1.0 - gate))", "gate * (1.0 - g * (1.0 - gate))"),
    ("_activation", "gelu: argument", "g * 0.7071067811865476", "g"),
    ("_activation", "gelu: act' without the density", "gate + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))", "gate"),
    ("_activation", "gelu: density", "tl.exp(-0.5 * g * g)", "tl.exp(-g * g)"),
    ("_activation", "gelu_tanh: of half", "tl.exp(-1.5957691216057308 *", "tl.exp(-0.7978845608028654 *"),
    ("_activation", "gelu_tanh: no cube", "0.044715 * g * g * g", "0.0 * g"),
    ("_activation", "gelu_tanh: the cube's derivative", "0.134145 * g * g", "0.044715 * g * g"),
    ("_activation", "relu2: act' of relu", "2.0 * positive", "tl.where(g < 0.0, 0.0, 2.0)"),
    ("_activation", "relu2: half of act'", "2.0 * positive", "positive"),
    ("_activation", "relu2: of the negative", "tl.where(g < 0.0, 0.0, g)", "tl.where(g < 0.0, g, 0.0)"),
]

FORWARD = [
    (FORWARD_KERNEL, "last column", "columns < H\n", "columns < H - 1\n"),
    (FORWARD_KERNEL, "last row", "rows < M\n", "rows < M - 1\n"),
    (FORWARD_KERNEL, "last rank", "(ranks < R)[None, :], other", "(ranks < R - 1)[None, :], other"),
    (FORWARD_KERNEL, "last block of columns", "_per_program, BLOCK_H)", "_per_program - BLOCK_H, BLOCK_H)"),
    (FORWARD_KERNEL, "up left out", "(act * u).to(HALF)", "act.to(HALF)"),
    (FORWARD_KERNEL, "gate for up", "up_ptr + places", "gate_ptr + places"),
    (FORWARD_KERNEL, "sign", "(act * u).to(HALF)", "(-act * u).to(HALF)"),
    (FORWARD_KERNEL, "h is dropped as well", STORE, STORE.replace("s, h,", f"s, tl.where({KEEP}, h, 0.0),")),
    (FORWARD_KERNEL, "S of the undropped", "tl.where(keep, h, 0.0)", "tl.where(keep, h, h)"),
    (FORWARD_KERNEL, "mask of other rows", "keep_mask(seed_ptr, row_start,", "keep_mask(seed_ptr, row_start + 1,"),
    (FORWARD_KERNEL, "mask of the first columns", "first + offset, threshold", "first, threshold"),
    (FORWARD_KERNEL, "kept values not scaled", "acc * keep_scale", "acc"),
    (FORWARD_KERNEL, "rank stride of A", "ranks[None, :] * stride_ar", "ranks[None, :] * H"),
    (FORWARD_KERNEL, "column stride of A", "columns[:, None] * stride_ah", "columns[:, None]"),
    (FORWARD_KERNEL, "S of one run", "(column_run * M + rows)", "(column_run * 0 + rows)"),
    (FORWARD_KERNEL, "sum forgotten", "dot(h, a, acc,", "dot(h, a, acc * 0,"),
    (FORWARD_KERNEL, "fp16 sums", "MODE, HALF, UPCAST)\n    if", f"MODE, HALF, UPCAST){ROUND_TO_HALF}\n    if"),
    ("gated_forward", "runs of S not added up", "add_up(sums)", "sums.clear()"),
]  # fmt: skip

BACKWARD = [
    (BACKWARD_KERNEL, "last row", "(rows < M)[:, None]", "(rows < M - 1)[:, None]"),
    (BACKWARD_KERNEL, "last column", "(columns < H)[None, :]", "(columns < H - 1)[None, :]"),
    (BACKWARD_KERNEL, "last block of rows", "rows_per_program, BLOCK_M)", "rows_per_program - BLOCK_M, BLOCK_M)"),
    (BACKWARD_KERNEL, "up for gate", "tl.load(gate_ptr + places", "tl.load(up_ptr + places"),
    (BACKWARD_KERNEL, "up left out of dg", "dh * u * act_grad", "dh * act_grad"),
    (BACKWARD_KERNEL, "act for act' in dg", "dh * u * act_grad", "dh * u * act"),
    (BACKWARD_KERNEL, "sign of dg", "dh * u * act_grad", "-dh * u * act_grad"),
    (BACKWARD_KERNEL, "gate for act in du", "(dh * act).to(HALF)", "(dh * g).to(HALF)"),
    (BACKWARD_KERNEL, "sign of du", "(dh * act).to(HALF)", "(-dh * act).to(HALF)"),
    (BACKWARD_KERNEL, "dg and du exchanged", "dup_ptr + places, dup,", "dup_ptr + places, dgate,"),
    (BACKWARD_KERNEL, "no rank-r term in dh", "dh += term", "dh += 0.0 * term"),
    (BACKWARD_KERNEL, "sign of the rank-r term", "dh += term", "dh -= term"),
    (BACKWARD_KERNEL, "the term is not masked", "tl.where(keep, term * keep_scale, 0.0)", "term * keep_scale"),
    (BACKWARD_KERNEL, "the term is masked the other way", "tl.where(keep, term", "tl.where(~keep, term"),
    (BACKWARD_KERNEL, "the term's kept values not scaled", "term * keep_scale", "term"),
    (BACKWARD_KERNEL, "dA of the undropped", "tl.where(keep, h, 0.0)", "tl.where(keep, h, h)"),
    (BACKWARD_KERNEL, "dA of the gate alone", "h = (act * u).to(HALF)", "h = act.to(HALF)"),
    (BACKWARD_KERNEL, "mask of the first rows", MASK, MASK.replace(" + offset", "")),
    (BACKWARD_KERNEL, "mask of the first columns", MASK, MASK.replace("column_start", "0")),
    (BACKWARD_KERNEL, "dA forgotten", "dot(t, h, da,", "dot(t, h, da * 0,"),
    (BACKWARD_KERNEL, "dA in fp16", SUM, SUM + ROUND_TO_HALF),
    (BACKWARD_KERNEL, "up's S for gate", "gate_db, gate_s_ptr", "gate_db, up_s_ptr"),
    (BACKWARD_KERNEL, "up's gradient for gate", "dgate, gate_b,", "(dh * act).to(HALF), gate_b,"),
    (BACKWARD_KERNEL, "gate's gradient for up", "dup, up_b,", "dgate, up_b,"),
    (BACKWARD_KERNEL, "dA not transposed", "R_DOWN, 1, H, BLOCK_DOWN", "R_DOWN, R_DOWN, 1, BLOCK_DOWN"),
    ("_by_columns", "last rank", "ranks < R", "ranks < R - 1"),
    ("_by_columns", "stride of a rank", "ranks[:, None] * stride_r", "ranks[:, None]"),
    ("_by_rows", "last row", "rows < M", "rows < M - 1"),
    ("_one_side", "T of the first columns", "(column_block * M + rows)", "(column_block * 0 + rows)"),
    ("_one_side", "dB forgotten", "grad, db, MODE", "grad, db * 0, MODE"),
    ("_one_side", "sign of T", "dot(grad, tl.trans(b)", "dot(-grad, tl.trans(b)"),
    ("_store_sum", "the first run's place", "row_run * H * R", "row_run * 0"),
    ("_store_sum", "last rank", "ranks < R", "ranks < R - 1"),
    ("_side", "T not scaled", "(rows, rank), dtype, device, side.scale", "(rows, rank), dtype, device, 1"),
    ("_side", "dB not scaled", "(columns, rank), dtype, device, side.scale", "(columns, rank), dtype, device, 1"),
    ("gated_backward", "dA's kept values not scaled", "dh.device, keep_scale,", "dh.device, 1.0,"),
    ("gated_backward", "runs not added up", "add_up(sums)", "sums.clear()"),
]  # fmt: skip

KERNELS = {"activation": ACTIVATION, "forward": FORWARD, "backward": BACKWARD}
