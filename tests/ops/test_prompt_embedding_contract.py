"""What `prompt_embedding` promises besides numbers: autograd's rules, what it keeps and allocates, its errors, which
backend serves a call, one node in a compiled graph, and that the kernels stay inside their outputs in any order."""

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.errors import BackendError, FastpeftError, OpError
from fastpeft.kernels import prompt_embedding as kernels
from fastpeft.ops import prepend_prompt, prompt_embedding
from tests.interpreter import GuardedTorch, backwards
from tests.memory import Allocations, saved_for_backward
from tests.ops.prompt_embedding_cases import BATCH, COUNT, ENTRIES, HIDDEN, TOKENS, draw, op_on, results
from tests.traffic import count_traffic

interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]
SOURCES = pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
LEARNING = pytest.mark.parametrize(
    ("embeds", "learns"), [(False, False), (False, True), (True, True)], ids=["ids", "a table that learns", "embeds"]
)
KINDS = pytest.mark.parametrize("by_sample", [False, True], ids=["shared", "by sample"])


# Autograd


@KINDS
@SOURCES
@pytest.mark.parametrize("name", BOTH)
def test_a_graph_can_be_used_twice_and_inputs_are_left_alone(name, embeds, by_sample):
    problem = draw(embeds=embeds, by_sample=by_sample)
    op, leaves = op_on(problem, learns=True)
    before = [t.detach().clone() for t in (*leaves, problem.dout)]
    with backend(name):
        out = op(*leaves)
        first = torch.autograd.grad(out, leaves, problem.dout, retain_graph=True)
        second = torch.autograd.grad(out, leaves, problem.dout)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(t, copy) for t, copy in zip((*leaves, problem.dout), before, strict=True))
    assert [t._version for t in (*leaves, problem.dout)] == [0, 0, 0]


