"""What `adapter_names=` cannot do is refused in words, and what looks as if it could not, is done."""

import warnings

import pytest
import torch

import fastpeft
from fastpeft import LoraConfig, PatchError
from tests.models import batch, tiny
from tests.peft_pair import close, randomise, result
from tests.test_mixed_batches import NAMES, alone, inputs_of, two


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b"], "adapter_names has 2 names, and the batch 5 samples"),
        (["a"] * 6, "adapter_names has 6 names, and the batch 5 samples"),
        (["a"], "adapter_names has 1 names, and the batch 5 samples"),
        (["a", "b", "c", "a", "b"], "names 'c', which is no adapter of this model; there are 'a', 'b', '__base__'"),
        ("a", "a list is needed, for each sample an adapter's name or '__base__'"),
        (["a", "b", None, "a", "b"], "a list is needed"),
        ([], "a list is needed"),
    ],
    ids=["few", "many", "one", "unknown", "string", "none", "empty"],
)
@pytest.mark.parametrize("verb", ["call", "generate"])
def test_names_that_do_not_fit_are_refused(verb, names, words):
    model = two()
    inputs = {key: value for key, value in inputs_of("llama").items() if key != "labels"}
    with pytest.raises(PatchError, match=words):
        model(**inputs, adapter_names=names) if verb == "call" else model.generate(
            **inputs, adapter_names=names, max_new_tokens=2
        )


def test_merged_adapters_are_refused():
    model, inputs = two(), inputs_of("llama")
    fastpeft.merge(model, "a")
    with pytest.raises(PatchError, match="a is merged into the base weights, which all samples share; unmerge first"):
        model(**inputs, adapter_names=NAMES)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "use_dora=True: that changes the base product"),
        (fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "which is PREFIX_TUNING"),
        (fastpeft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "which is PROMPT_TUNING"),
        (fastpeft.AdaLoraConfig(total_step=10, target_modules=["k_proj"]), "which is ADALORA"),
    ],
    ids=["dora", "prefix", "prompt", "adalora"],
)
def test_adapters_that_no_sample_can_have_alone_are_refused(config, words):
    model, inputs = tiny("llama"), inputs_of("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastpeft.patch(model, LoraConfig(r=4, target_modules=["v_proj"]), adapter_name="a")
        model.add_adapter("b", config)
    with pytest.raises(PatchError, match=f"names 'b', .*{words}"):
        model(**inputs, adapter_names=NAMES)
    with torch.no_grad():  # beside it, samples may have the others
        mixed = result(model, {**inputs, "adapter_names": ["a"] * len(NAMES)})
        with fastpeft.use_adapter(model, "a"):
            close(mixed, result(model, inputs), 1e-5)


def test_a_layer_whose_input_has_not_the_samples_as_rows_is_named():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)

        def forward(self, input_ids):
            return self.proj(input_ids.flatten(0, 1))

    flat = fastpeft.patch(Flat(), LoraConfig(r=2, target_modules=["proj"]), adapter_name="a")
    words = r"proj: an input of shape \(6, 4\) has not the 2 samples of adapter_names"
    with pytest.raises(PatchError, match=words):
        flat(torch.randn(2, 3, 4), adapter_names=["a", "__base__"])


@pytest.mark.parametrize("rows", [9, 5], ids=["as-many-samples-as-tokens", "fewer"])
def test_layers_that_are_called_with_the_sequence_in_front_are_refused(rows):
    """Of as many samples as tokens nothing would tell them apart."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = XLNetLMHeadModel(XLNetConfig(vocab_size=97, d_model=32, n_layer=1, n_head=2, d_inner=32)).eval()
    fastpeft.patch(model, LoraConfig(r=2, target_modules=["layer_1"]), adapter_name="a")
    with pytest.raises(PatchError, match="layers of a XLNetLMHeadModel are called with the sequence in front"):
        model(input_ids=batch(rows=rows, length=9)["input_ids"], adapter_names=["a"] * rows)


def test_guided_generation_is_refused():
    """Some models are then called with all samples and then all again, which beams are not."""
    model, inputs = two(), inputs_of("llama")
    ids, settings = inputs["input_ids"], model.generation_config
    for given in ({"guidance_scale": 1.5}, {"generation_config": type(settings)(guidance_scale=1.5)}):
        with pytest.raises(PatchError, match="adapter_names with guidance_scale=1.5"):
            model.generate(ids, adapter_names=NAMES, max_new_tokens=2, **given)
    model.generate(ids, adapter_names=NAMES, max_new_tokens=1, guidance_scale=1.0)


class Headed(torch.nn.Module):
    """A model whose head is called by keyword, and with more than one tensor."""

    def __init__(self, **more):
        super().__init__()
        self.proj, self.head, self.more = torch.nn.Linear(4, 4), Head(), more

    def forward(self, input_ids):
        return self.head(features=self.proj(input_ids), **self.more)


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4))

    def forward(self, features, scale=1.0):
        return features * self.weight * scale


def test_a_trained_head_may_be_called_by_keyword():
    config = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"])
    model = fastpeft.patch(Headed(scale=2.0), config, adapter_name="a")
    randomise(model)
    x, names = torch.randn(3, 2, 4), ["a", "__base__", "a"]
    mixed = model(x, adapter_names=names)
    for b, name in enumerate(names):
        with alone(model, name):
            close(mixed[b : b + 1], model(x[b : b + 1]), 1e-5)
    many = fastpeft.patch(Headed(scale=torch.ones(3, 1, 1)), config, adapter_name="a")
    with pytest.raises(PatchError, match="head: 2 tensors are given, and one is needed that has all samples"):
        many(x, adapter_names=names)
