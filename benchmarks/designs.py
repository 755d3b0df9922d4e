"""What each way of ours launches: operations and bytes kernel by kernel, with nothing fused that is not fused there.

Beside `fastpeft.cost`, which says what cannot be avoided. A tensor is moved once by a kernel that passes over it, so
the re-reads of tiles, which the caches serve, and partial sums are not counted; tests/benchmarks hold these figures
against the bytes that the kernels move in Triton's interpreter. Data and adapters have one type; a strategy is one of
`fastpeft.dispatch`, and "frozen" the layer without an adapter, in the vendor's library.
"""

from collections.abc import Callable
from typing import NamedTuple

from fastpeft.cost import FP32, NOTHING, SEED, TOKEN, Work
from fastpeft.plans import LORA_STRATEGIES

# What a kernel is limited by besides the machine: how near to its peak products come.
PRODUCT = "vendor's product"
TRITON_PRODUCT = "Triton product"
FLASH, FLASH_BACKWARD = "vendor's flash, forward", "vendor's flash, backward"
TRITON_FLASH, TRITON_FLASH_BACKWARD = "Triton flash, forward", "Triton flash, backward"
PASS = "pass over memory"
KINDS = (PRODUCT, TRITON_PRODUCT, FLASH, FLASH_BACKWARD, TRITON_FLASH, TRITON_FLASH_BACKWARD, PASS)


class Launch(NamedTuple):
    """One kernel: its name, or what it is to the vendor's library; the kind of its products; its work."""

    kernel: str
    kind: str
    work: Work


Launches = tuple[list[Launch], list[Launch]]  # forward, backward


def total(launches: list[Launch]) -> Work:
    return sum((launch.work for launch in launches), NOTHING)


# The LoRA linear. Above the first rank dY is read twice; above the second, by bytes of an element, the pass that makes
# dA leaves the term of dX to a kernel of its own. As in the kernels, which need Triton to be imported.
ONE_READ_RANK = 64
FUSED_TAIL_RANK = {2: 64, 4: 32}


def lora_linear(strategy: str, *, M: int, K: int, N: int, r: int, itemsize: int, dropout: float = 0.0) -> Launches:
    """`strategy`: "frozen", one of fastpeft.plans.LORA_STRATEGIES, or "rehomed": augment on a weight with room.
    Dropout's seed is read once by each kernel that masks; under "addmm", "augment" and "rehomed" a kernel of its own
    then prewrites the term of dX."""
    x, y, w, a, b, s = (size * itemsize for size in (M * K, M * N, N * K, r * K, r * N, M * r))
    seed = SEED if dropout else 0
    base = Launch("base", PRODUCT, Work(2 * M * N * K, x + w + y))
    if strategy == "frozen":
        return [base], [base]
    shrink = Launch("_shrink_kernel", PASS, Work(2 * M * r * K, x + a + s + seed))
    prewritten = [
        Launch("_tail_kernel", PASS, Work(2 * M * r * N, s + b + y)),
        Launch("base, beta=1", PRODUCT, Work(2 * M * N * K, x + w + 2 * y)),
    ]
    forward = {
        "prewrite": prewritten,
        "addmm": [base, Launch("addmm_", PASS, Work(2 * M * r * N, s + b + 2 * y))],
        "augment": _beside(M * N, M * (K + r), N * (K + r), K + r, itemsize),
        "rehomed": _beside(M * N, M * (K + r), N * (K + r), K + r, itemsize, written=N * r),
        "fused": [Launch("_tail_kernel", TRITON_PRODUCT, Work(2 * M * N * (K + r), x + w + s + b + y))],
        "persistent": [Launch("_persistent_tail_kernel", TRITON_PRODUCT, Work(2 * M * N * (K + r), x + w + s + b + y))],
    }[strategy]
    if r <= ONE_READ_RANK:
        gradients = [Launch("_grad_b_and_t_kernel", PASS, Work(4 * M * r * N, y + s + b + s + b))]
    else:
        gradients = [
            Launch("_shrink_kernel", PASS, Work(2 * M * r * N, y + b + s)),
            Launch("_grad_columns_kernel", PASS, Work(2 * M * r * N, y + s + b)),
        ]
    with_tail = strategy == "prewrite" and r <= FUSED_TAIL_RANK[itemsize]
    work = Work((4 if with_tail else 2) * M * r * K, x + s + a + with_tail * (a + x) + seed)
    gradients.append(Launch("_grad_columns_kernel", PASS, work))
    onto = Launch("base, beta=1", PRODUCT, Work(2 * M * N * K, y + w + 2 * x))
    if (strategy == "prewrite" and not with_tail) or (dropout and strategy in ("addmm", "augment", "rehomed")):
        gradients.append(Launch("_tail_kernel", PASS, Work(2 * M * r * K, s + a + x + seed)))
        return [shrink, *forward], [*gradients, onto]
    fused = Work(2 * M * K * (N + r), y + w + s + a + x + seed)
    gradients += {
        "prewrite": [onto],
        "addmm": [base, Launch("addmm_", PASS, Work(2 * M * r * K, s + a + 2 * x))],
        "augment": _beside(M * K, M * (N + r), K * (N + r), N + r, itemsize),
        "rehomed": _beside(M * K, M * (N + r), K * (N + r), N + r, itemsize, written=K * r),
        "fused": [Launch("_tail_kernel", TRITON_PRODUCT, fused)],
        "persistent": [Launch("_persistent_tail_kernel", TRITON_PRODUCT, fused)],
    }[strategy]
    return [shrink, *forward], gradients


