"""`torch.compile(fullgraph=True)` of a patched PeftModel: one graph, forward and backward, the eager numbers, and no
recompilation for the third length and all others."""

import pytest
import torch

import fastpeft
from tests.models import batch, tiny
from tests.test_patch_peft_life import lora, made
from tests.test_patch_peft_prompts import CONFIGS
from tests.test_patch_peft_prompts import made as with_prompts

peft = pytest.importorskip("peft", reason="HF peft is a test requirement")

ADALORA = {"total_step": 9, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
EVERY_LAYER = ("prefix", "projection", "adapter")
MODELS = {
    "lora": lambda: shallow(),
    "dora": lambda: shallow(lora(use_dora=True)),
    "adalora": lambda: shallow(peft.AdaLoraConfig(**ADALORA)),
    # torch.compile has no LSTM
    **{
        name: (lambda name=name: with_prompts(name, layers=1)) for name in CONFIGS if name not in (*EVERY_LAYER, "lstm")
    },
    **{name: (lambda name=name: with_prompts(name)) for name in EVERY_LAYER},  # two, each with rows of its own
}


def shallow(config=None):
    """Of one layer: tracing takes a time for each."""
    return made(config, base=tiny(layers=1))


@pytest.fixture(autouse=True)
def counted():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def step(model, length=9):
    inputs = {name: each[:, :length].contiguous() for name, each in batch().items()}
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_with_the_eager_numbers(name):
    model = fastpeft.patch(MODELS[name]())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, gradients = step(compiled)
    expected, expected_gradients = step(model)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for path, each in expected_gradients.items():
        torch.testing.assert_close(gradients[f"_orig_mod.{path}"], each, rtol=1e-4, atol=1e-6, msg=path)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_the_third_length_and_all_others_find_a_graph():
    model = fastpeft.patch(shallow()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (9, 8, 7, 6, 5):
        step(compiled, length)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_disabled_adapter_is_another_graph_and_not_a_break():
    model = fastpeft.patch(shallow())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        adapted = compiled(**batch()).logits
        with model.disable_adapter():
            plain, expected = compiled(**batch()).logits, model(**batch()).logits
        torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plain, adapted)
        assert torch.equal(compiled(**batch()).logits, adapted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_hot_swap_of_peft_s_needs_no_other_graph(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    made(lora(r=2, lora_alpha=5), seed=3).save_pretrained(tmp_path)
    swapped = peft.PeftModel.from_pretrained(tiny(), tmp_path)
    model = fastpeft.patch(made()).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        first = compiled(**batch()).logits
        torch.testing.assert_close(first, made().eval()(**batch()).logits, rtol=1e-5, atol=1e-5)
        hotswap_adapter(model, tmp_path, adapter_name="default")
        second, expected = compiled(**batch()).logits, swapped(**batch()).logits
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first, second)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
