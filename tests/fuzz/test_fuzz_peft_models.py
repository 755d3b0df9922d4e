"""Random lives of patched PeftModels: whatever was done, they are and compute what a PeftModel is and computes."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from fastpeft.integrations.peft.layers import FusedLora
from tests.fuzz.models_life import TARGETS
from tests.fuzz.peft_life import Twins
from tests.fuzz.profiles import tried

pytest.importorskip("peft", reason="HF peft is a test requirement")


@pytest.mark.hypothesis  # so that `make fuzz` takes it
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", TARGETS)
def test_lives_beside_peft_s(family):
    kind = type(f"Twins{family}", (Twins,), {"family": family})
    run_state_machine_as_test(kind, settings=settings(tried(2, 75), stateful_step_count=20))


@pytest.fixture
def life():
    life = Twins()
    life.family = "bert"
    life.begin(kind="elsewhere", name="a")
    yield life
    life.teardown()


def test_layers_of_an_adapter_that_peft_refuses_late_are_ours(life):
    """It cannot add one behind the last if there is a head to be trained, and leaves the layers."""
    life.delete(name="a")
    life.add(alike=0, kind="lora", name="a")
    assert not life.theirs.peft_config and any(isinstance(each, FusedLora) for each in life.ours.modules())
    life.the_same_but_for_classes()


def test_layers_that_name_adapters_that_are_no_more_put_none_in_force(life):
    life.delete(name="a")
    life.unpatch()
    life.set(names=["a", "b"])
    assert life.theirs.active_adapters == ["a", "b"]
    life.patch()
    assert not life.patched
    life.the_same_but_for_classes()


def test_a_life_shows_a_factor_that_is_off(life, monkeypatch):
    life.call(length=9, half=None)
    right = FusedLora.factors
    monkeypatch.setattr(FusedLora, "factors", lambda self, name: (right(self, name)[0], 1.01 * right(self, name)[1]))
    with pytest.raises(AssertionError, match="of the greatest value away"):
        life.call(length=9, half=None)


def test_of_half_precision_chance_is_passed_over_and_a_factor_that_is_off_is_shown(monkeypatch):
    life = type("TwinsT5", (Twins,), {"family": "t5"})()
    life.begin(kind="rank-stabilised", name="a")
    for half, length in (("fp16", 4), (None, 4), (None, 9), ("bf16", 4)):  # in the last ours are farther than peft's
        life.train(half=half, length=length, training=False)
    right = FusedLora.factors
    monkeypatch.setattr(FusedLora, "factors", lambda self, name: (right(self, name)[0], 1.2 * right(self, name)[1]))
    with pytest.raises(AssertionError, match="of the greatest value away"):
        life.train(half="bf16", length=4, training=False)
    life.teardown()


def test_a_life_shows_layers_that_are_peft_s_own(life):
    life.the_same_but_for_classes()
    life.unpatch()
    life.the_same_but_for_classes()
    life.patched = True
    with pytest.raises(AssertionError, match="dense"):
        life.the_same_but_for_classes()