def dora_linear(strategy: str, *, M: int, K: int, N: int, r: int, itemsize: int, dropout: float = 0.0) -> Launches:
    """`row_norms`, then `dora_linear`: the kernels of `lora_linear` for what is of rank r, and one pass over a whole
    output each way. `strategy`: "frozen", or how T A is added to dX, "prewrite" or "fused": on data in half precision
    the layer has A, B, S and T in fp32, which no vendor's product takes beside it. That these are twice as large, and
    what products in fp32 take longer, is not counted."""
    sizes = {"M": M, "K": K, "N": N, "r": r, "itemsize": itemsize}
    base, of_x = lora_linear("frozen", **sizes)
    if strategy == "frozen":
        return base, of_x
    x, y, w, a, b, s = (size * itemsize for size in (M * K, M * N, N * K, r * K, r * N, M * r))
    row = N * FP32
    norms = Launch("_row_norms_kernel", PASS, Work(2 * N * K * r, w + a + b + row))
    shrink = Launch("_shrink_kernel", PASS, Work(2 * M * r * K, x + a + s))
    combined = Work(2 * M * r * N, (3 if dropout else 2) * y + s + b + row)
    dropped = [Launch("_dora_drop_kernel", PASS, Work(0, 2 * x + SEED)), *base] if dropout else []
    forward = [norms, *base, *dropped, shrink, Launch("_dora_combine_kernel", PASS, combined)]
    _, backward = lora_linear(strategy, **sizes, dropout=dropout)
    backward = [*backward, Launch("_dora_grad_kernel", PASS, Work(0, 3 * y + 2 * row))]
    if dropout:
        backward += [*of_x, Launch("_dora_drop_kernel", PASS, Work(0, 3 * x + SEED))]
    return forward, backward


def _beside(result: int, left: int, right: int, depth: int, itemsize: int, written: int | None = None) -> list[Launch]:
    """Both operands copied next to their rank-r parts, and the product of the two; sizes in elements. written: of the
    right one this much alone is copied, into the room beside the rest."""
    copied = left + (right if written is None else written)
    copy = Launch("copies", PASS, Work(0, 2 * copied * itemsize))
    return [copy, Launch("augmented", PRODUCT, Work(2 * result * depth, (left + right + result) * itemsize))]


class _Attention(NamedTuple):
    """Bytes of the rows (q, out), keys (k or v), prefix (its keys or values) and a statistic of each row; operations of
    one product over the sequence and over the prefix."""

    rows: int
    keys: int
    prefix: int
    lse: int
    product: int
    prefix_product: int


def _attention(B: int, H: int, Hkv: int, S: int, P: int, D: int, itemsize: int, causal: bool) -> _Attention:
    return _Attention(
        B * H * S * D * itemsize,
        B * Hkv * S * D * itemsize,
        Hkv * P * D * itemsize,
        B * H * S * FP32,
        B * H * D * S * S * (1 if causal else 2),
        2 * B * H * D * S * P,
    )


def _vendor(at: _Attention, extra_keys: int = 0) -> Launches:
    """The vendor's flash; `extra_keys`: the bytes of prefix rows in front of its keys, which it then attends to."""
    keys, product = at.keys + extra_keys, at.product + (at.prefix_product if extra_keys else 0)
    forward = Work(2 * product, 2 * at.rows + 2 * keys + at.lse)
    backward = Work(5 * product, 4 * at.rows + 4 * keys + at.lse)
    return [Launch("flash", FLASH, forward)], [Launch("flash", FLASH_BACKWARD, backward)]


def _grad_prefix(at: _Attention) -> Launch:
    """Four products over the prefix; δ is read beside L."""
    work = Work(4 * at.prefix_product, 2 * at.rows + 4 * at.prefix + 2 * at.lse)
    return Launch("_grad_keys_kernel: prefix", TRITON_FLASH_BACKWARD, work)


def _own(at: _Attention, prefix: bool) -> Launches:
    """The kernels of ours over the sequence, and over the prefix in the same loops."""
    product, shared = at.product + at.prefix_product * prefix, at.prefix * prefix
    forward = Work(2 * product, 2 * at.rows + 2 * at.keys + 2 * shared + at.lse)
    of_query = Work(3 * product, 4 * at.rows + 2 * at.keys + 2 * shared + 2 * at.lse)
    of_keys = Work(4 * at.product, 2 * at.rows + 4 * at.keys + 2 * at.lse)
    return [Launch("_forward_kernel", TRITON_FLASH, forward)], [
        Launch("_grad_query_kernel", TRITON_FLASH_BACKWARD, of_query),
        Launch("_grad_keys_kernel", TRITON_FLASH_BACKWARD, of_keys),
    ]


