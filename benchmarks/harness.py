"""How a number comes about: interleaved rounds, device timers, memory, ceilings of the machine.

Implementations are timed in rounds, A B C A B C ..., because clocks, temperature and neighbours drift over seconds:
what drifts then meets all of them alike, and ratios are taken within a round. Before every sample the L2 cache is
overwritten, as a training step would between two uses of a layer, and the device is kept busy for as long as the host
needs to issue the sample, so that kernels are timed and not Python; how long the host needs is reported beside it.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # five times the 50 MB of an H100's L2, the largest cache this meets is 126 MB (B200)
MAX_COVER_MS = 20.0
Outputs = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass
class Call:
    """One implementation, bound to tensors: forward() -> y, or several of them in a tuple and `grad` likewise, and the
    leaves whose gradients its backward owes.

    `leaves` maps names to tensors that require a gradient; `frozen` holds what does not (a base weight), by name, so
    that a check can change it. `activations` names the leaves that are no parameters: memory that keeping them costs is
    counted. `context` is entered around forward and around backward.
    """

    forward: Callable[[], Outputs]
    leaves: dict[str, torch.Tensor]
    grad: Outputs
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    context: Callable[[], Any] = nullcontext
    activations: tuple[str, ...] = ("x",)

    def run_forward(self) -> Outputs:
        with self.context():
            return self.forward()

    def run_backward(self, y: Outputs) -> tuple[torch.Tensor, ...]:
        with self.context():
            return torch.autograd.grad(y, list(self.leaves.values()), self.grad)

    def run(self) -> tuple[Outputs, tuple[torch.Tensor, ...]]:
        y = self.run_forward()
        return y, self.run_backward(y)


@dataclass(frozen=True)
class Sample:
    forward_ms: float
    total_ms: float


@dataclass(frozen=True)
class Summary:
    median: float
    p20: float
    p80: float
    rounds: int


class Budget:
    """Seconds that a run may take. `clock` is any monotonic clock in seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds = seconds
        self._clock = clock
        self._start = clock()

    def elapsed(self) -> float:
        return self._clock() - self._start

    def left(self) -> float:
        return self.seconds - self.elapsed()

    def allows(self, durations: Sequence[float], reserve: float = 0.0) -> bool:
        """Whether one more piece of work like those that took `durations` fits before `reserve` is touched; half as
        much again is kept spare."""
        expected = 1.5 * statistics.median(durations) if durations else 0.0
        return self.left() - reserve > expected


