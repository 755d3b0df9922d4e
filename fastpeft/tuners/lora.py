"""LoRA layers (Hu et al., arXiv 2106.09685): one class for each kind of base module, in front of its own class.

Parameter names, shapes, scaling and the order of random draws are HF peft's; the arithmetic is `lora_linear`'s.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.configs import LoraConfig
from fastpeft.distributed import is_sharded, own_weight
from fastpeft.errors import PatchError
from fastpeft.selection import row_names
from fastpeft.tuners import dora, lora_init
from fastpeft.tuners.layer import AdapterLayer, fetched, offloaded_to
from fastpeft.tuners.linear_arithmetic import LinearArithmetic
from fastpeft.tuners.mixed import mixed_one_by_one

# The buffer of lora_B that has it, where it is no number of `Settings`: the bits of an fp32 as an int32, so that
# `model.to(torch.bfloat16)` does not round it.
SCALING = "scaling"


@dataclass(frozen=True)
class Settings:
    """One adapter's numbers in one layer. own_r: its rank, where its tensors are padded with zeros to r; else None."""

    r: int
    scaling: float
    dropout: float
    use_dora: bool
    bias: bool
    own_r: int | None = None


def settings_of(config: LoraConfig, r: int, alpha: float) -> Settings:
    """scaling = alpha/r, or alpha/√r for rank-stabilised LoRA (arXiv 2312.03732)."""
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    return Settings(r, scaling, config.lora_dropout, config.use_dora, config.lora_bias)


