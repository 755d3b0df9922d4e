"""transformers' mixtures of experts with LoRA on their experts: the arithmetic of its grouped implementation, with
the rank-r terms computed on the tokens that are routed to each expert, so that no weight of an expert is ever made.

All of transformers' implementations (eager, batched_mm, grouped_mm) compute the same, and each is served by this one.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastpeft.ops._expert_lora_linear_torch import segments
from fastpeft.ops.expert_lora_linear import apply_expert_lora
from fastpeft.tuners.layer import AdapterLayer
from fastpeft.tuners.lora_matrices import LoraMatrices
from fastpeft.tuners.lora_parameters import LoraParameters

Adapter = tuple[Tensor, Tensor, float]


def parameters_class(module: nn.Module) -> type[LoraParameters]:
    """Which class serves a module some of whose parameters are targets."""
    if isinstance(module, AdapterLayer):
        return type(module).__bases__[0]
    return LoraExperts if is_known(module) else LoraMatrices


def calls_of(parameters) -> list[tuple[nn.Module, nn.Parameter, int]]:
    """(module, parameter, rank) of each product of experts, of a plan's (path, module, settings)."""
    served = [(module, settings) for _, module, settings in parameters if parameters_class(module) is LoraExperts]
    return [(m, m._parameters[key], each.r) for m, settings in served for key, each in settings.each.items()]


def is_known(module: nn.Module) -> bool:
    """Whether the module's forward is one that transformers' `use_experts_implementation` has made, so that the module
    says what it computes."""
    made_by, own = sys.modules.get("transformers.integrations.moe"), type(module).forward
    if made_by is None or own.__globals__ is not vars(made_by) or not hasattr(module, "has_post_expert_norm"):
        return False
    behind = getattr(vars(module).get("_old_forward"), "__func__", None)  # accelerate's hook calls that
    return "forward" not in vars(module) or behind is own


class LoraExperts(LoraParameters):
    """LoRA on the experts of a mixture of transformers."""

    def adapted_forward(self, names: list[str], *args, **kwargs) -> Tensor:
        targeted = self._fastpeft.adapters[names[0]].each
        adapters = {key: [self.factors(name, key) for name in names] for key in targeted}

        def value_of(key: str) -> Tensor:
            return self.adapted(names, key) if key in targeted else self._parameters[key]

        return experts_forward(self, adapters, value_of, self._fastpeft.model.backend, *args, **kwargs)


def products_of(module: nn.Module) -> tuple[str, str]:
    """The parameters of the experts' two products."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def experts_forward(
    module: nn.Module, adapters: dict[str, list[Adapter]], value_of: Callable[[str], Tensor], backend: str | None,
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor,
) -> Tensor:  # fmt: skip
    """What experts of transformers (`is_known`) compute with LoRA: [tokens, K] of hidden_states [tokens, K], and of
    each token the experts and their weights [tokens, k].

    adapters: of each product's parameter (A [E·r, K], B [N, r·E], scaling) of those in force, none of one that is no
    target. value_of: a bias by its name. backend: as in `patch`.
    """
    tokens, chosen = len(hidden_states), top_k_index.shape[-1]
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    ends = torch.searchsorted(ids, torch.arange(module.num_experts, device=ids.device), right=True)
    rows = None if torch.compiler.is_compiling() else segments(ends, len(ids))  # waits for the device, once

    def product(key: str, x: Tensor) -> Tensor:
        weight = module._parameters[key]
        bias = value_of(f"{key}_bias") if module.has_bias else None
        each = weight.transpose(1, 2) if module.is_transposed else weight
        return apply_expert_lora(x.to(weight.dtype), each, bias, adapters.get(key, []), ends, backend, rows)

    first, last = products_of(module)
    x = product(first, hidden_states[order // chosen])
    x = product(last, module._apply_gate(x) if module.has_gate else module.act_fn(x))
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return x[back].view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)
