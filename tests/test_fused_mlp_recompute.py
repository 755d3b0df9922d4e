"""`fuse(model, "mlp", recompute=True)`: the same step, for which gate(x) and up(x) are not kept."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import PatchError
from fastpeft.dispatch import backend
from fastpeft.tuners import mlp
from tests.compiled import adapted as of_one_layer
from tests.compiled import stepped
from tests.fused import adapted, assert_alike, outcome
from tests.memory import saved_for_backward
from tests.models import batch, differences, snapshot
from tests.traffic import count_traffic

WAYS = pytest.mark.parametrize("way", ["native", "peft"])
BACKENDS = pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])


def pair(way: str = "native", **settings) -> tuple[nn.Module, nn.Module]:
    """(a model whose MLPs compute again, the same model whose MLPs keep), training."""
    keeping = adapted(way, **settings).train()
    return fastpeft.fuse(copy.deepcopy(keeping), "mlp", recompute=True), fastpeft.fuse(keeping, "mlp")


def recomputing(model: nn.Module) -> list[bool]:
    """Of each fused MLP."""
    return [each.__dict__[mlp.KEY].recompute for each in model.modules() if mlp.KEY in each.__dict__]


@BACKENDS
@WAYS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_is_the_same_bit_for_bit(dropout, way, name):
    model, keeping = pair(way, lora_dropout=dropout)
    assert (recomputing(model), recomputing(keeping)) == ([True, True], [False, False])
    with backend(name):
        found, expected = outcome(model), outcome(keeping)
    assert found.keys() == expected.keys() and len(found) > 20
    for key, each in expected.items():
        assert torch.equal(found[key], each), key


@BACKENDS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_x_the_rank_r_tensors_and_seeds_alone_are_kept(dropout, name):
    kept = []
    for model in pair(lora_dropout=dropout):
        part = model.model.layers[0].mlp
        x = torch.randn(4, 16, part.config.hidden_size, requires_grad=True)
        with backend(name), saved_for_backward(besides=list(part.parameters())) as saved:
            part(x)
        kept.append(sum(saved.values()))
    rows, inner = 4 * 16, part.config.intermediate_size
    assert kept[0] == 4 * rows * (part.config.hidden_size + 3 * 4) + 3 * 8 * (dropout > 0)
    assert kept[1] == kept[0] + 4 * rows * 2 * inner


@pytest.mark.interpreter
def test_the_kernels_compute_gate_and_up_once_more():
    """Each is a base product with its rank-r term, in the interpreter one launch."""
    found = []
    for model in pair():
        with backend("triton"):
            loss = model(**batch()).loss
            with count_traffic() as traffic:
                loss.backward()
        found.append(traffic.kernels().count("_tail_kernel"))
    assert found[0] == found[1] + 2 * 2


def test_compiled_as_one_graph():
    keeping = of_one_layer("lora", target_modules="all-linear")
    model = fastpeft.fuse(copy.deepcopy(keeping), "mlp", recompute=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with saved_for_backward() as less:
        found = stepped(model, compiled, batch())
    assert_alike(*({"loss": loss.detach(), **each} for loss, each in (found, stepped(keeping, keeping, batch()))))
    fastpeft.fuse(keeping, "mlp")
    torch._dynamo.reset()
    with saved_for_backward() as more:
        stepped(keeping, torch.compile(keeping, backend="aot_eager", fullgraph=True), batch())
    inner = 2 * 4 * batch()["input_ids"].numel() * keeping.config.intermediate_size
    assert sum(more.values()) - sum(less.values()) == inner
    torch._dynamo.reset()


@WAYS
def test_copies_and_pickles_compute_again_too(way):
    model, _ = pair(way)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert recomputing(each) == [True, True]
        fastpeft.fuse(each, "mlp")
        assert (recomputing(each), recomputing(model)) == ([False, False], [True, True])


@WAYS
def test_the_last_call_says_it_until_unfuse(way):
    model = adapted(way)
    before = snapshot(model)
    fastpeft.fuse(model, recompute=True)
    fastpeft.fuse(model, "projections")
    assert recomputing(model) == [True, True]
    fastpeft.fuse(model)
    assert recomputing(model) == [False, False]
    fastpeft.fuse(model, "projections", "mlp", recompute=True)
    assert recomputing(model) == [True, True]
    fastpeft.unfuse(model)
    assert recomputing(model) == [] and differences(before, snapshot(model)) == []
    assert recomputing(fastpeft.fuse(model, "mlp")) == [False, False]


def test_it_is_refused_where_nothing_is_computed_again():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(PatchError, match="of 'projections' nothing is computed again in backward; name 'mlp' too"):
        fastpeft.fuse(model, "projections", recompute=True)
    with pytest.raises(PatchError, match="fuse: recompute=1 must be True or False"):
        fastpeft.fuse(model, "mlp", recompute=1)
    assert differences(before, snapshot(model)) == []


@WAYS
def test_the_report_says_it(way):
    model = adapted(way, target_modules=["q_proj", "gate_proj", "down_proj"])

    def said() -> dict[str, str]:
        return {row.path.split(".")[-1]: row.reason for row in fastpeft.report(model).layers if "lora" in row.op}

    plain = said()
    one = "; gate_proj, up_proj, down_proj as one op, predicted to pay on GPUs"
    for recompute, more in ((True, ", with gate(x) and up(x) computed once more in backward"), (False, "")):
        fastpeft.fuse(model, "mlp", recompute=recompute)
        changed = {name: plain[name] + one + more for name in ("gate_proj", "down_proj")}
        assert said() == plain | changed
        with model.disable_adapter():  # layer by layer
            assert said() == plain
    fastpeft.unfuse(model)
    assert said() == plain
