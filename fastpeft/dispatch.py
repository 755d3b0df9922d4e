"""Which backend serves a call, by which strategy, and why.

Two questions. `choose_backend`: Triton or torch, by the precedence context manager > `patch(backend=)` > `set_backend`
> FASTPEFT_BACKEND > "auto". `lora_linear_plan`, `prefix_attention_plan`: how the Triton path divides the work with the
vendor's matrix product or flash attention, by the precedence `override_plan` > the user's table of measured choices >
one that ships > the predicted rules here. Every plan says which of them it is from.
"""

import contextlib
import contextvars
import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from fastpeft import tables
from fastpeft.errors import BackendError
from fastpeft.plans import ATTENTION_STRATEGIES as ATTENTION_STRATEGIES
from fastpeft.plans import GATED_STRATEGIES, LORA_STRATEGIES
from fastpeft.plans import Plan as Plan
from fastpeft.scoped import scoped
from fastpeft.untrusted import shown

BACKENDS = ("auto", "triton", "torch")
MAX_RANK = 256
SERVED = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = {"rank": MAX_RANK, "head dimension": 256}  # what kernels hold in registers; `lora_linear` has slices of ranks

_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastpeft_backend", default=None)
_default: str | None = None


class Choice(NamedTuple):
    """The backend that serves a call, and the reason in words."""

    backend: str
    reason: str


ON_A_CPU = Choice("torch", "CPU tensors run in torch unless Triton is demanded")
ASKED_FOR = Choice("torch", "asked for")
ON_A_GPU = Choice("triton", "cuda tensors")  # ROCm's too are called so
DEMANDED = Choice("triton", "asked for")

PREWRITE = Plan("prewrite", "prewrite", "predicted: the vendor's product is the faster one on wide matrices")
SHORT = Plan("addmm", "prewrite", "predicted: few rows, so launches count more than passes")
FUSED = Plan("fused", "fused", "the interpreter has no vendor product worth keeping")
SHORT_UP_TO = 64  # rows

ATTENTION_FUSED = Plan("fused", "fused", "the interpreter has no vendor's flash worth keeping")
ATTENTION_SHORT = Plan("fused", "fused", "predicted: few queries, so launches count more than the rate of products")
ATTENTION_MERGE = Plan("merge", "merge", "predicted: the vendor's flash is the faster one on long sequences")
ATTENTION_DECODE = Plan("decode", "fused", "predicted: one query a sample is too few rows to fill a GPU")
MERGE_FROM = 256  # queries
_plan: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("fastpeft_plan", default=None)


def checked_backend(name: str, where: str) -> str:
    """`name`, if it is a backend's. Raises BackendError."""
    if name not in BACKENDS:
        raise BackendError(f"{where}: unknown backend {shown(name)}; choose one of {', '.join(map(repr, BACKENDS))}")
    return name


def set_backend(name: str) -> None:
    """Set the process's default backend: "auto", "triton" or "torch". Raises BackendError for any other name."""
    global _default
    _default = checked_backend(name, "set_backend")


@contextlib.contextmanager
def backend(name: str):
    """Within the `with` block (of this thread or task), every fastpeft op runs on this backend.

    "auto": Triton on GPU tensors, torch elsewhere. "triton": demand it; a call it cannot serve raises BackendError
    with the reason. "torch": the pure-PyTorch path. A backward pass uses what its forward used.
    """
    with scoped(_context, checked_backend(name, "backend")):
        yield


def requested_backend(patched: str | None = None) -> str:
    """The backend asked for, by the precedence in this module's docstring; `patched` is what `patch` was given."""
    return _context.get() or patched or _default or backend_of_environment()


def circumstances(patched: str | None = None) -> tuple:
    """What the answers to both questions hang on beside tensors and numbers: while it is equal, so are they."""
    return _context.get() or patched or _default or backend_of_environment(), _plan.get(), tables.generation


@functools.cache
def backend_of_environment() -> str:
    """FASTPEFT_BACKEND, as it is when the first call asks: to look there takes as long as all other questions."""
    return checked_backend(os.environ.get("FASTPEFT_BACKEND", "auto"), "FASTPEFT_BACKEND")


@functools.cache
def triton_unavailable() -> str | None:
    """Why Triton cannot run at all in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which serves CPU tensors."""
    if triton_unavailable():
        return False
    import triton

    return triton.knobs.runtime.interpret


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability below 8.0"
    return None


