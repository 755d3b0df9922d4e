"""`adapter_names=`: each sample of a call, or of a `generate`, with an adapter of its own: beside HF peft, which does
it at inference alone, and in training beside a call for each sample."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastpeft
from fastpeft import LoraConfig, PatchError
from tests.models import batch, tiny
from tests.peft_pair import by_base_name, close, quietly, randomise, result
from tests.traffic import count_traffic

SETTINGS = {  # ranks, scalings and modules of the adapters' own
    "llama": {"a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
              "b": {"r": 7, "lora_alpha": 7, "target_modules": ["q_proj", "o_proj"]}},
    "gpt2": {"a": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"]},
             "b": {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], "lora_bias": True}},
    "t5": {"a": {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v", "wo"]},
           "b": {"r": 3, "lora_alpha": 3, "target_modules": ["q", "k"]}},
    "gemma3": {"a": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
               "b": {"r": 3, "lora_alpha": 3, "target_modules": ["embed_tokens"]}},
    "roberta": {"a": {"r": 4, "lora_alpha": 8, "target_modules": ["query"]},
                "b": {"r": 3, "lora_alpha": 3, "target_modules": ["value"]}},
}  # fmt: skip
TASKS = {"t5": "SEQ_2_SEQ_LM", "roberta": "SEQ_CLS"}
NAMES = ["a", "__base__", "b", "a", "b"]


def two(family="llama", dropout=0.0, layers=None, **options):
    """A model of ours with the adapters "a" and "b", both trainable, none neutral."""
    task = TASKS.get(family, "CAUSAL_LM")
    model = tiny(family, task, layers=layers)
    torch.manual_seed(11)
    for name, settings in SETTINGS[family].items():
        config = LoraConfig(task_type=task, lora_dropout=dropout, **settings | options)
        if name == "a":
            quietly(fastpeft.patch, model, config, adapter_name="a")
        else:
            quietly(model.add_adapter, name, config)
    for name in ("a", "b"):
        model.set_adapter(name)
        randomise(model)
    if not options.get("modules_to_save"):  # of which one adapter's is at work
        model.set_adapter(["a", "b"])
    return model.eval()


def pair(family="llama", **options):
    """(peft's model, ours), each with the adapters "a" and "b" of the same values."""
    import peft

    task = TASKS.get(family, "CAUSAL_LM")
    hf = None
    for name, settings in SETTINGS[family].items():
        config = peft.LoraConfig(task_type=task, **settings | options)
        if hf is None:
            hf = quietly(peft.get_peft_model, tiny(family, task), config, adapter_name=name)
        else:
            quietly(hf.add_adapter, name, config)
    ours = two(family, **options)
    expected, found = by_base_name(hf), by_base_name(ours)
    assert expected.keys() == found.keys()
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])
    return hf.eval(), ours.eval()


def inputs_of(family, rows=5):
    """As many samples as NAMES."""
    return batch(TASKS.get(family, "CAUSAL_LM"), rows=rows)


# Beside HF peft


@pytest.mark.parametrize("family", [family for family in SETTINGS if family != "roberta"])
def test_logits_are_hf_pefts(family):
    hf, ours = pair(family)
    inputs = inputs_of(family)
    with torch.no_grad():
        expected, found = (result(model, {**inputs, "adapter_names": NAMES}) for model in (hf, ours))
        close(found, expected, 1e-5)
        plain = result(ours, inputs)
    assert not torch.allclose(found, plain, rtol=1e-3)


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generate_is_hf_pefts(family, options):
    hf, ours = pair(family)
    given = {key: value for key, value in inputs_of(family).items() if key != "labels"}
    options = {**options, "max_new_tokens": 6, "do_sample": False, "adapter_names": NAMES}
    expected, found = (quietly(model.generate, **given, **options) for model in (hf, ours))
    assert torch.equal(found, expected)


def test_a_trained_head_is_each_samples_own():
    """HF peft takes a module trained whole of a kind it knows; here "__base__" has the original."""
    hf, ours = pair("llama", modules_to_save=["lm_head"])
    inputs = inputs_of("llama")
    with torch.no_grad():
        expected, found = (result(model, {**inputs, "adapter_names": NAMES}) for model in (hf, ours))
    close(found, expected, 1e-5)


# By itself: a call, or a generate, for each sample


