"""The test of the tests: mistakes planted in the kernels of `lora_mlp`, each of which must be found by comparing what
the two kernels give with the formulas in float64, under masks that this test draws itself."""

import functools
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from triton.runtime.errors import InterpreterError

from fastpeft.kernels import lora_mlp
from fastpeft.kernels._common import Dropout
from fastpeft.ops.lora_mlp import ACTIVATIONS, activation_reference
from tests.counting import count
from tests.ops.lora_mlp_mutants import KERNELS
from tests.ops.test_lora_linear_dropout import independent_mask
from tests.planting import mutated
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

MUTANTS = [mutant for mutants in KERNELS.values() for mutant in mutants]
ROWS, HIDDEN, RANKS = 35, 101, (5, 17, 3)
PROCESSORS = 2, 8  # for which there are two runs of two blocks of columns forward, of one and two of rows backward
SEED, P, SCALES = 99, 0.3, (0.5, 2.0)


def gappy(t: torch.Tensor) -> torch.Tensor:
    storage = torch.full((2 * len(t), 3 * t.shape[1]), float("nan"), dtype=t.dtype)
    storage[::2, ::3] = t
    return storage[::2, ::3]


@functools.cache
def inputs() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Data in fp16, matrices in fp32."""
    generator = torch.Generator().manual_seed(0)
    data = {name: torch.randn(ROWS, HIDDEN, generator=generator).half() for name in ("dh", "gate", "up")}
    gate, up, down = RANKS
    shapes = {"a": (down, HIDDEN), "gate_b": (HIDDEN, gate), "up_b": (HIDDEN, up)}
    small = {name: gappy(torch.randn(*shape, generator=generator)) for name, shape in shapes.items()}
    for name, rank in (("t", down), ("gate_s", gate), ("up_s", up)):
        small[name] = torch.randn(ROWS, rank, generator=generator)
    return data, small


@functools.cache
def truth(activation: str) -> dict[str, torch.Tensor]:
    """In float64, with the roundings that the kernels promise: h, dg and du are of the data's type."""
    data, small = inputs()
    wide, m = {name: t.double() for name, t in data.items()}, {name: t.double() for name, t in small.items()}
    keep = independent_mask(SEED, P, ROWS, HIDDEN) / (1 - round(P * 65536) / 65536)
    gate = wide["gate"].requires_grad_()
    act = activation_reference(activation, gate)
    (slope,) = torch.autograd.grad(act.sum(), gate)
    h = (act.detach() * wide["up"]).half().double()
    dh = wide["dh"] + keep * (m["t"] @ m["a"])
    dg, du = (dh * wide["up"] * slope).half().double(), (dh * act.detach()).half().double()
    return {
        "h": h, "s": (h * keep) @ m["a"].t(), "dg": dg, "du": du, "da": m["t"].t() @ (h * keep),
        "gate_t": SCALES[0] * dg @ m["gate_b"], "gate_db": SCALES[0] * dg.t() @ m["gate_s"],
        "up_t": SCALES[1] * du @ m["up_b"], "up_db": SCALES[1] * du.t() @ m["up_s"],
    }  # fmt: skip


def forward(kernels: ModuleType, activation: str) -> dict[str, torch.Tensor]:
    data, small = inputs()
    with mock.patch.object(kernels, "processor_count", lambda tensor: PROCESSORS[0]):
        dropout = Dropout(torch.tensor([SEED]), P)
        h, s = kernels.gated_forward(data["gate"], data["up"], activation, small["a"], dropout)
    return {"h": h, "s": s}


def backward(kernels: ModuleType, activation: str) -> dict[str, torch.Tensor]:
    data, small = inputs()
    dropout = Dropout(torch.tensor([SEED]), P)
    sides = tuple(
        kernels.Side(small[f"{side}_s"], small[f"{side}_b"], scale)
        for side, scale in zip(("gate", "up"), SCALES, strict=True)
    )
    given = (data["dh"], data["gate"], data["up"], activation)
    with mock.patch.object(kernels, "processor_count", lambda tensor: PROCESSORS[1]):
        grads = kernels.gated_backward(*given, down=(small["t"], small["a"]), sides=sides, dropout=dropout)
    t, db = (dict(zip(("gate", "up"), each, strict=True)) for each in (grads.t, grads.db))
    return {
        "dg": grads.dgate, "du": grads.dup, "da": grads.da, "gate_t": t["gate"], "gate_db": db["gate"],
        "up_t": t["up"], "up_db": db["up"],
    }  # fmt: skip


def first_fault(kernels: ModuleType, activations=ACTIVATIONS, directions=(forward, backward)) -> str | None:
    """What is wrong, in words; a lane that would leave its tensor is stopped before it does."""
    for activation, direction in itertools.product(activations, directions):
        try:
            with count_traffic():
                got = direction(kernels, activation)
        except (InterpreterError, RuntimeError) as fault:
            return f"{fault} {fault.__cause__}"
        expected = truth(activation)
        for name, t in got.items():
            fine = 2e-3 if name in ("h", "dg", "du") else 6e-5  # of those that are rounded a few go the other way
            error = (t.double() - expected[name]).abs().max()
            if not error <= fine * expected[name].abs().max():
                return f"{name} of {activation}: {error}"
    return None


def test_the_kernels_as_they_are_pass():
    assert first_fault(lora_mlp) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    source = mutated(Path(lora_mlp.__file__).read_text(), *(mutant[i] for i in (0, 2, 3)))
    assert source is not None, f"no function {mutant[0]}"
    file = tmp_path / "fastpeft_mutant_mlp.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    activation, colon, _ = mutant[1].partition(":")
    directions = (backward, forward) if mutant in KERNELS["backward"] else (forward, backward)
    assert first_fault(module, (activation if colon else "silu",), directions) is not None
    count("planted faults caught")


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_a_dozen_mistakes_for_every_kernel(kernel):
    changes = {mutant[0:1] + mutant[2:] for mutant in KERNELS[kernel]}
    assert len(changes) == len(KERNELS[kernel]) >= 12
