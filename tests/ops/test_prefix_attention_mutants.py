"""The test of the tests: mistakes planted in the kernels of `prefix_attention`, each of which a problem shows."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fastpeft.dispatch import ATTENTION_DECODE
from fastpeft.kernels import (
    _attention_decode,
    _attention_kernels,
    _attention_loops,
    _attention_scores,
    _prefix_attention_decode,
    prefix_attention,
)
from fastpeft.ops import _gated_prompt_attention_triton as gated
from fastpeft.ops import _prefix_attention_triton as path
from fastpeft.ops._prefix_attention_scores import Tensors
from fastpeft.ops.gated_prompt_attention import gated_prompt_attention_reference
from fastpeft.ops.prefix_attention import Call, prefix_attention_reference
from tests.counting import count
from tests.ops.prefix_attention_cases import NAMES, PLANS, problem, triton_keep
from tests.ops.prefix_attention_mutants import KERNELS, SOONEST
from tests.planting import mutated

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

GENERAL = (_attention_scores, _attention_loops, _attention_kernels, prefix_attention)
FILES = [Path(module.__file__) for module in (*GENERAL, _attention_decode, _prefix_attention_decode)]
MUTANTS = [mutant for mutants in KERNELS.values() for mutant in mutants]

# In fp32 the criterion allows errors of 1e-6 of a tensor's greatest; every mistake makes hundreds of times this.
TOLERANCE = 1e-4
SHAPE = {"queries": 18, "keys": 20, "prefix": 17, "depth": 17}


@functools.cache
def problems():
    """(strategy, problem, gate, truth): together they use every feature of every kernel."""
    made, one = [], {"batch": 1, "heads": 2, "kv_heads": 1}
    for strategy, modifiers, changes in (
        ("fused", (), {}),
        ("fused", ("own-prefixes", "alibi", "softcap", "sinks", "dropout"), {}),
        ("fused", ("bias", "prefix-bias", "dropout", "left-padding"), {}),
        ("fused", ("window", "segments", "bidirectional"), {}),
        ("fused", ("window",), {**one, "queries": 34, "keys": 34, "window": 11}),
        ("fused", ("window",), {**one, "queries": 33, "keys": 33, "window": 18}),  # ranges end behind a tile's first
        ("merge", ("bidirectional",), {}),
        ("gated", ("bidirectional",), {}),
        ("fused", ("prefix-bias",), {}),
        ("decode", ("alibi", "left-padding", "sinks", "cached"), {"queries": 1, "keys": 70, "prefix": 35, "start": 40}),
        ("decode", ("own-prefixes", "bidirectional", "bias", "prefix-bias"), {"queries": 1, "keys": 33, "batch": 9}),
        ("decode", ("window", "segments"), {"queries": 1, "keys": 60, "batch": 9, "window": 30}),
        ("biases alone", ("bias", "prefix-bias", "dropout", "left-padding"), {}),
    ):
        case = problem(*modifiers, **{**SHAPE, **changes})
        if "bias" in modifiers and strategy != "decode":  # of each kind of broadcasting
            bias, pbias = torch.randn(2, 1, 18, 20), torch.randn(1, 4, 18, 17)
            case = case._replace(tensors=case.tensors._replace(bias_BHST=bias, pbias_BHSP=pbias))
        elif "prefix-bias" in modifiers and strategy == "fused":
            case = case._replace(tensors=case.tensors._replace(pbias_BHSP=torch.randn(2, 1, 18, 17)))
        gate = torch.tensor([0.5, -1.0, 0.0, 2.0])
        made.append((strategy, case, gate, _truth(strategy, case, gate)))
    return made


def _names(strategy, case) -> list[str]:
    """Of the gradients that are looked at."""
    present = [name for name, t in zip(NAMES, case.tensors, strict=True) if t is not None]
    return {"gated": ["gate", *present], "biases alone": present[-2:], "decode": []}.get(strategy, present)


def _truth(strategy, case, gate) -> dict[str, torch.Tensor]:
    leaves = [t.double().requires_grad_() for t in (gate, *case.tensors) if t is not None]
    rest = iter(leaves[1:])
    tensors = Tensors(*(None if t is None else next(rest) for t in case.tensors))
    if strategy == "decode":  # its gradients are the other kernels'
        return {"out": prefix_attention_reference(tensors, case.scores).detach()}
    keep, p = triton_keep(case, 0)
    if strategy == "gated":
        out = gated_prompt_attention_reference(tensors, leaves[0], case.scores, keep, p)
    else:
        out = prefix_attention_reference(tensors, case.scores, keep, p)
    wanted = {"gated": leaves, "biases alone": leaves[-2:]}.get(strategy, leaves[1:])
    gradients = torch.autograd.grad(out, wanted, case.dout_BHSD.double())
    return {"out": out.detach(), **dict(zip(_names(strategy, case), gradients, strict=True))}


def _call(strategy, case):
    """And the dropout's seed."""
    if strategy == "decode":
        return Call(case.scores, 0.0, ATTENTION_DECODE), None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seed = path.draw_seed(case.dout_BHSD) if case.dropout else None
    return Call(case.scores, case.dropout, PLANS["merge" if strategy == "merge" else "fused"]), seed


