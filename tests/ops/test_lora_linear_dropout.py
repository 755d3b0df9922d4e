"""The dropout of `lora_linear`: which elements it drops, how often, and that backward drops the same ones."""

import numpy
import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from fastpeft.kernels._common import Dropout, dropout_threshold, keep_mask
from fastpeft.ops import dropout_mask, lora_linear
from fastpeft.ops._lora_linear_torch import dropout_of, gap_table, keeping, kept, row_blocks
from fastpeft.oracle import LoraProblem, op_dropout
from tests.fuzz.large import as_if_large
from tests.memory import saved_for_backward
from tests.ops import lora_projections_cases
from tests.ops.lora_linear_cases import INPUTS, assert_right, draws, on

pytestmark = pytest.mark.usefixtures("poison")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]


def philox_4x32(key: int, counters: numpy.ndarray, rounds: int) -> numpy.ndarray:
    """Random123's Philox4x32 (Salmon et al., SC'11, figure 2), counters [..., 4] -> [..., 4], in 64-bit integers."""
    low = numpy.uint64(0xFFFFFFFF)
    c = [counters[..., i].astype(numpy.uint64) for i in range(4)]
    k = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(rounds):
        first, second = numpy.uint64(0xD2511F53) * c[0], numpy.uint64(0xCD9E8D57) * c[2]
        shift = numpy.uint64(32)
        c = [
            (second >> shift) ^ c[1] ^ numpy.uint64(k[0]),
            second & low,
            (first >> shift) ^ c[3] ^ numpy.uint64(k[1]),
            first & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return numpy.stack(c, -1)


def independent_mask(seed: int, p: float, rows: int, columns: int, first_row: int = 0) -> torch.Tensor:
    """The mask as `keep_mask` documents it, from the words of the generator above."""
    groups = -(-columns // 8)
    counters = numpy.zeros((rows, groups, 4), dtype=numpy.uint64)
    row = numpy.arange(first_row, first_row + rows, dtype=numpy.uint64)
    counters[..., 0] = numpy.arange(groups, dtype=numpy.uint64)
    counters[..., 1] = (row & numpy.uint64(0xFFFFFFFF))[:, None]
    counters[..., 2] = (row >> numpy.uint64(32))[:, None]
    words = philox_4x32(seed % 2**64, counters, 7)
    halves = numpy.stack((words & numpy.uint64(0xFFFF), words >> numpy.uint64(16)), -1).reshape(rows, groups * 8)
    return torch.from_numpy(halves[:, :columns].astype(numpy.int64) >= round(p * 65536))


def test_philox_against_the_published_answers():
    # Random123, tests/kat_vectors, philox4x32 with 7 and with 10 rounds.
    def run(counter, key, rounds):
        words = philox_4x32(key[0] | key[1] << 32, numpy.array([counter], dtype=numpy.uint64), rounds)
        return " ".join(f"{int(word):08x}" for word in words[0])

    ones = 0xFFFFFFFF
    assert run([0] * 4, [0, 0], 10) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    assert run([ones] * 4, [ones] * 2, 10) == "408f276d 41c83b0e a20bc7c6 6d5451fd"
    assert run([0] * 4, [0, 0], 7) == "5f6fb709 0d893f64 4f121f81 4f730a48"


@interpreted
@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, -(2**63), 0x0123456789ABCDEF])
def test_the_kernels_mask_is_philox_bit_for_bit(seed):
    rows, columns = 41, 77
    mask = dropout_mask(torch.tensor([seed]), 0.3, rows, columns, "cpu", "triton")
    assert torch.equal(mask, independent_mask(seed, 0.3, rows, columns))


