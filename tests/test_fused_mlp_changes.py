"""`fuse(model, "mlp")` on MLPs whose forward, or whose activation's, goes by more than its input: by the mode, by an
attribute, by a method. After a change they compute what they compute without."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastpeft
from fastpeft.tuners import mlp
from fastpeft.tuners.gated_mlp import activation_of, gated_mlp_of
from tests.fused import adapted, assert_alike
from tests.models import differences, snapshot
from tests.peft_pair import randomise
from tests.test_fused_mlp import ops as ops


class Plain(nn.Module):
    """The usual form, of whose subclasses each goes by something."""

    factor: float | None = None

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act, self.alpha = nn.GELU(), None

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Dropping(Plain):
    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x)
        return self.down(F.dropout(h, 0.5) if self.training else h)


class Halving(Plain):
    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x))
        return y if self.training else 0.5 * y


class Scaling(Plain):
    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x))
        return y if self.alpha is None else y * self.alpha


class ScalingByClass(Plain):
    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x))
        return y if self.factor is None else y * self.factor


class ScalingIfThere(Plain):
    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x))
        return y * self.more if hasattr(self, "more") else y


class ByMethod(Plain):
    def hidden(self, x):
        return self.act(self.gate(x)) * self.up(x)

    def forward(self, x):
        return self.down(self.hidden(x))


class Warm(nn.Module):
    """SiLU, by a slope that is anybody's."""

    slope = 1.0

    def __init__(self):
        super().__init__()
        self._cut = None

    def forward(self, x):
        y = F.silu(x * self.slope)
        return y if self._cut is None else y.clamp(max=self._cut)


