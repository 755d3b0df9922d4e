"""peft's layers with our arithmetic: what stands in front of their classes, and for which there is something.

Which adapters a call uses is peft's own matter (active, disabled, merged). Where a layer does what the op does not
know, its own forward is called; `why_not` says so.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft import quantised
from fastpeft.distributed import own_weight
from fastpeft.integrations.peft.experts import FusedExperts
from fastpeft.integrations.peft.swapping import Swapped, full_name, is_bare
from fastpeft.tuners.linear_arithmetic import LinearArithmetic
from fastpeft.tuners.lora import Settings
from fastpeft.tuners.mixed import mixed_linear

PLAIN_DROPOUTS = (nn.Dropout, nn.Identity)
DORA = "peft.tuners.lora.variants.DoraLinearVariant"
CONV1D = "transformers.pytorch_utils.Conv1D"


class FusedLayer(Swapped, LinearArithmetic):
    """What the kinds share: in front of a class whose forward is `forward(x, *args, **kwargs)`."""

    op = "lora_linear"

    def is_dense(self) -> bool:
        """Whether the base has its weight as a floating-point parameter and nothing more."""
        weight = own_weight(self.base_layer)
        return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.itemsize > 1

    def base_forward(self, *args, **kwargs) -> Tensor:
        if self.is_dense():
            return self.base_layer(*args, **kwargs)
        return quantised.call(self.base_layer, self.base_layer, *args, **kwargs)

    def base_bias(self) -> Tensor | None:
        return self.base_layer.bias

    def backend(self) -> str | None:
        return self.extension.backend

    def matrix(self) -> Tensor:
        if not self.is_dense():
            return quantised.dense_weight(self.base_layer)
        weight = self.base_layer.weight
        return weight.t() if full_name(type(self.base_layer)) == CONV1D else weight

    def plain_base(self) -> bool:
        """Whether the base product is x Wᵀ + bias with a dense weight, so that the op may compute it."""
        base = self.base_layer
        known = type(base).forward is nn.Linear.forward or full_name(type(base)) == CONV1D
        return known and self.is_dense() and is_bare(base)

    def width(self) -> tuple[int, int]:
        """(N, K)"""
        return self.out_features, self.in_features

    def lone_adapter(self) -> str | None:
        """As of `LoraLinear`."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged_adapters or len(names) != 1:
            return None
        settings = self.settings(names[0])
        computed = self.plain_base() or (self.has_own_product() and not settings.bias)
        return None if not computed or settings.use_dora or self.why_not(names[0]) else names[0]

    def has_own_product(self) -> bool:
        """As of `LoraLinear`."""
        return quantised.entry_of(self.base_layer) is not None and is_bare(self.base_layer)

    def dropout_of(self, name: str) -> float:
        """The probability in force, which is the dropout module's matter alone."""
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.is_dense():
            return super().product(x, weight)
        return quantised.FrozenProduct.apply(x, None, self.matrix, lambda x: F.linear(x, weight.to(x.dtype)))

    def has_matrix(self) -> bool:
        """Whether the base's weight can be had without calling the base."""
        if self.is_dense():
            return self.plain_base()
        entry = quantised.entry_of(self.base_layer)
        return entry is not None and entry.dense is not None and is_bare(self.base_layer)

    def why_not(self, name: str) -> str | None:
        """Why this adapter is left to peft's own forward here, or None; of its dropout, to which the kinds add."""
        dropout = self.lora_dropout[name]
        if not is_bare(dropout):
            return "hooks on its dropout, which only its own calls run"
        if type(dropout) not in PLAIN_DROPOUTS:
            return f"its dropout is {type(dropout).__name__}"
        return "its dropout leaves nothing" if getattr(dropout, "p", 0.0) >= 1 else None

    def reasons(self) -> dict[str, str]:
        """Adapter -> why it is left to peft's own forward."""
        return {name: why for name in self.lora_A if (why := self.why_not(name)) is not None}

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        rows = kwargs.get("adapter_names")
        chosen = self.active_adapters if rows is None else dict.fromkeys(rows)
        names = [name for name in chosen if name in self.lora_A]
        special = self.disable_adapters or self.merged_adapters or kwargs.get("alora_offsets") is not None
        if special or not names or any(map(self.why_not, names)):
            return super().forward(x, *args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("adapter_names", "alora_offsets")}
        if rows is None:
            return self.adapted_forward(names, x, *args, **kwargs)
        self._check_forward_args(x, adapter_names=rows)
        return mixed_linear(self, names, rows, x, *args, **kwargs)


