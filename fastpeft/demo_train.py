"""The demo's training loop: several runs over the same batches, taking turns, each timed, measured and scored."""

import contextlib
import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import fastpeft


@dataclass(frozen=True)
class Schedule:
    """Batches [steps, batch, sequence] of `tokens` that begin at `starts`, and the learning rate: a linear rise over
    the first twentieth, then a cosine down to a tenth."""

    tokens: torch.Tensor
    starts: torch.Tensor
    sequence: int
    rate: float
    device: torch.device
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, step: int) -> torch.Tensor:
        return self.tokens[self.starts[step][:, None] + torch.arange(self.sequence)].to(self.device)

    def rate_at(self, step: int) -> float:
        warm = max(1, len(self) // 20)
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / len(self))
        return self.rate * min(1.0, (step + 1) / warm) * cosine


@dataclass
class Run:
    """One model in training: its losses, and the mean seconds of a step in each block of steps."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    losses: list[float] = field(default_factory=list)
    block_seconds: list[float] = field(default_factory=list)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def step(self, schedule: Schedule, step: int) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        loss = self.loss(schedule.batch(step))
        loss.backward()
        if schedule.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class FrozenBase(Run):
    """The floor: a patched model with its adapters switched off, forward, and backward down to the embeddings."""

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        with fastpeft.disable_adapter(self.model):
            embedded = self.model.get_input_embeddings()(batch).detach().requires_grad_()
            return self.model(inputs_embeds=embedded, labels=batch, use_cache=False).loss

    def step(self, schedule: Schedule, step: int) -> torch.Tensor:
        loss = self.loss(schedule.batch(step))
        loss.backward()
        return loss.detach()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(runs: Sequence[Run], schedule: Schedule, block: int, seed: int, advance: Callable[[int, str], None]) -> None:
    """Train every run on the same batches. The runs take turns block by block, in an order that is reversed each time,
    so that a drift of the machine meets all alike; dropout's draws do not depend on which runs there are."""
    for run in runs:
        run.model.train()
        run.loss(schedule.batch(0)).backward()  # first calls set things up; they are not timed
        run.model.zero_grad()
    for index, first in enumerate(range(0, len(schedule), block)):
        steps = range(first, min(first + block, len(schedule)))
        for run in runs if index % 2 == 0 else reversed(runs):
            torch.manual_seed(seed + first)
            _synchronize(schedule.device)
            start = time.perf_counter()
            losses = [run.step(schedule, step) for step in steps]
            _synchronize(schedule.device)
            run.block_seconds.append((time.perf_counter() - start) / len(steps))
            run.losses += [float(loss) for loss in losses]
        advance(steps.stop, f"loss {statistics.fmean(runs[0].losses[-len(steps) :]):.3f}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired_ratio(run: Run, other: Run) -> tuple[float, float, float]:
    """run's time over the other's, block by block: median, and the quantiles at 20 and 80 %."""
    ratios = [a / b for a, b in zip(run.block_seconds, other.block_seconds, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    quantiles = statistics.quantiles(ratios, n=5, method="inclusive")
    return statistics.median(ratios), quantiles[0], quantiles[-1]


def held_out_loss(model: nn.Module, rows: torch.Tensor, batch: int) -> float:
    """Mean cross-entropy of rows [n, sequence] in eval mode; the model's mode is restored."""
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for part in rows.split(batch):
            part = part.to(device)
            total += float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part)
    model.train(was_training)
    return total / len(rows)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is born inside and lives, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.known = WeakIdKeyDictionary()  # storages born here, and those that operators were given
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self.known.setdefault(tensor.untyped_storage(), None)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self.known:  # neither a view nor written in place
                self.known[storage] = None
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Memory(NamedTuple):
    """Bytes of one training step. resident: weights, adapters, optimizer state. peak: with the most that forward and
    backward add to it. saved: what forward keeps for backward, of it."""

    resident: int
    peak: int
    saved: int


def step_memory(run: Run, batch: torch.Tensor) -> Memory:
    """Measure one forward and backward. On a GPU the peak is the allocator's; on the CPU that of live tensors, which
    leaves out what an operator allocates and frees within itself."""
    model = run.model
    held = [*model.parameters(), *model.buffers()]
    for state in run.optimizer.state.values():
        held += [value for value in state.values() if isinstance(value, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    resident = sum(storages.values())
    saved: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    cuda = batch.is_cuda
    tracker = contextlib.nullcontext() if cuda else _LiveBytes()
    model.train()
    model.zero_grad()
    if cuda:
        torch.cuda.reset_peak_memory_stats(batch.device)
        before = torch.cuda.memory_allocated(batch.device)
    with tracker:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = run.loss(batch)
        loss.backward()
    added = torch.cuda.max_memory_allocated(batch.device) - before if cuda else tracker.peak
    model.zero_grad()
    return Memory(resident, resident + added, sum(saved.values()))
