"""Adapters of a patched model: several, switched, disabled, merged, for a block, a thread, a checkpointed segment."""

import contextlib
import threading

import pytest
import torch

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import by_base_name, close, patched_pair, quietly, randomise, result
from tests.two_adapters import TARGETS, config, outputs, trained, two


@pytest.fixture(scope="module")
def expected() -> dict:
    return outputs()


def test_setting_adding_and_deleting(expected):
    model = fastpeft.patch(tiny(), config(), adapter_name="a")
    model.add_adapter("b", config(r=2))
    assert model.active_adapters == ["a"] and model.active_adapter == "a" and trained(model) == {"a"}
    assert list(model.peft_config) == ["a", "b"] and model.peft_config["b"].r == 2
    model = two()
    for names in (("b",), ("a",), ("a", "b")):
        model.set_adapter(names[0] if len(names) == 1 else list(names))
        assert model.active_adapters == list(names) and trained(model) == set(names)
        assert torch.equal(result(model, batch()), expected[names])
    assert model.active_adapter == ["a", "b"]
    model.delete_adapter("b")
    assert model.active_adapters == ["a"] and list(model.peft_config) == ["a"]
    assert torch.equal(result(model, batch()), expected[("a",)])
    assert not any(".b." in name for name, _ in model.named_parameters())
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear  # had b only
    model.add_adapter("b", config(r=3))
    with pytest.warns(UserWarning, match="'a' was active and is deleted; 'b' is active now"):
        model.delete_adapter("a")
    assert trained(model) == {"b"}
    model.delete_adapter("b")
    assert torch.equal(result(model, batch()), expected[()]) and model.active_adapters == []
    model.set_adapter([])
    fastpeft.unpatch(model)


