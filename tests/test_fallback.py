"""A kernel that cannot run: the torch path computes its call, with the kernels' own dropout, one warning, and no wrong
gradient whichever pass it is that fails."""

import importlib
import threading
import warnings

import pytest
import torch

import fastpeft
from fastpeft import BackendError, dispatch, fallback, ops
from fastpeft.dispatch import Choice
from fastpeft.ops import _programs
from fastpeft.ops.lora_mlp import Projection
from fastpeft.ops.mixed_lora_linear import apply_mixed_lora
from tests.counting import count
from tests.peft_pair import close

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def nothing_has_failed():
    yield
    forget()


def forget():
    fallback._failed.clear()
    fallback._drawn.clear()


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """As on a GPU: Triton serves what nobody has demanded."""

    def choose(x, dtype, width=0, patched=None, of="rank"):
        return Choice("torch" if dispatch.requested_backend(patched) == "torch" else "triton", "a test")

    for name in (
        "dispatch",
        "ops.lora_linear",
        "ops.mixed_lora_linear",
        "ops.lora_projections",
        "ops.lora_mlp",
        "ops.prompt_embedding",
    ):
        monkeypatch.setattr(importlib.import_module(f"fastpeft.{name}"), "choose_backend", choose)


def tensors(*shapes):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw).mul_(0.3).requires_grad_() for shape in shapes]


def lora(dropout):
    x, a, b = leaves = tensors((2, 9, 24), (3, 24), (20, 3))
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(2))
    return leaves, lambda: ops.lora_linear(x, weight, None, a, b, 2.0, dropout=dropout, training=True)


def mixed(dropout):
    x, a, b, c, d = leaves = tensors((3, 5, 24), (3, 24), (20, 3), (4, 24), (20, 4))
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(2))
    adapters = [(a, b, 2.0, dropout), (c, d, 0.5, dropout)]
    return leaves, lambda: apply_mixed_lora(x, weight, None, None, adapters, [1, -1, 0])


def projections(dropout):
    x, a, b, c, d = leaves = tensors((3, 5, 24), (3, 24), (20, 3), (4, 24), (7, 4))
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(n, 24, generator=draw) for n in (20, 7)]
    options = {"dropouts": [dropout, 0.5 * dropout], "training": True}
    return leaves, lambda: torch.cat(ops.lora_projections(x, weights, None, [a, c], [b, d], [2.0, 0.5], **options), -1)


def mlp(dropout):
    x, *matrices = leaves = tensors((3, 5, 24), (3, 24), (20, 3), (4, 24), (20, 4), (5, 20), (24, 5))
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=draw) for shape in ((20, 24), (20, 24), (24, 20))]
    given = [Projection(weights[i], None, *matrices[2 * i : 2 * i + 2], 2.0, dropout) for i in range(3)]
    return leaves, lambda: ops.lora_mlp(x, *given, training=True)


def attention(dropout):
    q, k, v, pk, pv = leaves = tensors((2, 4, 7, 16), (2, 2, 7, 16), (2, 2, 7, 16), (2, 3, 16), (2, 3, 16))
    return leaves, lambda: ops.prefix_attention(q, k, v, pk, pv, dropout=dropout, training=True)


def gated(dropout):
    leaves = tensors((2, 4, 7, 16), (2, 2, 7, 16), (2, 2, 7, 16), (2, 3, 16), (2, 3, 16), (4,))
    return leaves, lambda: ops.gated_prompt_attention(*leaves, dropout=dropout, training=True)


def prompt(dropout):
    table, rows = leaves = tensors((40, 16), (3, 16))
    ids = torch.arange(14).view(2, 7)
    return leaves, lambda: ops.prompt_embedding(ids, table, rows)


OPS = {  # name -> a call, the kernels of its forward, those of its backward
    "lora_linear": (lora, ("_lora_linear_triton", "forward"), ("_lora_linear_triton", "grad_a_and_x")),
    "mixed_lora_linear": (
        mixed,
        ("_mixed_lora_linear_triton", "forward"),
        ("_mixed_lora_linear_triton", "grad_a_and_x"),
    ),
    "lora_projections": (
        projections,
        ("_lora_projections_triton", "forward"),
        ("_lora_projections_triton", "grads"),
    ),
    "lora_mlp": (mlp, ("_lora_mlp_triton", "forward"), ("_lora_mlp_triton", "backward")),
    "prefix_attention": (attention, ("_prefix_attention_triton", "forward"), ("_prefix_attention_triton", "backward")),
    "gated_prompt_attention": (
        gated,
        ("_gated_prompt_attention_triton", "forward"),
        ("_gated_prompt_attention_triton", "backward"),
    ),
    "prompt_embedding": (prompt, ("_prompt_embedding_triton", "forward"), ("_prompt_embedding_triton", "grad_prompt")),
}
DROPPING = [name for name in OPS if name != "prompt_embedding"]