class LoraLayer(AdapterLayer):
    """What the kinds share. Each says how its parameters are built, and its forward for one adapter; by the static
    method `shapes(base, settings)` the names and shapes of the tensors that HF's file holds for one adapter."""

    prefix = "Lora"
    has_op = False  # whether the fused op computes it
    containers = {"lora_A": nn.ModuleDict, "lora_B": nn.ModuleDict, "lora_magnitude_vector": nn.ModuleDict}

    # What a kind provides: the base weight as the matrix (N, K) that acts on a column, and the adapter's two matrices.
    def matrix(self) -> torch.Tensor:
        return own(self, "weight")

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, K], B [N, r]); the latter times the scaling, where that is a tensor."""
        modules = self._modules
        b = modules["lora_B"]._modules[name]
        weight = own(b, "weight")
        return own(modules["lora_A"]._modules[name], "weight"), scaled_by(b, weight) if b._buffers else weight

    def scaled(self, name: str, tensor: torch.Tensor | float) -> torch.Tensor | float:
        """`tensor` times the scaling that may change between compiled calls, if there is one (`fastpeft.hotswap`)."""
        return scaled_by(self.lora_B[name], tensor)

    @property
    def scaling(self) -> dict[str, float | torch.Tensor]:
        """Adapter -> its scaling, as a layer of HF peft has it for peft's optimizers."""
        return {name: self.scaled(name, each.scaling) for name, each in self._fastpeft.adapters.items()}

    def is_offloaded(self, name: str) -> bool:
        return self.factors(name)[0].is_meta

    def magnitude(self, name: str) -> torch.Tensor:
        return self.lora_magnitude_vector[name].weight

    def width(self) -> tuple[int, int]:
        """(N, K)"""
        return tuple(self.matrix().shape)

    def placement(self) -> dict:
        """Where an adapter's parameters belong, and of what dtype they are before half precision is widened."""
        base = self.weight
        device = offloaded_to(self) if base.is_meta else base.device
        return {"device": device, "dtype": base.dtype if base.is_floating_point() else None}

    def add_adapter(self, name: str, settings: Settings, init: bool | str | None, autocast: bool) -> None:
        """Build, initialise and place one adapter's parameters; `init` None leaves them unset, for a file to fill."""
        device = torch.device("meta") if init is None else None
        self.build(name, settings, device)
        if lora_init.decomposes(init):
            self._decompose(name, settings, init)
        elif init is not None:
            self.reset(name, init, settings)
        place = self.placement()
        for container in self.parameter_holders():
            if name in container:
                _place(container, name, place, empty=init is None)
        if settings.use_dora:
            self._add_magnitude(name, settings, empty=init is None)
        if autocast:
            for container in (getattr(self, key) for key in self.containers):
                if name in container:
                    _widen(container, name)
        self._fastpeft.adapters[name] = settings

    def reset(self, name: str, init: bool | str, settings: Settings) -> None:
        """The values that `init_lora_weights` asks for, over those that `build` has drawn."""
        lora_init.reset(*self.factors(name), self._bias_of(name), init, settings.r)

    def parameter_holders(self) -> tuple[nn.Module, ...]:
        return self.lora_A, self.lora_B

    def _bias_of(self, name: str) -> torch.Tensor | None:
        bias = self.lora_B[name].bias
        return None if bias is None else self.scaled(name, bias)

    def _decompose(self, name: str, settings: Settings, init: str) -> None:
        """PiSSA or OLoRA: the adapter takes over a part of the base weight, which is changed to the rest."""
        weight = self.matrix()
        try:
            if init == "olora":
                a, b = lora_init.olora(weight, settings.r)
            else:
                a, b = lora_init.pissa(weight, settings.r, settings.scaling, init)
        except torch.linalg.LinAlgError as error:
            raise PatchError(
                f"init_lora_weights={init!r} failed on a weight of {tuple(weight.shape)}: {error}"
            ) from error
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise PatchError(
                f"init_lora_weights={init!r} gave infinite values at scaling {settings.scaling:g}; raise it"
            )
        self.lora_A[name].weight.data, self.lora_B[name].weight.data = a, b
        self.leave(weight.detach().float() - settings.scaling * b @ a)

    def leave(self, rest: torch.Tensor) -> None:
        """Make `rest` (N, K) the base weight, until the adapter is taken out."""
        self.keep("weight")
        self.matrix().data.copy_(rest)

    def _add_magnitude(self, name: str, settings: Settings, empty: bool) -> None:
        a, b = (factor.detach().flatten(1) for factor in self.factors(name))
        weight = self.matrix().detach().flatten(1)
        value = torch.empty_like(weight[:, 0]) if empty else dora.initial_magnitude(weight, a, b, settings.scaling)
        self.lora_magnitude_vector[name] = dora.Magnitude(value.view(self.magnitude_shape()))

    def magnitude_shape(self) -> tuple[int, ...]:
        return (-1,)

    def delete_adapter(self, name: str) -> None:
        for container in self.containers:
            held = self._modules.get(container, ())  # none where taking the layer out was interrupted
            if name in held:
                held.pop(name)
        self._fastpeft.adapters.pop(name, None)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in HF's file, relative to this module."""
        out = {}
        for container in self.containers:
            held = getattr(self, container)
            if name not in held:
                continue
            if container == "lora_magnitude_vector":
                out[container] = held[name].weight
            elif isinstance(held, nn.ParameterDict):
                out[container] = held[name]
            else:
                out.update({f"{container}.{key}": value for key, value in held[name].named_parameters()})
        return out

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Without the zeros that fill an adapter up to a greater rank."""
        out, rank = self.parameters_of(name), self._fastpeft.adapters[name].own_r
        if rank is not None:
            a, b = out["lora_A.weight"], out["lora_B.weight"]
            if a[rank:].any() and b[:, rank:].any():
                raise PatchError(
                    f"{name!r} was swapped to rank {rank}, and an optimizer from before has trained it beyond; make a "
                    "new optimizer after hotswap_adapter"
                )
            out["lora_A.weight"], out["lora_B.weight"] = out["lora_A.weight"][:rank], out["lora_B.weight"][:, :rank]
        return out

    # Merging. What was there is kept, so that unmerging is exact and not an estimate.
    def delta(self, name: str) -> torch.Tensor:
        """scaling·B A in the shape of `matrix()`, in at least fp32."""
        a, b = (factor.detach() for factor in self.factors(name))
        wide = torch.promote_types(a.dtype, torch.float32)
        return (b.to(wide) @ a.to(wide)) * self._fastpeft.adapters[name].scaling

    def merged_weight(self, names: list[str]) -> torch.Tensor:
        """The weight, in its own shape, with the adapters added, in fp32 at least. Raises PatchError if it is not
        finite."""
        matrix = self.matrix().detach()
        merged = matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
        for name in names:
            settings = self._fastpeft.adapters[name]
            if settings.use_dora:
                a, b = (factor.detach().flatten(1) for factor in self.factors(name))
                scale = dora.factor(matrix.flatten(1), a, b, settings.scaling, self.magnitude(name).detach().flatten())
                merged = (merged + self.delta(name)) * scale.view(-1, *(1,) * (merged.ndim - 1))
            else:
                merged += self.delta(name)
        if not torch.isfinite(merged).all():
            raise PatchError(f"merging {', '.join(names)} would put NaN or Inf into a weight; the adapter is broken")
        return merged

    def merged_bias(self, names: list[str]) -> torch.Tensor | None:
        extra = [
            self._fastpeft.adapters[name].scaling * self._bias_of(name).detach()
            for name in names
            if self._fastpeft.adapters[name].bias
        ]
        if not extra:
            return None
        if self.bias is None:
            raise PatchError("an adapter with lora_bias cannot be merged into a layer without a bias; use it unmerged")
        return self.bias.detach() + sum(extra).to(self.bias.dtype)

    def prepare_merge(self, names) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """What `merge` will write, computed and checked beforehand; None if this layer has none of the adapters."""
        names = [name for name in names if name in self._fastpeft.adapters]
        if not names:
            return None
        if "weight" not in self._parameters:
            raise PatchError(
                "its weight is computed from other parameters, so nothing can be merged into it; use it unmerged"
            )
        if self.weight.is_meta:
            raise PatchError("its weight is offloaded by accelerate; load the model without offloading to merge")
        if is_sharded(self.weight):
            raise PatchError("its weight is sharded; save the adapter, and merge it into a model that is not")
        return self.merged_weight(names).to(self.weight.dtype), self.merged_bias(names)

    def merge(self, prepared, untie: bool) -> None:
        """Put the prepared weight in place. With `untie` the layer gets a parameter of its own, because another
        module (a tied head) uses the same one."""
        weight, bias = prepared
        state = self._fastpeft
        for key, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            parameter = getattr(self, key)
            if key == "weight":
                value = self.unmatrix(value)
            if untie and key == "weight":
                state.unmerged[key] = parameter
                self.weight = nn.Parameter(value.contiguous(), requires_grad=parameter.requires_grad)
            else:
                state.unmerged[key] = parameter.detach().to("cpu", copy=True)
                with torch.no_grad():
                    parameter.copy_(value)

    def unmatrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `matrix`."""
        return matrix

    def unmerge(self) -> None:
        """Put back what `merge` replaced, bit for bit."""
        state = self._fastpeft
        for key, kept in state.unmerged.items():
            if isinstance(kept, nn.Parameter):
                setattr(self, key, kept)
            else:
                with torch.no_grad():
                    getattr(self, key).copy_(kept)
        state.unmerged.clear()

    def forward(self, *args, **kwargs):
        names = self.active_adapters()
        if not names or self._fastpeft.model.merged:
            return self.base_forward(*args, **kwargs)
        rows = row_names(self._fastpeft.model)
        forward = self.adapted_forward if rows is None else functools.partial(self.mixed_forward, rows=rows)
        if not self.is_offloaded(names[0]):
            return forward(names, *args, **kwargs)
        with fetched(self._holders(names)):
            return forward(names, *args, **kwargs)

    def adapted_forward(self, names: list[str], input: torch.Tensor) -> torch.Tensor:
        """The forward with these adapters, one after the other."""
        result = self.base_forward(input)
        dtype = result.dtype
        for name in names:
            result = self._add(name, input, result)
        return result.to(dtype)

    def mixed_forward(self, names: list[str], input: torch.Tensor, *, rows: tuple[str, ...]) -> torch.Tensor:
        """`adapted_forward` of a batch for whose samples `rows` names adapters, of which there are `names` here."""
        return mixed_one_by_one(self, names, rows, input, self.base_forward(input), self._add)

    def _holders(self, names: list[str]) -> list[nn.Module]:
        """The modules that have the parameters of these adapters."""
        held = [getattr(self, container) for container in self.containers]
        holders = [each for each in held if isinstance(each, nn.ParameterDict)]
        return holders + [each[n] for each in held if isinstance(each, nn.ModuleDict) for n in names if n in each]


