"""transformers' mixtures of experts with LoRA on their experts: the arithmetic of its grouped implementation, with
the rank-r terms computed on the tokens that are routed to each expert, so that no weight of an expert is ever made.

All of transformers' implementations (eager, batched_mm, grouped_mm) compute the same, and each is served by this one.
"""

import sys

import torch
from torch import Tensor, nn

from fastpeft.ops.expert_lora_linear import apply_expert_lora
from fastpeft.tuners.layer import AdapterLayer
from fastpeft.tuners.lora_matrices import LoraMatrices
from fastpeft.tuners.lora_parameters import LoraParameters


def parameters_class(module: nn.Module) -> type[LoraParameters]:
    """Which class serves a module some of whose parameters are targets."""
    if isinstance(module, AdapterLayer):
        return type(module).__bases__[0]
    return LoraExperts if _is_known(module) else LoraMatrices


def calls_of(parameters) -> list[tuple[nn.Module, nn.Parameter, int]]:
    """(module, parameter, rank) of each product of experts, of a plan's (path, module, settings)."""
    served = [(module, settings) for _, module, settings in parameters if parameters_class(module) is LoraExperts]
    return [(m, m._parameters[key], each.r) for m, settings in served for key, each in settings.each.items()]


def _is_known(module: nn.Module) -> bool:
    """Whether the module's forward is one that transformers' `use_experts_implementation` has made, so that the module
    says what it computes."""
    made_by, own = sys.modules.get("transformers.integrations.moe"), type(module).forward
    if made_by is None or own.__globals__ is not vars(made_by) or not hasattr(module, "has_post_expert_norm"):
        return False
    behind = getattr(vars(module).get("_old_forward"), "__func__", None)  # accelerate's hook calls that
    return "forward" not in vars(module) or behind is own


class LoraExperts(LoraParameters):
    """LoRA on the experts of a mixture of transformers."""

    def adapted_forward(
        self, names: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """[tokens, K] of hidden_states [tokens, K], and of each token the experts and their weights [tokens, k]."""
        tokens, chosen = len(hidden_states), top_k_index.shape[-1]
        ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = torch.searchsorted(ids, torch.arange(self.num_experts, device=ids.device), right=True)
        x = hidden_states[order // chosen]
        x = self._product(names, "gate_up_proj" if self.has_gate else "up_proj", x, ids, ends)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = self._product(names, "down_proj", x, ids, ends)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return x[back].view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)

    def _product(self, names: list[str], key: str, x: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        """x_e W_eᵀ + bias_e of each expert, with these adapters."""
        weight, targeted = self._parameters[key], self._fastpeft.adapters[names[0]].each
        bias = None
        if self.has_bias:
            name = f"{key}_bias"
            bias = self.adapted(names, name) if name in targeted else self._parameters[name]
        adapters = [self.factors(name, key) for name in names] if key in targeted else []
        weight = weight.transpose(1, 2) if self.is_transposed else weight
        return apply_expert_lora(x.to(weight.dtype), weight, bias, adapters, ends, self._fastpeft.model.backend)
