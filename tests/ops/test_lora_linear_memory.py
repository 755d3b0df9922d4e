"""What a training step of `lora_linear` keeps for backward and what it allocates on the way, beside HF peft.

bf16 data and fp32 adapters, HF peft's default, with sizes at which each thing that must not be there (an fp32 copy of
x, a stored mask, the N×K delta) is larger than everything that may be.
"""

import gc

import peft
import pytest
import torch

from fastpeft.kernels._tiles import SMALL
from fastpeft.ops import lora_linear
from fastpeft.ops._lora_linear_torch import BLOCK_ELEMENTS, MASKED_ELEMENTS
from tests.memory import Allocations, saved_for_backward
from tests.ops import lora_linear_traffic as expected
from tests.ops.lora_linear_cases import on
from tests.ops.lora_linear_traffic import runs

BOTH = [pytest.param("torch"), pytest.param("triton", marks=pytest.mark.interpreter)]
RANK = 4
# M, K, N: many rows beside a small weight, and a large weight under few rows.
TALL, WIDE = (16384, 512, 32), (16, 2048, 2048)
SMALL_TALL, SMALL_WIDE = (256, 96, 32), (33, 160, 160)  # the interpreter's


def layer(m, k, n):
    """(x, weight, A, B) as leaves, the weight frozen."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator).bfloat16() for s in ((m, k), (n, k)))
    a, b = (torch.randn(*s, generator=generator) for s in ((RANK, k), (n, RANK)))
    return x.requires_grad_(), weight, a.requires_grad_(), b.requires_grad_()


def sizes(name):
    return [SMALL_TALL, SMALL_WIDE] if name == "triton" else [TALL, WIDE]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", BOTH)
def test_backward_keeps_x_s_and_a_seed(name, dropout):
    for m, k, n in sizes(name):
        x, weight, a, b = layer(m, k, n)
        with on(name), saved_for_backward(besides=(weight, a, b)) as saved:
            lora_linear(x, weight, None, a, b, 0.5, dropout=dropout, training=True)
        s = m * RANK * 4
        assert sorted(saved.values()) == sorted([x.nbytes, s] + [8] * (dropout > 0))


@pytest.mark.parametrize("name", BOTH)
def test_two_projections_keep_one_x(name):
    m, k, n = sizes(name)[0]
    x, weight, a, b = layer(m, k, n)
    _, other_weight, other_a, other_b = layer(m, k, n)
    with on(name), saved_for_backward(besides=(weight, a, b, other_weight, other_a, other_b)) as saved:
        outputs = [
            lora_linear(x, weight, None, a, b, 0.5, dropout=0.3, training=True),
            lora_linear(x, other_weight, None, other_a, other_b, 0.5, dropout=0.3, training=True),
        ]
    assert all(y.requires_grad for y in outputs)
    assert sorted(saved.values()) == sorted([x.nbytes, *[m * RANK * 4] * 2, 8, 8])


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [("x", []), ("A", ["x"]), ("B", ["s"]), ("xA", ["x"]), ("xB", ["s"]), ("AB", ["x", "s"]), ("", [])],
)
@pytest.mark.parametrize("name", BOTH)
def test_only_what_the_wanted_gradients_need_is_kept(name, wanted, kept):
    m, k, n = sizes(name)[0]
    x, weight, a, b = layer(m, k, n)
    for leaf, letter in ((x, "x"), (a, "A"), (b, "B")):
        leaf.requires_grad_(letter in wanted)
    with on(name), saved_for_backward(besides=(weight, a, b)) as saved:
        lora_linear(x, weight, None, a, b, 0.5)
    assert sorted(saved.values()) == sorted({"x": x.nbytes, "s": m * RANK * 4}[letter] for letter in kept)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["tall", "wide"])
def test_torch_path_allocates_its_results_and_a_block(shape, dropout):
    m, k, n = shape
    x, weight, a, b = layer(*shape)
    with Allocations() as allocations:
        y = lora_linear(x, weight, None, a, b, 0.5, dropout=dropout, training=True)
        forward_peak = allocations.peak
        dx, da, db = torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    # S, T and s·T / (1 - p); an operand's block in fp32, the product it goes into, and the draws of dropped places.
    low_rank, block = m * RANK * 4, 4 * (MASKED_ELEMENTS if dropout else BLOCK_ELEMENTS)
    assert forward_peak <= y.nbytes + low_rank + 3 * block
    assert allocations.peak <= 2 * y.nbytes + dx.nbytes + da.nbytes + db.nbytes + 3 * low_rank + 3 * block
    mask_or_delta = max(m * k, n * k)  # a byte for each element
    assert {size for size in allocations.sizes if size >= mask_or_delta} <= {y.nbytes, dx.nbytes}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_path_makes_no_wide_copy_of_the_result_or_its_gradient(dropout):
    m, k, n = 32768, 16, 512
    x, weight, a, b = layer(m, k, n)
    with Allocations() as allocations:
        y = lora_linear(x, weight, None, a, b, 0.5, dropout=dropout, training=True)
        torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    assert max(allocations.sizes) == y.nbytes and allocations.sizes.count(y.nbytes) == 2  # y and dy
    assert allocations.peak < 3 * y.nbytes


@pytest.fixture
def tidy_interpreter(monkeypatch):
    """The interpreter leaves a launch's arguments in a reference cycle; a GPU launch keeps nothing. A collection looks
    through what this file's tests made and no more: see `conftest._short_collections`."""
    from triton.runtime.interpreter import GridExecutor

    execute = GridExecutor.__call__

    def execute_and_collect(*arguments, **keywords):
        execute(*arguments, **keywords)
        gc.collect()

    monkeypatch.setattr(GridExecutor, "__call__", execute_and_collect)


