"""x Wᵀ and dY W on a CPU, by one of two vendors' libraries.

torch takes fp32 products to MKL. On the one AMD processor that was measured (Zen 4, two cores) that took 5 to 20 %
longer than oneDNN, torch's own library for half precision. The choice is by processor, dtype and size alone, so that
the same call gives the same bits.

oneDNN compiles code for each number of rows, which takes it as long as a small product, and keeps it: half a megabyte
each of up to a thousand. So it is asked for round numbers of rows alone, which batches of one length have, and batches
of any length seldom.
"""

import functools
import platform
from pathlib import Path

import torch

ELEMENTS = 1 << 23  # M·N·K, below which a call of oneDNN costs more than it saves
ROWS = 256  # of which the rows must be a multiple


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
    """x Wᵀ + bias (..., N): x (..., K), weight [N, K]."""
    if is_onednns(x, weight):
        bias = bias if bias is None else bias.contiguous()  # whose stride oneDNN takes for 1
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def through(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dY W [M, K]: dy [M, N], weight [N, K]."""
    if is_onednns(dy, weight):
        return torch.ops.mkldnn._linear_pointwise(dy, weight.t(), None, "none", [], "")
    return dy @ weight


def add_through(dx: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx += dY W, in place, which oneDNN is not asked for: dx [M, K], dy [M, N], weight [N, K]."""
    return dx.addmm_(dy, weight) if dx.dtype is dy.dtype else dx.add_(dy @ weight)


def is_onednns(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of x (..., ·) with weight [N, K] or its transpose is: neither is copied for it."""
    if x.dtype is not torch.float32 or not prefers_onednn() or not x.is_cpu:
        return False
    rows, (outputs, inputs) = x.shape[:-1].numel(), weight.shape
    if rows % ROWS or rows * outputs * inputs < ELEMENTS or weight.stride() not in ((inputs, 1), (1, outputs)):
        return False
    return weight.dtype is torch.float32 and x.is_contiguous() and torch.backends.mkldnn.enabled