def test_switching_trains_what_peft_trains():
    hf, ours = patched_pair("llama", {"target_modules": TARGETS})
    import peft

    for model, library in ((hf, peft), (ours, fastpeft)):
        model.add_adapter("b", library.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name in ("default", "b", "default"):
        hf.set_adapter(name)
        ours.set_adapter(name)
        wanting = [
            {key for key, parameter in by_base_name(model).items() if parameter.requires_grad} for model in (hf, ours)
        ]
        assert wanting[0] == wanting[1] and wanting[0]
    hf.delete_adapter("default")
    quietly(ours.delete_adapter, "default")
    assert hf.active_adapters == ours.active_adapters == ["b"]
    assert by_base_name(hf).keys() == by_base_name(ours).keys()


def test_a_deleted_adapter_leaves_no_trace_in_the_base():
    model = tiny("qwen2")
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quietly(fastpeft.patch, model, config(r=2), adapter_name="kept")
    settings = {"init_lora_weights": "pissa", "target_modules": ["k_proj"]}
    for bias in ("all", "none"):
        quietly(model.add_adapter, "gone", config(**settings, bias=bias))
        model.set_adapter("gone")
        randomise(model)
        changed = {
            name for name, parameter in model.named_parameters() if name in base and not parameter.equal(base[name])
        }
        assert {name.rpartition(".")[2] for name in changed} == {"weight"} | ({"bias"} if bias == "all" else set())
        quietly(model.delete_adapter, "gone")
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], parameter) for name, parameter in base.items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.set_adapter("c"), "set_adapter: there is no adapter 'c'; there are 'a', 'b'"),
        (lambda m: m.set_adapter(["a", "a"]), "'a' is named twice"),
        (lambda m: m.delete_adapter("c"), "no adapter 'c'"),
        (lambda m: m.add_adapter("a", config()), "already an adapter 'a'"),
        (lambda m: m.add_adapter("x.y/z", config()), "cannot be an adapter's name"),
        (lambda m: m.add_adapter("c", config(target_modules=["nothing"])), "matches no module"),
        (lambda m: fastpeft.use_adapter(m, "c").__enter__(), "use_adapter: there is no adapter 'c'"),
        (lambda m: fastpeft.use_adapter(m, ["b", "b"]).__enter__(), "'b' is named twice"),
        (lambda m: fastpeft.adapter_state_dict(m, "c"), "no adapter 'c'"),
        (lambda m: (m.set_adapter(["a", "b"]), fastpeft.adapter_state_dict(m)), "which adapter"),
        (lambda m: m.save_pretrained("/nowhere", safe_serialization=False), "safe_serialization=False"),
        (lambda m: m.save_pretrained("/nowhere", push_to_hub=True), "push_to_hub"),
        (lambda m: m.save_pretrained("/nowhere", selected_adapters=["c"]), "no adapter 'c'"),
        (lambda m: m.load_adapter("/nowhere", "c", key_mapping={"a": "b"}), "key_mapping"),
        (lambda m: m.load_adapter("/nowhere", "c", subfolder="x"), "subfolder='x'"),
        (lambda m: m.merge_and_unload(adapter_names=["c"]), "merge_and_unload: there is no adapter 'c'"),
        (lambda m: m.add_adapter("c", config(modules_to_save=["q_proj"])), "q_proj already carries an adapter"),
        (lambda m: m.add_adapter("c", config(modules_to_save=["layers.0.mlp"])), "up_proj already carries an adapter"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(call, words):
    model = two()
    before = snapshot(model)
    with pytest.raises(fastpeft.FastpeftError, match=words):
        call(model)
    model.set_adapter("a")
    assert differences(before, snapshot(model)) == []


def test_adapters_that_train_the_same_things_do_not_go_together():
    model = fastpeft.patch(tiny("roberta", "SEQ_CLS"), fastpeft.LoraConfig(task_type="SEQ_CLS", bias="all"))
    before = snapshot(model)
    for settings, words in (
        ({"bias": "lora_only"}, "bias='lora_only' and so has 'default'"),
        ({"target_modules": ["classifier.dense"]}, "classifier.dense is already trained whole"),
        ({"modules_to_save": ["classifier.dense"]}, "classifier.dense.* as part of more"),
    ):
        with pytest.raises(fastpeft.FastpeftError, match=words):
            model.add_adapter("b", fastpeft.LoraConfig(**{"target_modules": ["query"], **settings}))
        assert differences(before, snapshot(model)) == []


def test_the_methods_take_what_those_of_peft_take():
    import inspect

    from peft import PeftModel
    from peft.tuners.lora import LoraModel

    model = two()
    compared = 0
    for cls in (PeftModel, LoraModel):
        for name in (
            *("save_pretrained", "load_adapter", "add_adapter", "set_adapter", "delete_adapter", "disable_adapter"),
            *("print_trainable_parameters", "get_nb_trainable_parameters", "merge_and_unload", "unload"),
            *("merge_adapter", "unmerge_adapter"),
        ):
            if (theirs := inspect.getattr_static(cls, name, None)) is not None and (
                cls is LoraModel or name in vars(cls)
            ):
                ours = inspect.signature(getattr(model, name)).parameters
                assert list(ours) == list(inspect.signature(theirs).parameters)[1:], name
                compared += 1
    assert compared >= 12


def test_an_adapter_can_be_active_and_frozen():
    model = two()
    model.set_adapter("b", inference_mode=True)
    assert model.active_adapters == ["b"] and trained(model) == set()
    model.add_adapter("c", config())
    assert trained(model) == set()
    model.set_adapter("b")
    assert trained(model) == {"b"}


def test_the_vocabulary_does_not_change_under_an_adapter():
    model = two()
    model.resize_token_embeddings(103)
    assert result(model, batch()).shape[-1] == 103
    for settings in (
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = fastpeft.patch(tiny(), config(**settings))
        before = snapshot(model)
        with pytest.raises(fastpeft.PatchError, match="97 tokens, not 103.*unpatch"):
            model.resize_token_embeddings(103)
        assert differences(before, snapshot(model)) == []
        assert model.resize_token_embeddings() is model.get_input_embeddings()


@torch.no_grad()
def test_blocks_override_and_nest_and_end(expected):
    model = two()

    def now():
        return next(names for names, logits in expected.items() if torch.equal(result(model, batch()), logits))

    with fastpeft.use_adapter(model, "b") as same:
        assert same is model and now() == ("b",)
        with model.disable_adapter():
            assert now() == ()
            with fastpeft.use_adapter(model, ["a", "b"]):
                assert now() == ("a", "b")
            assert now() == ()
        model.set_adapter(["a", "b"])
        assert now() == ("b",)
    assert now() == ("a", "b")
    with pytest.raises(ZeroDivisionError), fastpeft.disable_adapter(model):
        1 / 0  # noqa: B018
    assert now() == ("a", "b")
    other = two()
    with fastpeft.use_adapter(other, "b"):
        assert now() == ("a", "b")


@torch.no_grad()
def test_compiled_calls_inside_a_block_use_its_adapters():
    expected, model = outputs(layers=1), two(layers=1)
    compiled = torch.compile(model, backend="eager")
    for names in expected:
        with fastpeft.use_adapter(model, list(names)) if names else fastpeft.disable_adapter(model):
            torch.testing.assert_close(result(compiled, batch()), expected[names])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("names", [("b",), ("a",), ()], ids=["b", "a", "none"])
def test_backward_after_the_block_is_that_of_the_forward(kwargs, names):
    model = two().train()
    model.set_adapter(["a", "b"])  # so that both want gradients
    with fastpeft.use_adapter(model, list(names)):
        model(**batch()).loss.backward() if names else None
    direct = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in direct} == set(names)
    model.zero_grad()
    if kwargs is not None:
        model.gradient_checkpointing_enable(kwargs)
    block = fastpeft.use_adapter(model, list(names)) if names else fastpeft.disable_adapter(model)
    embeddings = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    with block:
        loss = model(inputs_embeds=embeddings, labels=batch()["labels"], attention_mask=batch()["attention_mask"]).loss
    model.set_adapter(["b", "a"])
    with fastpeft.use_adapter(model, "a"):
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == direct.keys() and embeddings.grad.any()
    for name, grad in direct.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("setting", ["use_adapter", "disable_adapter"])
def test_threads_do_not_disturb_each_other(setting, expected):
    model = two()
    wrong, started = [], threading.Barrier(2)

    def call(names) -> None:
        started.wait()
        for _ in range(100):
            block = fastpeft.use_adapter(model, list(names)) if names else fastpeft.disable_adapter(model)
            with block, torch.no_grad():
                if not torch.equal(result(model, batch()), expected[names]):
                    wrong.append(names)

    choices = (("a",), ("b",)) if setting == "use_adapter" else ((), ("a", "b"))
    threads = [threading.Thread(target=call, args=(names,)) for names in choices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(result(model, batch()), expected[("a",)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mistral"])
def test_generating_is_as_in_peft(family):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    hf, ours = patched_pair(family, {}, task=task)
    randomise(hf, ours)
    inputs = {key: value[:, :6] for key, value in batch(task).items() if key != "labels"}
    for settings in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}):
        found = []
        for model in (hf, ours):
            torch.manual_seed(1)
            found.append(model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **settings))
        assert torch.equal(found[0], found[1])


def test_generating_in_a_thread_uses_the_model_and_its_own_blocks():
    model = two()
    ids = batch()["input_ids"][:1, :4]
    found = {}

    def generate(key, block) -> None:
        with block:
            found[key] = model.generate(ids, max_new_tokens=12, do_sample=False)

    for key in ("a", "b"):
        model.set_adapter(key)
        generate(key, contextlib.nullcontext())
    assert not torch.equal(found["a"], found["b"])
    blocks = {"plain": contextlib.nullcontext(), "inside": fastpeft.use_adapter(model, "a")}
    threads = [threading.Thread(target=generate, args=item) for item in blocks.items()]
    with fastpeft.disable_adapter(model):  # of this thread
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(found["plain"], found["b"]) and torch.equal(found["inside"], found["a"])


# Merging.


@torch.no_grad()
def test_merging_and_what_is_done_meanwhile(expected):
    model = two()
    before = snapshot(model)
    model.set_adapter(["a", "b"])
    fastpeft.merge(model)
    merged = result(model, batch())
    close(merged, expected[("a", "b")], 1e-5)
    with pytest.warns(UserWarning, match="already merged"):
        fastpeft.merge(model)
    assert torch.equal(result(model, batch()), merged)
    with fastpeft.disable_adapter(model):
        assert torch.equal(result(model, batch()), expected[()])
    assert torch.equal(result(model, batch()), merged)
    for call in (
        lambda: fastpeft.use_adapter(model, "a").__enter__(),
        lambda: model.delete_adapter("a"),
        lambda: model.add_adapter("c", config()),
    ):
        with pytest.raises(fastpeft.PatchError, match="merged.*unmerge first"):
            call()
    with fastpeft.use_adapter(model, ["a", "b"]):
        assert torch.equal(result(model, batch()), merged)
    with pytest.warns(UserWarning, match="a, b was merged and is unmerged"):
        model.set_adapter("b")
    assert torch.equal(result(model, batch()), expected[("b",)])
    model.merge_adapter()
    model.unmerge_adapter()
    model.unmerge_adapter()
    model.set_adapter("a")
    assert differences(before, snapshot(model)) == []


@torch.no_grad()
def test_other_adapters_than_the_active_ones_can_be_merged(expected):
    model = two()
    model.merge_adapter(adapter_names=["b"])
    close(result(model, batch()), expected[("b",)], 1e-5)
    with model.disable_adapter():
        assert torch.equal(result(model, batch()), expected[()])
    close(result(model, batch()), expected[("b",)], 1e-5)
    model.unmerge_adapter()
    assert torch.equal(result(model, batch()), expected[("a",)])
    model.merge_adapter()
    plain = model.merge_and_unload(adapter_names=["a", "b"], safe_merge=True, progressbar=True)
    close(result(plain, batch()), expected[("a", "b")], 1e-5)
    assert not hasattr(plain, "peft_config")


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged(bad):
    model = two()
    before = snapshot(model)
    broken = model.model.layers[1].self_attn.v_proj.lora_B["a"].weight
    good = broken.clone()
    broken[0, 0] = bad
    for merge in (fastpeft.merge, fastpeft.merge_and_unload):
        with pytest.raises(fastpeft.PatchError, match=r"merge: model\.layers\.1\.self_attn\.v_proj: .*NaN or Inf"):
            merge(model)
        assert torch.isnan(result(model, batch())).any() or bad == float("inf")
    broken.copy_(good)
    assert differences(before, snapshot(model)) == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unmerging_in_half_precision_is_exact(dtype):
    torch.manual_seed(11)
    model = fastpeft.patch(tiny(dtype=dtype), config(use_dora=True))
    randomise(model)
    expected, weights = result(model, batch()), {name: p.clone() for name, p in model.named_parameters()}
    fastpeft.merge(model)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])]
    assert len(changed) == 6
    fastpeft.unmerge(model)
    assert torch.equal(result(model, batch()), expected)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@torch.no_grad()
def test_merging_and_unloading_gives_the_plain_model(expected):
    from transformers import LlamaForCausalLM

    model = two(modules_to_save=["norm"], bias="all")
    before = result(model, batch())
    plain = quietly(fastpeft.merge_and_unload, model)
    assert plain is model and type(plain) is LlamaForCausalLM
    close(result(plain, batch()), before, 1e-5)
    assert plain.state_dict().keys() == tiny().state_dict().keys()
    fastpeft.patch(plain, config())
    assert torch.equal(result(two().unload(), batch()), expected[()])