def triton_refusal(x: torch.Tensor, dtype: torch.dtype, width: int, of: str = "rank") -> str | None:
    """Why Triton cannot serve this call, or None; `width` is what `LIMITS` limits under the name `of`, 0 if nothing."""
    if reason := triton_unavailable():
        return reason
    if x.is_cuda:
        if interpreting():
            return "TRITON_INTERPRET=1 serves CPU tensors only"
        if reason := _too_old(x.device):
            return reason
    elif not x.is_cpu:
        return f"{x.device.type} tensors are not served"
    elif not interpreting():
        return "CPU tensors need TRITON_INTERPRET=1 in the environment before triton is imported"
    if dtype not in SERVED:
        return f"{dtype} is not served"
    if width > LIMITS[of]:
        return f"{of} {width} is above {LIMITS[of]}"
    return None


def choose_backend(
    x: torch.Tensor, dtype: torch.dtype, width: int = 0, patched: str | None = None, of: str = "rank"
) -> Choice:
    """The backend of one call on `x` computing in `dtype`, with the `width` that `triton_refusal` asks for. Raises
    BackendError where "triton" is demanded in vain."""
    asked = requested_backend(patched)
    if asked == "torch":
        return ASKED_FOR
    if asked == "auto" and x.is_cpu:
        return ON_A_CPU
    reason = triton_refusal(x, dtype, width, of)
    if reason is None:
        return DEMANDED if asked == "triton" else ON_A_GPU
    if asked == "triton":
        raise BackendError(f"the triton backend was demanded but cannot serve this call: {reason}")
    return Choice("torch", reason)


def _modifiers_refusal(tensors, scores, dropout: float) -> str | None:
    """What of a call of `prefix_attention` no vendor's flash serves: a modifier, or the head dimension; or None."""
    modifiers = {
        "a bias": tensors.bias_BHST,
        "ALiBi": scores.slopes_H,
        "a softcap": scores.softcap,
        "a window": scores.window,
        "padding": scores.padding_BT,
        "segments": scores.segments_BT,
        "dropout": dropout or None,
    }
    for name, value in modifiers.items():
        if value is not None:
            return f"{name} is the kernels' own"
    depth = tensors.q_BHSD.shape[3]
    return f"head dimension {depth} is no multiple of 8" if depth % 8 else None


def merge_refusal(tensors, scores, dropout: float) -> str | None:
    """Why the vendor's flash cannot do the sequence's part of a call of `prefix_attention`, or None."""
    queries, keys = tensors.q_BHSD.shape[2], tensors.k_BGTD.shape[2]
    if reason := _modifiers_refusal(tensors, scores, dropout):
        return reason
    if scores.causal and (queries != keys or scores.start != 0):
        return "the vendor's causal mask is for queries that begin where the keys do"
    return "no keys" if keys == 0 else None


def concat_refusal(tensors, scores, dropout: float) -> str | None:
    """Why the vendor's flash cannot do a call of `prefix_attention` over concatenated keys, or None."""
    queries, keys = tensors.q_BHSD.shape[2], tensors.k_BGTD.shape[2]
    if reason := _modifiers_refusal(tensors, scores, dropout):
        return reason
    for name, value in (("a prefix bias", tensors.pbias_BHSP), ("a sink", tensors.sinks_H)):
        if value is not None:
            return f"{name} is the kernels' own"
    if scores.causal and not 0 <= scores.start == keys - queries:
        return "the vendor's causal mask is for queries that are the last of the keys"
    if scores.causal and torch.version.hip is not None:
        return "ROCm's flash is not known to have a causal mask that ends at the bottom right"
    return None


def _decode_refusal(tensors, scores, dropout: float) -> str | None:
    """Why the kernels for one query a sample cannot do a call of `prefix_attention`, or None."""
    if tensors.q_BHSD.shape[2] != 1:
        return "decode is for one query a sample"
    return "decode has no dropout" if dropout else None


def strategy_refusal(strategy: str, tensors, scores, dropout: float) -> str | None:
    """Why this one of ATTENTION_STRATEGIES, or "decode", cannot serve a call of `prefix_attention`, or None."""
    refusals = {"merge": merge_refusal, "concat": concat_refusal, "decode": _decode_refusal}
    return refusals[strategy](tensors, scores, dropout) if strategy in refusals else None


