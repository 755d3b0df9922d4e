"""A new LoRA out of others, weighted: peft's `add_weighted_adapter`, with its numbers and its random draws.

    cat            A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁, B₂, …]: exactly Σ wᵢ sᵢ Bᵢ Aᵢ, of rank Σ rᵢ
    svd            the best approximation of that sum, of rank svd_rank
    linear         A = Σ √|wᵢsᵢ|·sgn Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ: cheap, and no such sum, as products of different adapters
                   come in
    ties           (arXiv 2306.01708) of each of A and B the largest values, summed where the majority has the sign
    dare_…         (arXiv 2311.03099) of each a random part, scaled up
    magnitude_prune   of each the largest values

and ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd do the same to the products, and approximate.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastpeft import files
from fastpeft.configs import LoraConfig, as_config
from fastpeft.errors import PatchError
from fastpeft.mapping import tuner_of
from fastpeft.patching import add_planned, adding, check_names, layers, state_of
from fastpeft.tuners.lora import LoraLayer
from fastpeft.tuners.saved_modules import SavedModule
from fastpeft.untrusted import shown

_SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = ("cat", "svd", *_SAME_RANK, *(f"{kind}_svd" for kind in _SAME_RANK[1:]))


@dataclasses.dataclass(frozen=True)
class Combination:
    """How tensors of several adapters become one. density: of the values that are left, None where all are."""

    kind: str
    density: float | None = None
    sign: str = "total"

    def __call__(self, tensors: list[Tensor], weights: Sequence[float]) -> Tensor:
        """Of n tensors of one shape, their weighted combination."""
        if self.kind.startswith("dare"):
            tensors = [self._random_part(tensor) for tensor in tensors]
        elif self.kind.startswith(("ties", "magnitude")):
            tensors = [self._largest(tensor) for tensor in tensors]
        stacked = torch.stack(tensors)
        weighted = stacked * torch.tensor(weights, device=stacked.device).view(-1, *(1,) * tensors[0].ndim)
        if "ties" not in self.kind:
            return weighted.sum(0)
        votes = (stacked if self.sign == "total" else stacked.sign()).sum(0)
        agrees = stacked.sign() == torch.where(votes >= 0, 1, -1)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)

    def _largest(self, tensor: Tensor) -> Tensor:
        if self.density >= 1:
            return tensor
        chosen = tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices
        return tensor * torch.zeros_like(tensor).flatten().index_fill_(0, chosen, 1.0).view(tensor.shape)

    def _random_part(self, tensor: Tensor) -> Tensor:
        if self.density >= 1:
            return tensor
        return tensor * torch.bernoulli(torch.full_like(tensor, self.density)) / self.density


def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
    combination_type: str = "svd", svd_rank: int | None = None, svd_clamp: float | None = None,
    density: float | None = None, majority_sign_method: str = "total",
) -> None:  # fmt: skip
    """Add the LoRA `adapter_name` to a patched model, made of others; it waits for `set_adapter`.

    Args:
        model: patched, with the adapters, all LoRA.
        adapters, weights: the adapters' names, and a finite number for each.
        adapter_name: of the new one.
        combination_type: one of KINDS; of one adapter alone always "linear".
        svd_rank: of the new adapter, for the kinds with svd; None is the greatest of the adapters'.
        svd_clamp: for these, the quantile at which the factors' values are cut off.
        density: for ties, dare and magnitude_prune, the share of the values that is kept, above 0.
        majority_sign_method: for ties, whether the signs of "total" sums decide or the "frequency" of signs.

    Raises:
        PatchError: a name, weight or option is wrong; the adapters are no LoRAs of one rank where they must be; or they
        have what cannot be added up: DoRA's magnitudes, biases, modules trained whole. ConfigError, TargetError as
        `add_adapter`. The model is then as it was.
    """
    state = state_of(model)
    files.adapter_directory("", adapter_name)
    names = tuple(adapters)
    check_names(state, names, "add_weighted_adapter")
    if adapter_name in state.configs:
        _refuse(f"there is already an adapter {adapter_name!r}; choose another name")
    if combination_type not in KINDS:
        _refuse(f"combination_type={shown(combination_type)}; choose one of {', '.join(KINDS)}")
    kind = "linear" if len(names) == 1 else combination_type
    _check(model, names, weights, kind, density, majority_sign_method)
    _check_clamp(svd_clamp)
    plan, r = _plan(model, names, kind, svd_rank)
    combine = Combination(kind, density, majority_sign_method)
    with adding(model, adapter_name):
        add_planned(model, state, plan, adapter_name, init=True)
        for path, layer in layers(model):
            if isinstance(layer, LoraLayer) and adapter_name in layer._fastpeft.adapters:
                held = [(n, w) for n, w in zip(names, weights, strict=True) if n in layer._fastpeft.adapters]
                _fill(path, layer, adapter_name, held, combine, svd_clamp)


def _refuse(why: str):
    raise PatchError(f"add_weighted_adapter: {why}")


def _check(model: nn.Module, names, weights, kind: str, density, sign: str) -> None:
    state = state_of(model)
    if not names:
        _refuse("no adapters are named; give their names and weights")
    if len(weights) != len(names) or not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
        _refuse(f"weights={shown(list(weights))}; give a finite number for each of the {len(names)} adapters")
    if sign not in ("total", "frequency"):
        _refuse(f"majority_sign_method={shown(sign)}; choose 'total' or 'frequency'")
    needs = kind.startswith(("ties", "dare", "magnitude"))
    if needs and not (isinstance(density, int | float) and 0 < density <= 1):
        _refuse(f"density={shown(density)}; {kind} keeps a share of the values, above 0 and up to 1")
    for name in names:
        config = state.configs[name]
        if type(config) is not LoraConfig:
            _refuse(f"{name!r} is {config.peft_type.value}; only LoRAs are made of others")
        for what in ("use_dora", "lora_bias"):
            if getattr(config, what):
                _refuse(f"{name!r} has {what}=True, which cannot be added up; leave it out")
        if config.target_parameters:
            _refuse(f"{name!r} has target_parameters, and parameters are not added up; leave it out")
        if config.bias != "none":
            _refuse(f"{name!r} has bias={config.bias!r}, and trained biases cannot be added up; leave it out")
    for path, layer in layers(model):
        if isinstance(layer, SavedModule) and (whole := set(names) & layer._fastpeft.adapters.keys()):
            _refuse(f"{path} is trained whole by {', '.join(sorted(whole))}, which cannot be added up; leave those out")


def _check_clamp(clamp) -> None:
    if clamp is not None and not (type(clamp) in (int, float) and 0 <= clamp <= 1):
        _refuse(f"svd_clamp={clamp!r}; it is a quantile, from 0 to 1, or None")


def _plan(model: nn.Module, names: tuple[str, ...], kind: str, svd_rank: int | None):
    """The new adapter's plan and rank: on all layers that one of the adapters has."""
    configs = [state_of(model).configs[name] for name in names]
    ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
    if kind in _SAME_RANK and len(set(ranks)) > 1:
        _refuse(f"{kind} needs adapters of one r, and these have {ranks}; use 'cat' or 'svd'")
    if svd_rank is not None and (isinstance(svd_rank, bool) or not isinstance(svd_rank, int) or svd_rank < 1):
        _refuse(f"svd_rank={svd_rank!r}; a rank is an int of at least 1")
    r = sum(ranks) if kind == "cat" else (svd_rank or max(ranks)) if kind.endswith("svd") else ranks[0]
    fresh = {"r": r, "lora_alpha": r, "use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}}
    if not isinstance(configs[0].init_lora_weights, bool):
        fresh["init_lora_weights"] = True  # the base was changed for the adapters already
    config = dataclasses.replace(as_config(configs[0]), inference_mode=False, **fresh)
    wanted = [path for path, layer in layers(model) if layer._fastpeft.adapters.keys() & set(names)]
    targets = [config.target_modules for config in configs]
    if all(isinstance(each, set) for each in targets):
        config.target_modules = set().union(*targets)
    elif all(isinstance(each, str) for each in targets):
        config.target_modules = "|".join(f"({each})" for each in targets)
    plan = tuner_of(config).plan(model, config)
    if {target.name for target, _, _ in plan.targets} != set(wanted):
        everywhere = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        config = dataclasses.replace(config, target_modules=set(wanted), **everywhere)
        plan = tuner_of(config).plan(model, config)
    return plan, r


def _own_factors(layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the adapter's own rank, without the zeros that a hot swap has filled it up with."""
    (a, b), settings = layer.factors(name), layer._fastpeft.adapters[name]
    rank = settings.own_r or settings.r
    return a.detach()[:rank], b.detach()[:, :rank]


@torch.no_grad()
def _fill(path: str, layer: LoraLayer, name: str, held: list[tuple[str, float]], combine: Combination, clamp) -> None:
    a, b = layer.factors(name)
    scalings = [weight * layer._fastpeft.adapters[each].scaling for each, weight in held]
    pairs = [_own_factors(layer, each) for each, _ in held]
    if combine.kind == "cat":
        down = torch.cat([each * scaling for (each, _), scaling in zip(pairs, scalings, strict=True)])
        up = torch.cat([each for _, each in pairs], 1)
    elif combine.kind.endswith("svd"):
        if getattr(layer, "groups", 1) > 1:
            _refuse(f"{path} is a convolution with groups, whose factors have no product; use 'cat' or 'linear'")
        deltas = [layer.unmatrix(layer.delta(each)).flatten(1) for each, _ in held]  # as the weight lies, for the draws
        product = layer.unmatrix(combine(deltas, [weight for _, weight in held]))
        down, up = _approximated(product, len(a), clamp)
        down, up = down.view(-1, *a.shape[1:]), up.view(len(b), -1, *b.shape[2:])
    else:
        if len({len(each) for each, _ in pairs}) > 1:
            ranks = [len(each) for each, _ in pairs]
            _refuse(f"{combine.kind} needs adapters of one r, and at {path} these have {ranks}; use 'cat' or 'svd'")
        roots = [math.sqrt(abs(scaling)) for scaling in scalings]
        down = combine([each for each, _ in pairs], [math.copysign(r, s) for r, s in zip(roots, scalings, strict=True)])
        up = combine([each for _, each in pairs], roots)
    a.zero_()
    b.zero_()
    a[: len(down)].copy_(down)
    b[:, : up.shape[1]].copy_(up)


def _approximated(product: Tensor, r: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """(r, K) and (N, r), whose product is the nearest to (N, K) of that rank."""
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    up, down = u[:, :r] * s[:r], v[:r]
    if clamp is not None:
        most = torch.quantile(torch.cat([up.flatten(), down.flatten()]), clamp)
        up, down = up.clamp(-most, most), down.clamp(-most, most)
    return down, up
