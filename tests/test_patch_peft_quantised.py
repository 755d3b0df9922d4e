"""`patch(peft_model)` on quantised bases: bitsandbytes' and torchao's own forward is called, and the adapter's part is
ours; numbers and merging stay peft's."""

import copy
import warnings

import pytest
import torch

import fastpeft
from tests.models import batch
from tests.quantised import load
from tests.test_patch_peft_life import assert_equal, gradients, logits, stir

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")

TARGETS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
CONFIGS = {
    "lora": peft.LoraConfig(r=4, **TARGETS),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, **TARGETS),
    "dora": peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, **TARGETS),
}
CASES = [
    *[(kind, "lora") for kind in ("nf4", "nf4-double", "int8", "ao-int8")],
    *[("nf4-double", method) for method in ("rslora", "dora", "adalora")],
    ("int8", "adalora"),
]


def made(kind, method):
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(kind), copy.deepcopy(CONFIGS[method]))
    stir(model)
    return model.train()


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_numbers_are_peft_s(kind, method):
    model = made(kind, method)
    names, expected, expected_gradients = list(model.state_dict()), logits(model), gradients(model)
    fastpeft.patch(model)
    assert_equal(logits(model), expected)
    assert_equal(gradients(model), expected_gradients)
    assert list(model.state_dict()) == names
    rows = fastpeft.report(model).layers
    assert len(rows) == 6
    assert {row.op for row in rows} == {"lora_linear"} and "the base product is its own" in rows[0].reason


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_steps_and_merging(kind):
    results = []
    for patched in (False, True):
        model = made(kind, "lora")
        if patched:
            fastpeft.patch(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload()
        results.append((losses, logits(model), logits(merged), [type(each).__name__ for each in merged.modules()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    # the merged weights are quantised again, in which a small difference can become a step of the grid
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-3, atol=1e-3 * float(results[0][2].abs().max()))
    assert results[0][3] == results[1][3]


def test_prepared_and_checkpointed_as_in_a_qlora_script():
    results = []
    for patched in (False, True):
        torch.manual_seed(11)
        base = peft.prepare_model_for_kbit_training(
            load("nf4-double"), gradient_checkpointing_kwargs={"use_reentrant": patched}
        )
        model = peft.get_peft_model(base, copy.deepcopy(CONFIGS["lora"]))
        stir(model)
        if patched:
            fastpeft.patch(model)
        model.train()
        results.append(gradients(model))
    assert_equal(results[1], results[0])