def own(module: nn.Module, name: str) -> torch.Tensor | None:
    """Its weight or bias, a parameter as it is or what a parametrisation computes; torch's own look-up takes several
    times as long, and a layer's call needs four."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def scaled_by(lora_B: nn.Module, tensor: torch.Tensor | float) -> torch.Tensor | float:
    """`tensor` times the scaling that is a buffer of lora_B, if there is one."""
    buffers = lora_B._buffers
    return tensor * buffers[SCALING].view(torch.float32) if SCALING in buffers else tensor


def linear_shapes(outputs: int, inputs: int, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The shapes of one adapter of a linear layer."""
    shapes = {"lora_A.weight": (settings.r, inputs), "lora_B.weight": (outputs, settings.r)}
    if settings.bias:
        shapes["lora_B.bias"] = (outputs,)
    if settings.use_dora:
        shapes["lora_magnitude_vector"] = (outputs,)
    return shapes


def _place(container, name: str, place: dict, empty: bool) -> None:
    item = container[name]
    if isinstance(item, nn.Parameter):
        tensor = torch.empty_like(item, **place) if empty else item.detach().to(**place)
        container[name] = nn.Parameter(tensor)
    elif empty:
        container[name] = item.to(dtype=place["dtype"]).to_empty(device=place["device"])
    else:
        container[name] = item.to(**place)


