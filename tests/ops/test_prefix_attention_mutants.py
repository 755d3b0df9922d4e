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
from tests.ops.prefix_attention_mutants import KERNELS
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
    """(op, strategy, problem, gate, mask, truth): together they use every feature of every kernel."""
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


def _truth(strategy, case, gate):
    if strategy == "decode":  # its gradients are the other kernels'
        return [
            prefix_attention_reference(Tensors(*(t if t is None else t.double() for t in case.tensors)), case.scores)
        ]
    keep, p = triton_keep(case, 0)
    leaves = [t.double().requires_grad_() for t in (gate, *case.tensors) if t is not None]
    rest = iter(leaves[1:])
    tensors = Tensors(*(None if t is None else next(rest) for t in case.tensors))
    if strategy == "gated":
        out = gated_prompt_attention_reference(tensors, leaves[0], case.scores)
    else:
        out = prefix_attention_reference(tensors, case.scores, keep, p)
    wanted = {"gated": leaves, "biases alone": leaves[-2:]}.get(strategy, leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, wanted, case.dout_BHSD.double())]


def _results(strategy, case, gate):
    """out and the gradients; these are computed when out has been looked at."""
    if strategy == "decode":
        yield path.forward(case.tensors, Call(case.scores, 0.0, ATTENTION_DECODE), None)[0]
        return
    call = Call(case.scores, case.dropout, PLANS["merge" if strategy == "merge" else "fused"])
    few = strategy == "biases alone"
    needs = Tensors(*(t is not None and (not few or "bias" in name) for name, t in case.tensors._asdict().items()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seed = path.draw_seed(gate) if case.dropout else None
    if strategy == "gated":
        out, own, lse = gated.forward(case.tensors, gate, call, seed)
        yield out
        gradients = gated.backward(case.dout_BHSD, case.tensors, gate, own, lse, call, seed, needs, True)
    else:
        out, lse = path.forward(case.tensors, call, seed)
        yield out
        gradients = path.backward(case.dout_BHSD, case.tensors, out, lse, call, seed, needs)
    yield from (each for each in gradients if each is not None)


# Where to look first: a word of the mistake, and the number of a problem that has to do with it.
LIKELY = {
    "cap after the bias": 1, "sign of δ": 6, "head of the prefix's bias": 2,
    "causal row": 5, "gate": 7, "statistics": 7, "vendor": 6, "prefix's bias": 8, "bias": 2, "sink": 1, "cap": 1,
    "alibi": 1, "slope": 1,
    "mask": 1, "kept": 1, "drop": 1, "padding": 2, "segment": 3, "first sample": 1, "window": 4, "begin": 4, "end": 5,
}  # fmt: skip


def likely(mutant) -> int:
    for kernel, first in (("decode", 9), ("grad_bias", 12)):
        if mutant in KERNELS[kernel]:
            return first
    said = " ".join(mutant).lower()
    return next((number for word, number in LIKELY.items() if word in said), 0)


def first_fault(first: int = 0) -> str | None:
    """What is wrong with the kernels as they are, at the first problem that shows it, beginning with one of them."""
    for strategy, case, gate, truth in problems()[first:] + problems()[:first]:
        for number, (got, true) in enumerate(zip(_results(strategy, case, gate), truth, strict=True)):
            if not (got - true).abs().max() <= TOLERANCE * true.abs().max():
                return f"{strategy}, result {number} of out and the gradients of {NAMES}"
    return None


def test_the_kernels_as_they_are_pass(monkeypatch):
    monkeypatch.setattr(path.decode, "processor_count", lambda tensor: 64)
    assert first_fault() is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1]}")
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    problems()  # whose masks are made by the kernels as they should be
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
    assert first_fault(likely(mutant)) is not None
    count("planted faults caught")


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_a_dozen_mistakes_for_every_kernel(kernel):
    changes = {mutant[0:1] + mutant[2:] for mutant in KERNELS[kernel]}
    assert len(changes) == len(KERNELS[kernel]) >= 12
