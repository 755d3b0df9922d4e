"""The work that an op cannot avoid: operations of matrix products, and bytes between the device's memory and its chip.

A floor, not a prediction. Every tensor that enters or leaves a pass is moved once in the pass, whatever a kernel reads
again; what forward keeps for backward instead of computing it twice (S of the LoRA linear, the log-sum-exp of an
attention's rows) is written once and read once; partial sums, padding, masks and element-wise operations are free. A
frozen weight has no gradient. `itemsize` is that of every tensor; statistics are fp32.
"""

from typing import NamedTuple

from fastpeft.errors import OpError

PASSES = ("fwd", "bwd", "fwd+bwd")
FP32, SEED, TOKEN = 4, 8, 8  # bytes of a statistic, of dropout's seed, of a token's number


class Work(NamedTuple):
    """Operations (a multiplication and an addition are two) and bytes. `+` adds both."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Work(0, 0)


class Machine(NamedTuple):
    """A GPU's peaks: dense bf16 products in TFLOP/s, memory in GB/s (1e9)."""

    name: str
    tflops: float
    gbps: float


# The vendors' public data sheets: what a product or a copy on the device reaches is 10 to 25 % less.
MACHINES = {
    "h100": Machine("H100 SXM", 989.0, 3350.0),
    "h200": Machine("H200 SXM", 989.0, 4800.0),
    "b200": Machine("B200", 2250.0, 8000.0),
    "mi300x": Machine("MI300X", 1307.0, 5300.0),
}


def floor_ms(work: Work, machine: Machine) -> float:
    """The least milliseconds: operations and bytes at the machine's peaks, the longer of the two, wholly overlapped."""
    return max(work.flops / machine.tflops / 1e9, work.bytes / machine.gbps / 1e6)


def of_pass(passed: str, forward: Work, backward: Work) -> Work:
    """What `passed` takes of the two. Raises OpError unless it is one of PASSES."""
    if passed not in PASSES:
        raise OpError(f"passed={passed!r}: choose one of {', '.join(map(repr, PASSES))}")
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[passed]


def _checked(least: int, **sizes: int) -> None:
    """Raises OpError for a size below `least`."""
    for name, size in sizes.items():
        if size < least:
            raise OpError(f"{name}={size}: at least {least} is wanted")


def lora_linear(passed: str, *, M: int, K: int, N: int, r: int, itemsize: int, dropout: float = 0.0) -> Work:
    """y = x Wᵀ + S Bᵀ, S = s·drop(x) Aᵀ, with x (M, K), W (N, K) frozen, A (r, K), B (N, r); r=0: the frozen layer.

    Forward: x, W, A, B read, y and S written; three products. Backward: dY, W, x, S, A, B read, dX, dA, dB written; the
    products T = s·dY B, dB = dYᵀ S, dA = Tᵀ drop(x), and dX = dY W + T A. The frozen layer has y and dX alone. Dropout
    is a function of a seed, which each pass reads: no mask is moved.
    """
    _checked(1, M=M, K=K, N=N, itemsize=itemsize)
    _checked(0, r=r)
    base, product = M * K + N * K + M * N, 2 * M * N * K
    adapter, low_rank = r * (K + N), 2 * M * r * (K + N)
    seed = SEED if r and dropout else 0
    forward = Work(product + low_rank, (base + adapter + M * r) * itemsize + seed)
    kept = M * K + M * r if r else 0
    backward = Work(product + 2 * low_rank, (base + kept + 2 * adapter) * itemsize + seed)
    return of_pass(passed, forward, backward)


