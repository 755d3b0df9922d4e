"""The compile gate: every launch that ships, compiled for GPUs that are not here; what came out is read and bounded.

    python tests/aot.py --all      every shipped configuration for every target, as a table; exit status 1 on a fault
    python tests/aot.py --tiles    of each kernel, tile and element types the launch that does most: a quarter of them
    python tests/aot.py --quick    a few for each kernel
    python tests/aot.py --quick --known     as the tests do: of these what has changed, and a sample (aot_known.py)
    python tests/aot.py --quick --update    writes down what --known goes by
    --op lora_linear  --target sm_90  --json FILE  --processes 8

The launchers run on meta tensors while Triton's driver is replaced and its launch recorded instead of made: kernel,
argument types, divisibility, constants and options are those a GPU would get, and nothing is written down a second
time that could drift. An op takes part by a file tests/ops/aot_<op>.py with a function `cases()`.

Triton's interpreter must be off, which is decided when triton is imported: run it as a process of its own.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tests import aot_known  # noqa: E402
from tests.ttir import narrow_offsets, narrow_products  # noqa: E402

KIB = 1024


class Target(NamedTuple):
    """What a launch is compiled for, the shared memory (LDS) a block may have there, and its processors.

    Triton compiles what no card could launch. sm_80's code also runs on sm_86 and sm_89, so it must fit those.
    """

    gpu: GPUTarget
    shared: int
    processors: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 99 * KIB, 108),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB, 132),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB, 148),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB, 304),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KIB, 188),
}
PROCESSORS = {target.gpu: target.processors for target in TARGETS.values()}
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
CUDA_REGISTERS = 65536  # of a processor; a block that wants more cannot start

TENSOR_CORE = {"cuda": r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", "hip": r"v_mfma"}


class Case(NamedTuple):
    """One configuration of an op: `run` calls its launchers on meta tensors.

    What is not `bounded` may spill and do without tensor cores, and is only reported. `quick` names the targets that
    the test suite compiles it for.
    """

    name: str
    run: Callable[[], object]
    bounded: bool = True
    quick: tuple[str, ...] = ()


@dataclass
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    @property
    def name(self) -> str:
        """The kernel's, with the flags that are on and the sizes of its blocks."""
        names = {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}
        flags = [name.lower() for name, value in names.items() if value is True]
        blocks = [str(value) for name, value in names.items() if name.startswith("BLOCK") and value is not None]
        return " ".join([self.kernel.fn.__name__.strip("_"), *flags, "x".join(blocks)])

    @property
    def key(self) -> str:
        return repr((self.kernel.fn.__name__, self.signature, self.constants, self.attributes, self.options))

    @property
    def tile(self) -> str:
        """What decides how much of a processor it fills: the blocks, the elements' types and the options."""
        names = {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}
        blocks = sorted((name, value) for name, value in names.items() if name.startswith("BLOCK"))
        types = sorted({str(kind) for kind in self.signature.values() if str(kind).startswith(("*", "tensordesc"))})
        return repr((self.kernel.fn.__name__, blocks, types, self.options))

    @property
    def extent(self) -> int:
        """How much it does: flags that are on, less what is left out."""
        return sum((value is True) - (value is None) for value in self.constants.values())

    @property
    def outline(self) -> str:
        """The name, what is left out (a bias, a gate) and the options: what differs in types and alignment has one."""
        return repr((self.name, sorted(path for path, value in self.constants.items() if value is None), self.options))


@dataclass
class Facts:
    """What the compiler made of a launch for one target, and what is wrong with it."""

    target: str
    kernel: str
    case: str
    warps: int
    registers: int
    stack: int
    spilled: int  # bytes (CUDA) or registers (HIP)
    shared: int
    tensor_core: dict[str, int]
    async_copies: int
    narrow_copies: int  # of fewer than 16 bytes
    descriptors: int  # arguments that describe a tensor
    descriptor_copies: int  # of tiles, by them
    float64: bool
    serialised: bool  # ptxas waits for each wgmma before the next: slower, not wrong
    fusion_stated: bool  # whether the launch says if a product and a sum may fuse; Triton's default is not constant
    narrow_products: list[str]
    narrow_offsets: list[str]
    seconds: float
    faults: list[str] = field(default_factory=list)


def recorded_launches(run: Callable[[], object], gpu: GPUTarget) -> list[Launch]:
    """What `run` would launch on this GPU, in order."""
    launches, binder = [], functools.cache(lambda kernel: kernel.create_binder())

    def record(kernel, *args, grid, warmup, **kwargs):
        *_, backend, bind = binder(kernel)
        bound, specialization, options = bind(*args, debug=False, **kwargs)
        _, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        options = {name: value for name, value in kwargs.items() if name not in signature}
        launches.append(Launch(kernel, signature, constants, attributes, options))

    hip = gpu.backend == "hip"
    capability = (0, 0) if hip else divmod(gpu.arch, 10)
    tiles, common = (importlib.import_module(f"fastpeft.kernels.{name}") for name in ("_tiles", "_common"))
    families = tiles.family_of
    families.cache_clear()
    with (
        mock.patch.object(driver, "_active", SimpleNamespace(get_current_target=lambda: gpu)),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(torch.version, "hip", "6" if hip else None),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
        mock.patch.object(common, "_processors", lambda device: PROCESSORS[gpu]),
    ):
        run()
    families.cache_clear()
    return launches


