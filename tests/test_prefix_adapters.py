"""Several adapters in one model that has a prefix: prefixes, LoRA beside them, which one a call uses, and copies."""

import copy
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from tests.models import batch, tiny
from tests.peft_pair import WEIGHTS, close, quietly, randomise, result
from tests.prefix_pair import prefixed, settings_of, step_gradients, task_of, tokens

CHECKPOINTS = [{"use_reentrant": False}, {"use_reentrant": True}]
TABLE = "prompt_encoder.default.embedding.weight"


def config(family: str = "llama", **settings) -> fastpeft.PrefixTuningConfig:
    return fastpeft.PrefixTuningConfig(**settings_of(family, **settings))


# Which adapter a call uses.


def two(family: str = "llama", **settings):
    """Adapters a (active) and b, of 5 and 3 virtual tokens."""
    torch.manual_seed(11)
    model = fastpeft.patch(tiny(family, task_of(family)), config(family, **settings), adapter_name="a")
    model.add_adapter("b", config(family, num_virtual_tokens=3, **settings))
    return model.eval()


def table(model, name: str) -> torch.Tensor:
    return fastpeft.adapter_state_dict(model, name)["prompt_embeddings"]


def of_table(values: torch.Tensor, family: str = "llama", **settings):
    """A model with this one prefix."""
    model = prefixed(family, num_virtual_tokens=len(values), **settings)
    with torch.no_grad():
        model.get_parameter(TABLE).copy_(values)
    return model


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "opt", "bloom", "gemma3", "t5", "gptj", "m2m_100", "mpt", "falcon"]
)
def test_several_prefixes(family):
    inputs = batch(task_of(family))
    model = two(family)
    for name in ("a", "b"):
        model.set_adapter(name)
        assert torch.equal(result(model, inputs), result(of_table(table(model, name), family), inputs))
        assert [n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad] == [name]
    model.set_adapter(["a", "b"])
    both = torch.cat((table(model, "a"), table(model, "b")))
    close(result(model, inputs), result(of_table(both, family), inputs), 1e-6)
    expected = step_gradients(of_table(both, family), inputs)[TABLE]
    found = step_gradients(model, inputs)
    close(torch.cat([found[f"prompt_encoder.{name}.embedding.weight"] for name in "ab"]), expected, 1e-5)
    model.eval().delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert torch.equal(result(model, inputs), result(of_table(table(model, "b"), family), inputs))
    model.add_adapter("c", config(family))
    model.set_adapter("c")
    assert torch.equal(result(model, inputs), result(of_table(table(model, "c"), family), inputs))
    for name in ("b", "c"):
        quietly(model.delete_adapter, name)
    with torch.no_grad():
        assert torch.equal(result(model, inputs), result(tiny(family, task_of(family)), inputs))


