"""The kernels of `mixed_lora_linear` move the bytes that `mixed_lora_linear_traffic` derives, and not one more.

Counted in the interpreter by tests/traffic.py. A loop over the rows would read an adapter's matrices once for each.
"""

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.kernels import mixed_lora_linear as kernels
from fastpeft.kernels._segments import Layout
from fastpeft.kernels._tiles import SMALL
from fastpeft.ops import mixed_lora_linear
from tests.ops import mixed_lora_linear_traffic as expected
from tests.traffic import SUMS, count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

TILES = SMALL
DATA, ADAPTER = torch.float16, torch.float32
LAYOUTS = {  # samples of each adapter, of none, rows of a sample, ranks
    "apart": (((0, 3), (1, 2)), (4,), 11, (8, 24)),
    "decoding": (((0, 2, 5, 6), (1,), (3, 4)), (), 1, (4, 16, 8)),
    "one": (((0, 1),), (2,), 20, (5,)),
    "experts": ((range(7), range(0), range(7, 40)), (), 1, (8, 8, 8)),
}
layouts = pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
dropping = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
processors = pytest.mark.parametrize("processors", [1, 13])


def layout_of(shape, dropout=False) -> Layout:
    samples, rest, tokens, ranks = shape
    count = len(ranks)
    return Layout(samples, rest, tokens, ranks, (0.5,) * count, ((0.3,) if dropout else (0.0,)) * count)


def rows_of(layout: Layout) -> int:
    return sum(layout.counts) + len(layout.rest) * layout.tokens


def data(*shape):
    return torch.randn(*shape).to(DATA)


def matrices(layout: Layout, width: int):
    return torch.randn(sum(layout.ranks) * width)


def seed(dropout):
    return torch.tensor([7]) if dropout else None


@layouts
@dropping
@processors
@pytest.mark.parametrize("of_b", [False, True], ids=["A", "B"])
def test_shrink_reads_x_once_and_a_matrix_once_for_each_block(shape, dropout, processors, of_b, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    layout, width = layout_of(shape, dropout), 100
    with count_traffic() as traffic:
        x = data(rows_of(layout), width)
        kernels.shrink(x, matrices(layout, width), layout, seed(dropout), of_b=of_b, tiles=TILES)
    found = expected.shrink(layout.counts, width, layout.ranks, TILES, 2, 4, processors, dropout, of_b)
    assert traffic.of("_mixed_shrink_kernel") == found
    assert traffic.atomics == 0


@layouts
@dropping
@pytest.mark.parametrize("kind", ["in place", "residual", "alone"])
def test_expand_touches_only_what_it_must(shape, dropout, kind):
    layout, width = layout_of(shape, dropout), 70
    rows = rows_of(layout)
    out = data(rows, width)
    residual = {"in place": out, "residual": data(rows, width), "alone": None}[kind]
    with count_traffic() as traffic:
        p, q = torch.randn(layout.elements), matrices(layout, width)
        kernels.expand(p, q, layout, out, DATA, residual=residual, seed=seed(dropout), of_b=True, tiles=TILES)
    rest = 0 if kind == "in place" else len(layout.rest) * layout.tokens
    found = expected.expand(layout.counts, width, layout.ranks, TILES, 2, 4, rest, kind != "alone", dropout)
    if kind == "in place":  # one tensor, of which the first argument is charged
        found = found[0], {"residual_ptr": found[1]["out_ptr"]}
    assert traffic.of("_mixed_expand_kernel") == found
    assert traffic.atomics == 0


@layouts
@dropping
@processors
def test_grad_columns_reads_x_once(shape, dropout, processors, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    layout, width = layout_of(shape, dropout), 100
    with count_traffic() as traffic:
        x = data(rows_of(layout), width)
        kernels.grad_columns(torch.randn(layout.elements), x, layout, seed(dropout), tiles=TILES)
    found, sums = expected.grad_columns(layout.counts, width, layout.ranks, TILES, 2, 4, processors, dropout)
    assert traffic.of("_mixed_grad_columns_kernel") == found
    loads, stores = traffic.of("_mixed_sum_kernel")  # every partial sum is read back once
    assert loads["parts_ptr"] == sums and stores == {"out_ptr": sum(layout.ranks) * width * 4}
    assert traffic.atomics == 0


def test_a_training_step_launches_eight_kernels_whatever_the_number_of_adapters():
    launched = []
    for ranks, rows in (((4,), (0, 0, -1)), ((4, 8, 3), (2, 0, 1))):
        x, dy = data(3, 7, 40).requires_grad_(), data(3, 7, 50)
        a, b = [torch.randn(r, 40) for r in ranks], [torch.randn(50, r) for r in ranks]
        leaves = [x, *(each.requires_grad_() for each in (*a, *b))]
        with backend("triton"), count_traffic() as traffic:
            y = mixed_lora_linear(x, data(50, 40), None, a, b, [0.5] * len(ranks), rows)
            assert traffic.loaded(x) == x.nbytes * sum(g >= 0 for g in rows) // 3
            torch.autograd.grad(y, leaves, dy)
        launched.append([name for name in traffic.kernels() if name not in SUMS])
        assert traffic.loaded(x) == 2 * x.nbytes * sum(g >= 0 for g in rows) // 3
        assert traffic.loaded(dy) == 2 * dy.nbytes * sum(g >= 0 for g in rows) // 3
    assert launched[0] == launched[1] == [
        "_mixed_shrink_kernel", "_mixed_expand_kernel", "_mixed_grad_columns_kernel", "_mixed_sum_kernel",
        "_mixed_shrink_kernel", "_mixed_grad_columns_kernel", "_mixed_sum_kernel", "_mixed_expand_kernel",
    ]  # fmt: skip


def test_tables_are_made_once_for_a_layout():
    from fastpeft.kernels import _segments

    x, a, b = torch.randn(3, 5, 40), torch.randn(4, 40), torch.randn(40, 4)
    with backend("triton"):
        mixed_lora_linear(x, torch.zeros(40, 40), None, [a], [b], [0.5], [0, -1, 0])
        made = [each.cache_info().misses for each in (_segments.order, _segments.segments, _segments.blocks)]
        for scale in (1.0, 2.0):  # other layers of the model
            mixed_lora_linear(x * scale, torch.ones(40, 40), None, [a * scale], [b], [0.5], [0, -1, 0])
    assert made == [each.cache_info().misses for each in (_segments.order, _segments.segments, _segments.blocks)]