def test_a_second_derivative_is_refused():
    op, leaves = op_on(draw(embeds=True))
    (drows,) = torch.autograd.grad(op(*leaves).square().sum(), leaves[1], create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        drows.sum().backward()


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_recorded_where_nothing_wants_a_gradient(name):
    problem = draw()
    expected = results(problem, reference=True)["out"]
    with backend(name):
        assert not prompt_embedding(problem.ids, problem.rows, problem.prompt).requires_grad
        op, leaves = op_on(problem, learns=True)
        assert op(*leaves).requires_grad
        with torch.no_grad():
            assert not op(*leaves).requires_grad
        with torch.inference_mode():
            assert torch.equal(op(*leaves), expected)


@pytest.mark.parametrize("name", BOTH)
def test_the_result_has_the_tables_dtype_under_autocast_too(name):
    problem = draw("fp16-fp32")
    op, leaves = op_on(problem)
    with backend(name), torch.autocast("cpu", torch.bfloat16):
        out = op(*leaves)
        (dprompt,) = torch.autograd.grad(out, leaves[0], problem.dout)
    assert (out.dtype, dprompt.dtype) == (torch.float16, torch.float32)
    assert torch.equal(out, results(problem)["out"]) and torch.equal(dprompt, results(problem)["dprompt"])


def test_a_prompt_in_float64_leaves_the_kernels_to_others():
    """The table is served by them, the prompt is not."""
    problem = draw()
    with backend("auto"):
        out = prompt_embedding(problem.ids, problem.rows, problem.prompt.double())
    assert torch.equal(out, results(problem)["out"])


# Memory


@KINDS
@LEARNING
@pytest.mark.parametrize("name", BOTH)
def test_only_the_ids_of_a_table_that_learns_are_kept(name, learns, embeds, by_sample):
    problem = draw(embeds=embeds, by_sample=by_sample)
    op, leaves = op_on(problem, learns=learns)
    with backend(name), saved_for_backward() as saved:
        op(*leaves)
    assert list(saved.values()) == ([problem.ids.nbytes] if learns and not embeds else [])


@KINDS
@SOURCES
@pytest.mark.parametrize("name", BOTH)
def test_the_result_is_allocated_once_and_nothing_beside_it(name, embeds, by_sample):
    """No rows of the table, no repeated prompt, no cast of either; backward has the prompt's gradient alone. What
    torch's own operators hold while they run is not seen here."""
    problem = draw("bf16-fp32", tokens=5, embeds=embeds, by_sample=by_sample)
    op, leaves = op_on(problem)
    with backend(name), Allocations() as forward:
        out = op(*leaves)
    assert [size for size in forward.sizes if size] == [out.nbytes]
    with backend(name), Allocations() as backward:
        dprompt = torch.autograd.grad(out, leaves if embeds else leaves[:1], problem.dout)[0]
    assert [size for size in backward.sizes if size] == [dprompt.nbytes]


def test_the_gradient_of_embeddings_is_no_copy():
    problem = draw(embeds=True)
    op, leaves = op_on(problem)
    found = torch.autograd.grad(op(*leaves), leaves[1], problem.dout)[0]
    assert found.untyped_storage().data_ptr() == problem.dout.untyped_storage().data_ptr()


# Errors


def call(**changes):
    problem = draw()
    return prompt_embedding(**({"input_ids": problem.ids, "weight": problem.rows, "prompt": problem.prompt} | changes))


ERRORS = [
    ({"input_ids": [[1, 2]]}, "input_ids is of list; a tensor is needed"),
    ({"weight": None}, "weight is of NoneType; a tensor is needed"),
    ({"prompt": 3}, "prompt is of int; a tensor is needed"),
    ({"input_ids": torch.zeros(BATCH, TOKENS)}, "input_ids is torch.float32; int32 or int64 is needed"),
    ({"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.int16)}, "input_ids is torch.int16; int32 or int64"),
    (
        {"weight": torch.zeros(3, HIDDEN, dtype=torch.int8)},
        "weight is torch.int8; float32, float16, bfloat16 or float64",
    ),
    ({"weight": torch.zeros(3, HIDDEN).to(torch.float8_e4m3fn)}, "weight is torch.float8_e4m3fn; float32"),
    ({"prompt": torch.zeros(3, HIDDEN).cfloat()}, "prompt is torch.complex64; float32"),
    ({"input_ids": torch.zeros(BATCH, dtype=torch.int64)}, r"input_ids has shape \(5,\); \(B, S\) is needed"),
    ({"weight": torch.zeros(HIDDEN)}, r"weight has shape \(69,\); \(V, H\) is needed"),
    ({"prompt": torch.zeros(COUNT, HIDDEN + 1)}, r"prompt has shape \(3, 70\); \(P, 69\) or \(5, P, 69\) is needed"),
    ({"prompt": torch.zeros(1, COUNT, HIDDEN)}, r"prompt has shape \(1, 3, 69\); \(P, 69\) or \(5, P, 69\) is needed"),
    ({"prompt": torch.zeros(HIDDEN)}, r"prompt has shape \(69,\); \(P, 69\) or"),
    ({"prompt": torch.tensor(1.0)}, r"prompt has shape \(\); \(P, 69\) or"),
    ({"prompt": torch.zeros(0, HIDDEN)}, "prompt has P = 0 rows; at least 1 is needed"),
    ({"prompt": torch.zeros(BATCH, 0, HIDDEN)}, "prompt has P = 0 rows"),
    ({"prompt": torch.zeros(COUNT, HIDDEN, device="meta")}, "prompt is on the meta device and has no values"),
    ({"weight": torch.zeros(ENTRIES, HIDDEN, device="meta")}, "weight is on the meta device and has no values"),
    ({"padding_idx": ENTRIES}, "padding_idx is 11; a row of weight's 11, or None is needed"),
    ({"padding_idx": -ENTRIES - 1}, "padding_idx is -12"),
    ({"padding_idx": 1.0}, "padding_idx is 1.0"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_errors_name_the_argument_and_what_was_expected(changes, message):
    with pytest.raises(OpError, match=f"prompt_embedding: {message}") as caught:
        call(**changes)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FastpeftError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs_embeds": torch.zeros(TOKENS, HIDDEN)}, r"inputs_embeds has shape \(7, 69\); \(B, S, H\) is needed"),
        (
            {"inputs_embeds": torch.zeros(BATCH, TOKENS, HIDDEN, dtype=torch.int64)},
            "inputs_embeds is torch.int64; float32",
        ),
        ({"inputs_embeds": None}, "inputs_embeds is of NoneType"),
        ({"prompt": torch.zeros(2, COUNT, HIDDEN)}, r"prompt has shape \(2, 3, 69\); \(P, 69\) or \(5, P, 69\) is"),
        ({"prompt": torch.zeros(COUNT, HIDDEN, device="meta")}, "prompt is on the meta device"),
    ],
)
def test_errors_of_embeddings(changes, message):
    problem = draw(embeds=True)
    with pytest.raises(OpError, match=f"prepend_prompt: {message}"):
        prepend_prompt(**({"inputs_embeds": problem.rows, "prompt": problem.prompt} | changes))


def test_another_device_is_named(monkeypatch):
    """A device that this machine need not have: it is asked of the tensor."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    for name, like in (("prompt", "weight"), ("input_ids", "weight")):
        tensor = torch.zeros(COUNT, HIDDEN, dtype=torch.int64 if name == "input_ids" else torch.float32)
        with pytest.raises(OpError, match=f"{name} is on cuda:1, {like} on cpu; move one of them"):
            call(**{name: tensor.as_subclass(Elsewhere)})


# Backends


@interpreted
def test_triton_demanded_in_vain_says_why():
    problem = draw().double()
    for how in ({"rows": problem.rows, "prompt": draw().prompt}, {"rows": draw().rows, "prompt": problem.prompt}):
        with pytest.raises(BackendError, match="cannot serve this call: torch.float64 is not served"):
            prompt_embedding(problem.ids, how["rows"], how["prompt"], patched_backend="triton")
    with backend("auto"):
        assert torch.equal(results(problem)["out"], results(problem, reference=True)["out"])


@interpreted
@pytest.mark.parametrize("forward", ["torch", "triton"])
def test_backward_uses_the_backend_of_its_forward(forward):
    op, leaves = op_on(problem := draw(batch=2, tokens=2))
    with count_traffic() as traffic:
        with backend(forward):
            out = op(*leaves)
        with backend({"torch": "triton", "triton": "torch"}[forward]):
            torch.autograd.grad(out, leaves[0], problem.dout)
    assert traffic.kernels() == ([] if forward == "torch" else ["_prepend_kernel", "_grad_prompt_kernel"])


@interpreted
@pytest.mark.usefixtures("overflow_checks", "poison")
@SOURCES
@KINDS
def test_kernels_stay_inside_and_do_not_depend_on_program_order(by_sample, embeds, monkeypatch):
    problem = draw("fp16-fp32", embeds=embeds, by_sample=by_sample, tokens=3)
    with backend("triton"):
        expected = results(problem)
        with backwards():
            reordered = results(problem)
        guarded = GuardedTorch()
        monkeypatch.setattr(kernels, "torch", guarded)
        with count_traffic() as traffic:  # raises where an active lane leaves its tensor
            inside = results(problem)
    for key in expected:
        assert torch.equal(expected[key], reordered[key]), key
        assert torch.equal(expected[key], inside[key]), key
    assert len(guarded.allocations) == (1 if by_sample else 2) and guarded.trespassed() == 0
    assert traffic.atomics == 0


# Compiled


@KINDS
@LEARNING
@pytest.mark.parametrize("name", BOTH)
def test_compiled_as_one_graph(name, learns, embeds, by_sample):
    problem = draw("fp16-fp32", embeds=embeds, by_sample=by_sample, batch=3, tokens=2)
    op, leaves = op_on(problem, learns=learns)

    def doubled(*leaves):
        return op(*leaves) * 2

    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    torch._dynamo.reset()
    with backend(name):
        outs = doubled(*leaves), torch.compile(doubled, fullgraph=True, backend="aot_eager")(*leaves)
        gradients = [torch.autograd.grad(out, wanted, problem.dout) for out in outs]
    assert torch.equal(*outs)
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_compiled_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(prompt_embedding, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, tokens, count in ((5, 7, 3), (4, 9, 3), (2, 13, 6), (3, 21, 8)):
        problem = draw(batch=batch, tokens=tokens, count=count)
        assert torch.equal(compiled(problem.ids, problem.rows, problem.prompt), results(problem, reference=True)["out"])


@KINDS
@SOURCES
def test_the_operators_keep_torchs_rules(embeds, by_sample):
    problem = draw("fp16-fp32", embeds=embeds, by_sample=by_sample)
    _, (prompt, rows) = op_on(problem)
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.fastpeft.prompt_embedding.default,
        (prompt, rows, problem.ids, problem.start, -1, ""),
        test_utils=kinds,
    )
    if not by_sample:
        args = (problem.dout, prompt.detach(), problem.start, torch.tensor([False]))
        torch.library.opcheck(torch.ops.fastpeft.prompt_embedding_backward.default, args, test_utils=kinds[:2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    problem = draw(embeds=True)
    op, leaves = op_on(problem)
    expected = torch.autograd.grad(op(*leaves), leaves, problem.dout)
    torch.utils.checkpoint.checkpoint(op, *leaves, use_reentrant=reentrant).backward(problem.dout)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))