def test_threads_each_have_their_adapter():
    model = two()
    inputs = batch()
    expected = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = result(model, inputs).detach()
    with model.disable_adapter():
        expected[None] = result(model, inputs).detach()
    wrong, barrier = [], threading.Barrier(3)

    def work(name):
        context = model.disable_adapter() if name is None else fastpeft.use_adapter(model, name)
        with context, torch.no_grad():
            barrier.wait()
            wrong.extend(name for _ in range(20) if not torch.equal(result(model, inputs), expected[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", [None, *CHECKPOINTS], ids=["plain", "direct", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bloom", "gptj"])
def test_the_with_may_end_before_backward(family, kwargs):
    task = task_of(family)
    model = two(family)
    model.set_adapter(["a", "b"])  # both train
    model.set_adapter("b")
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_(True)
    if kwargs is not None:
        model.train().gradient_checkpointing_enable(kwargs)
    with fastpeft.use_adapter(model, "a"):
        loss = model(**batch(task)).loss
    loss.backward()
    assert model.prompt_encoder["b"].embedding.weight.grad is None
    expected = step_gradients(of_table(table(model, "a"), family), batch(task))[TABLE]
    close(model.prompt_encoder["a"].embedding.weight.grad, expected, 1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "t5", "m2m_100", "falcon", "gptj", "bert"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(family, how):
    task = task_of(family)
    model = prefixed(family, prefix_projection=True)
    expected = result(model, batch(task)).detach()
    other = how(model)
    randomise(other)
    assert torch.equal(result(model, batch(task)), expected)
    moved = result(other, batch(task)).detach()
    assert not torch.allclose(moved, expected)
    step_gradients(other, batch(task))
    fastpeft.unpatch(model)
    assert torch.equal(result(other.eval(), batch(task)), moved)
    fastpeft.unpatch(other)
    assert torch.equal(result(other, batch(task)), result(tiny(family, task), batch(task)))


# A prefix and LoRA.

LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def lora_and_prefix(family: str, first: str = "lora"):
    """LoRA "default" and prefix "p" in one model, both active, or the other way round."""
    torch.manual_seed(11)
    adapters = {"default": fastpeft.LoraConfig(**LORA), "p": config(family)}
    names = ["default", "p"] if first == "lora" else ["p", "default"]
    model = fastpeft.patch(tiny(family), adapters[names[0]], adapter_name=names[0])
    model.add_adapter(names[1], adapters[names[1]])
    model.set_adapter(names)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("first", ["lora", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3", "gptj"])
def test_lora_and_a_prefix_in_one_model(family, first, tmp_path):
    import peft

    model = lora_and_prefix(family, first)
    inputs = batch()
    both = tokens(model, inputs)
    slopes = step_gradients(model, inputs)
    assert any("lora_A" in name for name in slopes) and any("prompt_encoder.p" in name for name in slopes)
    model.eval()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "p" / WEIGHTS)) == {"prompt_embeddings"}
    assert all(".lora_" in name for name in load_file(tmp_path / WEIGHTS))
    alone = {}
    for name, directory in (("default", tmp_path), ("p", tmp_path / "p")):
        model.set_adapter(name)
        alone[name] = tokens(model, inputs)
        theirs = quietly(peft.PeftModel.from_pretrained, tiny(family), directory)
        close(alone[name], tokens(theirs, inputs), 2e-6)
        assert torch.equal(tokens(quietly(fastpeft.load_adapter, tiny(family), directory), inputs), alone[name])
    assert not torch.allclose(both, alone["p"]) and not torch.allclose(both, alone["default"])
    # The two together are a prefix on the model into which LoRA is merged.
    merged = quietly(peft.PeftModel.from_pretrained, tiny(family), tmp_path).merge_and_unload()
    close(tokens(quietly(fastpeft.load_adapter, merged, tmp_path / "p"), inputs), both, 1e-5)
    loaded = quietly(fastpeft.load_adapter, tiny(family), tmp_path)
    quietly(loaded.load_adapter, tmp_path / "p", adapter_name="p")
    loaded.set_adapter(["default", "p"])
    close(tokens(loaded, inputs), both, 1e-6)
    fastpeft.unpatch(model)
    assert torch.equal(result(model, inputs), result(tiny(family), inputs))


def test_lora_may_be_merged_beside_a_prefix():
    model = lora_and_prefix("llama")
    expected = result(model, batch()).detach()
    fastpeft.merge(model, ["default"])
    close(result(model, batch()), expected, 1e-5)
    fastpeft.unmerge(model)
    assert torch.equal(result(model, batch()), expected)


@pytest.mark.parametrize("name", ["prefix", "behind", "NAME", "parameters_of"])
def test_an_adapter_may_have_the_name_of_an_attribute(name, tmp_path):
    model = fastpeft.patch(tiny(), config(), adapter_name=name)
    expected = result(model, batch()).detach()
    assert torch.equal(result(pickle.loads(pickle.dumps(model)), batch()), expected)
    model.save_pretrained(tmp_path)
    loaded = quietly(fastpeft.load_adapter, tiny(), tmp_path / name, adapter_name=name)
    assert torch.equal(result(loaded, batch()), expected)
    step_gradients(model, batch())
    fastpeft.unpatch(model)