def compiled(launch: Launch, gpu: GPUTarget) -> tuple[SimpleNamespace, str]:
    """(metadata and assembly, log of ptxas) of a launch, never from a cache."""
    source = ASTSource(launch.kernel, launch.signature, constexprs=launch.constants, attrs=launch.attributes)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.object(triton.knobs.cache, "dir", cache),
        mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
        contextlib.redirect_stdout(log),
    ):
        kernel = triton.compile(source, target=gpu, options=launch.options)
        return SimpleNamespace(metadata=kernel.metadata, asm=dict(kernel.asm)), log.getvalue()


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])


def inspect(launch: Launch, target: str, case: str) -> tuple[Facts, str]:
    """(facts, Triton IR) of a launch compiled for the target."""
    started = time.perf_counter()
    gpu = TARGETS[target].gpu
    kernel, log = compiled(launch, gpu)
    if gpu.backend == "cuda":
        code = kernel.asm["ptx"]
        registers = _number(r"Used (\d+) registers", log)
        stack, spilled = _number(r"(\d+) bytes stack frame", log), _number(r"(\d+) bytes spill stores", log)
    else:
        code = kernel.asm["amdgcn"]
        registers, spilled = _number(r"\.vgpr_count:\s+(\d+)", code), _number(r"\.vgpr_spill_count:\s+(\d+)", code)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", code)
    units = re.findall(TENSOR_CORE[gpu.backend], code)
    copies = re.findall(r"cp\.async\.c[ag]\.\S+ \[.*?\], \[.*?\], (0x\w+)", code)
    facts = Facts(
        target=target,
        kernel=launch.name,
        case=case,
        warps=kernel.metadata.num_warps,
        registers=registers,
        stack=stack,
        spilled=spilled,
        shared=kernel.metadata.shared,
        tensor_core={unit: units.count(unit) for unit in sorted(set(units))},
        async_copies=len(copies),
        narrow_copies=sum(int(size, 16) < 16 for size in copies),
        descriptors=sum(str(kind).startswith("tensordesc") for kind in launch.signature.values()),
        descriptor_copies=len(re.findall(r"cp\.async\.bulk\.tensor", code)),
        float64=bool(re.search(r"\.f64|_f64", code)),
        serialised="are serialized" in log,
        fusion_stated="enable_fp_fusion" in launch.options,
        narrow_products=narrow_products(kernel.asm["ttir"]),
        narrow_offsets=narrow_offsets(kernel.asm["ttir"]),
        seconds=time.perf_counter() - started,
    )
    return facts, kernel.asm["ttir"]


def faults(facts: Facts, ttir: str, bounded: bool) -> Iterator[str]:
    """What is wrong, in words."""
    target = TARGETS[facts.target]
    if facts.shared > target.shared:
        yield f"{facts.shared} bytes of shared memory, {facts.target} has {target.shared}"
    if target.gpu.backend == "cuda" and (total := facts.registers * facts.warps * 32) > CUDA_REGISTERS:
        yield f"{total} registers in a block, above {CUDA_REGISTERS}"
    if facts.float64:
        yield "computes in float64"
    if not facts.fusion_stated:
        yield "launched without enable_fp_fusion"
    if facts.descriptors and not facts.descriptor_copies:
        yield "descriptors by which no tile is copied"
    yield from (f"an address hangs on a 32-bit product: {product}" for product in facts.narrow_products)
    yield from (f"a 32-bit index into a whole tensor: {offset}" for offset in facts.narrow_offsets)
    if bounded and (facts.spilled or facts.stack):
        yield f"spills: {facts.spilled} spilled, {facts.stack} bytes of stack"
    # Tensor cores do not multiply fp32 as such; they do once it counts as tf32.
    products = [line for line in ttir.splitlines() if " tt.dot " in line]
    if not facts.tensor_core and any("xf32> * " not in line or "= tf32" in line for line in products):
        yield "a matrix product without tensor cores"


def check(launch: Launch, target: str, case: str = "", bounded: bool = True) -> Facts:
    """Compile, read and judge one launch."""
    facts, ttir = inspect(launch, target, case)
    facts.faults = list(faults(facts, ttir, bounded))
    return facts


def all_cases(ops: Iterable[str]) -> Iterator[Case]:
    for op in ops:
        yield from importlib.import_module(f"tests.ops.aot_{op}").cases()


def forget_places(modules: Iterable[ModuleType]) -> None:
    """Kernels get keys that hang on what they say: Triton's also count the line in which a function begins, and would
    make all below a change unknown."""
    for module in modules:
        for function in vars(module).values():
            if isinstance(function, JITFunction):
                function.starting_line_number, function.hash = 0, None


