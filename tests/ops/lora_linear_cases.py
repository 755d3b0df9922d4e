"""What the tests of `lora_linear` have in common: dtypes, plans, backends and how a result is judged."""

import contextlib

import torch

from fastpeft import oracle
from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.ops.lora_linear import lora_linear_reference
from fastpeft.oracle import Bounds, LoraProblem, lora_linear_differences, op_dropout, random_lora_problem

# Odd, and with the interpreter's tiles of 16 x 32 x 32 every loop takes at least two whole tiles and a tail.
ROWS, INPUTS, OUTPUTS, RANK = 37, 69, 71, 5

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
DTYPES = {  # data, adapter
    "fp32": (SINGLE, SINGLE),
    "fp16": (HALF, HALF),
    "fp16-fp32": (HALF, SINGLE),
    "bf16": (BRAIN, BRAIN),
    "bf16-fp32": (BRAIN, SINGLE),
}
EXACT_IN_INTERPRETER = ("fp32", "fp16", "fp16-fp32")

STRATEGIES = ("fused", "prewrite", "addmm", "augment")
PLANS = {name: Plan(name, name, "forced by a test") for name in (*STRATEGIES, "persistent")}

# The interpreter truncates where it makes a bf16 of an fp32, which doubles the error of a rounding (a whole unit in
# the last place for half of one) and shrinks every value by up to 2**-8, here S or T and then the result.
TRUNCATED = Bounds(rms=2.2, peak=4.0, row=4.0, gain=0.002 + 2 * 2**-8)


@contextlib.contextmanager
def on(name: str, strategy: str | None = None):
    """The backend in force, and for Triton the strategy."""
    with backend(name), override_plan(PLANS[strategy]) if strategy else contextlib.nullcontext():
        yield


def draws(
    count: int, shape=(ROWS, INPUTS), outputs=OUTPUTS, rank=RANK, *, base=True, dtypes="fp32", **options
) -> list[LoraProblem]:
    """`count` random problems; without `base` the low-rank term alone."""
    dtype, adapter_dtype = DTYPES[dtypes]
    problems = [
        random_lora_problem(shape, outputs, rank, dtype=dtype, adapter_dtype=adapter_dtype, seed=seed, **options)
        for seed in range(count)
    ]
    return problems if base else [problem.without_base() for problem in problems]


def truth_of(problem: LoraProblem, wanted: tuple[str, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """The third of `lora_linear_outcomes`, without the op's and eager's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        keep, p = op_dropout(problem)

    def reference(*leaves):
        return lora_linear_reference(*leaves, problem.scaling, keep, p)

    return oracle._outcome(reference, problem, wanted, torch.float64)


def assert_right(problems, wanted=("x", "bias", "lora_A", "lora_B"), bounds: Bounds = Bounds()) -> None:  # noqa: B008
    """Result and wanted gradients obey the criterion on the backend in force."""
    differences = lora_linear_differences(problems, wanted)
    faults = [fault for difference in differences for fault in difference.faults(bounds)]
    assert not faults, "\n".join([*faults, *map(str, differences)])