def dora_linear(
    passed: str, *, M: int, K: int, N: int, r: int, itemsize: int, dropout: float = 0.0, norms: bool = True
) -> Work:
    """y = x Wᵀ + (f - 1)⊙(z Wᵀ) + f⊙(s·z Aᵀ Bᵀ), z = drop(x), f = m/‖W + s·B A‖ (N,); r=0: the frozen layer.

    As `lora_linear`, and beside it: forward reads m and makes the norms, of one more product, s·B A, from the W that is
    there anyway; norms=False: they are in hand, and read. Backward reads m and the norms, writes dm, and reads y, which
    dm is made of. Under dropout the base's product is there twice in each pass, of x and z, of dY and (f - 1)⊙dY, and
    dm is made of z Wᵀ, which forward then writes.
    """
    if r == 0:
        return lora_linear(passed, M=M, K=K, N=N, r=r, itemsize=itemsize)
    _checked(1, M=M, K=K, N=N, r=r, itemsize=itemsize)
    base, product = M * K + N * K + M * N, 2 * M * N * K * (2 if dropout else 1)
    adapter, low_rank = r * (K + N) + N, 2 * M * r * (K + N)
    written, others = (M * N, N * FP32 + SEED) if dropout else (0, N * FP32)
    made = 2 * N * K * r if norms else 0
    forward = Work(product + low_rank + made, (base + adapter + M * r + written) * itemsize + others)
    kept = M * K + M * r + M * N
    backward = Work(product + 2 * low_rank, (base + kept + 2 * adapter) * itemsize + others)
    return of_pass(passed, forward, backward)


def lora_projections(
    passed: str, *, M: int, K: int, N: tuple[int, ...], r: int, itemsize: int, dropout: float = 0.0
) -> Work:
    """LoRA linears of N[0], N[1], ... outputs on one x (M, K), each of rank r; r=0: the frozen layers.

    As `lora_linear` each, but x is read once in forward and once in backward, and there is one dX.
    """
    _checked(1, M=M, K=K, itemsize=itemsize, **{f"N[{i}]": n for i, n in enumerate(N)})
    _checked(0, r=r)
    outputs, count = sum(N), len(N)
    base, product = M * K + K * outputs + M * outputs, 2 * M * K * outputs
    adapters, low_rank = r * (count * K + outputs), 2 * M * r * (count * K + outputs)
    seeds = SEED * count if r and dropout else 0
    forward = Work(product + low_rank, (base + adapters + count * M * r) * itemsize + seeds)
    kept = M * K + count * M * r if r else 0
    backward = Work(product + 2 * low_rank, (base + kept + 2 * adapters) * itemsize + seeds)
    return of_pass(passed, forward, backward)


def lora_mlp(passed: str, *, M: int, K: int, H: int, N: int, r: int, itemsize: int, dropout: float = 0.0) -> Work:
    """down(act(gate(x))·up(x)) of x (M, K), frozen gate and up (H, K), down (N, H), each with LoRA of rank r; r=0: the
    frozen module.

    Forward: x, the weights and adapters read, y, gate, up and the three S written, h in between being nobody's.
    Backward: dY, gate, up, x, S, the weights and adapters read, dX, dA and dB written. The activation is not counted.
    """
    _checked(1, M=M, K=K, H=H, N=N, itemsize=itemsize)
    _checked(0, r=r)
    weights, kept = 2 * H * K + N * H, 2 * M * H
    base, product = M * (K + N) + weights + kept, 2 * M * weights
    adapters, low_rank = r * (2 * (K + H) + H + N), 2 * M * r * (2 * (K + H) + H + N)
    seeds = 3 * SEED if r and dropout else 0
    forward = Work(product + low_rank, (base + adapters + 3 * M * r) * itemsize + seeds)
    more = M * K + 3 * M * r if r else 0
    backward = Work(product + 2 * low_rank, (base + more + 2 * adapters) * itemsize + seeds)
    return of_pass(passed, forward, backward)


def mixed_lora_linear(
    passed: str, *, B: int, S: int, K: int, N: int, served: tuple[tuple[int, int], ...], itemsize: int
) -> Work:
    """The LoRA linear on B samples of S rows, of which each adapter of `served`, (samples, rank), has some of its own;
    without any the frozen layer.

    As `lora_linear`, but for what only an adapter's samples need: S, T and their products, and x once more in backward.
    """
    _checked(1, B=B, S=S, K=K, N=N, itemsize=itemsize)
    _checked(0, **{f"served[{i}]": min(pair) for i, pair in enumerate(served)})
    if (samples := sum(count for count, _ in served)) > B:
        raise OpError(f"served={served}: {samples} samples; at most B={B} are wanted")
    base, product = B * S * (K + N) + N * K, 2 * B * S * N * K
    shrunk, rank = sum(count * S * r for count, r in served), sum(r for _, r in served)
    adapters, low_rank = rank * (K + N), 2 * shrunk * (K + N)
    forward = Work(product + low_rank, (base + adapters + shrunk) * itemsize)
    backward = Work(product + 2 * low_rank, (base + samples * S * K + shrunk + 2 * adapters) * itemsize)
    return of_pass(passed, forward, backward)


