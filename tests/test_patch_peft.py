"""`patch(peft_model)`: before, patched and unpatched a model of HF peft computes the same, on every family and task
where peft runs; classes, parameters and names stay. And what the patch gives that peft lacks."""

import copy
import itertools
import warnings

import pytest
import torch

import fastpeft
from fastpeft.reporting import LEFT
from tests.matrix import (
    CHECKS,
    FAMILIES,
    METHODS,
    TASKS,
    Cell,
    Library,
    attempt,
    made,
    offers,
    peft_s,
    read,
    with_gradients,
)


def chosen() -> list[Cell]:
    """One task for each pair of a family and a method, where peft runs: another one than in tests/test_matrix.py."""
    out = []
    for (row, family), (column, method) in itertools.product(enumerate(FAMILIES), enumerate(METHODS)):
        tasks = [task for task in TASKS if offers(family, task)]
        out.append(Cell(family, tasks[(row + column + 1) % len(tasks)], method))
    return out


def step(model, cell):
    """Logits of real tokens, and the gradients of a step."""
    inputs = cell.inputs()
    logits = read(model, inputs)
    model.zero_grad()
    model(**inputs).loss.backward()
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, bound=1e-6):
    """Of the greatest logit and, with the rounding of sums over a batch, of the greatest gradient."""
    error = (found[0] - expected[0]).abs().max() / expected[0].abs().max()
    assert error <= bound, f"logits differ by {float(error):.1e}"
    assert found[1].keys() == expected[1].keys()
    greatest = max(float(each.norm()) for each in expected[1].values())
    for name, each in expected[1].items():
        error = float((found[1][name] - each).norm())
        assert error <= 10 * bound * max(float(each.norm()), 0.1 * greatest), f"the gradient of {name} differs"


@pytest.mark.parametrize("cell", chosen(), ids=str)
def test_the_numbers_are_peft_s(cell):
    made_by_peft = []
    if attempt(lambda: made_by_peft.append(with_gradients(peft_s(), cell))):
        with pytest.raises(Exception):  # noqa: B017  peft fails by itself, in whatever way
            made(peft_s(), cell)(**cell.inputs()).loss.backward()
        return
    (model,) = made_by_peft
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, parameters = list(model.state_dict()), [id(each) for each in model.parameters()]
        kinds, expected = [type(each) for each in model.modules()], step(model, cell)
        assert fastpeft.patch(model) is model
        assert_same(step(model, cell), expected)
        assert list(model.state_dict()) == names and [id(each) for each in model.parameters()] == parameters
        assert all(isinstance(each, kind) for each, kind in zip(model.modules(), kinds, strict=False))
        served = [row for row in fastpeft.report(model).layers if row.op != LEFT]
        assert served, fastpeft.report(model)
        fastpeft.unpatch(model)
        assert [type(each) for each in model.modules()] == kinds
        assert torch.equal(step(model, cell)[0], expected[0])


def patched_peft() -> Library:
    theirs = peft_s()
    return Library("extension", None, lambda base, cell: fastpeft.patch(theirs.wrap(base, cell)), None, theirs.stepped)


GAINS = [
    Cell(family, task, method)
    for family, task in (
        ("llama", "CAUSAL_LM"),
        ("gpt2", "CAUSAL_LM"),
        ("bloom", "CAUSAL_LM"),
        ("bart", "SEQ_2_SEQ_LM"),
    )
    for method in ("prefix", "prompt", "p-tuning", "adapter")
    if method != "adapter" or family in ("llama", "gpt2")
]


@pytest.mark.parametrize("cell", GAINS, ids=str)
def test_checkpointing_and_caches_work_where_peft_s_do_not(cell, tmp_path):
    """Both kinds of checkpointing, and `generate` with a static cache, without one, and as one argmax after the other;
    a prompt in front of the padding, as peft puts it, is seen by what is generated."""
    assert attempt(CHECKS["checkpointing"], patched_peft(), cell, tmp_path) == ""
    words = attempt(CHECKS["generates"], patched_peft(), cell, tmp_path)
    in_front = cell.method in ("prompt", "p-tuning") and words.startswith("left padding: logits differ")
    assert words == "" or in_front, words


def test_peft_lacks_what_the_patch_gives_to_a_prefix(tmp_path):
    cell = Cell("llama", "CAUSAL_LM", "prefix")
    assert attempt(CHECKS["checkpointing"], peft_s(), cell, tmp_path) != ""
    assert attempt(CHECKS["generates"], peft_s(), cell, tmp_path) != ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "prompt"])
def test_in_half_precision_it_is_as_close_to_float64(method, dtype):
    """Of a base in half precision with fp32 adapters, peft's default."""
    model = made(peft_s(), Cell("llama", "CAUSAL_LM", method))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    ids = torch.randint(3, 90, (16, 24), generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def logits(model):
        return model(input_ids=ids).logits[:, -24:].double()

    exact, before = logits(copy.deepcopy(model).double()), logits(model)
    after = logits(fastpeft.patch(model))
    errors = [float((each - exact).pow(2).mean().sqrt()) for each in (before, after)]
    assert 0 < errors[1] <= 1.1 * errors[0]
