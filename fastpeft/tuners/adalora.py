"""AdaLoRA layers (Zhang et al., arXiv 2303.10512, section 3.1): a LoRA of r triplets, each with a singular value of its
own, which a schedule sets to zero where it matters least:

    y = base(x) + s·B (A∘E) x        s = lora_alpha / (init_r + 1e-5)

A (r, K) are the right vectors, E (r, 1) the values, B (N, r) the left vectors. Names, shapes, scaling and the order of
random draws are HF peft's; the arithmetic is `lora_linear`'s with A∘E for A. s stays what it was at the start, whatever
is taken away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional as F

from fastpeft import quantised
from fastpeft.configs import AdaLoraConfig
from fastpeft.errors import TargetError
from fastpeft.tuners.lora import LoraConv1D, LoraLayer, LoraLinear, Settings
from fastpeft.tuners.lora_kinds import layer_class
from fastpeft.tuners.lora_quantised import QuantisedLora

EPSILON = 1e-5  # peft's, beside the number of triplets
KEYS = ("lora_A", "lora_E", "lora_B")


@dataclass(eq=False)
class Ranks:
    """Which triplets one layer has, which of them count, and how important each entry has been so far.

    positions: their numbers among the init_r of the start. kept: by the last allocation, triplet by triplet; None
    before the first. dropped: the opposite as a mask (r, 1) beside E. importance, uncertainty: of A, E and B, in their
    shapes (equations 9 and 10 of the paper); None before the first step and after the last allocation.
    """

    positions: tuple[int, ...]
    kept: tuple[bool, ...] | None = None
    dropped: torch.Tensor | None = None
    importance: list[torch.Tensor] | None = None
    uncertainty: list[torch.Tensor] | None = None

    def pattern(self, init_r: int) -> list[bool]:
        """Which of the init_r triplets of the start are left, as HF peft's rank_pattern has it."""
        kept = self.kept or (True,) * len(self.positions)
        left = {position for position, stays in zip(self.positions, kept, strict=True) if stays}
        return [position in left for position in range(init_r)]


@dataclass(frozen=True)
class AdaLoraSettings(Settings):
    """One adapter's numbers in one layer; r is how many triplets the layer has, of the init_r that there were."""

    init_r: int = 0
    ranks: Ranks = field(default=None, compare=False)


def settings_of(config: AdaLoraConfig, kept: list[bool] | None) -> AdaLoraSettings:
    """`kept` says which triplets a file has; None is all."""
    positions = tuple(position for position, stays in enumerate(kept or [True] * config.init_r) if stays)
    scaling = config.effective_alpha / (config.init_r + EPSILON)
    return AdaLoraSettings(
        len(positions), scaling, config.lora_dropout, False, False, init_r=config.init_r, ranks=Ranks(positions)
    )


class AdaLoraLayer(LoraLayer):
    """What the kinds share: parameters, their start, what a file gets of them."""

    prefix = "AdaLora"
    containers = {**dict.fromkeys(KEYS, nn.ParameterDict), "ranknum": nn.ParameterDict}

    def build(self, name: str, settings: AdaLoraSettings, device) -> None:
        for key, shape in {**triplet_shapes(*self.width(), settings.r), "ranknum": (1,)}.items():
            getattr(self, key)[name] = nn.Parameter(torch.randn(shape, device=device))

    def reset(self, name: str, init: bool | str, settings: AdaLoraSettings) -> None:
        """Neutral, with vectors of standard deviation 0.02; False keeps what was drawn."""
        if init:
            nn.init.zeros_(self.lora_E[name])
            nn.init.normal_(self.lora_A[name], std=0.02)
            nn.init.normal_(self.lora_B[name], std=0.02)

    def add_adapter(self, name: str, settings: AdaLoraSettings, init: bool | None, autocast: bool) -> None:
        super().add_adapter(name, settings, init, autocast)
        self.ranknum[name].requires_grad_(False).fill_(float(settings.init_r))

    def parameter_holders(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self, container) for container in self.containers)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A[name] * self.lora_E[name], self.lora_B[name]

    def scaled(self, name: str, tensor: torch.Tensor | float) -> torch.Tensor | float:
        return tensor

    def is_offloaded(self, name: str) -> bool:
        return self.lora_A[name].is_meta

    def _bias_of(self, name: str) -> None:
        return None

    def active_adapters(self) -> list[str]:
        """Those that have any triplets left in this layer."""
        return [name for name in super().active_adapters() if self._fastpeft.adapters[name].r]

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        held = {key: getattr(self, key) for key in KEYS}
        return {key: parameters[name] for key, parameters in held.items() if name in parameters}

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Without the triplets that the last allocation has dropped, as HF peft's file."""
        own, kept = self.parameters_of(name), self._fastpeft.adapters[name].ranks.kept
        return own if kept is None or all(kept) else rows_of(own, [row for row, stays in enumerate(kept) if stays])

    def regrow(self, name: str, ranks: Ranks, dropped: dict[str, torch.Tensor]) -> None:
        """Put the triplets that a file left out (`dropped`, in order) back among those that it has, so that the layer
        has those of `ranks.positions`; the parameters are new ones."""
        stays = [row for row, kept in enumerate(ranks.kept) if kept]
        gone = [row for row, kept in enumerate(ranks.kept) if not kept]
        order = torch.tensor(stays + gone).argsort()
        for key, parameter in self.parameters_of(name).items():
            dimension = 1 if key == "lora_B" else 0
            extra = dropped[key].to(parameter)
            whole = torch.cat((parameter.detach(), extra), dimension).index_select(dimension, order.to(extra.device))
            getattr(self, key)[name] = nn.Parameter(whole.contiguous(), requires_grad=parameter.requires_grad)
        self.settle(name, ranks)

    def settle(self, name: str, ranks: Ranks) -> None:
        """Say which triplets the parameters are."""
        settings = self._fastpeft.adapters[name]
        self._fastpeft.adapters[name] = replace(settings, r=len(ranks.positions), ranks=ranks)