@triton.jit
def _write_mask(seed_ptr, out_ptr, first_row, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    keep = keep_mask(seed_ptr, first_row, tl.program_id(0) * COLUMNS, threshold, ROWS, COLUMNS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    places = tl.arange(0, ROWS)[:, None] * (COLUMNS * tl.num_programs(0)) + columns[None, :]
    tl.store(out_ptr + places, keep.to(tl.int8))


@interpreted
@pytest.mark.parametrize("first_row", [0, 2**31 - 8, 2**32 - 8, 2**32 + 5, 2**40])
def test_rows_beyond_32_bits_have_masks_of_their_own(first_row):
    out = torch.empty(16, 96, dtype=torch.int8)
    seed = torch.tensor([99])
    _write_mask[(3,)](seed, out, first_row, dropout_threshold(0.5), 16, 32)
    assert torch.equal(out.bool(), independent_mask(99, 0.5, 16, 96, first_row))
    assert not torch.equal(out.bool(), independent_mask(99, 0.5, 16, 96, first_row + 16))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("backend", BOTH)
def test_the_rate_and_the_independence_of_neighbours(backend, p):
    if backend == "triton":  # the interpreter would take a minute, and the test above has shown them equal
        keep = torch.cat([independent_mask(seed, p, 500, 500) for seed in (3, 4, 5, 6)])
    else:
        keep = torch.cat([dropout_mask(torch.tensor([seed]), p, 500, 500, "cpu", "torch") for seed in (3, 4, 5, 6)])
    count = keep.numel()
    assert count == 1_000_000
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs((~keep).double().mean() - p) < 5 * deviation
    centred = (keep.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    columns = [(centred[:, gap:] * centred[:, :-gap]).mean() * count**0.5 for gap in (1, 2, 3, 4, 7, 8, 16)]
    rows = [(centred[gap:] * centred[:-gap]).mean() * count**0.5 for gap in (1, 2, 4, 8, 16, 500)]  # 500: other seed
    assert max(map(abs, columns + rows)) < 5
    for side in (0, 1):  # no row and no column has a rate of its own
        size = keep.shape[1 - side]
        worst = ((~keep).double().mean(1 - side) - p).abs().max() / (p * (1 - p) / size) ** 0.5
        assert worst < 5.5 if p < 0.9 else worst < 8  # far from normal where 1 in 1000 is kept


@pytest.mark.parametrize("backend", BOTH)
def test_the_rate_is_honoured_by_the_op_itself(backend):
    rows = 64 if backend == "triton" else 4000
    x, a, b = torch.ones(rows, 64), torch.eye(64), torch.eye(64)
    with on(backend, "fused" if backend == "triton" else None):
        y = lora_linear(x, torch.zeros(64, 64), None, a, b, 1.0, dropout=0.3, training=True)
    kept = y > 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7), rtol=2e-5, atol=0.0)
    assert not y[~kept].any()
    assert abs((~kept).double().mean() - 0.3) < 5 * (0.21 / kept.numel()) ** 0.5


@pytest.mark.parametrize(
    ("backend", "rows"), [("torch", 37), ("torch", 9001), pytest.param("triton", 37, marks=interpreted)]
)
def test_forward_and_backward_drop_what_dropout_mask_says(backend, rows):
    """9001 rows are three of the torch path's row blocks, the last one short."""
    eye = torch.eye(INPUTS)  # as A and as B, so that y is the dropped x and dX the dropped dY
    x = (torch.rand(rows, INPUTS) + 0.5).requires_grad_()
    with on(backend, "fused" if backend == "triton" else None):
        torch.manual_seed(11)
        keep, p = op_dropout(LoraProblem(x, eye, None, eye, eye, x, 1.0, 0.4))
        torch.manual_seed(11)
        a = eye.clone().requires_grad_()
        y = lora_linear(x, torch.zeros_like(eye), None, a, eye, 1.0, dropout=0.4, training=True)
        dx, da = torch.autograd.grad(y, (x, a), torch.ones_like(y))
    assert abs(p - 0.4) <= 2**-17
    assert torch.equal(y != 0, keep) and torch.equal(dx != 0, keep)
    torch.testing.assert_close(da, (x.detach() * keep).sum(0).expand_as(da) / (1 - p))


@pytest.mark.parametrize("rows", [37, 4000])
@pytest.mark.parametrize("p", [1e-9, 0.0011, 0.05, 0.06, 0.07, 0.5])
def test_the_torch_path_keeps_the_gaps_of_a_mask_or_its_seed(p, rows):
    """4000 rows are two blocks. Where the gaps are kept, nothing is drawn in backward."""
    columns = 400
    x, weight = (torch.rand(rows, columns) + 0.5).requires_grad_(), torch.zeros(columns, columns)
    a, b = torch.eye(columns, requires_grad=True), torch.eye(columns)
    with on("torch"), saved_for_backward(besides=[x, weight, a, b]) as saved:
        y = lora_linear(x, weight, None, a, b, 1.0, dropout=p, training=True)
    (size,) = saved.values()
    most = rows * columns / 8 * (1.4 if rows == 37 else 1.03)  # ten standard deviations, which are more of a few
    assert 8 < size < most if 2**-10 <= p <= 2**-4 else size == 8
    dx, da = torch.autograd.grad(y, (x, a), torch.ones_like(y))
    keep = y.detach() != 0
    assert torch.equal(dx != 0, keep)
    torch.testing.assert_close(da[0], (x.detach() * keep).sum(0) / (1 - p), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 8)])
