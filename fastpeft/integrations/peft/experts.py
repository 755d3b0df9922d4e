"""peft's wrappers of the parameters of a mixture's experts (`target_parameters`), with our arithmetic: the outermost
computes for those inside it. What is not known is left to peft's own forward, which makes adapted weights."""

import functools
from collections.abc import Iterator

from torch import Tensor, nn

from fastpeft.integrations.peft.swapping import Swapped, is_bare
from fastpeft.tuners.experts import experts_forward, is_known, products_of


class FusedExperts(Swapped):
    """In front of ParamWrapper."""

    op = "expert_lora_linear"

    def chain(self) -> Iterator["FusedExperts"]:
        """This wrapper and those inside it."""
        wrapper = self
        while isinstance(wrapper, FusedExperts):
            yield wrapper
            wrapper = wrapper.base_layer

    def why_not(self) -> str | None:
        """Why calls are left to peft's own forward now, or None."""
        chain = list(self.chain())
        base = chain[-1].base_layer
        if not is_known(base):
            return f"the forward of {type(base).__name__} is not known"
        others = [each.parameter_name for each in chain if each.parameter_name not in products_of(base)]
        if others:
            return f"{', '.join(others)} is not what the experts' products read"
        parts = [held[name] for each in chain for held in (each.lora_A, each.lora_B) for name in held]
        if not all(map(is_bare, (*chain[1:], base, *parts))):
            return "hooks on the experts or on the adapter's modules, which only their own calls run"
        if not all(type(base._parameters.get(key)) is nn.Parameter for key in products_of(base)):
            return "its weights are no parameters of their own"
        return None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        chain = list(self.chain())
        special = any(each.disable_adapters or each.merged_adapters for each in chain)
        if special or kwargs.get("adapter_names") is not None or self.why_not() is not None:
            return super().forward(x, *args, **kwargs)
        adapters = {
            each.parameter_name: [each.factors(n) for n in each.active_adapters if n in each.lora_A] for each in chain
        }
        base = chain[-1].base_layer
        value_of = functools.partial(getattr, base)  # a bias may be parametrised by a wrapper around this one
        return experts_forward(base, adapters, value_of, self.extension.backend, x, *args, **kwargs)

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """(A, B, scaling) of one adapter of this wrapper's parameter."""
        a, b, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        return (a, b * scaling.to(b.dtype), 1.0) if isinstance(scaling, Tensor) else (a, b, scaling)
