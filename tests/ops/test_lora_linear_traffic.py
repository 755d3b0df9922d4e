"""The kernels of `lora_linear` move the bytes that `lora_linear_traffic` derives, and not one more.

Counted in the interpreter by tests/traffic.py; the shapes are those of a transformer's projections, scaled down.
"""

import pytest
import torch

from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.kernels import _partials
from fastpeft.kernels import lora_linear as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.kernels._tiles import SMALL, tiles_for
from fastpeft.ops import lora_linear
from fastpeft.ops._lora_linear_triton import ONE_READ_RANK
from tests.ops import lora_linear_traffic as expected
from tests.ops.lora_linear_traffic import Sizes
from tests.traffic import SUMS, count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

TILES = SMALL
ROWS = 53
PROJECTIONS = {"q/o": (100, 100), "k/v": (132, 33), "up": (40, 140), "down": (140, 40)}  # K, N
shapes = pytest.mark.parametrize(("inputs", "outputs"), PROJECTIONS.values(), ids=PROJECTIONS)
ranks = pytest.mark.parametrize("rank", [8, 24])
dropouts = pytest.mark.parametrize("dropout", [None, Dropout(torch.tensor([7]), 0.3)], ids=["", "dropout"])
processors = pytest.mark.parametrize("processors", [1, 4, 13])

DATA, ADAPTER = torch.float16, torch.float32
SIZES = Sizes(data=2, adapter=4)


def data(*shape):
    return torch.randn(*shape).to(DATA)


def adapter(*shape):
    return torch.randn(*shape).to(ADAPTER)


