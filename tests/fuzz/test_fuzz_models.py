"""Random lives of patched models: whatever was done, the account holds, and unpatching gives the base back."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from fastpeft.tuners import layer
from fastpeft.tuners.lora import LoraLayer
from tests.fuzz.models_life import TARGETS, Life
from tests.fuzz.profiles import tried


@pytest.mark.hypothesis  # so that `make fuzz` takes it
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", TARGETS)
def test_lives(family):
    kind = type(f"Life{family}", (Life,), {"family": family})
    run_state_machine_as_test(kind, settings=settings(tried(3, 60), stateful_step_count=25))


FAULTS = {
    "unmerging does nothing": (LoraLayer, "unmerge", lambda self: None),
    "blocks are not looked at": (layer, "active_names", lambda state: state.active),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_life_shows_a_planted_fault(fault, monkeypatch):
    for planted in (False, True):
        life = Life()
        life.begin(kind="lora", name="a")
        life.train()
        life.merge()
        if planted:
            monkeypatch.setattr(*FAULTS[fault])
        try:
            life.unmerge()
            life.disable()
        except AssertionError:
            assert planted
        else:
            assert not planted
        life.teardown()
