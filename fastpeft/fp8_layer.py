"""A linear layer whose weight is kept in float8 with a scale for each row; how a layer becomes one and ceases to be.

`Fp8Linear` is to adapters what another library's quantised layer is: `fastpeft.quantised` knows it by its entry below.
"""

from types import MethodType

import torch
from torch import nn

from fastpeft import quantised
from fastpeft.ops.fp8_linear import FP8, apply_fp8, dequantise_rows, quantise_rows
from fastpeft.tuners.adalora import AdaLoraLinear, QuantisedAdaLora
from fastpeft.tuners.layer import LayerState, accelerate_calls, patched_class
from fastpeft.tuners.lora import LoraLinear
from fastpeft.tuners.lora_quantised import QuantisedLora

# What stands in front of a dense layer's class, and of a quantised one's.
KINDS = {LoraLinear: QuantisedLora, AdaLoraLinear: QuantisedAdaLora}
DENSE_KINDS = {quantised_kind: kind for kind, quantised_kind in KINDS.items()}


class Fp8Linear(nn.Linear):
    """y = x Wᵀ + bias as `fastpeft.ops.fp8_linear` computes it. `fastpeft.quantise_base_fp8` makes them of torch's.

    weight: (N, K) torch.float8_e4m3fn, frozen. weight_scale: (N, 1) fp32, a buffer. Both keep their dtypes whatever
    dtype the model is given. A state dict has both, and weight in one dimension: whoever takes it for the weight of a
    torch.nn.Linear, as `from_pretrained` would, finds that its shape does not fit.
    compute_dtype: of the weight before, and of adapters and the dense weight now.
    original: the weight before, on the CPU, if it was kept. wanted_grad: whether the weight before was to be trained
    without the patch.
    """

    compute_dtype: torch.dtype
    original: torch.Tensor | None
    wanted_grad: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return apply_fp8(input, self.weight, self.weight_scale, self.bias)

    def _apply(self, fn, recurse=True):
        own = (self.weight, self.weight_scale)

        def keeping(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            if out.dtype == tensor.dtype or not any(tensor is each for each in own):
                return out
            if tensor is own[0]:
                self.compute_dtype = out.dtype
            return tensor.to(out.device)

        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(keeping, recurse=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].flatten()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        name = f"{prefix}weight"
        weight, scale = state_dict.get(name), state_dict.get(f"{name}_scale")
        if weight is not None or scale is not None:
            if scale is None or weight is None or weight.dtype != FP8 or weight.numel() != self.weight.numel():
                found = "no weight" if weight is None else f"{weight.dtype} of {weight.numel()} numbers"
                error_msgs.append(
                    f"{name} is kept in float8, {self.weight.numel()} numbers, with {name}_scale; this state dict has "
                    f"{found} with {'no' if scale is None else 'a'} scale; fastpeft.dequantise_base_fp8(model) first"
                )
                return
            self.original = None
            state_dict = {**state_dict, name: weight.view(self.weight.shape)}
        others = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *others)


def quantised_values(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The two tensors of a weight (N, K)."""
    codes, scale = quantise_rows(weight.detach())
    return {"weight": nn.Parameter(codes.contiguous(), requires_grad=False), "weight_scale": scale.contiguous()}


def dense(module: Fp8Linear) -> torch.Tensor:
    return dequantise_rows(module.weight.detach(), module.weight_scale, module.compute_dtype)


def _requantised(module: Fp8Linear, weight: torch.Tensor) -> dict:
    """Of another weight; the one that was kept is not it."""
    return {**quantised_values(weight.to(module.weight.device)), "original": None}


quantised.register("fastpeft.Fp8Linear", quantised.Entry("fastpeft", None, dense, _requantised))


def to_fp8(module: nn.Linear, keep: bool, wanted_grad: bool) -> None:
    """Make a frozen linear layer, adapted or not, an Fp8Linear; of torch.nn.Linear itself, with a finite weight."""
    weight = module.weight
    values = quantised_values(weight)
    original = weight.detach().to("cpu", copy=True) if keep else None
    module.compute_dtype, module.original, module.wanted_grad = weight.dtype, original, wanted_grad
    module.weight = values["weight"]
    module.register_buffer("weight_scale", values["weight_scale"])
    _give_class(module, Fp8Linear, KINDS)


def to_dense(module: Fp8Linear, wants_grad: bool) -> None:
    """The reverse: the weight that was kept, or the one that float8 stands for."""
    weight = dense(module) if module.original is None else module.original
    weight = weight.to(module.weight.device, module.compute_dtype)
    module.weight = nn.Parameter(weight, requires_grad=wants_grad)
    del module.weight_scale, module.compute_dtype, module.original, module.wanted_grad
    _give_class(module, nn.Linear, DENSE_KINDS)


def _give_class(module: nn.Module, base: type, kinds: dict[type, type]) -> None:
    """Give the module the class `base`, behind that of its adapters if it has any."""
    before, state = type(module), module.__dict__.get("_fastpeft")
    called_by_accelerate = accelerate_calls(module, before)
    if isinstance(state, LayerState):
        module.__class__ = patched_class(kinds[before.__bases__[0]], base)
        state.original_class = base
    else:
        module.__class__ = base
    if called_by_accelerate:
        module._old_forward = MethodType(type(module).forward, module)
