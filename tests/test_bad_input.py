"""What cannot be served is refused before anything changes, by one of our own errors whose words name the value, the
place and the way out."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import quietly, randomise, result
from tests.two_adapters import config, two

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(call, model, error, *words) -> None:
    """The call raises this error with all of these words, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        quietly(call)
    assert isinstance(caught.value, fastpeft.FastpeftError) and isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert differences(before, snapshot(model)) == []


SETTINGS = [
    # targets
    ({"target_modules": ["q_pro"]}, fastpeft.TargetError, ("'q_pro'", "did you mean 'q_proj'", "LlamaForCausalLM")),
    ({"target_modules": "q_proj"}, fastpeft.TargetError, ("'q_proj'", "regular expression", "['name']")),
    ({"target_modules": []}, fastpeft.TargetError, ("names nothing", "'down_proj'")),
    ({"target_modules": ["mlp"]}, fastpeft.TargetError, ("layers.0.mlp is a LlamaMLP", "Linear", "Narrow")),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        fastpeft.TargetError,
        ("exclude_modules", "excluded"),
    ),
    ({"layers_to_transform": [7]}, fastpeft.TargetError, ("[7]", "0 to 1")),
    ({"modules_to_save": ["lm_hed"]}, fastpeft.TargetError, ("'lm_hed'", "lm_head")),
    ({"modules_to_save": ["layers"]}, fastpeft.TargetError, ("model.layers", "ModuleList")),
    ({"target_modules": "(a+)+$"}, fastpeft.FastpeftError, ("(a+)+$",)),
    ({"target_modules": "*q"}, fastpeft.ConfigError, ("target_modules='*q'",)),
    # numbers
    ({"r": 0}, fastpeft.ConfigError, ("r=0", "at least 1")),
    ({"r": -3}, fastpeft.ConfigError, ("r=-3", "at least 1")),
    ({"r": 2.0}, fastpeft.ConfigError, ("r=2.0", "int")),
    ({"r": True}, fastpeft.ConfigError, ("r=True",)),
    ({"r": 10**30}, fastpeft.ConfigError, ("r=10000", "q_proj", "65536")),
    ({"lora_alpha": float("nan")}, fastpeft.ConfigError, ("lora_alpha=nan", "finite")),
    ({"lora_alpha": float("inf")}, fastpeft.ConfigError, ("lora_alpha=inf", "finite")),
    ({"lora_alpha": 1e9}, fastpeft.ConfigError, ("lora_alpha=1000000000.0", "q_proj", "lower lora_alpha")),
    ({"lora_alpha": "16"}, fastpeft.ConfigError, ("lora_alpha='16'",)),
    ({"lora_dropout": 1.0}, fastpeft.ConfigError, ("lora_dropout=1.0", "below 1")),
    ({"lora_dropout": -0.1}, fastpeft.ConfigError, ("lora_dropout=-0.1",)),
    ({"rank_pattern": {"q_proj": 0}}, fastpeft.ConfigError, ("rank_pattern['q_proj']=0",)),
    ({"alpha_pattern": {"q_proj": float("nan")}}, fastpeft.ConfigError, ("alpha_pattern['q_proj']=nan",)),
    # words
    ({"bias": "lora"}, fastpeft.ConfigError, ("bias='lora'", "lora_only")),
    ({"task_type": "CHAT"}, fastpeft.ConfigError, ("task_type='CHAT'", "CAUSAL_LM")),
    ({"init_lora_weights": "eva"}, fastpeft.ConfigError, ("init_lora_weights='eva'", "pissa")),
    ({"peft_type": "MAGIC"}, fastpeft.ConfigError, ("peft_type='MAGIC'", "LORA")),
    ({"use_dora": "yes"}, fastpeft.ConfigError, ("use_dora='yes'", "True or False")),
    # combinations
    ({"lora_bias": True, "use_dora": True}, fastpeft.ConfigError, ("lora_bias", "use_dora")),
    ({"lora_bias": True, "target_modules": ["embed_tokens"]}, fastpeft.ConfigError, ("lora_bias", "embed_tokens")),
    ({"init_lora_weights": "pissa", "r": 40}, fastpeft.ConfigError, ("'pissa'", "r=40", "q_proj", "lower r")),
    *(
        ({"init_lora_weights": init, "lora_alpha": alpha}, fastpeft.ConfigError, (repr(init), "q_proj", "lora_alpha"))
        for init in ("pissa", "pissa_niter_4")
        for alpha in (0, -4)
    ),
    (
        {"init_lora_weights": "pissa", "alpha_pattern": {"v_proj": 0}},
        fastpeft.ConfigError,
        ("'pissa'", "v_proj", "alpha_pattern"),
    ),
    ({"init_lora_weights": "pissa", "lora_alpha": 1e-42}, fastpeft.PatchError, ("'pissa'", "infinite", "2.5e-43")),
    (
        {"init_lora_weights": "olora", "target_modules": ["embed_tokens"]},
        fastpeft.ConfigError,
        ("'olora'", "embed_tokens"),
    ),
]