class WarmInEval(nn.Module):
    def forward(self, x):
        return F.dropout(F.silu(x), 0.5, self.training)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(a fused model around an adapted copy of the module, the same without)."""
    config = fastpeft.LoraConfig(r=2, target_modules=["gate", "up", "down"])
    alone = fastpeft.patch(nn.Sequential(module), config)
    torch.manual_seed(11)
    randomise(alone)
    alone.train(module.training)
    return fastpeft.fuse(copy.deepcopy(alone), "mlp"), alone


def assert_same(model: nn.Module, alone: nn.Module) -> None:
    """Results and gradients, of two calls in a row."""
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    for seed in range(2):
        found = []
        for each in (model, alone):
            each.zero_grad()
            torch.manual_seed(seed)
            y = each(x)
            y.square().sum().backward()
            gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
            found.append({"y": y.detach(), "drawn": torch.get_rng_state()[:16].float(), **gradients})
        assert_alike(*found)


@pytest.mark.parametrize(("kind", "fused_in"), [(Dropping, False), (Halving, True)])
def test_a_forward_that_goes_by_the_mode(kind, fused_in, ops):
    module = kind().train(fused_in)
    model, alone = pair(module)
    for training in (fused_in, not fused_in, fused_in):
        ops.clear()
        for each in (model, alone):
            each.train(training)
        assert_same(model, alone)
        assert ops == ["gelu"] * 2 * (training == fused_in)


@pytest.mark.parametrize("kind", [Dropping, Halving])
def test_what_is_none_of_them_in_this_mode_is_left_alone(kind):
    model = fastpeft.patch(nn.Sequential(kind()), fastpeft.LoraConfig(r=2, target_modules=["gate", "up", "down"]))
    model.train(kind is Dropping)
    before = snapshot(model)
    assert differences(before, snapshot(fastpeft.fuse(model, "mlp"))) == []


def its_own_method(module):
    module.hidden = lambda x: module.act(module.gate(x)) * 2 * module.up(x)


CHANGES = {
    "an attribute": (Scaling, lambda module: setattr(module, "alpha", 2.0), lambda m: setattr(m, "alpha", None)),
    "a class's attribute": (ScalingByClass, lambda m: setattr(m, "factor", 2.0), lambda m: delattr(m, "factor")),
    "one that was not there": (ScalingIfThere, lambda m: setattr(m, "more", 2.0), lambda m: delattr(m, "more")),
    "a method": (ByMethod, its_own_method, lambda m: delattr(m, "hidden")),
}


@pytest.mark.parametrize(("kind", "change", "undo"), CHANGES.values(), ids=CHANGES)
def test_a_forward_that_goes_by(kind, change, undo, ops):
    model, alone = pair(kind())
    for step in (None, change, undo):
        ops.clear()
        for each in (model, alone):
            if step is not None:
                step(each[0])
        assert_same(model, alone)
        assert ops == ["gelu"] * 2 * (step is not change)


ACTIVATIONS = {
    "approximate": (nn.GELU, "approximate", "tanh", ["gelu", "gelu_tanh"]),
    "of its class": (Warm, "slope", 2.0, ["silu", None]),
    "of its own": (Warm, "_cut", 1.0, ["silu", None]),
    "the mode": (WarmInEval, "training", True, ["silu", None]),
}


@pytest.mark.parametrize(("act", "name", "value", "expected"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_an_activation_that_goes_by(act, name, value, expected, ops):
    module = Plain()
    module.act = act()
    model, alone = pair(module.eval())
    assert_same(model, alone)
    for each in (model, alone):
        setattr(each[0].act, name, value)
    assert_same(model, alone)
    assert ops == [each for each in expected for _ in range(2) if each]


def test_an_activation_whose_class_s_forward_is_replaced(ops, monkeypatch):
    module = Plain()
    module.act = Warm()
    model, alone = pair(module)
    assert_same(model, alone)
    monkeypatch.setattr(Warm, "forward", lambda self, x: F.relu(x))
    assert_same(model, alone)
    assert ops == ["silu"] * 2


def test_reading_draws_no_random_numbers():
    state = torch.get_rng_state()
    assert (
        activation_of(WarmInEval()) is None and activation_of(nn.Sequential(nn.SiLU(), nn.Dropout(0.5)).eval()) is None
    )
    assert torch.equal(torch.get_rng_state(), state)


class ByWhat(Plain):
    def forward(self, x):
        self.what  # noqa: B018
        return self.down(self.act(self.gate(x)) * self.up(x))


LASTING = {"a class": nn.Linear, "gelu": F.gelu, "relu": torch.relu, "a dtype": torch.float32, "a word": "a", "": 1e-5}
CHANGING = {
    "a list": [],
    "a dictionary": {},
    "a tensor": torch.zeros(()),
    "a list's": [1].copy,
    "a module's": nn.SiLU().type,
}


@pytest.mark.parametrize("what", LASTING.values(), ids=LASTING)
def test_what_is_itself_as_long_as_it_is_there(what):
    module, read = ByWhat(), {}
    module.what = what
    assert gated_mlp_of(module, read=read) is not None and read == {"what": what}


@pytest.mark.parametrize("what", CHANGING.values(), ids=CHANGING)
def test_what_may_change_within_is_gone_by_layer_by_layer(what):
    module = ByWhat()
    module.what = what
    assert gated_mlp_of(module) is None


def test_stock_models_go_by_nothing_else(ops):
    """But for whether nn.SiLU works in place."""
    model = fastpeft.fuse(adapted(), "mlp")
    found = [module.__dict__[mlp.KEY] for module in model.modules() if mlp.KEY in module.__dict__]
    assert len(found) == 2 and all(each.read[0] == {} for each in found)
    assert {name for each in found for name in each.read[1]} <= {"inplace"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_go_by_their_own(copied, ops):
    model, alone = pair(ByMethod())
    model, alone = copied(model), copied(alone)
    assert_same(model, alone)
    found = model[0].__dict__[mlp.KEY]
    assert ops == ["gelu"] * 2 and found.read[0]["hidden"].__self__ is model[0]
    before = found.of
    assert found.look(model[0]) and found.of is before, "nothing was read again"


def test_compiled_after_a_change(ops):
    model, alone = pair(Scaling())
    x = torch.randn(3, 8)
    for alpha, expected in ((None, 1), (2.0, 0)):
        for each in (model, alone):
            each[0].alpha = alpha
        ops.clear()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), alone(x))
        assert len(ops) == expected
        model[0].alpha = alone[0].alpha = 3.0  # which is seen by the compiled model, too
        torch.testing.assert_close(compiled(x), alone(x))