def prefix_attention(
    strategy: str, *, B: int, H: int, Hkv: int, S: int, P: int, D: int, itemsize: int, causal: bool = True
) -> Launches:
    """`strategy`: "frozen", "fused", "merge" or "concat"."""
    at = _attention(B, H, Hkv, S, P, D, itemsize, causal)
    vendor_forward, vendor_backward = _vendor(at)
    if strategy == "frozen":
        return vendor_forward, vendor_backward
    if strategy == "fused":
        forward, backward = _own(at, prefix=True)
        return forward, [*backward, _grad_prefix(at)]
    if strategy == "merge":  # q and the vendor's out read, out written; in backward the vendor's dq besides
        merge = Work(2 * at.prefix_product, 3 * at.rows + 2 * at.prefix + 2 * at.lse)
        of_query = Work(3 * at.prefix_product, 5 * at.rows + 2 * at.prefix + 2 * at.lse)
        return [*vendor_forward, Launch("_forward_kernel", TRITON_FLASH, merge)], [
            *vendor_backward,
            Launch("_grad_query_kernel", TRITON_FLASH_BACKWARD, of_query),
            _grad_prefix(at),
        ]
    rows = B * at.prefix  # of every sample
    copies = Launch("copies", PASS, Work(0, 2 * (2 * at.keys + rows + at.prefix)))
    reduced = Launch("sum over the batch", PASS, Work(2 * B * Hkv * P * D, 2 * (rows + at.prefix)))
    joined_forward, joined_backward = _vendor(at, rows)
    return [copies, *joined_forward], [copies, *joined_backward, reduced]


def gated_prompt_attention(
    strategy: str, *, B: int, H: int, Hkv: int, S: int, P: int, D: int, itemsize: int, causal: bool = True
) -> Launches:
    """`strategy`: "frozen", "fused" or "merge"; the prompt is a second kernel either way, and its softmax is made again
    in backward. Where the vendor does the sequence, one more kernel turns its result into the kernels' own."""
    at = _attention(B, H, Hkv, S, P, D, itemsize, causal)
    own_forward, own_backward = {"frozen": _vendor(at), "merge": _vendor(at), "fused": _own(at, False)}[strategy]
    if strategy == "frozen":
        return own_forward, own_backward
    if strategy == "merge":
        own_forward = [*own_forward, Launch("_forward_kernel: sinks", PASS, Work(0, 3 * at.rows + 2 * at.lse))]
    prompt = Work(2 * at.prefix_product, 3 * at.rows + 2 * at.prefix + at.lse)
    of_query = Work(5 * at.prefix_product, 4 * at.rows + 4 * at.prefix + 2 * at.lse)  # two passes over the prompt
    return [*own_forward, Launch("_forward_kernel: prompt", TRITON_FLASH, prompt)], [
        *own_backward,
        Launch("_grad_query_kernel: prompt", TRITON_FLASH_BACKWARD, of_query),
        _grad_prefix(at),
    ]


def prompt_embedding(strategy: str, *, B: int, S: int, P: int, hidden: int, itemsize: int) -> Launches:
    """`strategy`: "frozen" (the table's rows alone) or "fused" (one kernel writes both kinds of rows)."""
    tokens, learned = B * S * hidden * itemsize, P * hidden * itemsize
    if strategy == "frozen":
        return [Launch("embedding", PASS, Work(0, 2 * tokens + B * S * TOKEN))], []
    forward = Work(0, 2 * tokens + (B + 1) * learned + B * S * TOKEN)
    return [Launch("_prepend_kernel", PASS, forward)], [
        Launch("_grad_prompt_kernel", PASS, Work(B * P * hidden, (B + 1) * learned))
    ]


class Design(NamedTuple):
    """An op's launches by strategy, its strategies beside "frozen", the sizes it takes, and the kind of its floor."""

    launches: Callable[..., Launches]
    strategies: tuple[str, ...]
    sizes: tuple[str, ...]
    forward: str
    backward: str


_ATTENTION_SIZES = ("B", "H", "Hkv", "S", "P", "D")
DESIGNS = {
    "lora_linear": Design(lora_linear, (*LORA_STRATEGIES, "rehomed"), ("M", "K", "N", "r"), PRODUCT, PRODUCT),
    "dora_linear": Design(dora_linear, ("prewrite", "fused"), ("M", "K", "N", "r"), PRODUCT, PRODUCT),
    "prefix_attention": Design(prefix_attention, ("fused", "merge", "concat"), _ATTENTION_SIZES, FLASH, FLASH_BACKWARD),
    "gated_prompt_attention": Design(
        gated_prompt_attention, ("fused", "merge"), _ATTENTION_SIZES, FLASH, FLASH_BACKWARD
    ),
    "prompt_embedding": Design(prompt_embedding, ("fused",), ("B", "S", "P", "hidden"), PASS, PASS),
}
