"""What peft adapts in a model and what we find there, in one form."""

import copy
import json
import warnings

import peft
import transformers
from peft.utils.other import ModulesToSaveWrapper

from fastpeft.configs import LoraConfig
from fastpeft.targets import resolve_targets
from tests.models import tiny

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "bloom", "opt", "gpt_neox", "phi3", "mixtral"]
FAMILIES = [*DECODERS, "t5", "bart", "bert", "roberta"]
SEQ2SEQ = ("t5", "bart")


def build(family, task=None):
    """A tiny model of a family; of T5 and BART the sequence-to-sequence one, if no task is given."""
    return tiny(family, task or ("SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"))


def build_other(model_type, head="AutoModelForCausalLM", **settings):
    """A tiny model of a type that `tests.models` does not have."""
    config = transformers.AutoConfig.for_model(model_type, vocab_size=97, pad_token_id=0, **settings)
    return getattr(transformers, head).from_config(config)


def adapted_by_peft(model, **kwargs):
    """What peft adapts, {name: (r, alpha)} in the order of the model, what it trains whole, and its configuration."""
    config = peft.LoraConfig(**copy.deepcopy(kwargs))  # peft extends the caller's modules_to_save
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config).base_model.model
    layers = {n: (m.r["default"], m.lora_alpha["default"]) for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    saved = [n for n, m in wrapped.named_modules(remove_duplicate=False) if isinstance(m, ModulesToSaveWrapper)]
    return layers, saved, config


def resolved(model, **kwargs):
    """The same of ours, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolution = resolve_targets(model, LoraConfig(**kwargs))
    assert all(model.get_submodule(t.name) is t.module for t in resolution.targets)
    return {t.name: (t.r, t.alpha) for t in resolution.targets}, list(resolution.saved_modules), resolution.config


def assert_same(make, **kwargs):
    """Both adapt the same modules of the models that `make` makes, which are returned with their ranks and alphas."""
    theirs, saved, _ = adapted_by_peft(make(), **kwargs)
    ours, also_saved, config = resolved(make(), **kwargs)
    assert list(ours.items()) == list(theirs.items()) and also_saved == saved
    if not isinstance(kwargs.get("target_modules"), list):
        # What was filled in means the same to peft, and to us when it is read again.
        written = json.loads(json.dumps(config.to_file_dict()))
        assert adapted_by_peft(make(), **written)[0] == theirs and resolved(make(), **written)[0] == ours
    return ours