def rows_of(tensors: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Copies of some triplets of `{"lora_A": …, "lora_E": …, "lora_B": …}`."""
    chosen = torch.tensor(rows, dtype=torch.long, device=tensors["lora_E"].device)
    return {
        key: tensor.detach().index_select(1 if key == "lora_B" else 0, chosen).contiguous()
        for key, tensor in tensors.items()
    }


def triplet_shapes(outputs: int, inputs: int, r: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one adapter of a layer."""
    return {"lora_A": (r, inputs), "lora_E": (r, 1), "lora_B": (outputs, r)}


class AdaLoraLinear(AdaLoraLayer, LoraLinear):
    """AdaLoRA on nn.Linear and its subclasses."""

    @staticmethod
    def shapes(base: nn.Module, settings: AdaLoraSettings) -> dict[str, tuple[int, ...]]:
        return triplet_shapes(*base.weight.shape, settings.r)


class AdaLoraConv1D(AdaLoraLayer, LoraConv1D):
    """AdaLoRA on transformers' Conv1D (GPT-2), a linear layer whose weight is stored as (K, N)."""

    @staticmethod
    def shapes(base: nn.Module, settings: AdaLoraSettings) -> dict[str, tuple[int, ...]]:
        return triplet_shapes(*base.weight.shape[::-1], settings.r)


class QuantisedAdaLora(AdaLoraLayer, QuantisedLora):
    """AdaLoRA on a quantised linear layer of another library."""

    @staticmethod
    def shapes(base: nn.Module, settings: AdaLoraSettings) -> dict[str, tuple[int, ...]]:
        return triplet_shapes(*quantised.features(base), settings.r)


class AdaLoraConv2d(AdaLoraLayer):
    """AdaLoRA on nn.Conv2d: A is a convolution like the base's down to r channels, B a pointwise one.

    Stride, padding, dilation and padding_mode are the base's, so that the update equals one of the base weight.
    """

    @staticmethod
    def shapes(base: nn.Module, settings: AdaLoraSettings) -> dict[str, tuple[int, ...]]:
        return triplet_shapes(base.out_channels, base.weight[0].numel(), settings.r)

    def width(self) -> tuple[int, int]:
        return self.out_channels, self.weight[0].numel()

    def delta(self, name: str) -> torch.Tensor:
        return super().delta(name).view(self.weight.shape)

    def adapted_forward(self, names: list[str], input: torch.Tensor) -> torch.Tensor:
        result = self.base_forward(input)
        dtype = result.dtype
        for name in names:
            settings: AdaLoraSettings = self._fastpeft.adapters[name]
            a, b = self.factors(name)
            p = settings.dropout if self.training else 0.0
            z = input.to(a.dtype)
            z = F.dropout(z, p) if p else z
            inner = self._conv_forward(z, a.view(settings.r, *self.weight.shape[1:]), None)
            result = result + F.conv2d(inner, b.view(*b.shape, 1, 1)) * settings.scaling
        return result.to(dtype)


_KINDS = {LoraLinear: AdaLoraLinear, LoraConv1D: AdaLoraConv1D, QuantisedLora: QuantisedAdaLora}


def adalora_class(name: str, module: nn.Module) -> type[AdaLoraLayer]:
    """The AdaLoRA class for a module. Raises TargetError if AdaLoRA does not serve it."""
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            groups = f"a convolution with {module.groups} groups"
            raise TargetError(f"{name} is {groups}, which AdaLoRA does not serve; set exclude_modules")
        return AdaLoraConv2d
    kind = _KINDS.get(layer_class(module))
    if kind is None:
        raise TargetError(
            f"{name} is a {type(module).__name__}, which AdaLoRA does not serve; it serves Linear, Conv2d and "
            "transformers' Conv1D. Narrow target_modules or set exclude_modules"
        )
    return kind
