"""LoRA on what is not a linear layer (embeddings, convolutions), and which class serves which module."""

import sys
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from fastpeft import quantised
from fastpeft.configs import LoraConfig
from fastpeft.errors import ConfigError, PatchError, TargetError
from fastpeft.tuners import dora, lora_init
from fastpeft.tuners.layer import offloaded_to
from fastpeft.tuners.lora import LoraConv1D, LoraLayer, LoraLinear, Settings, settings_of
from fastpeft.tuners.lora_quantised import QuantisedLora, check_quantised

MAX_SCALING = 1e4
MAX_RANK = 1 << 16  # far beyond the width of any layer
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoraEmbedding(LoraLayer):
    """LoRA on nn.Embedding: row i of the update is s·B A[:, i]. Dropout has no input to act on, as in HF peft."""

    containers = {
        "lora_embedding_A": nn.ParameterDict,
        "lora_embedding_B": nn.ParameterDict,
        "lora_magnitude_vector": nn.ModuleDict,
    }

    @staticmethod
    def shapes(base: nn.Module, settings: Settings) -> dict[str, tuple[int, ...]]:
        entries, width = base.weight.shape
        shapes = {"lora_embedding_A": (settings.r, entries), "lora_embedding_B": (width, settings.r)}
        return {**shapes, "lora_magnitude_vector": (width,)} if settings.use_dora else shapes

    def build(self, name: str, settings: Settings, device) -> None:
        entries, width = self.weight.shape
        self.lora_embedding_A[name] = nn.Parameter(torch.randn(settings.r, entries, device=device))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn(width, settings.r, device=device))

    def reset(self, name: str, init: bool | str, settings: Settings) -> None:
        """As nn.Embedding begins, and neutral: A zero, B of standard deviation 1; False keeps both random."""
        if init is not False:
            a, b = self.factors(name)
            nn.init.zeros_(a)
            nn.init.normal_(b)

    def parameter_holders(self):
        return self.lora_embedding_A, self.lora_embedding_B

    def matrix(self) -> torch.Tensor:
        return self.weight.t()

    def unmatrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t()

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def scaled(self, name: str, tensor: torch.Tensor | float) -> torch.Tensor | float:
        return tensor

    def _bias_of(self, name: str) -> None:
        return None

    def _add(self, name: str, input: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` plus one adapter's share."""
        settings: Settings = self._fastpeft.adapters[name]
        a, b = self.factors(name)
        factor = None
        if settings.use_dora:  # with A as it is before max_norm shortens its columns in place
            factor = dora.factor(self.matrix(), a, b, settings.scaling, self.magnitude(name))
        rows = F.embedding(
            input, a.t(), self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        update = (rows @ b.t()) * settings.scaling
        embed_scale = getattr(self, "embed_scale", None)  # Gemma's embeddings multiply their output
        if embed_scale is not None:
            update = update * torch.as_tensor(embed_scale).to(update)
        return result + update if factor is None else (result + update) * factor


class LoraConv(LoraLayer):
    """LoRA on nn.Conv1d and nn.Conv2d: A is a convolution like the base's down to r channels, B a pointwise one.

    Stride, padding, dilation and padding_mode are the base's, so that the update equals one of the base weight.
    """

    @staticmethod
    def shapes(base: nn.Module, settings: Settings) -> dict[str, tuple[int, ...]]:
        ones = (1,) * len(base.kernel_size)
        shapes = {
            "lora_A.weight": (settings.r, base.in_channels, *base.kernel_size),
            "lora_B.weight": (base.out_channels, settings.r // base.groups, *ones),
        }
        if settings.bias:
            shapes["lora_B.bias"] = (base.out_channels,)
        if settings.use_dora:
            shapes["lora_magnitude_vector"] = (1, base.out_channels, *ones)
        return shapes

    def build(self, name: str, settings: Settings, device) -> None:
        convolution = next(kind for kind in CONVOLUTIONS if isinstance(self, kind))
        ones = (1,) * len(self.kernel_size)
        self.lora_A[name] = convolution(
            self.in_channels, settings.r, self.kernel_size, self.stride, self.padding, self.dilation,
            bias=False, padding_mode=self.padding_mode, device=device,
        )  # fmt: skip
        self.lora_B[name] = convolution(
            settings.r, self.out_channels, ones, groups=self.groups, bias=settings.bias, device=device
        )

    def magnitude_shape(self) -> tuple[int, ...]:
        return (1, -1, *(1,) * len(self.kernel_size))

    def delta(self, name: str) -> torch.Tensor:
        if self.groups > 1:
            raise PatchError(f"LoRA on a convolution with {self.groups} groups cannot be merged; use it unmerged")
        a, b = (factor.detach() for factor in self.factors(name))
        wide = torch.promote_types(a.dtype, torch.float32)
        product = b.to(wide).flatten(1) @ a.to(wide).flatten(1)
        return product.view(self.weight.shape) * self._fastpeft.adapters[name].scaling

    def _add(self, name: str, input: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` plus one adapter's share."""
        settings: Settings = self._fastpeft.adapters[name]
        p = settings.dropout if self.training else 0.0
        z = input.to(self.lora_A[name].weight.dtype)
        z = F.dropout(z, p) if p else z
        update = self.scaled(name, self.lora_B[name](self.lora_A[name](z)) * settings.scaling)
        return self._with_magnitude(name, z, result, update, bool(p)) if settings.use_dora else result + update

    def _with_magnitude(self, name, z, result, update, dropped: bool) -> torch.Tensor:
        a, b = (factor.flatten(1) for factor in self.factors(name))
        scaling = self._fastpeft.adapters[name].scaling
        factor = dora.factor(self.weight.flatten(1), a, b, scaling, self.magnitude(name).flatten())
        factor = factor.view(self.magnitude_shape())
        bias = 0 if self.bias is None else self.bias.view(self.magnitude_shape())
        base = self._conv_forward(z, self.weight.to(z.dtype), None) if dropped else result - bias
        return result + (factor - 1) * base + factor * update


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """The LoRA class for a module, or None if LoRA does not serve it."""
    if quantised.entry_of(module) is not None:
        return QuantisedLora
    if isinstance(module, nn.Linear):
        return LoraLinear
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if isinstance(module, CONVOLUTIONS):
        return LoraConv
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D):
        LoraLinear.base_class_forwards.add(pytorch_utils.Conv1D.forward)
        return LoraConv1D
    return None


