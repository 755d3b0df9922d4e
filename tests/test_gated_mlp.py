"""Which modules are gated MLPs is read from their forwards: transformers' families, forms that are the same, and what
must not be taken for one."""

import inspect

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from fastpeft.tuners.gated_mlp import GatedMlp, activation_of, gated_mlp_of
from tests.models import FAMILIES, MORE_FAMILIES

GATED = {  # family of transformers -> its class, for those whose forward is the whole of it
    "llama": "LlamaMLP", "mistral": "MistralMLP", "qwen2": "Qwen2MLP", "qwen3": "Qwen3MLP", "gemma": "GemmaMLP",
    "gemma2": "Gemma2MLP", "gemma3": "Gemma3MLP", "cohere": "CohereMLP", "cohere2": "Cohere2MLP", "olmo": "OlmoMLP",
    "olmo2": "Olmo2MLP", "olmo3": "Olmo3MLP", "granite": "GraniteMLP", "stablelm": "StableLmMLP",
    "smollm3": "SmolLM3MLP", "deepseek_v3": "DeepseekV3MLP", "helium": "HeliumMLP", "exaone4": "Exaone4MLP",
    "idefics": "IdeficsMLP", "mllama": "MllamaTextMLP", "ernie4_5": "Ernie4_5MLP", "jamba": "JambaMLP",
}  # fmt: skip
OTHERS = {  # gated, but with something beside or in another form
    "phi3": "Phi3MLP", "glm": "GlmMLP", "seed_oss": "SeedOssMLP", "t5": "T5DenseGatedActDense", "gpt2": "GPT2MLP",
    "bitnet": "BitNetMLP", "falcon_h1": "FalconH1MLP", "gemma3n": "Gemma3nTextMLP", "t5gemma": "T5GemmaMLP",
    "modernbert": "ModernBertMLP", "nemotron": "NemotronMLP", "persimmon": "PersimmonMLP",
}  # fmt: skip


def bare(family: str, name: str) -> nn.Module:
    """An instance without weights, with a child under every name that its forward calls."""
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(module, name)
    instance = cls.__new__(cls)
    nn.Module.__init__(instance)
    for child in ("gate_proj", "up_proj", "down_proj", "act_fn", "gate_up_proj", "activation_fn", "wi_0", "wi_1", "wo"):
        if f"self.{child}(" in inspect.getsource(cls.forward):
            instance.add_module(child, nn.Identity())
    return instance


@pytest.mark.parametrize(("family", "name"), GATED.items(), ids=GATED)
def test_families_that_are(family, name):
    assert gated_mlp_of(bare(family, name)) == ("gate_proj", "up_proj", "down_proj", "act_fn")


@pytest.mark.parametrize(("family", "name"), OTHERS.items(), ids=OTHERS)
def test_families_that_are_not(family, name):
    assert gated_mlp_of(bare(family, name)) is None


def test_models_have_one_in_each_layer():
    found = {}
    for family, (kind, settings) in {**FAMILIES, **MORE_FAMILIES}.items():
        config = transformers.AutoConfig.for_model(kind, **settings)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        found[family] = sum(gated_mlp_of(each) is not None for each in model.modules())
    assert {family for family, count in found.items() if count == 2} == {
        "llama", "llama-tied", "llama-bias", "mistral", "mistral-wide", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
        "cohere", "cohere2", "granite", "olmo", "olmo2", "smollm3", "stablelm",
    }  # fmt: skip
    assert set(found.values()) == {0, 2}