def work(cases: Iterable[Case], targets: Iterable[str], distinct: str) -> list[tuple[Launch, str, Case]]:
    """(launch, target, case that makes it): of launches with one `distinct` property, "key", "tile" or "outline", that
    of the greatest extent, and of these the first, for each target. By outlines, of quick cases alone."""
    wanted: dict[tuple[str, str], tuple[Launch, str, Case]] = {}
    for case in cases:
        for target in targets:
            if distinct != "outline" or target in case.quick:
                for launch in recorded_launches(case.run, TARGETS[target].gpu):
                    key = getattr(launch, distinct), target
                    if key not in wanted or distinct == "tile" and launch.extent > wanted[key][0].extent:
                        wanted[key] = launch, target, case
    forget_places([module for name, module in sys.modules.items() if name.startswith("fastpeft.kernels.")])
    return list(wanted.values())


_jobs: list[tuple[Launch, str, Case]] = []


def checked(jobs: list[tuple[Launch, str, Case]], processes: int) -> Iterator[Facts]:
    """What `check` finds, job by job. Processes are forked with the jobs: a launch holds what cannot be pickled."""
    _jobs[:] = jobs
    if processes == 1:
        yield from map(_checked, range(len(jobs)))
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_checked, range(len(jobs)))


def _checked(number: int) -> Facts:
    launch, target, case = _jobs[number]
    return check(launch, target, case.name, case.bounded)


def checked_or_known(jobs: list[tuple[Launch, str, Case]], processes: int, known: dict[str, dict]) -> Iterator[Facts]:
    """As `checked`, but what is known is compiled only if it is of the sample, and a fault if it is otherwise."""
    digests = [aot_known.digest(*job, triton.__version__) for job in jobs]
    again = aot_known.compiled_again(each for each in digests if each in known)
    new = [each not in known or each in again for each in digests]
    found = checked([job for job, wanted in zip(jobs, new, strict=True) if wanted], processes)
    for each, wanted in zip(digests, new, strict=True):
        facts = next(found) if wanted else Facts(seconds=0.0, **known[each])
        if wanted and each in known:
            facts.faults += aot_known.contradicted(known[each], facts)
        yield facts


COLUMNS = "{:<7} {:<34} {:<68} {:>4} {:>5} {:>6} {:>7} {:>6}  {}"


def table_row(facts: Facts) -> str:
    units = " ".join(f"{unit} {count}" for unit, count in facts.tensor_core.items()) or "-"
    return COLUMNS.format(
        facts.target, facts.case, facts.kernel, facts.registers, facts.stack, facts.spilled, facts.shared,
        facts.async_copies, units + " serialised" * facts.serialised,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    ops = sorted(path.stem.removeprefix("aot_") for path in (ROOT / "tests/ops").glob("aot_*.py"))
    parser = argparse.ArgumentParser(description="Compile what ships for GPUs that are not here, and read the result.")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--all", action="store_true", help="every shipped configuration")
    how.add_argument("--tiles", action="store_true", help="every tile for every type of elements, once")
    how.add_argument("--quick", action="store_true", help="the configurations of the test suite")
    parser.add_argument("--op", action="append", choices=ops, help="only this op")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target")
    parser.add_argument("--json", type=Path, help="write the facts here as well")
    parser.add_argument("--processes", type=int, default=1, help="compile in so many at once")
    parser.add_argument("--known", action="store_true", help="take what aot_known.json has of unchanged launches")
    parser.add_argument("--update", action="store_true", help="write aot_known.json")
    chosen = parser.parse_args(arguments)
    if chosen.update and (not chosen.quick or chosen.op or chosen.target or chosen.known):
        parser.error("--update writes down the whole quick set, newly compiled: with --quick alone")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: compiled kernels need a process without it")
    distinct = "key" if chosen.all else "tile" if chosen.tiles else "outline"
    jobs = work(all_cases(chosen.op or ops), chosen.target or DEFAULT_TARGETS, distinct)
    known = aot_known.load() if chosen.known else {}
    results = []
    for (launch, target, case), facts in zip(jobs, checked_or_known(jobs, chosen.processes, known), strict=True):
        results.append(facts)
        progress = f"[{len(results)}/{len(jobs)}] {target} {case.name} {launch.name}"
        print(progress, *facts.faults, sep="; ", file=sys.stderr, flush=True)
    print(COLUMNS.format("target", "case", "kernel", "regs", "stack", "spills", "shared", "copies", "tensor cores"))
    for facts in results:
        print(table_row(facts))
    if chosen.json:
        chosen.json.write_text(json.dumps({"triton": triton.__version__, "results": [asdict(f) for f in results]}))
    wrong = [f"{f.target} {f.case} {f.kernel}: {fault}" for f in results for fault in f.faults]
    if chosen.update and not wrong:
        aot_known.save({aot_known.digest(*job, triton.__version__): f for job, f in zip(jobs, results, strict=True)})
    print("\n".join(wrong) or f"{len(results)} compilations, no fault", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