class CpuTimer:
    """Wall clock, for machines without a GPU. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock

    def round(self, calls: Mapping[str, Call], host_ms: Mapping[str, float]) -> dict[str, Sample]:
        """Each call once, in order. `host_ms` is of no use where the host is the device."""
        samples = {}
        for name, call in calls.items():
            start = self._clock()
            y = call.run_forward()
            middle = self._clock()
            call.run_backward(y)
            del y
            end = self._clock()
            samples[name] = Sample(1e3 * (middle - start), 1e3 * (end - start))
        return samples


class CudaTimer:
    """CUDA events around forward and backward, the L2 overwritten and the launch queue filled before each sample."""

    def __init__(self, device: torch.device):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._spin(300_000_000)  # loads the kernel, and wakes a clock that slept
        self._cycles_per_ms = max(self._calibrate() for _ in range(3))

    def _calibrate(self, cycles: int = 10_000_000) -> float:
        start, end = self._event(), self._event()
        start.record()
        self._spin(cycles)
        end.record()
        torch.cuda.synchronize()
        return cycles / start.elapsed_time(end)

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    @staticmethod
    def _spin(cycles: int) -> None:
        torch.cuda._sleep(cycles)  # torch's own tests have used it for years; there is no public way to wait on device

    def round(self, calls: Mapping[str, Call], host_ms: Mapping[str, float]) -> dict[str, Sample]:
        """Each call once, in order, all enqueued before the one synchronisation at the end. What is not in `host_ms`
        is not covered: it begins on an idle device, and what the host needs is part of it."""
        events = {}
        for name, call in calls.items():
            self._flush.zero_()
            if name in host_ms:
                self._spin(int(min(1.5 * host_ms[name], MAX_COVER_MS) * self._cycles_per_ms))
            else:
                torch.cuda.synchronize()
            start, middle, end = self._event(), self._event(), self._event()
            start.record()
            y = call.run_forward()
            middle.record()
            call.run_backward(y)
            del y
            end.record()
            events[name] = start, middle, end
        torch.cuda.synchronize()
        return {name: Sample(s.elapsed_time(m), s.elapsed_time(e)) for name, (s, m, e) in events.items()}


def timer_for(device: torch.device) -> CpuTimer | CudaTimer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def warm_up(call: Call, device: torch.device, repeats: int = 3) -> tuple[float, float]:
    """Run until compiled and cached. Returns (seconds of the first run, ms that the host needs to issue one)."""
    first, host_ms = 0.0, float("inf")
    for index in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        y = call.run_forward()
        call.run_backward(y)
        issued = time.perf_counter()
        synchronize(device)
        if index == 0:
            first = time.perf_counter() - start
        else:
            host_ms = min(host_ms, 1e3 * (issued - start))
    return first, host_ms


def interleave(
    timer, calls: Mapping[str, Call], host_ms: Mapping[str, float], *, rounds: tuple[int, int], seconds: float
) -> dict[str, list[Sample]]:
    """Samples per implementation, in rounds A B C A B C ...

    At least rounds[0] and at most rounds[1] of them; between the two, until `seconds` have gone by. Every list has the
    same length, and entry i of each comes from round i.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    start = time.monotonic()
    for index in range(rounds[1]):
        if index >= rounds[0] and time.monotonic() - start > seconds:
            break
        for name, sample in timer.round(calls, host_ms).items():
            samples[name].append(sample)
    return samples


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0..1), linear between order statistics, as numpy's default."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarise(values: Sequence[float]) -> Summary:
    return Summary(quantile(values, 0.5), quantile(values, 0.2), quantile(values, 0.8), len(values))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Median and spread of numerator[i] / denominator[i]: samples of one round, so drift cancels."""
    return summarise([a / b for a, b in zip(numerator, denominator, strict=True)])


@dataclass(frozen=True)
class Memory:
    """Bytes. `saved`: the storages autograd keeps, each once, without parameters; an activation counts if it is kept.
    `held`: what the allocator has handed out and not got back when forward returns, without the output (also what a
    Function keeps outside of saved tensors). `peak`: the most at any time above what stood before forward."""

    saved: int | None
    held: int | None
    peak: int | None


def measure_memory(call: Call, device: torch.device, *, count_saved: bool = True) -> Memory:
    """One forward and backward under the allocator's counters (CUDA) and autograd's saved-tensor hooks (anywhere).

    count_saved=False leaves the hooks out: a compiled call would be compiled anew under them.
    """
    inputs = {**call.leaves, **call.frozen}
    parameters = {t.untyped_storage().data_ptr() for name, t in inputs.items() if name not in call.activations}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    on_gpu = device.type == "cuda"
    synchronize(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor) if count_saved else nullcontext()
    with hooks:
        y = call.run_forward()
    results = sum(each.untyped_storage().nbytes() for each in (y if isinstance(y, tuple) else (y,)))
    held = torch.cuda.memory_allocated() - before - results if on_gpu else None
    grads = call.run_backward(y)
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    del y, grads
    return Memory(sum(storages.values()) if count_saved else None, held, peak)


def ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> dict[str, float]:
    """The machine's own limits, measured: a large copy (bytes read plus written), a large product on random data."""
    elements, side = (1 << 30, 8192) if device.type == "cuda" and not tiny else (1 << 22, 128)
    copy_ms, matmul_ms = _copy_ms(elements, device), _matmul_ms(side, dtype, device)
    return {
        "copy_gbps": 2 * torch.bfloat16.itemsize * elements / copy_ms / 1e6,
        "matmul_tflops": 2 * side**3 / matmul_ms / 1e9,
    }


def _copy_ms(elements: int, device: torch.device) -> float:
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return _plain_ms(lambda: target.copy_(source), device)


def _matmul_ms(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return _plain_ms(lambda: a @ b, device)


def _plain_ms(work: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median time of `work`, long enough by itself to need neither cover nor flush."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - begin))
    return quantile(times, 0.5)


def kernel_profile(call: Call, device: torch.device) -> list[dict[str, Any]]:
    """The kernels of one forward and backward, longest first: [{"name", "us", "launches"}]. CUDA only."""
    from torch.profiler import ProfilerActivity, profile

    call.run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        call.run()
        synchronize(device)
    totals: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = totals.setdefault(event.name, [0.0, 0])
            entry[0] += event.time_range.elapsed_us()
            entry[1] += 1
    rows = [{"name": name[:120], "us": round(us, 1), "launches": count} for name, (us, count) in totals.items()]
    return sorted(rows, key=lambda row: -row["us"])