def _widen(container, name: str) -> None:
    item = container[name]
    half = (torch.float16, torch.bfloat16)
    if isinstance(item, nn.Parameter):
        if item.dtype in half:
            container[name] = nn.Parameter(item.detach().float())
    elif any(parameter.dtype in half for parameter in item.parameters()):
        container[name] = item.float()


class LoraLinear(LinearArithmetic, LoraLayer):
    """LoRA on nn.Linear and its subclasses."""

    has_op = True
    base_class_forwards = {nn.Linear.forward}

    @staticmethod
    def shapes(base: nn.Module, settings: Settings) -> dict[str, tuple[int, ...]]:
        return linear_shapes(*base.weight.shape, settings)

    def build(self, name: str, settings: Settings, device) -> None:
        outputs, inputs = self.width()
        self.lora_A[name] = nn.Linear(inputs, settings.r, bias=False, device=device)
        self.lora_B[name] = nn.Linear(settings.r, outputs, bias=settings.bias, device=device)

    def plain_base(self) -> bool:
        """Whether the base product is x Wᵀ + bias with a dense weight, so that the op may compute it."""
        state = self._fastpeft
        plain = state.original_forward is None and state.original_class.forward in self.base_class_forwards
        return plain and self.is_dense()

    def is_dense(self) -> bool:
        """Whether the weight is a floating-point parameter and nothing more."""
        weight = own_weight(self)  # not an attribute: reading a parametrised weight computes it
        return type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point()

    def lone_adapter(self) -> str | None:
        """The adapter of which the op computes this layer's call now, with the base product or (`has_own_product`)
        based on it; None if it does not."""
        names, model = self.active_adapters(), self._fastpeft.model
        if len(names) != 1 or "_hf_hook" in self.__dict__ or model.merged or row_names(model) is not None:
            return None
        settings = self.settings(names[0])
        computed = self.plain_base() or (self.has_own_product() and not settings.bias)
        return None if not computed or settings.use_dora or self.is_offloaded(names[0]) else names[0]

    def has_own_product(self) -> bool:
        """Whether the base product is the layer's own affair, and nothing but that: it may be asked for it before the
        layer is called."""
        return False

    def settings(self, name: str) -> Settings:
        return self._fastpeft.adapters[name]

    def base_bias(self) -> torch.Tensor | None:
        return own(self, "bias")

    def is_offloaded(self, name: str) -> bool:
        return own(self._modules["lora_A"]._modules[name], "weight").is_meta

    def backend(self) -> str | None:
        return self._fastpeft.model.backend


class LoraConv1D(LoraLinear):
    """LoRA on transformers' Conv1D (GPT-2), a linear layer whose weight is stored as (K, N)."""

    @staticmethod
    def shapes(base: nn.Module, settings: Settings) -> dict[str, tuple[int, ...]]:
        return linear_shapes(*base.weight.shape[::-1], settings)

    def matrix(self) -> torch.Tensor:
        return self.weight.t()

    def unmatrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t()