@pytest.mark.parametrize(("settings", "error", "words"), SETTINGS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("form", ["config", "dict", "another adapter"])
def test_a_configuration_that_cannot_be_honoured(form, settings, error, words):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    if form == "another adapter":
        model = two()
        refused(lambda: model.add_adapter("c", fastpeft.LoraConfig(**settings)), model, error, *words)
        return
    model = tiny().train()
    if form == "config":
        refused(lambda: fastpeft.patch(model, fastpeft.LoraConfig(**settings)), model, error, *words)
    else:
        refused(lambda: fastpeft.patch(model, {"peft_type": "LORA", **settings}), model, error, *words)


UNHONOURED = [each.name for each in fields(fastpeft.LoraConfig) if each.metadata.get("honoured") is False]
NOT_DEFAULT = {"megatron_core": "other", "qalora_group_size": 8, "use_qalora": True, "ensure_weight_tying": True}


@pytest.mark.parametrize("name", [*UNHONOURED, "a_field_of_tomorrow"])
@pytest.mark.parametrize("form", ["config", "dict", "file", "peft"])
def test_a_field_that_is_not_honoured_is_named(form, name, tmp_path):
    import peft

    value = NOT_DEFAULT.get(name, {"some": 1})
    model = tiny()
    settings = {"target_modules": ["q_proj"], name: value}
    if form == "file":
        two().save_pretrained(tmp_path)
        written = json.loads((tmp_path / "a" / CONFIG).read_text())
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**written, name: value}))
        call = lambda: fastpeft.load_adapter(model, tmp_path / "a")  # noqa: E731
    elif form == "dict":
        call = lambda: fastpeft.patch(model, {"peft_type": "LORA", **settings})  # noqa: E731
    elif name == "a_field_of_tomorrow":  # which neither class takes
        with pytest.raises(TypeError, match=name):
            fastpeft.LoraConfig(**settings)
        return
    elif form == "peft":
        theirs = peft.LoraConfig(target_modules=["q_proj"])
        setattr(theirs, name, value)
        call = lambda: fastpeft.patch(model, theirs)  # noqa: E731
    else:
        call = lambda: fastpeft.patch(model, fastpeft.LoraConfig(**settings))  # noqa: E731
    refused(call, model, fastpeft.ConfigError, f"{name}=", str(value)[:5])


def test_the_list_of_fields_that_are_not_honoured_is_not_empty():
    assert {"trainable_token_indices", "layer_replication", "loftq_config"} <= set(UNHONOURED)


def int8() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def attention() -> nn.Module:
    return nn.ModuleDict({"1": nn.MultiheadAttention(4, 2)})


def class_of(library: str) -> nn.Module:
    layer = type("Layer", (nn.Linear,), {"__module__": f"{library}.kernels"})
    return nn.Sequential(nn.Linear(4, 4), layer(4, 4))


def on_meta() -> nn.Module:
    return tiny().to("meta")


def partly_compiled():
    model = tiny()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def peft_model():
    import peft

    return peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))


MODELS = [
    (int8, fastpeft.TargetError, ("dtype torch.int8", "exclude_modules")),
    (attention, fastpeft.TargetError, ("1 is a MultiheadAttention", "exclude_modules")),
    (on_meta, fastpeft.TargetError, ("model.layers.0.self_attn.q_proj is on the meta device", "load")),
    (lambda: class_of("unsloth"), fastpeft.PatchError, ("1 is a unsloth layer", "not patched again")),
    (lambda: class_of("axolotl"), fastpeft.PatchError, ("1 is a axolotl layer",)),
    (peft_model, fastpeft.PatchError, ("PeftModel has adapters of peft's", "fastpeft.patch(model)", "add_adapter")),
    (lambda: peft_model().base_model.model, fastpeft.PatchError, ("LlamaForCausalLM has adapters of peft's",)),
    (lambda: two(), fastpeft.PatchError, ("already patched", "'a', 'b'", "unpatch")),
    (lambda: two().model, fastpeft.PatchError, ("layers.0.self_attn.q_proj is patched as part of another model",)),
    (
        lambda: torch.compile(tiny(), backend="eager"),
        fastpeft.PatchError,
        ("OptimizedModule", "'_orig_mod'", "then compile"),
    ),
    (
        lambda: partly_compiled(),
        fastpeft.PatchError,
        ("model.layers.1", "compiled before the patch", "patch the model first"),
    ),
    (lambda: nn.DataParallel(tiny()), fastpeft.PatchError, ("DataParallel", "'module'", "then")),
]