def test_nothing_can_be_dropped(shape):
    x, b = torch.randn(*shape, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    a = torch.randn(2, shape[-1], requires_grad=True)
    with on("torch"):
        y = lora_linear(x, torch.zeros(5, shape[-1]), None, a, b, 1.0, dropout=0.05, training=True)
        dx, da, db = torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    assert y.shape == (*shape[:-1], 5) and not y.any()
    assert dx.shape == x.shape and not da.any() and not db.any()


def test_a_block_that_drops_nothing_keeps_the_seed():
    draws, p = 0, 2.0**-9
    for seed in range(40):
        given = keeping(torch.tensor([seed]), p, torch.device("cpu"))
        places = [given.next(4, 20), given.next(100, 20), given.next(4, 20)]
        found = kept(given)
        again = dropout_of(found, p, torch.device("cpu"))
        draws += found.dtype is torch.int64
        for before, size in zip(places, (80, 2000, 80), strict=True):
            after = again.next(size // 20, 20)
            assert set(after.tolist()) == set(before.tolist()) <= set(range(size))
    assert 20 < draws < 40


@pytest.mark.parametrize("p", [1e-12, 1e-6, 0.001, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99, 1 - 2.0**-53])
def test_the_mean_gap_is_that_of_the_probability(p):
    gaps = gap_table(p, torch.device("cpu"))
    assert gaps.min() >= 1
    assert abs(len(gaps) / gaps.double().sum() - p) <= 2**-16


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 0), (1, 10**7), (1024, 1408), (7, 2**18), (10**5, 3)])
def test_blocks_are_even(rows, columns, masked):
    blocks = row_blocks(rows, columns, masked)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    lengths = [block.stop - block.start for block in blocks]
    assert all(length * columns <= 2**20 or length == 1 for length in lengths)
    assert not lengths or max(lengths) - lengths[-1] < len(lengths) or max(lengths) == 1


@pytest.mark.parametrize("backend", BOTH)
def test_the_generator_decides(backend):
    problem = draws(1)[0]

    def run(p=0.3, training=True):
        tensors = (problem.x, problem.weight, None, problem.lora_A, problem.lora_B)
        return lora_linear(*tensors, 1.0, dropout=p, training=training)

    with on(backend, "fused" if backend == "triton" else None):
        torch.manual_seed(5)
        first, second = run(), run()
        torch.manual_seed(5)
        again = run()
        state = torch.get_rng_state()
        evaluated, undropped = run(training=False), run(p=0.0)
        assert torch.equal(state, torch.get_rng_state())  # without dropout nothing is drawn
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(evaluated, undropped)


def test_the_mean_of_many_draws_is_the_result_without_dropout():
    problem = draws(1)[0].without_base()

    def run(p):
        return lora_linear(
            problem.x.double(), problem.weight.double(), None, problem.lora_A.double(), problem.lora_B.double(), 1.0,
            dropout=p, training=True,
        )  # fmt: skip

    torch.manual_seed(0)
    samples = torch.stack([run(0.3) for _ in range(2000)])
    error = (samples.mean(0) - run(0.0)) / (samples.std(0) / len(samples) ** 0.5)
    assert error.abs().max() < 5.5 and abs(error.square().mean() - 1) < 0.15


@interpreted
def test_the_kernels_scale_the_kept_by_the_exact_inverse_of_their_rate():
    for p in (1e-5, 0.1, 1 / 3, 0.999, 0.99999999):
        dropout = Dropout(torch.tensor([0]), p)
        assert abs(dropout.threshold / 65536 - p) <= 2**-17 or p > 1 - 2**-16
        assert dropout.keep_scale * (1 - dropout.threshold / 65536) == 1.0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BOTH)
def test_checkpointing_draws_the_same_mask_again(backend, reentrant):
    problem = draws(1, dropout=0.3)[0]
    leaves = [getattr(problem, name).clone().requires_grad_() for name in ("x", "weight", "bias", "lora_A", "lora_B")]

    def run(*leaves):
        return lora_linear(*leaves, 0.5, dropout=0.3, training=True)

    with on(backend, "fused" if backend == "triton" else None):
        torch.manual_seed(3)
        plain = run(*leaves)
        expected = torch.autograd.grad(plain, leaves, problem.dy)
        torch.manual_seed(3)
        y = checkpoint(run, *leaves, use_reentrant=reentrant)
        torch.rand(7)  # the generator has moved on by the time of the recomputation
        y.backward(problem.dy)
    assert torch.equal(y, plain)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("dtypes", ["fp16", "bf16"])
def test_a_gradient_of_many_row_blocks_is_rounded_once(dtypes):
    """A's, of 64 blocks: added up in half precision it would have three times eager's error."""
    with on("torch"), as_if_large(True):
        assert len(row_blocks(2048, 32, masked=True)) == 64
        assert_right(draws(4, (2048, 32), outputs=24, rank=8, dropout=0.3, dtypes=dtypes), ("lora_A",))
        lora_projections_cases.assert_right(
            [lora_projections_cases.draw(dtypes, shape=(2048, 32), dropout=True, seed=seed) for seed in range(4)]
        )
