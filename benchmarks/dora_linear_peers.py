"""What a layer with DoRA is measured against, and ours: a table of named implementations.

Beside "fastpeft", the layer's own forward, stand three of ours that differ from it in one thing: with
"fastpeft:given-norms", `dora_linear` alone, the difference is what `row_norms` costs; with "fastpeft:full-norms", which
makes them of the whole sum, what it saves; and "fastpeft:lora" is the same layer without magnitudes.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from . import lora_linear_peers
from .baselines import Implementation, Missing, in_force, ours
from .dora_linear_truth import Inputs, full_norms, plain
from .harness import Call
from .report import FLOOR

# peft in half precision rounds the whole sum W + s·B A, its norms, the factor, f - 1 and each term; of eager, by which
# errors are judged, the norms and the sum of the terms are in fp32. On a CPU it has up to 1.8 times eager's error.
ROUNDED = 2.5


def build_peft(inputs: Inputs, *, autocast_adapter_dtype: bool, compiled: bool = False) -> Call:
    """peft's own layer, with our values in it."""
    if importlib.util.find_spec("peft") is None:
        raise Missing("peft is not installed")
    from peft import LoraConfig, get_peft_model

    lora, model = inputs.lora, nn.Module()
    rank, k = lora.lora_a.shape
    model.proj = nn.Linear(k, len(lora.weight), bias=False, device="meta")
    model.proj.weight = nn.Parameter(lora.weight, requires_grad=False)
    config = LoraConfig(
        r=rank, lora_alpha=lora.scaling * rank, lora_dropout=lora.dropout, target_modules=["proj"], use_dora=True
    )
    layer = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).base_model.model.proj.train()
    leaves = {
        "x": lora.x.detach().clone().requires_grad_(),
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
        "m": layer.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        for name, values in (("A", lora.lora_a), ("B", lora.lora_b), ("m", inputs.magnitude)):
            leaves[name].copy_(values)
    forward = layer
    if compiled:
        torch._dynamo.reset()  # every cell compiles the same code anew; dynamo gives up after eight such times
        forward = torch.compile(layer, dynamic=False)
    return Call(lambda: forward(leaves["x"]), leaves, lora.grad, {"weight": lora.weight})


def build_eager(inputs: Inputs) -> Call:
    """The same algebra without peft, and without an op of ours."""
    lora, leaves = inputs.lora, inputs.leaves(None)
    drop = (lambda x: F.dropout(x, lora.dropout)) if lora.dropout else None

    def forward():
        x, *adapter = leaves.values()
        return plain(x, lora.weight, *adapter, lora.scaling, drop)

    return Call(forward, leaves, lora.grad, {"weight": lora.weight})


def build_fastpeft(
    inputs: Inputs,
    *,
    backend: str = "auto",
    adapter_dtype: torch.dtype | None = None,
    norms: Callable[..., torch.Tensor] | None = None,
) -> Call:
    """As fastpeft's layer computes it. norms(weight, A, B, scaling): in place of `row_norms`."""
    context = in_force(backend, None)
    from fastpeft.ops.dora_linear import apply_dora
    from fastpeft.ops.row_norms import row_norms

    lora, leaves, norms = inputs.lora, inputs.leaves(adapter_dtype), norms or row_norms

    def forward():
        x, a, b, m = leaves.values()
        factor = m / norms(lora.weight, a, b, lora.scaling)
        return apply_dora(x, lora.weight, None, a, b, factor, lora.scaling, lora.dropout)

    return Call(forward, leaves, lora.grad, {"weight": lora.weight}, context)


def build_given_norms(inputs: Inputs) -> Call:
    """The norms are made here, once, and belong to what a check may change."""
    leaves = inputs.leaves(None)
    norms = full_norms(inputs.lora.weight, leaves["A"], leaves["B"], inputs.lora.scaling)
    call = build_fastpeft(inputs, norms=lambda *_: norms)
    call.frozen["norms"] = norms
    return call


IMPLEMENTATIONS = (
    Implementation(
        FLOOR,
        "frozen linear: forward and dX, no adapter",
        lambda inputs: lora_linear_peers.build_frozen(inputs.lora),
    ),
    Implementation(
        "peft-fp32",
        "peft's DoRA, eager, its default: fp32 adapters and magnitudes",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=True),
        adapter_dtype=torch.float32,
    ),
    Implementation(
        "peft",
        "peft's DoRA, eager, adapters in the base's dtype",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=False),
        rms_bound=ROUNDED,
    ),
    Implementation(
        "peft-compile",
        "peft's DoRA under torch.compile, adapters in the base's dtype",
        lambda inputs: build_peft(inputs, autocast_adapter_dtype=False, compiled=True),
        compiled=True,
        rms_bound=ROUNDED,
    ),
    Implementation("eager", "DoRA's algebra in eager torch, norms of the whole sum in fp32", build_eager),
    ours(
        "fastpeft:lora",
        "fastpeft's lora_linear: the layer without magnitudes",
        lambda inputs: lora_linear_peers.build_fastpeft(inputs.lora),
        work=lambda cell, passed: cell.work_of_lora(passed),
    ),
    ours("fastpeft", "fastpeft's layer: row_norms, then dora_linear", build_fastpeft),
    ours(
        "fastpeft-fp32",
        "fastpeft's layer, fp32 adapters and magnitudes",
        lambda inputs: build_fastpeft(inputs, adapter_dtype=torch.float32),
        adapter_dtype=torch.float32,
    ),
    ours(
        "fastpeft:given-norms",
        "fastpeft's dora_linear alone, norms in hand",
        build_given_norms,
        work=lambda cell, passed: cell.work_of_dora(passed, norms=False),
    ),
    ours(
        "fastpeft:full-norms",
        "fastpeft's dora_linear, norms of the whole sum in eager torch",
        lambda inputs: build_fastpeft(inputs, norms=full_norms),
    ),
    ours(
        "fastpeft:torch",
        "fastpeft's layer, torch backend",
        lambda inputs: build_fastpeft(inputs, backend="torch"),
        strategy="torch",
    ),
)