def expert_lora_linear(passed: str, *, M: int, E: int, K: int, N: int, r: int, itemsize: int) -> Work:
    """The LoRA linear of E experts (N, K) that have M rows together, each some; r=0: without adapters.

    As `lora_linear`, but for the weights and the adapters, of which there are E, each read once.
    """
    _checked(1, M=M, E=E, K=K, N=N, itemsize=itemsize)
    _checked(0, r=r)
    base, product = M * (K + N) + E * N * K, 2 * M * N * K
    adapters, low_rank = E * r * (K + N), 2 * M * r * (K + N)
    forward = Work(product + low_rank, (base + adapters + M * r) * itemsize)
    kept = M * K + M * r if r else 0
    backward = Work(product + 2 * low_rank, (base + kept + 2 * adapters) * itemsize)
    return of_pass(passed, forward, backward)


def prefix_attention(
    passed: str, *, B: int, H: int, Hkv: int, S: int, P: int, D: int, itemsize: int, causal: bool = True
) -> Work:
    """q (B, H, S, D) attends to k, v (B, Hkv, S, D) and to a prefix (Hkv, P, D) that the batch shares; P=0: without.

    Forward: q, k, v and the prefix read, out and L written; two products. Backward: q, k, v, the prefix, out, dout and
    L read, dq, dk, dv and the prefix's two gradients written; five products, the scores made again, as flash attention
    is counted everywhere. Causal: half of S² pairs, as everywhere, without the diagonal's other half; the prefix is
    seen by all queries.
    """
    _checked(1, B=B, H=H, Hkv=Hkv, S=S, D=D, itemsize=itemsize)
    _checked(0, P=P)
    product = B * H * D * (S * S * (1 if causal else 2) + 2 * S * P)
    rows, keys, prefix, lse = B * H * S * D, B * Hkv * S * D, Hkv * P * D, B * H * S * FP32
    forward = Work(2 * product, (2 * rows + 2 * keys + 2 * prefix) * itemsize + lse)
    backward = Work(5 * product, (4 * rows + 4 * keys + 4 * prefix) * itemsize + lse)
    return of_pass(passed, forward, backward)


def gated_prompt_attention(
    passed: str, *, B: int, H: int, Hkv: int, S: int, P: int, D: int, itemsize: int, causal: bool = True
) -> Work:
    """As `prefix_attention`, but the prompt has a softmax of its own and is added through a gate; P=0: without.

    The operations are the same. Forward writes the sequence's own result beside the gated sum, as δ of its softmax is
    made of it, and backward reads that one; of the prompt's softmax nothing is kept. The gates, one number a head, are
    not counted.
    """
    attended = prefix_attention(passed, B=B, H=H, Hkv=Hkv, S=S, P=P, D=D, itemsize=itemsize, causal=causal)
    own = B * H * S * D * itemsize if P else 0
    return attended + of_pass(passed, Work(0, own), NOTHING)


def prompt_embedding(passed: str, *, B: int, S: int, P: int, hidden: int, itemsize: int) -> Work:
    """P learned rows in front of the embeddings of S tokens, for each of B samples; P=0: the embeddings alone.

    Forward: the tokens' numbers (8 bytes), a row of the table for each, and the learned rows read, which the batch
    shares; (B, P + S, hidden) written. Backward: the gradient of the B copies read, that of the learned rows written,
    one addition for each number read; the table is frozen, so the tokens' gradients are not looked at.
    """
    _checked(1, B=B, S=S, hidden=hidden, itemsize=itemsize)
    _checked(0, P=P)
    read, written = (B * S + P) * hidden, B * (P + S) * hidden
    forward = Work(0, (read + written) * itemsize + B * S * TOKEN)
    backward = Work(B * P * hidden, (B + 1) * P * hidden * itemsize)
    return of_pass(passed, forward, backward)