@shapes
@ranks
@dropouts
@processors
def test_shrink_reads_x_once(inputs, outputs, rank, dropout, processors, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    with count_traffic() as traffic:
        kernels.shrink(data(ROWS, inputs), adapter(rank, inputs), 0.5, DATA, dropout, TILES)
    loads, stores = expected.shrink(ROWS, inputs, rank, TILES, 2, 4, 2, processors, dropout is not None)
    assert traffic.of("_shrink_kernel") == (loads, stores)
    parts = expected.runs(inputs, TILES.depth, processors // -(-ROWS // TILES.rows))
    assert traffic.of("_sum_partials_kernel") == expected.sums(*[(parts, ROWS * rank, 2)] * (parts > 1))
    assert traffic.atomics == 0


@shapes
@pytest.mark.parametrize("rank", [8, 24, 70])
@dropouts
@pytest.mark.parametrize("kind", ["base", "bias", "residual", "widened", "alone"])
def test_tail_reads_the_low_rank_factors_once_per_tile(inputs, outputs, rank, dropout, kind):
    options = {
        "base": {"base": (data(ROWS, inputs), data(outputs, inputs)), "bias": data(outputs)},
        "bias": {"bias": data(outputs)},
        "residual": {"residual": data(ROWS, outputs)},
        "widened": {"residual": data(ROWS, outputs), "out_dtype": torch.float32},
        "alone": {},
    }[kind]
    with count_traffic() as traffic:
        kernels.tail(adapter(ROWS, rank), adapter(outputs, rank), DATA, dropout=dropout, tiles=TILES, **options)
    assert traffic.of("_tail_kernel") == expected.tail(
        ROWS, outputs, rank, TILES, SIZES, depth=inputs if kind == "base" else 0, bias=kind in ("base", "bias"),
        residual=kind in ("residual", "widened"), dropout=dropout is not None, out=4 if kind == "widened" else None,
    )  # fmt: skip
    assert traffic.atomics == 0


@shapes
@ranks
@processors
@pytest.mark.parametrize("bias", [False, True])
def test_grad_b_and_t_reads_dy_once(inputs, outputs, rank, processors, bias, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    with count_traffic() as traffic:
        kernels.grad_b_and_t(data(ROWS, outputs), adapter(ROWS, rank), adapter(outputs, rank), 0.5, bias, TILES)
    loads, stores = expected.grad_b_and_t(ROWS, outputs, rank, TILES, SIZES, processors, bias)
    assert traffic.of("_grad_b_and_t_kernel") == (loads, stores)
    shares = expected.shares_of_grad_b_and_t(ROWS, outputs, rank, TILES, SIZES, processors, bias)
    assert traffic.of("_sum_partials_kernel") == expected.sums(*shares)
    assert traffic.kernels() == ["_grad_b_and_t_kernel", "_sum_partials_kernel"] and traffic.atomics == 0


@shapes
@ranks
@dropouts
@processors
@pytest.mark.parametrize("kind", ["product", "tail", "sum"])
def test_grad_columns_reads_x_once_and_writes_the_tail_once(
    inputs, outputs, rank, dropout, processors, kind, monkeypatch
):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    options = {"product": {}, "tail": {"tail_of": adapter(rank, inputs)}, "sum": {"with_sum": True}}[kind]
    with count_traffic() as traffic:
        kernels.grad_columns(adapter(ROWS, rank), data(ROWS, inputs), ADAPTER, dropout=dropout, tiles=TILES, **options)
    loads, stores = expected.grad_columns(
        ROWS, inputs, rank, TILES, SIZES, processors, kind == "tail", kind == "sum", dropout is not None
    )
    assert traffic.of("_grad_columns_kernel") == (loads, stores)
    parts = expected.runs(ROWS, TILES.rows, 2 * processors // -(-inputs // TILES.columns))
    shares = [(parts, rank * inputs, 4), *[(parts, inputs, 4)] * (kind == "sum")]
    assert traffic.of("_sum_partials_kernel") == expected.sums(*shares * (parts > 1))  # one program writes the whole
    assert traffic.atomics == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, _partials.MOST, _partials.MOST + 1])
def test_sums_are_added_up_in_one_launch_up_to_a_number(count):
    parts = [torch.randn(1 + number, 31, 17 + 40 * number) for number in range(count)]
    outs = [torch.empty(each.shape[1:], dtype=DATA) for each in parts]
    left = [(each, out, 0.5, len(each), out.numel()) for each, out in zip(parts, outs, strict=True)]
    with count_traffic() as traffic:
        _partials.add_up(left)
    loads, stores = traffic.of(*SUMS)
    assert sum(loads.values()) == sum(each.nbytes for each in parts)
    assert sum(stores.values()) == sum(out.nbytes for out in outs)
    assert left == [] and len(traffic.launches) == -(-count // _partials.MOST)
    for each, out in zip(parts, outs, strict=True):
        truth = each.double().sum(0) * 0.5
        assert (out - truth).abs().max() <= 2e-3 * truth.abs().max()


@shapes
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_step_passes_over_x_twice_and_over_dy_once(inputs, outputs, dropout):
    """Beyond the vendor's two products: x for S, x for dA (which also seeds dX), dY for dB, T and dbias together."""
    x, weight, bias = data(ROWS, inputs), data(outputs, inputs), data(outputs)
    a, b, dy = adapter(8, inputs), adapter(outputs, 8), data(ROWS, outputs)
    for leaf in (x, bias, a, b):
        leaf.requires_grad_()
    with backend("triton"), override_plan(Plan("prewrite", "prewrite", "test")), count_traffic() as traffic:
        y = lora_linear(x, weight, bias, a, b, 0.5, dropout=dropout, training=True)
        assert traffic.loaded(x) == x.nbytes
        torch.autograd.grad(y, (x, bias, a, b), dy)
    assert traffic.loaded(x) == 2 * x.nbytes
    assert traffic.loaded(dy) == dy.nbytes
    assert traffic.loaded(weight) == 0
    shared = expected.runs(ROWS, TILES.rows, 8 // -(-inputs // TILES.columns)) > 1
    assert traffic.kernels() == [
        "_shrink_kernel", "_tail_kernel", "_grad_b_and_t_kernel", "_sum_partials_kernel",
        "_grad_columns_kernel", *["_sum_partials_kernel"] * shared,
    ]  # fmt: skip
    assert traffic.atomics == 0


@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("processors", [108, 132, 304])
@pytest.mark.parametrize("rank", [8, 16, ONE_READ_RANK])
@pytest.mark.parametrize("mode", ["half", "split"])
def test_the_partial_sums_of_the_shipped_tiles_are_bounded(inputs, outputs, processors, mode, rank):
    """T's partial sums, written and read, cost no more than a second read of dY would; at rank 64 with fp32 adapters,
    whose three parts take the registers that wider tiles would need, no more than two. Those of dB arise in any case: a
    tile's worth per processor, however many rows there are."""
    rows, tiles = 8192, tiles_for("grad_b_and_t", rank, mode, False, "sm_90")
    shares = expected.shares_of_grad_b_and_t(rows, outputs, rank, tiles, SIZES, processors)
    t, db = (2 * 4 * parts * size for parts, size, _ in shares)
    reads = 2 if mode == "split" and rank > 32 else 1
    assert t <= reads * rows * outputs * 2
    assert db <= 2 * 4 * max(processors, -(-outputs // tiles.columns)) * tiles.columns * rank
