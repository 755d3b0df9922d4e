"""The quantised linear layers of other libraries, as `fastpeft.quantised` describes them.

bitsandbytes' and torchao's weights, and HQQ's, can be made dense and quantised again. Of GPTQ and AWQ (gptqmodel),
EETQ, AQLM and Intel's Neural Compressor only the forward is known, as in HF peft: LoRA and AdaLoRA without DoRA, used
unmerged.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from fastpeft.errors import PatchError
from fastpeft.quantised import Entry


def _state_4bit(module: nn.Module):
    """bitsandbytes' QuantState of a layer, also where FSDP's wrapping has taken it from the weight."""
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def _is_repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes has rearranged the weight for its CPU kernel, as it does in an evaluation forward where the
    CPU has AVX512-BF16: then it cannot be dequantised, and products with it have no gradient."""
    return bool(getattr(_state_4bit(module), "packing_format_for_cpu", False))


def _dense_4bit(module: nn.Module) -> torch.Tensor:
    import bitsandbytes

    weight, state = module.weight, _state_4bit(module)
    if _is_repacked(module):
        unit = torch.eye(state.shape[1], dtype=state.dtype, device=weight.device)
        return bitsandbytes.matmul_4bit(unit, weight.data, quant_state=state).t()
    return bitsandbytes.functional.dequantize_4bit(weight.data, state)


def _requantised_4bit(module: nn.Module, dense: torch.Tensor) -> dict:
    import bitsandbytes

    old = module.weight
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    settings = {name: getattr(old, name) for name in names}
    new = bitsandbytes.nn.Params4bit(dense.to("cpu"), requires_grad=False, **settings).to(old.device)
    new.module = old.module
    return {"weight": new, "quant_state": new.quant_state}


def _refusal_4bit(module: nn.Module) -> str | None:
    if module.weight.is_meta or _state_4bit(module) is not None:
        return None
    return "is not quantised yet; move the model to its device first, which quantises it"


def _dense_8bit(module: nn.Module) -> torch.Tensor:
    import bitsandbytes

    weight = module.weight
    if weight.is_floating_point():
        return weight
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))


def _requantised_8bit(module: nn.Module, dense: torch.Tensor) -> dict:
    import bitsandbytes

    old, state = module.weight, copy.copy(module.state)
    state.reset_grads()  # forward takes the scales from the new weight
    if old.is_floating_point():
        dense = dense.to(old.dtype)
    settings = {"requires_grad": False, "has_fp16_weights": old.has_fp16_weights}
    new = bitsandbytes.nn.Int8Params(dense.to("cpu"), **settings).to(old.device)
    return {"weight": new, "state": state}


def _refusal_8bit(module: nn.Module) -> str | None:
    if module.weight.is_meta or not module.weight.is_floating_point() or module.state.has_fp16_weights:
        return None
    return "is not quantised yet; move the model to its device first, which quantises it"


def _dense_torchao(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    if hasattr(type(weight), "dequantize"):
        return weight.dequantize()
    unit = torch.eye(module.in_features, dtype=weight.dtype, device=weight.device)
    return F.linear(unit, weight).t()


def _requantised_torchao(module: nn.Module, dense: torch.Tensor) -> dict:
    old = module.weight
    again = _TORCHAO_AGAIN.get(type(old).__name__)
    if again is None:
        raise PatchError(
            f"a weight of torchao's {type(old).__name__} is not quantised again from here; use the adapter unmerged"
        )
    return {"weight": nn.Parameter(again(old, dense.to(old.dtype)), requires_grad=old.requires_grad)}


def _again_int8(old, dense: torch.Tensor):
    return type(old).from_hp(
        dense, granularity=_granularity(old), act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale, act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale, reduce_range=bool(getattr(old, "reduce_range", False)),
    )  # fmt: skip


def _again_float8(old, dense: torch.Tensor):
    return type(old).from_hp(
        dense, float8_dtype=old.qdata.dtype, granularity=_granularity(old), mm_config=old.mm_config,
        kernel_preference=old.kernel_preference, act_quant_kwargs=old.act_quant_kwargs,
    )  # fmt: skip


def _again_intx(old, dense: torch.Tensor):
    from torchao.quantization.quant_primitives import MappingType

    mapping = MappingType.ASYMMETRIC if old.zero_point.any() else MappingType.SYMMETRIC
    options = {"mapping_type": mapping, "activation_quantization": old.activation_quantization}
    new = type(old).from_hp(dense, old.block_size, old.target_dtype, **options)
    new.scale = new.scale.to(old.scale.dtype)
    return new


_TORCHAO_AGAIN = {
    "Int8Tensor": _again_int8,
    "Float8Tensor": _again_float8,
    "IntxUnpackedToInt8Tensor": _again_intx,
}


def _granularity(weight):
    from torchao.quantization.granularity import PerBlock, PerRow, PerTensor

    block = tuple(weight.block_size)
    if block == tuple(weight.shape):
        return PerTensor()
    return PerRow() if block == (1, weight.shape[1]) else PerBlock(block)


def _requantised_hqq(module: nn.Module, dense: torch.Tensor) -> dict:
    kind = next(each for each in type(module).__mro__ if each.__name__ == "HQQLinear")
    settings = copy.deepcopy(module.quant_config)
    whole = {**settings, "offload_meta": module.offload_meta}
    new = kind(None, whole, compute_dtype=module.compute_dtype, device=module.device)
    new.quantize(dense, **settings)
    return {"W_q": new.W_q, "meta": new.meta}


def _features_eetq(module: nn.Module) -> tuple[int, int]:
    """transformers' class has its weight as (K, N), and no other record of them."""
    if hasattr(module, "in_features"):
        return module.out_features, module.in_features
    return tuple(module.weight.shape[::-1])


ENTRIES = {
    "bitsandbytes.Linear4bit": Entry(
        "bitsandbytes", None, _dense_4bit, _requantised_4bit, lambda module: not _is_repacked(module), _refusal_4bit
    ),
    "bitsandbytes.Linear8bitLt": Entry("bitsandbytes", None, _dense_8bit, _requantised_8bit, refusal=_refusal_8bit),
    # Its product keeps a dense weight for backward, or has no backward where it quantises x on the way.
    "torchao.TorchAOBaseTensor": Entry("torchao", None, _dense_torchao, _requantised_torchao, lambda module: False),
    "hqq.HQQLinear": Entry("hqq", None, lambda module: module.dequantize(), _requantised_hqq),
    "gptqmodel.BaseQuantLinear": Entry("gptqmodel"),
    "eetq.EetqLinear": Entry("eetq", _features_eetq),
    "transformers.EetqLinear": Entry("eetq", _features_eetq),
    "aqlm.QuantizedLinear": Entry("aqlm"),
    "neural_compressor.PatchedLinear": Entry("neural_compressor"),
}
