"""PeftModels with our arithmetic on a GPU: as close to float64 as peft is, by the kernels, without a wait for the
device in a training step, and compiled."""

import contextlib
import copy

import pytest
import torch

import fastpeft
from tests.test_patch_peft_life import lora, made
from tests.test_patch_peft_prompts import CONFIGS
from tests.test_patch_peft_prompts import made as with_prompts

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")
pytestmark = pytest.mark.cuda
DEVICE = "cuda"

MODELS = {
    "lora": lambda: made(lora(target_modules="all-linear")),
    "dora": lambda: made(lora(use_dora=True)),
    "adalora": lambda: made(peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    **{name: (lambda name=name: with_prompts(name)) for name in CONFIGS},
}


def on_device(name, dtype):
    """A frozen base in `dtype`, adapters as peft has them."""
    model = MODELS[name]().to(DEVICE)
    own = dtype if name == "adapter" else torch.float32  # LLaMA-Adapter's are in the base's dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(own if parameter.requires_grad else dtype)
    return model.train()


def inputs():
    """Enough tokens that rounding errors are as great as they are on average."""
    ids = torch.randint(3, 90, (16, 24), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def step(model):
    model.zero_grad()
    out = model(**inputs())
    out.loss.backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return out.logits.detach().double(), torch.cat(grads)


def distance(found, exact):
    return float((found - exact).pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_as_close_to_float64_as_peft(name, dtype):
    model = on_device(name, dtype)
    exact, before = step(copy.deepcopy(model).double()), step(model)
    fastpeft.patch(model)
    after = step(model)
    assert {row.backend for row in fastpeft.report(model).layers} == {"triton"}
    bound = 1.25 if dtype == torch.float32 else 1.5  # gradients of so small a model differ by their rounding's luck
    for found, theirs, wanted in zip(after, before, exact, strict=True):
        floor = 1e-6 * float(wanted.abs().max())
        assert distance(found, wanted) <= max(bound * distance(theirs, wanted), floor)


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_a_training_step_does_not_wait_for_the_device(name):
    model = fastpeft.patch(on_device(name, torch.bfloat16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    given = inputs()
    with contextlib.ExitStack() as stack:
        for number in range(3):  # the first compiles kernels
            if number == 2:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                stack.callback(torch.cuda.set_sync_debug_mode, "default")
            optimizer.zero_grad()
            model(**given).loss.backward()
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_compiled_by_inductor(name):
    model = fastpeft.patch(on_device(name, torch.float32))
    expected = step(model)
    found = step(torch.compile(model, fullgraph=True))
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