@pytest.mark.parametrize(("build", "error", "words"), MODELS, ids=lambda value: getattr(value, "__name__", "")[:20])
def test_a_model_that_cannot_be_patched(build, error, words):
    model = build()
    refused(lambda: fastpeft.patch(model, {"peft_type": "LORA", "target_modules": r"1|.*q_proj"}), model, error, *words)


def test_a_model_without_shapes():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(fastpeft.PatchError, match="lazy modules without shapes; run a batch through it first"):
        fastpeft.patch(model, fastpeft.LoraConfig(target_modules=["0"]))
    assert type(model) is nn.Sequential and model[0].weight.requires_grad
    model(torch.ones(2, 4))
    fastpeft.patch(model, fastpeft.LoraConfig(target_modules=["1"]))


@pytest.mark.parametrize("model", [None, "meta-llama/Llama-3.2-1B", {"a": nn.Linear(2, 2)}, nn.Linear, 3])
def test_what_is_no_model(model):
    for call in (lambda: fastpeft.patch(model, config()), lambda: fastpeft.load_adapter(model, "/somewhere")):
        with pytest.raises(fastpeft.PatchError, match=f"{type(model).__name__}.*torch.nn.Module is needed"):
            call()
    for verb in (fastpeft.unpatch, fastpeft.report, fastpeft.merge, fastpeft.adapter_state_dict):
        with pytest.raises(fastpeft.PatchError, match="not patched"):
            verb(model)


@pytest.mark.parametrize("given", [None, "lora", 16, ["q_proj"], object()])
def test_what_is_no_configuration(given):
    model = tiny()
    refused(lambda: fastpeft.patch(model, given), model, fastpeft.ConfigError, "LoraConfig(r=")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a" * 65, "lora_A", "keys", 3, None, "x y"])
def test_what_is_no_name_of_an_adapter(name, tmp_path):
    model = tiny()
    two().save_pretrained(tmp_path)
    refused(lambda: fastpeft.patch(model, config(), adapter_name=name), model, fastpeft.FastpeftError, "adapter's name")
    call = lambda: fastpeft.load_adapter(model, tmp_path / "a", adapter_name=name)  # noqa: E731
    refused(call, model, fastpeft.FastpeftError, "adapter's name")


def test_a_backend_that_does_not_exist():
    model = tiny()
    call = lambda: fastpeft.patch(model, config(), backend="cuda")  # noqa: E731
    refused(call, model, fastpeft.BackendError, "patch(backend=)", "'cuda'", "'triton'")


# Adapter directories.


def rewrite(change):
    """A change of the weights' file: `change(tensors)`."""

    def edit(directory) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return edit


def rename(tensors) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def put(name, tensor):
    return rewrite(lambda tensors: tensors.update({name: tensor}))


def settings(**values):
    """A change of the configuration."""

    def edit(directory) -> None:
        written = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**written, **values}))

    return edit


def pickled(directory) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "adapter_model.bin")
    (directory / WEIGHTS).unlink()


def truncated(directory) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-100])