def _forward(strategy, case, gate):
    """out, and what backward is given of it."""
    if strategy == "gated":
        out, *kept = gated.forward(case.tensors, gate, *_call(strategy, case))
        return out, kept
    out, lse = path.forward(case.tensors, *_call(strategy, case))
    return out, (out, lse)


def _backward(strategy, case, gate, kept, wanted):
    """(name, gradient) of those that are wanted, by the name of the tensor."""
    needs = Tensors(*(name in wanted for name in NAMES))
    if strategy == "gated":
        given = (case.dout_BHSD, case.tensors, gate, *kept, *_call(strategy, case))
        gradients = gated.backward(*given, needs, "gate" in wanted)
    else:
        gradients = (None, *path.backward(case.dout_BHSD, case.tensors, *kept, *_call(strategy, case), needs))
    found = dict(zip(("gate", *NAMES), gradients, strict=True))
    return [(name, found[name]) for name in wanted]


@functools.cache
def kept_of(number: int):
    """What the kernels as they should be give backward; first asked for before a mistake is planted."""
    return _forward(*problems()[number][:3])[1]


# What each kernel gives besides out.
GIVES = {
    "forward": (), "grad_query": ("query",), "grad_keys": ("key", "value", "prefix_key", "prefix_value"),
    "grad_bias": ("bias", "prefix_bias"), "decode": (),
}  # fmt: skip


def fault_of(number: int, kernel: str | None = None) -> str | None:
    """What is wrong with a problem's results, or with what one kernel gives that is given what it should be."""
    strategy, case, gate, truth = problems()[number]
    wanted = [name for name in _names(strategy, case) if kernel is None or name in GIVES[kernel]]

    def results():  # gradients are computed when out has been looked at
        if kernel is None or not wanted:
            out, kept = _forward(strategy, case, gate)
            yield "out", out
        else:
            kept = kept_of(number)
        if wanted:
            yield from _backward(strategy, case, gate, kept, wanted)

    for name, got in results():
        if not (got - truth[name]).abs().max() <= TOLERANCE * truth[name].abs().max():
            return f"{strategy}, {name}"
    return None


def soonest(mutant) -> tuple[int, str]:
    """The problem and the kernel by which the mistake is probably found."""
    kernel = next(name for name, mutants in KERNELS.items() if mutant in mutants)
    first, *others = SOONEST[kernel]
    return next((n for n in others if {mutant[0], mutant[1]} & {*SOONEST[kernel][n]}), first), kernel


def first_fault() -> str | None:
    """What is wrong with the kernels as they are, at the first problem that shows it."""
    return next((fault for number in range(len(problems())) if (fault := fault_of(number))), None)


def test_the_kernels_as_they_are_pass(monkeypatch):
    monkeypatch.setattr(path.decode, "processor_count", lambda tensor: 64)
    assert first_fault() is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    problems()  # whose masks are made by the kernels as they should be
    number, kernel = soonest(mutant)
    if GIVES[kernel]:
        kept_of(number)
    function, _, old, new = mutant
    planted, modules = 0, {}
    for file in FILES:  # each imports those before it
        source = file.read_text()
        if (changed := mutated(source, function, old, new)) is not None:
            planted, source = planted + 1, changed
        for other in FILES:
            source = source.replace(f"fastpeft.kernels.{other.stem} import", f"fastpeft_mutant_{other.stem} import")
        copy = tmp_path / f"fastpeft_mutant_{file.stem}.py"
        copy.write_text(source)
        spec = importlib.util.spec_from_file_location(copy.stem, copy)
        modules[file.stem] = module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, copy.stem, module)
        spec.loader.exec_module(module)
    assert planted == 1, f"{function} is in {planted} files"
    monkeypatch.setattr(path, "kernels", modules["prefix_attention"])
    monkeypatch.setattr(gated, "kernels", modules["prefix_attention"])
    monkeypatch.setattr(path, "decode", modules["_prefix_attention_decode"])
    monkeypatch.setattr(path.decode, "processor_count", lambda tensor: 64)
    assert (fault_of(number, kernel) or first_fault()) is not None
    count("planted faults caught")


@pytest.mark.parametrize("kernel", SOONEST)
def test_nothing_is_found_where_there_is_no_mistake(kernel, monkeypatch):
    """Afterwards, where mistakes are looked for first: none of them has left anything in what all were given."""
    monkeypatch.setattr(path.decode, "processor_count", lambda tensor: 64)
    assert [(number, fault) for number in SOONEST[kernel] if (fault := fault_of(number, kernel))] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_a_dozen_mistakes_for_every_kernel(kernel):
    changes = {mutant[0:1] + mutant[2:] for mutant in KERNELS[kernel]}
    assert len(changes) == len(KERNELS[kernel]) >= 12