def _masks(name: str) -> tuple[str, str]:
    """Where the kernels' masks come from."""
    if "attention" in name:
        return "_prefix_attention_triton", "keep_mask"
    return OPS[name][1][0], "keep_masks" if name == "lora_projections" else "keep_mask"


def break_(monkeypatch, place, how=None):
    """Let what a test names raise what Triton raises."""
    from triton.runtime.errors import OutOfResources

    def fail(*args, **kwargs):
        raise how if how is not None else OutOfResources(300_000, 232_448, "shared memory")

    _programs.forget()  # which have what was there before
    module, name = place
    monkeypatch.setattr(importlib.import_module(f"fastpeft.ops.{module}"), name, fail)


def outcome(name: str, dropout: float = 0.0) -> list[torch.Tensor]:
    return computed(*OPS[name][0](dropout))


def computed(leaves: list[torch.Tensor], call) -> list[torch.Tensor]:
    """The result and the gradients of a call."""
    torch.manual_seed(3)
    out = call()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("name", OPS)
def test_what_fails_is_computed_by_torch_with_one_warning(name, phase, dropout, monkeypatch):
    expected = outcome(name, dropout)
    break_(monkeypatch, OPS[name][1 if phase == "forward" else 2])
    said = rf"kernels failed \({name}, {phase}, on cpu: .*OutOfResources.*shared memory, Required: 300000"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        assert_close(outcome(name, dropout), expected)
    assert sum(warning.category is RuntimeWarning for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(outcome(name, dropout), expected)
    (call,) = fastpeft.kernel_failures()
    assert call.startswith(f"{name}, {phase}, on cpu: ")
    count("failing kernels answered")


@pytest.mark.parametrize("name", OPS)
def test_compiled_calls_fall_back_too(name, monkeypatch):
    """In the call that is compiled and in later ones, which stay as they were compiled."""
    leaves, call = OPS[name][0](0.0 if name == "prompt_embedding" else 0.3)
    torch._dynamo.reset()
    compiled, found = torch.compile(call, backend="aot_eager", fullgraph=True), []
    phases = [*zip(("forward", "backward"), OPS[name][1:], strict=True)]
    for phase, place in phases if len(name) % 2 else phases[::-1]:  # of some ops this is broken first, of others that
        with monkeypatch.context() as broken, pytest.warns(RuntimeWarning, match=rf"{name}, {phase}, on cpu"):
            break_(broken, place)
            found.append(computed(leaves, compiled))
        forget()
    expected = computed(leaves, compiled)
    assert fastpeft.kernel_failures() == {}
    for each in found:
        assert_close(each, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", DROPPING)
def test_without_any_kernel_the_mask_is_torch_s(name, monkeypatch):
    def one_seed(x, adapters):
        return torch.empty(1, dtype=torch.int64).random_() + torch.arange(adapters)

    monkeypatch.setattr("fastpeft.ops._mixed_lora_linear_torch.draw_seeds", one_seed)
    with fastpeft.backend("torch"):
        expected = outcome(name, 0.3)
    break_(monkeypatch, OPS[name][1])
    break_(monkeypatch, _masks(name))
    with pytest.warns(RuntimeWarning, match="dropout"):
        assert_close(outcome(name, 0.3), expected)


@pytest.mark.parametrize("name", DROPPING)
def test_a_backward_whose_forward_s_mask_is_lost_is_an_error(name, monkeypatch):
    """Gradients under another mask would be wrong ones."""
    break_(monkeypatch, OPS[name][2])
    break_(monkeypatch, _masks(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BackendError, match="cannot be done without.*dropout, on cpu"):
            outcome(name, 0.3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_is_repeated_with_its_mask(reentrant, monkeypatch):
    """Layers that ran on the kernels, and are computed again after another's backward has failed."""
    from torch.utils.checkpoint import checkpoint

    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(2)) * 0.2

    def gradients():
        x, a, b = tensors((2, 9, 24), (3, 24), (24, 3))
        torch.manual_seed(5)
        y = x
        for _ in range(3):
            y = checkpoint(
                lambda y: ops.lora_linear(y, weight, None, a, b, 2.0, dropout=0.3, training=True), y,
                use_reentrant=reentrant,
            )  # fmt: skip
        return torch.autograd.grad(y.square().sum(), (a, b)) if not reentrant else _by_backward(y, (a, b))

    expected = gradients()
    break_(monkeypatch, OPS["lora_linear"][2])
    with pytest.warns(RuntimeWarning, match="lora_linear, backward"):
        assert_close(gradients(), expected)


def _by_backward(y, leaves):
    y.square().sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("how", ["environment", "context", "patch", "default"])
def test_where_triton_is_demanded_it_is_an_error(how, monkeypatch, environment_backend):
    break_(monkeypatch, OPS["lora_linear"][1])
    said = r"cannot be done without \(lora_linear, forward, on cpu: .*OutOfResources"
    if how == "environment":
        environment_backend("triton")
        with pytest.raises(BackendError, match=said):
            outcome("lora_linear")
    elif how == "context":
        with fastpeft.backend("triton"), pytest.raises(BackendError, match=said):
            outcome("lora_linear")
    elif how == "default":
        monkeypatch.setattr(dispatch, "_default", "triton")
        with pytest.raises(BackendError, match=said):
            outcome("lora_linear")
    else:
        model = fastpeft.patch(
            torch.nn.Sequential(torch.nn.Linear(8, 8)), fastpeft.LoraConfig(r=2, target_modules=["0"]), backend="triton"
        )
        with pytest.raises(BackendError, match=said):
            model(torch.randn(3, 8))
    assert fastpeft.kernel_failures() == {}


def test_what_is_measured_or_checked_does_not_fall_back(monkeypatch):
    break_(monkeypatch, OPS["lora_linear"][1])
    with fallback.no_fallback(), pytest.raises(BackendError, match="lora_linear, forward"):
        outcome("lora_linear")
    with pytest.warns(RuntimeWarning, match="lora_linear, forward"):
        outcome("lora_linear")
    with fallback.no_fallback(), pytest.raises(BackendError, match="lora_linear, forward"):
        outcome("lora_linear")


def test_a_demanded_backward_is_an_error_in_the_engine_s_thread(monkeypatch):
    leaves, call = lora(0.0)
    with fastpeft.backend("triton"):
        out = call()
    break_(monkeypatch, OPS["lora_linear"][2])
    with pytest.raises(BackendError, match="lora_linear, backward"):
        out.sum().backward()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        TypeError("a mistake of ours"),
        KeyboardInterrupt(),
    ],
    ids=["memory", "late", "mistake", "interrupt"],
)
def test_other_errors_are_not_answered(error, monkeypatch):
    break_(monkeypatch, OPS["lora_linear"][1], error)
    with pytest.raises(type(error)):
        outcome("lora_linear")
    assert fastpeft.kernel_failures() == {}


def test_other_calls_stay_on_the_kernels(monkeypatch):
    """What fell back is one kind of call, by its sizes and dtypes; rows are none of these."""
    real = importlib.import_module("fastpeft.ops._lora_linear_triton").forward
    calls = []

    def forward(x, weight, bias, residual, a, *rest):
        calls.append(len(a))
        return resources() if len(a) == 3 else real(x, weight, bias, residual, a, *rest)

    def resources():
        from triton.runtime.errors import OutOfResources

        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(importlib.import_module("fastpeft.ops._lora_linear_triton"), "forward", forward)
    weight = torch.randn(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in (4, 5, 6):
            for rank in (3, 4):
                ops.lora_linear(torch.randn(rows, 8), weight, None, torch.randn(rank, 8), torch.randn(8, rank), 1.0)
    assert calls == [3, 4, 4, 4]


def test_a_kernel_that_does_not_compile(monkeypatch):
    """Triton's own error, from its own frames."""
    from fastpeft.kernels import lora_linear as kernels

    class Wrong:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: kernels._tail_kernel_before[grid]()  # arguments are missing

    monkeypatch.setattr(kernels, "_tail_kernel_before", kernels._tail_kernel, raising=False)
    expected = outcome("lora_linear")
    monkeypatch.setattr(kernels, "_tail_kernel", Wrong())
    with pytest.warns(RuntimeWarning, match="lora_linear, forward"):
        assert_close(outcome("lora_linear"), expected)


def test_the_report_names_what_has_failed(monkeypatch):
    model = fastpeft.patch(torch.nn.Sequential(torch.nn.Linear(8, 8)), fastpeft.LoraConfig(r=2, target_modules=["0"]))
    assert fastpeft.report(model).failures == {} and "failed" not in str(fastpeft.report(model))
    break_(monkeypatch, OPS["lora_linear"][1])
    with pytest.warns(RuntimeWarning, match="lora_linear"):
        model(torch.randn(3, 8))
    assert fastpeft.report(model).failures == fastpeft.kernel_failures()
    assert "kernels failed, torch computes: lora_linear, forward, on cpu" in str(fastpeft.report(model))


def test_threads_warn_once(monkeypatch):
    break_(monkeypatch, OPS["lora_linear"][1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=outcome, args=("lora_linear",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(warning.category is RuntimeWarning for warning in caught) == 1