class Plain(nn.Module):
    """The usual form; each variant says its own forward."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act, self.drop, self.factor, self.exact = nn.SiLU(), nn.Dropout(0.5), 1.0, True

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))

    def hidden(self, x):
        return self.act(self.w1(x)) * self.w3(x)


def variant(forward) -> nn.Module:
    return type("Variant", (Plain,), {"forward": forward})()


def torch_multiply(self, x):
    gate = self.w1(x)
    up = self.w3(x)
    return self.w2(torch.mul(up, self.act(gate)))


def by_method(self, x):
    return self.w2(self.hidden(x))


def method_of_a_tensor(self, hidden_states):
    return self.w2(self.act(self.w1(hidden_states)).mul(self.w3(hidden_states)))


def chosen_by_settings(self, x):
    if self.exact:
        return self.w2(self.act(self.w1(x)) * self.w3(x))
    return self.w2(self.drop(self.w1(x)))


@pytest.mark.parametrize("forward", [Plain.forward, torch_multiply, by_method, method_of_a_tensor, chosen_by_settings])
def test_other_forms_of_the_same(forward):
    assert gated_mlp_of(variant(forward)) == ("w1", "w3", "w2", "act")


def test_an_activation_that_is_a_function():
    found = gated_mlp_of(variant(lambda self, x: self.w2(F.silu(self.w1(x)) * self.w3(x))))
    assert found[:3] == ("w1", "w3", "w2") and activation_of(found.act) == "silu"
    found = gated_mlp_of(variant(lambda self, x: self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))))
    assert activation_of(found.act) == "gelu_tanh"
    assert activation_of(gated_mlp_of(variant(lambda self, x: self.w2(F.relu(self.w1(x)) * self.w3(x)))).act) is None


def keeps_state(self, x):
    self.last = self.act(self.w1(x)) * self.w3(x)
    return self.w2(self.last)


def branches_on_values(self, x):
    return self.w2(self.act(self.w1(x)) * self.w3(x)) if x.sum() > 0 else x


def raises(self, x):
    raise RuntimeError("not on a symbol")


def with_more_inputs(self, x, mask=None):
    return self.w2(self.act(self.w1(x)) * self.w3(x))


def of_keywords(self, **x):
    return self.w2(self.act(self.w1(x["x"])) * self.w3(x["x"]))


OTHER_FORMS = {
    "dropout between": lambda self, x: self.w2(self.drop(self.act(self.w1(x)) * self.w3(x))),
    "dropout behind": lambda self, x: self.drop(self.w2(self.act(self.w1(x)) * self.w3(x))),
    "a factor": lambda self, x: self.w2(self.act(self.w1(x) * self.factor) * self.w3(x)),
    "clamped": lambda self, x: self.w2(self.act(self.w1(x).clamp(max=7.0)) * self.w3(x)),
    "cast": lambda self, x: self.w2((self.act(self.w1(x).float()) * self.w3(x)).to(x.dtype)),
    "a residual": lambda self, x: x + self.w2(self.act(self.w1(x)) * self.w3(x)),
    "added": lambda self, x: self.w2(self.act(self.w1(x)) + self.w3(x)),
    "another input": lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x * 2)),
    "one projection": lambda self, x: self.w2(self.act(self.w1(x)) * self.w1(x)),
    "the activation of both": lambda self, x: self.w2(self.act(self.w1(x)) * self.act(self.w3(x))),
    "the activation behind": lambda self, x: self.w2(self.act(self.w1(x) * self.w3(x))),
    "no activation": lambda self, x: self.w2(self.w1(x) * self.w3(x)),
    "up before gate": lambda self, x: self.w2(self.w3(x) * self.act(self.w1(x))),
    "two results": lambda self, x: (self.w2(self.act(self.w1(x)) * self.w3(x)), x),
    "nothing": lambda self, x: None,
    "its input": lambda self, x: x,
    "keeps state": keeps_state,
    "branches on values": branches_on_values,
    "raises": raises,
    "more inputs": with_more_inputs,
    "of keywords": of_keywords,
}


@pytest.mark.parametrize("forward", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_what_is_otherwise_is_not_taken_for_one(forward):
    module = variant(forward)
    before = dict(module.__dict__)
    assert gated_mlp_of(module) is None
    assert module.__dict__ == before


def test_of_another_class():
    assert gated_mlp_of(variant(raises), Plain) == GatedMlp("w1", "w3", "w2", "act")
    assert gated_mlp_of(nn.Sequential(nn.Linear(2, 2))) is None


ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2", "relu": None, "quick_gelu": None, "gelu_fast": None,
    "gelu_10": None, "tanh": None, "sigmoid": None, "mish": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), ACTIVATIONS.items(), ids=ACTIVATIONS)
def test_activations_of_transformers(name, expected):
    assert activation_of(ACT2FN[name]) == expected


class Sloped(nn.Module):
    """SiLU times a parameter."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return F.silu(x) * self.slope


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (nn.SiLU(), "silu"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (Sloped(), None),
        (nn.PReLU(), None),
        (nn.Dropout(0.5), None),
        (lambda x: x.half(), None),
        (lambda x: x.sum(), None),
        (lambda x: 1.0, None),
        (lambda x, y: x, None),
        (lambda x: F.silu(x.clamp(max=40.0)), None),
        (lambda x: F.silu(x) * (1 + 1e-9), None),
    ],
)
def test_activations_are_compared_by_what_they_compute(act, expected):
    assert activation_of(act) == expected