@pytest.mark.interpreter
@pytest.mark.usefixtures("tidy_interpreter")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("strategy", ["fused", "prewrite"])
@pytest.mark.parametrize("shape", [SMALL_TALL, SMALL_WIDE], ids=["tall", "wide"])
def test_kernels_allocate_their_results_and_partial_sums(shape, strategy, dropout):
    m, k, n = shape
    x, weight, a, b = layer(*shape)
    with on("triton", strategy), Allocations() as allocations:
        y = lora_linear(x, weight, None, a, b, 0.5, dropout=dropout, training=True)
        forward_peak = allocations.peak
        dx, da, db = torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    low_rank = m * RANK * 4
    shares = expected.shares_of_grad_b_and_t(m, n, RANK, SMALL, expected.Sizes(data=x.element_size(), adapter=4), 4)
    partials = sum(parts * size * 4 for parts, size, _ in shares)
    most = max(partials, runs(m, SMALL.rows, 8 // -(-k // SMALL.columns)) * da.nbytes)
    product = 0 if strategy == "fused" else y.nbytes  # the vendor's, to which an fp32 term is added out of place
    assert forward_peak <= y.nbytes + product + low_rank + 8
    assert allocations.peak <= 2 * y.nbytes + dx.nbytes + da.nbytes + db.nbytes + 2 * low_rank + 8 + most
    mask_or_delta = max(m * k, n * k)
    assert {size for size in allocations.sizes if size >= mask_or_delta} <= {y.nbytes, dx.nbytes}


def of_peft(dropout, m, k, n):
    """(bytes saved beyond weights, peak of a step) of HF peft's own layer on the problem of `layer`."""
    x, weight, a, b = layer(m, k, n)
    base = torch.nn.Linear(k, n, bias=False, dtype=x.dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK // 2, lora_dropout=dropout, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), config).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with saved_for_backward(besides=tuple(model.parameters())) as saved, Allocations() as allocations:
        y = model(x)
        y.backward(torch.ones_like(y))
    return sum(saved.values()), allocations.peak


def of_ours(dropout, m, k, n):
    x, weight, a, b = layer(m, k, n)
    with saved_for_backward(besides=(weight, a, b)) as saved, Allocations() as allocations:
        y = lora_linear(x, weight, None, a, b, 0.5, dropout=dropout, training=True)
        y.backward(torch.ones_like(y))
    return sum(saved.values()), allocations.peak


@pytest.mark.parametrize(("dropout", "less_saved", "less_peak"), [(0.0, 1.9, 3.2), (0.3, 3.5, 4.0)])
def test_beside_hf_peft(dropout, less_saved, less_peak):
    ours, theirs = of_ours(dropout, *TALL), of_peft(dropout, *TALL)
    print(f"saved {ours[0]:,} B, HF peft {theirs[0]:,} B; peak {ours[1]:,} B, HF peft {theirs[1]:,} B")
    assert ours[0] * less_saved <= theirs[0]
    assert ours[1] * less_peak <= theirs[1]
