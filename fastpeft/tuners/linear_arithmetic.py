"""The arithmetic of a linear layer with LoRA, for whoever holds its parameters: our own layers, and peft's."""

import torch
from torch.nn import functional as F

from fastpeft.distributed import check_gathered
from fastpeft.ops.lora_linear import apply_lora
from fastpeft.tuners import dora, siblings
from fastpeft.tuners.mixed import mixed_linear


class LinearArithmetic:
    """The forward of a linear layer with LoRA, whoever holds its parameters.

    A class says: `matrix()` (N, K) and `base_bias()` of the base, `base_forward(...)`, `plain_base()` (whether the op
    may compute that); of an adapter `factors(name)`, `settings(name)`, `_bias_of(name)`, `magnitude(name)`; and the
    `backend()` that is asked for.
    """

    def dropout_of(self, name: str) -> float:
        """The probability in force."""
        return self.settings(name).dropout if self.training else 0.0

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x Wᵀ with the weight that `matrix()` has given."""
        return F.linear(x, weight)

    def adapted_forward(self, names: list[str], input: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if len(names) == 1:
            alone = not args and not kwargs
            if alone and siblings.KEY in self.__dict__:
                result = self.__dict__[siblings.KEY].result(self, names[0], input)
                if result is not None:
                    return result
            fused = alone and self.plain_base()
            return self._add(names[0], input, None if fused else self.base_forward(input, *args, **kwargs))
        result = self.base_forward(input, *args, **kwargs)
        dtype = result.dtype
        for name in names:  # the sum is rounded once, as in HF peft
            result = self._add(name, input, result.to(torch.promote_types(dtype, self.factors(name)[0].dtype)))
        return result.to(dtype)

    def mixed_forward(self, names: list[str], input: torch.Tensor, *args, rows: tuple[str, ...], **kwargs):
        """The same, of a batch for whose samples `rows` names adapters; `names` are those that there are here."""
        return mixed_linear(self, names, rows, input, *args, **kwargs)

    def _add(self, name: str, x: torch.Tensor, result: torch.Tensor | None) -> torch.Tensor:
        """`result` (None: the base's, not yet computed) plus one adapter's share."""
        settings = self.settings(name)
        a, b = self.factors(name)
        check_gathered("a factor of LoRA", a, b)
        p = self.dropout_of(name)
        backend = self.backend()
        if settings.use_dora:
            return dora.add(self, name, x, result, p, backend)
        if result is None:
            bias = self._bias_with(name, settings) if settings.bias else self.base_bias()
            return apply_lora(x, self.matrix(), bias, None, a, b, settings.scaling, p, backend)
        result = apply_lora(x, None, None, result, a, b, settings.scaling, p, backend)
        return result if not settings.bias else result + (settings.scaling * self._bias_of(name)).to(result.dtype)

    def _bias_with(self, name: str, settings) -> torch.Tensor | None:
        if not settings.bias:
            return self.base_bias()
        extra, bias = settings.scaling * self._bias_of(name), self.base_bias()
        return extra if bias is None else bias + extra