def alone(model, name):
    return fastpeft.disable_adapter(model) if name == "__base__" else fastpeft.use_adapter(model, name)


def row(inputs, b):
    return {key: value[b : b + 1] for key, value in inputs.items()}


@pytest.mark.parametrize("family", SETTINGS)
def test_each_sample_has_the_logits_of_its_adapter_alone(family):
    model, inputs = two(family), inputs_of(family)
    with torch.no_grad():
        mixed = result(model, {**inputs, "adapter_names": NAMES})
        for b, name in enumerate(NAMES):
            with alone(model, name):
                close(mixed[b : b + 1], result(model, row(inputs, b)), 1e-5)


def test_heads_of_any_class_are_each_samples_own():
    """RoBERTa's head is no single layer; HF peft refuses it."""
    model, inputs = two("roberta", modules_to_save=["classifier"]), inputs_of("roberta")
    with torch.no_grad():
        mixed = result(model, {**inputs, "adapter_names": NAMES})
        for b, name in enumerate(NAMES):
            with alone(model, name):
                close(mixed[b : b + 1], result(model, row(inputs, b)), 1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_sample_generates_what_its_adapter_alone_generates(family, options):
    """Sampled sequences are checked to be those of the sample's adapter: at so low a temperature sampling is greedy."""
    model = two(family)
    given = {key: value for key, value in inputs_of(family).items() if key != "labels"}
    given = {key: value[:, :7] for key, value in given.items()}  # without padding
    options = {"max_new_tokens": 5, **options}
    if options.get("do_sample"):
        options["temperature"] = 1e-4
    torch.manual_seed(0)
    mixed = quietly(model.generate, **given, adapter_names=NAMES, **options)
    repeats = options.get("num_return_sequences", 1)
    for b, name in enumerate(NAMES):
        with alone(model, name):
            expected = quietly(model.generate, **row(given, b), **options)
        found = mixed[b * repeats : (b + 1) * repeats]
        width = min(found.shape[1], expected.shape[1])
        assert torch.equal(found[:, :width], expected[:, :width]), name
        assert not found[:, width:].sub(model.config.pad_token_id).any()


def gradients_of(model, names=("a", "b")):
    return {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None and any(f".{name}." in f"{key}." for name in names)
    }


def losses_of_samples(model, inputs):
    """The sum of each sample's own loss under its own adapter: the yardstick of training."""
    total = 0.0
    for b, name in enumerate(NAMES):
        with alone(model, name):
            total = total + own_loss(result(model, row(inputs, b)), inputs["labels"][b : b + 1])
    return total


def own_loss(logits, labels):
    """Σ over samples and tokens, so that samples are independent of each other."""
    if logits.ndim == 3:
        labels = labels[:, -logits.shape[1] :]
        logits = logits[:, : labels.shape[1]]
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("family", SETTINGS)
def test_training_gives_each_adapter_the_gradient_of_its_samples(family):
    model, inputs = two(family), inputs_of(family)
    own_loss(result(model, {**inputs, "adapter_names": NAMES}), inputs["labels"]).backward()
    found = gradients_of(model)
    model.zero_grad()
    losses_of_samples(model, inputs).backward()
    expected = gradients_of(model)
    assert found.keys() == expected.keys() and {"a", "b"} <= {part for key in found for part in key.split(".")}
    for key in expected:
        close(found[key], expected[key], 1e-4, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_repeats_the_choice(reentrant, dropout):
    """In backward, after another call has made another choice."""
    found = []
    for checkpointing in (False, True):
        model, inputs = two("llama", dropout).train(), inputs_of("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        loss = own_loss(result(model, {**inputs, "adapter_names": NAMES}), inputs["labels"])
        with torch.no_grad(), torch.random.fork_rng():
            model(**inputs, adapter_names=NAMES[::-1])
        loss.backward()
        found.append(gradients_of(model))
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        close(found[1][key], found[0][key], 1e-5, 1e-7)


def test_an_adapter_that_is_not_named_has_no_gradient_and_none_is_made_trainable():
    model, inputs = two(), inputs_of("llama")
    model.set_adapter("a")
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    result(model, {**inputs, "adapter_names": ["a", "b", "a", "__base__", "b"]}).sum().backward()
    assert gradients_of(model, ["a"]) and not gradients_of(model, ["b"])
    assert before == {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert model.active_adapters == ["a"]


@pytest.mark.interpreter
def test_on_the_kernels_it_is_the_grouped_op():
    """One launch for all adapters in a layer, and the logits of the torch path."""
    model, inputs = two(), inputs_of("llama", rows=3)
    names = ["b", "__base__", "a"]
    with torch.no_grad():
        expected = result(model, {**inputs, "adapter_names": names})
        with fastpeft.backend("triton"), count_traffic() as traffic:
            found = result(model, {**inputs, "adapter_names": names})
    close(found, expected, 1e-4)
    adapted = sum(hasattr(module, "lora_A") for module in model.modules())
    assert traffic.kernels().count("_mixed_shrink_kernel") == traffic.kernels().count("_mixed_expand_kernel") == adapted


def test_compiled_it_is_one_graph():
    model, inputs = two(layers=1), inputs_of("llama")
    inputs = {**inputs, "use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = result(model, {**inputs, "adapter_names": NAMES})
        close(compiled(**inputs, adapter_names=NAMES).logits, expected, 1e-5)
        close(compiled(**inputs).logits, result(model, inputs), 1e-5)


def test_convolutions_each_sample_by_its_own():
    """And modules that are not transformers'."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4 * 6 * 6, 5)

        def forward(self, x):
            return self.out(self.conv(x).flatten(1))

    torch.manual_seed(0)
    model = fastpeft.patch(Net(), LoraConfig(r=2, target_modules=["conv", "out"]), adapter_name="a")
    fastpeft.adapters.add_adapter(model, "b", LoraConfig(r=3, target_modules=["conv"]))
    randomise(model)
    fastpeft.set_adapter(model, "b")
    randomise(model)
    x = torch.randn(len(NAMES), 3, 8, 8)
    mixed = model(x, adapter_names=NAMES)
    for b, name in enumerate(NAMES):
        with alone(model, name):
            close(mixed[b : b + 1], model(x[b : b + 1]), 1e-5)


def test_half_precision_with_fp32_adapters():
    model = tiny("llama", dtype=torch.bfloat16)
    fastpeft.patch(model, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=8, target_modules=["q_proj"]))
    model.set_adapter(["a", "b"])
    randomise(model)
    inputs = inputs_of("llama")
    with torch.no_grad():
        mixed = result(model, {**inputs, "adapter_names": NAMES})
        assert mixed.dtype == torch.bfloat16
        for b, name in enumerate(NAMES):
            with alone(model, name):
                close(mixed[b : b + 1].float(), result(model, row(inputs, b)).float(), 3e-2)


# Blocks, other threads, refusals


def test_disabled_adapters_stay_disabled_and_used_ones_give_way():
    model, inputs = two(), inputs_of("llama")
    with torch.no_grad():
        mixed = result(model, {**inputs, "adapter_names": NAMES})
        with fastpeft.disable_adapter(model):
            base = result(model, inputs)
            assert torch.equal(result(model, {**inputs, "adapter_names": NAMES}), base)  # as in HF peft
        with fastpeft.use_adapter(model, "b"):
            assert torch.equal(result(model, {**inputs, "adapter_names": NAMES}), mixed)
            other = result(model, inputs)
        with fastpeft.use_adapter(model, "b"):
            assert torch.equal(result(model, inputs), other)
        close(result(model, {**inputs, "adapter_names": ["__base__"] * len(NAMES)}), base, 1e-6)
        assert torch.equal(result(model, {**inputs, "adapter_names": None}), result(model, inputs))


def test_threads_name_adapters_of_their_own():
    model, inputs = two(), inputs_of("llama")
    choices = [NAMES, NAMES[::-1], None, ["b"] * len(NAMES)] * 3

    def logits(names):
        with torch.no_grad():
            return result(model, {**inputs, "adapter_names": names})

    expected = [logits(names) for names in choices]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(logits, choices))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_choice_ends_with_the_call_also_where_that_fails():
    model, inputs = two(), inputs_of("llama")
    with torch.no_grad():
        expected = result(model, inputs)
        with pytest.raises(TypeError):
            model(**inputs, adapter_names=NAMES, no_argument_of_a_model=torch.ones(1), attention_mask=3)
        with pytest.raises(PatchError):
            model(**inputs, adapter_names=["a"])
        assert torch.equal(result(model, inputs), expected)