def prefix_attention_plan(
    tensors, scores, dropout: float, patched: str | None = None, *, gated: bool = False
) -> Plan | None:
    """The strategy for one call of `prefix_attention`, or if `gated` of `gated_prompt_attention`, on the Triton
    backend; None is the torch path.

    Tables are of `prefix_attention`: the gated op goes by the rules. Raises BackendError where "triton" is demanded in
    vain, or a strategy by `override_plan`.
    """
    q = tensors.q_BHSD
    if choose_backend(q, q.dtype, q.shape[3], patched, "head dimension").backend == "torch" or q.numel() == 0:
        return None
    measured = tables.measured(q.device) if q.device.type == "cuda" else {}  # first of all: tiles come with it
    plan = _plan.get()
    if plan is not None and plan.forward in (GATED_STRATEGIES if gated else ATTENTION_STRATEGIES):
        if reason := strategy_refusal(plan.forward, tensors, scores, dropout):
            raise BackendError(f"the strategy {plan.forward!r} was demanded but cannot serve this call: {reason}")
        return plan
    if measured and not gated:
        found = measured.get(tables.prefix_bucket(tensors, scores, dropout))
        if found is not None and strategy_refusal(found.forward, tensors, scores, dropout) is None:
            return found
    return predicted_attention_plan(tensors, scores, dropout, gated=gated)


def predicted_attention_plan(tensors, scores, dropout: float, *, gated: bool = False) -> Plan:
    """By the rules, for a call on the Triton backend that no table knows."""
    q = tensors.q_BHSD
    if q.shape[2] == 1 and not dropout and not gated:
        return ATTENTION_DECODE
    if not q.is_cuda:
        return ATTENTION_FUSED
    if reason := merge_refusal(tensors, scores, dropout):
        return Plan("fused", "fused", reason)
    if q.dtype == torch.float32:
        return Plan("fused", "fused", "predicted: the vendor's flash does not serve fp32")
    return ATTENTION_SHORT if q.shape[2] < MERGE_FROM else ATTENTION_MERGE


def lora_linear_plan(x: torch.Tensor, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, dropout: float) -> Plan:
    """The strategy for x (..., K), or dY (..., N), whose base product is in `dtype`, A [R, K] and B [N, R], on the
    Triton backend."""
    return lora_linear_plans(x, dtype, (a,), (b,), (dropout,))[0]


def lora_linear_plans(x: torch.Tensor, dtype: torch.dtype, a, b, dropouts) -> tuple[Plan, ...]:
    """The same for each A and B on as many rows, of at least one column; one that is None has no use for its plan.
    Sizes are asked for where a table might know them."""
    device, rows = x.device, x.numel() // x.shape[-1]
    if x.is_cuda and tables.measured(device):
        return tuple(map(functools.partial(_plan_of, device, rows, dtype), a, b, dropouts))
    return (_overriding_lora_plan() or predicted_lora_plan(device, rows),) * len(a)


def _plan_of(device: torch.device, rows: int, dtype: torch.dtype, a, b, dropout: float) -> Plan:
    if a is None:
        return predicted_lora_plan(device, rows)
    return lora_linear_plan_for(device, dtype, a.dtype, (rows, a.shape[1], b.shape[0], a.shape[0]), dropout)


def _overriding_lora_plan() -> Plan | None:
    """That of `override_plan`, if it is one for `lora_linear`."""
    plan = _plan.get()
    return plan if plan is not None and plan.forward in LORA_STRATEGIES else None


def lora_linear_plan_for(
    device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, sizes: tuple[int, ...], dropout: float
) -> Plan:
    """The strategy for sizes (M, K, N, R)."""
    measured = tables.measured(device) if device.type == "cuda" else None
    if (plan := _overriding_lora_plan()) is not None:
        return plan
    if measured and (found := measured.get(tables.lora_bucket(dtype, adapter_dtype, *sizes, dropout))):
        return found
    return predicted_lora_plan(device, sizes[0])


def predicted_lora_plan(device: torch.device, rows: int) -> Plan:
    """By the rules, for a call that no table knows."""
    if device.type != "cuda":
        return FUSED
    return SHORT if rows <= SHORT_UP_TO else PREWRITE


@contextlib.contextmanager
def override_plan(plan: Plan):
    """Force one strategy within the block, for benchmarks and tests, on the ops that know it; an attention op that
    knows it and cannot serve a call by it raises BackendError with the reason."""
    with scoped(_plan, plan):
        yield