class FusedLora(FusedLayer):
    """LoRA, rank-stabilised LoRA and DoRA."""

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        scaling = self.scaling[name]  # a tensor on the device, once peft has prepared the model for hot swaps
        b = self.lora_B[name].weight
        return self.lora_A[name].weight, b * scaling.to(b.dtype) if isinstance(scaling, Tensor) else b

    def settings(self, name: str) -> Settings:
        scaling = self.scaling[name]
        scaling = 1.0 if isinstance(scaling, Tensor) else scaling
        use_dora, bias = name in self.lora_variant, self.lora_B[name].bias is not None
        return Settings(self.r[name], scaling, self.dropout_of(name), use_dora, bias)

    def _bias_of(self, name: str) -> Tensor | None:
        scaling, bias = self.scaling[name], self.lora_B[name].bias
        return bias * scaling if isinstance(scaling, Tensor) else bias

    def magnitude(self, name: str) -> Tensor:
        return self.lora_magnitude_vector[name].weight

    def why_not(self, name: str) -> str | None:
        variant = self.lora_variant.get(name)
        if variant is not None and full_name(type(variant)) != DORA:
            return f"{type(variant).__name__} has a forward of its own"
        if variant is not None and not self.has_matrix():
            return "DoRA on a base whose weight is not at hand, or that has hooks"
        parts = [self.lora_A[name], self.lora_B[name]]
        if variant is not None:
            parts.append(self.lora_magnitude_vector[name])
        if not all(map(is_bare, parts)):
            return "hooks on the adapter's modules, which only their own calls run"
        if type(parts[0]) is not nn.Linear or type(parts[1]) is not nn.Linear:
            return f"its factors are {type(parts[0]).__name__} and {type(parts[1]).__name__}"
        return super().why_not(name)

    def dropout_of(self, name: str) -> float:
        """DoRA's goes by the layer's own mode too, as in peft."""
        return super().dropout_of(name) if self.training or name not in self.lora_variant else 0.0


class FusedAdaLora(FusedLayer):
    """AdaLoRA, with A∘E for A. The scaling, which peft divides by a number on the device, goes with E."""

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        scaling = self.scaling[name] / (self.ranknum[name] + 1e-5)
        return self.lora_A[name] * (self.lora_E[name] * scaling), self.lora_B[name]

    def settings(self, name: str) -> Settings:
        return Settings(self.r[name], 1.0, self.dropout_of(name), False, False)

    def _bias_of(self, name: str) -> None:
        return None

    def why_not(self, name: str) -> str | None:
        if not self.lora_A[name].shape[0]:
            return "no triplets are left"
        return super().why_not(name)


_LORA = "peft.tuners.lora"
FUSED = {
    f"{_LORA}.layer.Linear": FusedLora,
    f"{_LORA}.layer.ParamWrapper": FusedExperts,
    f"{_LORA}.bnb.Linear8bitLt": FusedLora,
    f"{_LORA}.bnb.Linear4bit": FusedLora,
    f"{_LORA}.gptq.GPTQLoraLinear": FusedLora,
    f"{_LORA}.awq.AwqLoraLinear": FusedLora,
    f"{_LORA}.hqq.HqqLoraLinear": FusedLora,
    f"{_LORA}.eetq.EetqLoraLinear": FusedLora,
    f"{_LORA}.aqlm.AqlmLoraLinear": FusedLora,
    f"{_LORA}.torchao.TorchaoLoraLinear": FusedLora,
    "peft.tuners.adalora.layer.SVDLinear": FusedAdaLora,
    "peft.tuners.adalora.bnb.SVDLinear8bitLt": FusedAdaLora,
    "peft.tuners.adalora.bnb.SVDLinear4bit": FusedAdaLora,
    "peft.tuners.adalora.gptq.SVDQuantLinear": FusedAdaLora,
}