File = fastpeft.AdapterFileError
DIRECTORIES = {
    "missing tensor": (rewrite(lambda t: t.pop(f"{Q}.lora_A.weight")), File, ("1 of 12", "missing", f"{Q}.lora_A")),
    "none fits": (rewrite(rename), File, ("none of its 12", "other.")),
    "foreign tensor": (put("extra", torch.ones(1)), File, ("1 tensors", ": extra;", "declare")),
    "base tensor": (put("base_model.model.lm_head.weight", torch.zeros(97, 32)), File, ("lm_head.weight", "declare")),
    "base of a target": (put(f"{Q}.base_layer.weight", torch.zeros(32, 32)), File, ("base_layer.weight", "declare")),
    "another shape": (put(f"{Q}.lora_B.weight", torch.zeros(4, 32)), File, ("(4, 32)", "(32, 4)", "base model")),
    "not finite": (
        put(f"{Q}.lora_B.weight", torch.full((32, 4), float("nan"))),
        File,
        (f"{Q}.lora_B", "NaN", "earlier"),
    ),
    "beyond fp32": (
        put(f"{Q}.lora_B.weight", torch.full((32, 4), 1e300, dtype=torch.double)),
        File,
        (f"{Q}.lora_B", "1e+300", "float32"),
    ),
    "integers": (put(f"{Q}.lora_B.weight", torch.ones(32, 4).int()), File, ("lora_B", "I32")),
    "another rank": (settings(r=8), File, ("(4, 48)", "(8, 48)", "is r what")),
    "another bias": (settings(lora_bias=True), File, ("missing", "lora_B.bias")),
    "no such module": (settings(target_modules=["c_attn"]), fastpeft.TargetError, ("c_attn", "LlamaForCausalLM")),
    "another method": (settings(peft_type="P_TUNING"), fastpeft.ConfigError, ("bias='none'", "PromptEncoderConfig")),
    "unknown method": (settings(peft_type="MAGIC"), fastpeft.ConfigError, ("'MAGIC'", "LORA")),
    "no method": (settings(peft_type=None), File, ("peft_type", "adapter_config.json")),
    "wrong alpha": (settings(lora_alpha="NaN"), fastpeft.ConfigError, ("lora_alpha='NaN'",)),
    "NaN in JSON": (settings(lora_alpha=float("nan")), fastpeft.FastpeftError, ("NaN", "adapter_config.json")),
    "huge rank": (settings(r=10**9), fastpeft.ConfigError, ("r=1000000000", "65536")),
    "pickle": (pickled, File, ("adapter_model.bin", "pickle", "weights_only=True", "save_file")),
    "truncated": (truncated, File, (WEIGHTS,)),
    "empty file": (lambda d: (d / WEIGHTS).write_bytes(b""), File, (WEIGHTS,)),
    "garbage": (lambda d: (d / WEIGHTS).write_bytes(b"\x00" * 999), File, (WEIGHTS,)),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), File, (WEIGHTS, "is missing")),
    "no configuration": (lambda d: (d / CONFIG).unlink(), File, (CONFIG, "is missing")),
    "no JSON": (lambda d: (d / CONFIG).write_text("{"), File, (CONFIG,)),
    "no directory": (shutil.rmtree, File, ("does not exist",)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model = fastpeft.patch(tiny(), config())
    randomise(model)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", DIRECTORIES)
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_a_directory_that_does_not_fit_changes_nothing(patched, kind, saved, tmp_path):
    edit, error, words = DIRECTORIES[kind]
    directory = tmp_path / "adapter"
    shutil.copytree(saved, directory)
    (directory / "fastpeft.json").unlink()
    edit(directory)
    model = two().train() if patched else tiny().train()
    refused(lambda: fastpeft.load_adapter(model, directory, adapter_name="c"), model, error, *words)


@pytest.mark.parametrize("patched", [False, True])
def test_the_directory_that_those_are_made_of_fits(patched, saved):
    model = fastpeft.load_adapter(two() if patched else tiny(), saved, adapter_name="c")
    model.set_adapter("c")
    assert not torch.allclose(result(model, batch()), result(tiny(), batch()))


def test_an_adapter_of_another_model(saved):
    model = tiny("gpt2")
    call = lambda: fastpeft.load_adapter(model, saved)  # noqa: E731
    refused(call, model, fastpeft.TargetError, "'q_proj'", "GPT2LMHeadModel", "'c_attn'")


def test_a_name_on_the_hub_is_not_fetched():
    model = tiny()
    call = lambda: fastpeft.load_adapter(model, "someone/llama-lora")  # noqa: E731
    refused(call, model, fastpeft.AdapterFileError, "someone/llama-lora does not exist", "snapshot_download")


def test_tied_weights_are_not_decomposed():
    model = tiny("llama-tied")
    call = lambda: fastpeft.patch(model, config(target_modules=["lm_head"], init_lora_weights="pissa"))  # noqa: E731
    refused(call, model, fastpeft.ConfigError, "'pissa'", "lm_head", "tied", "exclude it")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_broken_weights_are_not_decomposed(init, bad):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = bad
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(fastpeft.TargetError, match=f"'{init}': the weight of model.layers.1.self_attn.v_proj has NaN"):
        fastpeft.patch(model, config(init_lora_weights=init))
    assert "_fastpeft" not in vars(model) and all(p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(before[name].view(torch.uint8), t.view(torch.uint8)) for name, t in model.state_dict().items()
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_decomposition_that_fails(init, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd" if init == "pissa" else "qr", fail)
    model = tiny()
    words = (f"'{init}'", "(32, 32)", "did not converge")
    refused(lambda: fastpeft.patch(model, config(init_lora_weights=init)), model, fastpeft.PatchError, *words)


def test_a_counter_is_not_trained_whole():
    model = nn.ModuleDict({"lin": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    call = lambda: fastpeft.patch(model, fastpeft.LoraConfig(target_modules=["lin"], modules_to_save=["norm"]))  # noqa: E731
    refused(call, model, fastpeft.TargetError, "norm.num_batches_tracked", "torch.int64", "leave the module out")