def _check_dense(name: str, module: nn.Module) -> None:
    weight, kind = module.weight, type(module)
    if weight.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) and not (
        quantised.is_quantised(weight)
    ):
        return
    if isinstance(module, nn.Linear):
        advice = (
            f"its library is not known; say how it works with fastpeft.quantised.register("
            f"'{kind.__module__.partition('.')[0]}.{kind.__qualname__}', ...)"
        )
    else:
        advice = "of quantised modules only linear layers carry an adapter; convert it to a floating type"
    raise TargetError(
        f"{name} is a {kind.__name__} with a weight of {type(weight).__name__}, dtype {weight.dtype}, which is not "
        f"served: {advice}, or exclude the module with exclude_modules"
    )


def check_target(name: str, module: nn.Module, config: LoraConfig, r: int, alpha: float) -> None:
    """Refuse what cannot be served, before anything changes. Raises TargetError or ConfigError."""
    weight = quantised.storage(module)
    decomposed = lora_init.decomposes(config.init_lora_weights)
    if weight.is_meta and offloaded_to(module) is None:
        raise TargetError(f"{name} is on the meta device; load the model's weights before patching it")
    if weight.is_meta and (config.use_dora or decomposed):
        what = "use_dora=True" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
        raise TargetError(f"{name} is offloaded by accelerate, and {what} needs its weight; load it without offloading")
    if layer_class(module) is QuantisedLora:
        check_quantised(name, module, config)
    else:
        _check_dense(name, module)
    if r > MAX_RANK:
        raise ConfigError(f"r={r} for {name}, whose weight is {tuple(weight.shape)}; the most is {MAX_RANK}")
    scaling = settings_of(config, r, alpha).scaling
    if abs(scaling) > MAX_SCALING:
        raise ConfigError(f"lora_alpha={alpha} with r={r} scales {name} by more than {MAX_SCALING:g}; lower lora_alpha")
    if isinstance(module, nn.Embedding) and config.lora_bias:
        raise ConfigError(f"lora_bias=True does not apply to the embedding {name}; exclude it or set lora_bias=False")
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        if r % module.groups:
            raise ConfigError(f"{name} has {module.groups} groups, which must divide the rank; r is {r}")
        if config.use_dora:
            raise ConfigError(
                f"use_dora=True does not apply to {name}, a convolution with {module.groups} groups; set it to False, "
                "or exclude the module with exclude_modules"
            )
    if decomposed:
        kind = layer_class(module)
        matrix = weight if kind in (LoraLinear, LoraConv1D) else weight.new_empty(0)
        matrix = quantised.dense_weight(module) if kind is QuantisedLora else matrix
        lora_init.check_decomposition(name, matrix, r, scaling, config.init_lora_weights)


def settle_fan_in_fan_out(config: LoraConfig, module: nn.Module) -> None:
    """HF peft's rule: the stored layout is the module's, whatever the configuration says; a warning if they differ."""
    stored_transposed = layer_class(module) is LoraConv1D
    kind = "Conv1D" if stored_transposed else "Linear"
    if isinstance(module, nn.Linear) or stored_transposed:
        if config.fan_in_fan_out != stored_transposed:
            warnings.warn(
                f"fan_in_fan_out={config.fan_in_fan_out} does not fit {kind}, which stores its weight "
                f"{'(in, out)' if stored_transposed else '(out, in)'}; using {stored_transposed}",
                stacklevel=2,
            )
        config.fan_in_fan_out = stored_transposed
