"""x Wᵀ and dY W on a CPU, by one of two vendors' libraries.

torch takes fp32 products to MKL. On the AMD processors with AVX-512 that were measured (two cores of a Zen 4, two of a
Zen 5) that took 5 to 20 % longer than oneDNN, torch's own library for half precision, or more than twice as long. The
choice is by processor, dtype and size alone, so that the same call gives the same bits.

oneDNN compiles code for each number of rows, which takes it as long as a small product, and keeps it: half a megabyte
each of up to a thousand. So it is asked for round numbers of rows alone, which batches of one length have, and batches
of any length seldom.

Half precision that oneDNN has no instructions for, on x86 (bf16 without AVX-512, fp16 on most), is multiplied by a loop
of torch's own: dY W takes eighty times as long as in fp32 on a Zen 3, x Wᵀ seven times. There dX and the adapters'
products are made in fp32, by square blocks of both operands, and rounded once. The base's own product stays what it is
without an adapter, bit for bit.
"""

import functools
import platform
from pathlib import Path

import torch

from fastpeft.ops._selective import own

ELEMENTS = 1 << 23  # M·N·K, below which a call of oneDNN costs more than it saves
ROWS = 256  # of which the rows must be a multiple
EDGE = 512  # of a block that is widened, 1 MiB in fp32
FEW = 4  # rows, below which the loop is as fast


@functools.cache
def prefers_onednn() -> bool:
    """Whether this machine's fp32 products are oneDNN's: an AMD processor with AVX-512, and torch built with both."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return "AuthenticAMD" in processor()


def processor() -> str:
    """What the system says of it."""
    file = Path("/proc/cpuinfo")
    return platform.processor() + (file.read_text()[:4096] if file.exists() else "")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + bias (..., N), which can be changed in place: x (..., K), weight [N, K]."""
    bias = bias if bias is None else bias.contiguous()  # whose stride oneDNN takes for 1, and torch adds otherwise
    if is_onednns(x, weight):
        return own(torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return own(torch.nn.functional.linear(x, weight, bias))


def through(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dY W [M, K]: dy [M, N], weight [N, K]."""
    if is_onednns(dy, weight):
        return torch.ops.mkldnn._linear_pointwise(dy, weight.t(), None, "none", [], "")
    return widened(dy, weight) if widens(dy, weight) else dy @ weight


def add_through(dx: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx += dY W, in place: dx [M, K], dy [M, N], weight [N, K]."""
    if dx.dtype is not dy.dtype or is_onednns(dy, weight):
        return dx.add_(through(dy, weight))
    return add_widened(dx, dy, weight) if widens(dy, weight) else dx.addmm_(dy, weight)


@functools.cache
def lacks_half(dtype: torch.dtype) -> bool:
    """Whether this machine has no instructions for products in this half precision, and torch's loop for them is slow:
    x86 whose oneDNN does not support them."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return False
    name = f"_is_mkldnn_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_supported"
    return not getattr(torch.ops.mkldnn, name)() if hasattr(torch.ops.mkldnn, name) else capability == "AVX2"


def widens(p: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether the product of p (M, ·) and q is made in fp32."""
    half = p.dtype is q.dtype and p.dtype in (torch.bfloat16, torch.float16)
    return half and p.is_cpu and p.shape[0] >= FEW and lacks_half(p.dtype)


def widened(p: torch.Tensor, q: torch.Tensor, scale: float = 1.0, out: torch.Tensor | None = None) -> torch.Tensor:
    """scale·p q [M, N], by way of fp32: p [M, R], q [R, N]."""
    out = p.new_empty(len(p), q.shape[1]) if out is None else out
    return _by_blocks(out, p, q, scale, torch.zeros_like)


def add_widened(out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """out += scale·p q, in place, by way of fp32: out [M, N], p [M, R], q [R, N]."""
    return _by_blocks(out, p, q, scale, torch.Tensor.to)


def _by_blocks(out, p, q, scale, begun) -> torch.Tensor:
    """Each block of out from what `begun` makes of it in fp32, and the products of blocks of p and q: without a
    gradient, and out is neither of them."""
    for rows, into in zip(p.split(EDGE), out.split(EDGE), strict=True):
        for columns, place in zip(q.split(EDGE, 1), into.split(EDGE, 1), strict=True):
            total = begun(place, dtype=torch.float32)
            for left, right in zip(rows.split(EDGE, 1), columns.split(EDGE), strict=True):
                total.addmm_(left.float(), right.float(), alpha=scale)
            place.copy_(total)
    return out


def is_onednns(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of x (..., ·) with weight [N, K] or its transpose is: neither is copied for it."""
    if x.dtype is not torch.float32 or not prefers_onednn() or not x.is_cpu:
        return False
    rows, (outputs, inputs) = x.shape[:-1].numel(), weight.shape
    if rows % ROWS or rows * outputs * inputs < ELEMENTS or weight.stride() not in ((inputs, 1), (1, outputs)):
        return False
    return weight.dtype is torch.float32 and x.is_contiguous() and torch.backends.mkldnn.enabled
