"""AdaLoRA's schedule (Zhang et al., arXiv 2303.10512, section 3.2 and algorithm 1): after each optimizer step the
importance of every entry is brought up to date, and where the schedule says so, the singular values of the least
important triplets of the whole model are set to zero.

    I = |w·∂L/∂w|    Ī ← β₁Ī + (1-β₁) I    Ū ← β₂Ū + (1-β₂)|I - Ī|           equations 8 to 10
    score of a triplet = (Ī·Ū)(E) + mean of (Ī·Ū) over its row of A + the same for its column of B    equations 7, 11

Step for step HF peft 0.21.2's, of which the state lies in the layers (`fastpeft.tuners.adalora.Ranks`): between two
allocations a value that was set to zero may grow again. Parameters of one shape are one batch, so that a step starts a
few kernels for the whole model; it waits for the device once where triplets are chosen, and else never.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpeft.configs import AdaLoraConfig
from fastpeft.distributed import local, placed_as, whole
from fastpeft.errors import PatchError
from fastpeft.patching import state_of
from fastpeft.tuners.adalora import AdaLoraLayer, Ranks
from fastpeft.tuners.adalora_injection import layers_of


def update_and_allocate(model: nn.Module, global_step: int) -> None:
    """AdaLoRA's part of a training step; for a loop of one's own:

        loss.backward()
        optimizer.step()
        fastpeft.update_and_allocate(model, step)  # step is 1 after the first optimizer step
        optimizer.zero_grad()

    With gradient accumulation it is called once for each optimizer step, not for each batch. `total_step`, `tinit` and
    `tfinal` of the configuration count the same steps: with tfinal=0 the ranks are settled at step total_step itself.

    Raises PatchError, with everything as it was, if no AdaLoRA adapter is active and trained, a gradient is missing,
    the step is no int from 0 up, or the schedule is past its end without ever having been followed. If importances are
    NaN or infinite, as a gradient was, the values are as they were.
    """
    if isinstance(global_step, bool) or not isinstance(global_step, int) or global_step < 0:
        raise PatchError(
            f"update_and_allocate: global_step={global_step!r}: the number of the step must be an int from 0 up"
        )
    allocator = RankAllocator(model, _trained_adapter(model))
    if allocator.config.total_step is None:
        raise PatchError(
            f"update_and_allocate: the configuration of {allocator.name!r} has no total_step, and so no schedule; set "
            "it in model.peft_config, or in adapter_config.json before loading"
        )
    with torch.no_grad():
        allocator.step(global_step)


def _trained_adapter(model: nn.Module) -> str:
    state = state_of(model)
    names = [name for name in state.active if isinstance(state.configs[name], AdaLoraConfig)]
    for name in names:
        if any(p.requires_grad for _, layer in layers_of(model, name) for p in layer.parameters_of(name).values()):
            return name
    if names:
        raise PatchError(f"update_and_allocate: {names[0]!r} is frozen; load it with trainable=True to train it")
    raise PatchError(
        f"update_and_allocate: no AdaLoRA adapter is active; active are {', '.join(map(repr, state.active)) or 'none'}"
    )


def budget_at(config: AdaLoraConfig, step: int, layers: int) -> tuple[int, bool]:
    """How many triplets the model may have at a step, and whether this is one at which they are chosen.

    All init_r·layers up to tinit, target_r·layers after total_step - tfinal; in between (equation 12) what is above the
    target falls with the cube of the part of the steps that is left, rounded down, and every deltaT-th step chooses.
    """
    first, last = config.init_r * layers, config.target_r * layers
    if step <= config.tinit:
        return first, False
    if step > config.final_step:
        return last, True
    left = 1 - (step - config.tinit) / (config.final_step - config.tinit)
    return int((first - last) * left**3 + last), step % config.deltaT == 0


@dataclass(frozen=True)
class _Group:
    """Layers of one shape, dtype and device, whose triplets are scored together."""

    layers: list[AdaLoraLayer]
    scores: Tensor  # (n, r)


class RankAllocator:
    """One adapter's triplets in all layers of a model."""

    def __init__(self, model: nn.Module, name: str):
        self.name = name
        self.config: AdaLoraConfig = state_of(model).configs[name]
        self.every = dict(layers_of(model, name))
        # Those that have triplets: a file may have left some without.
        self.layers = [layer for layer in self.every.values() if layer._fastpeft.adapters[name].r]
        self.paths = {id(layer): path for path, layer in self.every.items()}

    def step(self, step: int) -> None:
        """What the schedule wants after this optimizer step. Raises PatchError."""
        if step < self.config.final_step:
            self.observe()
            budget, chooses = budget_at(self.config, step, len(self.every))
            if chooses:
                self.allocate(budget)
        elif any(self.ranks(layer).importance is not None for layer in self.layers):
            self.allocate(self.config.target_r * len(self.every))
            for layer in self.layers:
                self.ranks(layer).importance = self.ranks(layer).uncertainty = None
        else:
            self.mask_again(step)

    def ranks(self, layer: AdaLoraLayer) -> Ranks:
        return layer._fastpeft.adapters[self.name].ranks

    def parameters(self, layers: Iterable[AdaLoraLayer]) -> list[nn.Parameter]:
        """A, E and B of each layer, one after the other."""
        return [parameter for layer in layers for parameter in layer.parameters_of(self.name).values()]

    def observe(self) -> None:
        """Bring the importances up to date with the gradients that are there. Raises PatchError for a missing one."""
        parameters = self.parameters(self.layers)
        if any(parameter.grad is None for parameter in parameters):
            missing = [
                f"{self.paths[id(layer)]}.{key}"
                for layer in self.layers
                for key, parameter in layer.parameters_of(self.name).items()
                if parameter.grad is None
            ]
            raise PatchError(
                f"update_and_allocate: {len(missing)} of {len(parameters)} parameters have no gradient, the first is "
                f"{missing[0]}; call it after loss.backward() and optimizer.step(), and before zero_grad(). DeepSpeed, "
                "which keeps gradients to itself, cannot train AdaLoRA"
            )
        averages = [local(tensor) for layer in self.layers for tensor in self._started(layer).importance]
        deviations = [local(tensor) for layer in self.layers for tensor in self.ranks(layer).uncertainty]
        now = torch._foreach_mul([*map(local, parameters)], [local(parameter.grad) for parameter in parameters])
        torch._foreach_abs_(now)
        _average(averages, torch._foreach_mul(now, 1 - self.config.beta1), self.config.beta1)
        torch._foreach_sub_(now, averages)
        torch._foreach_abs_(now)
        torch._foreach_mul_(now, 1 - self.config.beta2)
        _average(deviations, now, self.config.beta2)

    def _started(self, layer: AdaLoraLayer) -> Ranks:
        ranks, own = self.ranks(layer), layer.parameters_of(self.name).values()
        if ranks.importance is None:
            ranks.importance = [torch.zeros_like(parameter) for parameter in own]
            ranks.uncertainty = [torch.zeros_like(parameter) for parameter in own]
        for held in (ranks.importance, ranks.uncertainty):  # the model may have been moved or sharded since
            held[:] = [placed_as(tensor, parameter) for tensor, parameter in zip(held, own, strict=True)]
        return ranks

    def allocate(self, budget: int) -> None:
        """Leave the `budget` most important triplets, or all if there are fewer, and set the others' values to zero.
        Of equal ones the later go last, so that the budget is kept exactly. Raises PatchError for importances that are
        not finite."""
        if not self.layers:
            return
        groups = self._scored()
        device = groups[0].scores.device
        scores = torch.cat([group.scores.flatten().to(device) for group in groups])
        stays = torch.ones(len(scores), dtype=torch.bool, device=device)
        stays[torch.sort(scores, stable=True).indices[: max(len(scores) - budget, 0)]] = False
        *kept, finite = torch.cat((stays, torch.isfinite(scores).all().view(1))).tolist()  # waits for the device
        if not finite:
            raise PatchError(
                "update_and_allocate: importances are NaN or infinite because a gradient was; with loss scaling, leave "
                "out the steps that the scaler has skipped"
            )
        start = 0
        for group in groups:
            count, r = group.scores.shape
            dropped = ~stays[start : start + count * r].view(count, r, 1).to(group.scores.device)
            for row, layer in enumerate(group.layers):
                ranks = self.ranks(layer)
                ranks.dropped = dropped[row]
                ranks.kept = tuple(kept[start + row * r : start + (row + 1) * r])
            start += count * r
        self._mask(self.layers)
        self.config.rank_pattern = {
            f"{path}.lora_E": self.ranks(layer).pattern(self.config.init_r) for path, layer in self.every.items()
        }

    def _scored(self) -> list[_Group]:
        groups: dict[tuple, list[AdaLoraLayer]] = defaultdict(list)
        for layer in self.layers:
            a, _, b = self.ranks(layer).importance
            groups[a.shape, b.shape, a.dtype, a.device].append(layer)
        out = []
        for layers in groups.values():
            importances = zip(*(self.ranks(layer).importance for layer in layers), strict=True)
            uncertainties = zip(*(self.ranks(layer).uncertainty for layer in layers), strict=True)
            a, e, b = (
                torch.stack([*map(whole, means)]).mul_(torch.stack([*map(whole, deviations)]))
                for means, deviations in zip(importances, uncertainties, strict=True)
            )
            out.append(_Group(layers, e.squeeze(2) + (a.mean(2) + b.mean(1))))
        return out

    def _mask(self, layers: list[AdaLoraLayer]) -> None:
        groups: dict[tuple, list[AdaLoraLayer]] = defaultdict(list)
        for layer in layers:
            values = layer.lora_E[self.name]
            groups[values.shape, values.dtype, values.device].append(layer)
        for group in groups.values():
            masks = torch.stack([local(placed_as(self.ranks(e).dropped, e.lora_E[self.name])) for e in group])
            values = [local(layer.lora_E[self.name]) for layer in group]
            torch._foreach_copy_(values, list(torch.stack(values).masked_fill_(masks, 0.0).unbind()))

    def mask_again(self, step: int) -> None:
        """Set the values to zero again that the last allocation has dropped."""
        if self.config.rank_pattern is None:
            raise PatchError(
                f"update_and_allocate: step {step} is not before total_step - tfinal = {self.config.final_step}, where "
                "ranks are settled, and there are no importances to settle them by; call it at every step from 1 on"
            )
        masked = [layer for layer in self.layers if not all(self.ranks(layer).kept or (True,))]
        for layer in masked:
            ranks = self.ranks(layer)
            if ranks.dropped is None:
                mask = torch.tensor([[not stays] for stays in ranks.kept])
                ranks.dropped = mask.to(layer.lora_E[self.name].device)
        self._mask(masked)


def _average(averages: list[Tensor], share: list[Tensor], beta: float) -> None:
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, share)
