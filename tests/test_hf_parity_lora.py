"""LoRA beside Hugging Face peft on whole models: the start bit for bit, outputs, gradients, files, loading, merging."""

import contextlib
import copy
import functools

import pytest
import torch
from safetensors.torch import load_file

from tests.models import batch, tiny
from tests.peft_pair import (
    WEIGHTS,
    assert_interchangeable,
    assert_same,
    assert_same_files,
    assert_same_line,
    assert_same_merged,
    assert_same_start,
    assert_same_step,
    by_base_name,
    close,
    pair_of,
    patched_pair,
    randomise,
    result,
)

DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "bloom", "opt", "gpt_neox"),
    *("phi", "phi3", "mixtral"),
)
WITHOUT_DEFAULT = {"phi3": ["qkv_proj", "o_proj"], "mixtral": ["q_proj", "v_proj"]}  # peft refuses or fails without

# (family, task, target_modules); None is peft's default for the family.
CASES = [
    *((family, "CAUSAL_LM", WITHOUT_DEFAULT.get(family)) for family in DECODERS),
    # mixtral's experts are one parameter in transformers 5, which peft adapts under all-linear and we leave out
    *((family, "CAUSAL_LM", "all-linear") for family in DECODERS if family != "mixtral"),
    *((family, "SEQ_2_SEQ_LM", targets) for family in ("t5", "bart") for targets in (None, "all-linear")),
    *((family, "SEQ_CLS", None) for family in ("bert", "roberta", "llama", "gpt2", "bloom", "opt")),
    *((family, "SEQ_CLS", "all-linear") for family in ("bert", "roberta", "llama")),
    *((family, "TOKEN_CLS", None) for family in ("bert", "roberta", "llama", "gpt2")),
    *((family, "QUESTION_ANS", None) for family in ("bert", "llama", "t5", "bart")),
]


@pytest.mark.parametrize(("family", "task", "targets"), CASES)
def test_a_family_is_as_in_peft(family, task, targets, tmp_path):
    settings = {} if targets is None else {"target_modules": targets}
    assert_same(lambda: tiny(family, task), settings, task, tmp_path)


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_fc"]}
TARGETS = {"llama": LLAMA, "llama-tied": LLAMA, "gpt2": GPT2}

VARIANTS = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 8, "c_attn": 2, r".*1\..*down_proj": 3},
        "alpha_pattern": {"q_proj": 3, "down_proj": 32, "c_fc": 5},
    },
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "layers": {"layers_to_transform": [1]},
    "exclude": {"exclude_modules": ["layers.0.self_attn.q_proj", "h.0.attn.c_attn"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "not-neutral": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "bias": "all"},
    "dora-pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_variant_is_as_in_peft(family, variant, tmp_path):
    assert_same(lambda: tiny(family), {**TARGETS[family], **VARIANTS[variant]}, "CAUSAL_LM", tmp_path)


@pytest.mark.parametrize(
    ("family", "saved"),
    [
        *(("llama", name) for name in ("lm_head", "embed_tokens", "input_layernorm", "layers.1.mlp")),
        *(("gpt2", name) for name in ("lm_head", "wte", "ln_1")),
        ("llama-tied", "lm_head"),
        ("llama-tied", "embed_tokens"),
    ],
)
def test_modules_to_save_are_as_in_peft(family, saved, tmp_path):
    targets = ["q_proj", "v_proj"] if family.startswith("llama") else ["c_attn"]
    settings = {"target_modules": targets, "modules_to_save": [saved]}
    assert_same(lambda: tiny(family), settings, "CAUSAL_LM", tmp_path)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"modules_to_save": ["bert.embeddings"]}),  # holds a buffer that is not saved
        ("roberta", {"modules_to_save": ["LayerNorm"]}),
        *((family, {"bias": "all"}) for family in ("llama", "bert", "roberta")),
    ],
)
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_heads_beside_other_trained_modules_are_as_in_peft(family, settings, task, tmp_path):
    assert_same(lambda: tiny(family, task), settings, task, tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", ["q", "v"]])
def test_names_with_bias_in_them_are_no_biases(targets, tmp_path):
    """T5's relative_attention_bias.weight is not trained by bias="all"."""
    settings = {"target_modules": targets, "bias": "all"}
    assert_same(functools.partial(tiny, "t5", "SEQ_2_SEQ_LM"), settings, "SEQ_2_SEQ_LM", tmp_path)


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


def test_the_biases_of_torchs_attention_are_as_in_peft(tmp_path):
    """in_proj_bias is none by peft's rule, out_proj.bias is one."""
    hf, ours = pair_of(Attends, {"target_modules": ["out"], "bias": "all"})
    trained = {name for name, parameter in by_base_name(ours).items() if parameter.requires_grad}
    assert trained == {name for name, parameter in by_base_name(hf).items() if parameter.requires_grad}
    assert "attention.out_proj.bias" in trained and "attention.in_proj_bias" not in trained
    hf.save_pretrained(tmp_path / "hf")
    ours.save_pretrained(tmp_path / "ours")
    found = [set(load_file(tmp_path / who / WEIGHTS)) for who in ("ours", "hf")]
    assert found[0] == found[1]


def test_olora_is_as_in_peft(tmp_path):
    assert_same(lambda: tiny(), {**LLAMA, "init_lora_weights": "olora"}, "CAUSAL_LM", tmp_path)


def test_olora_on_conv1d_is_a_decomposition_too():
    # peft decomposes GPT-2's transposed weight as if it were not, which gives A and B each other's shapes
    import fastpeft

    inputs = batch()
    expected = result(tiny("gpt2"), inputs)
    ours = fastpeft.patch(tiny("gpt2"), fastpeft.LoraConfig(r=4, init_lora_weights="olora", **GPT2))
    close(result(ours, inputs), expected, 1e-5)
    with fastpeft.disable_adapter(ours):
        assert not torch.allclose(result(ours, inputs), expected, rtol=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_randomised_pissa_is_as_in_peft(family, tmp_path):
    # loading repeats the random part in both libraries, so the seed decides, and ours warns
    import peft

    import fastpeft

    settings = {**TARGETS[family], "init_lora_weights": "pissa_niter_4"}
    hf, ours = patched_pair(family, settings)
    assert_same_start(hf, ours)
    randomise(hf, ours)
    assert_same_step(hf, ours, batch())
    assert_same_files(hf, ours, tmp_path)
    loaded = []
    for load in (peft.PeftModel.from_pretrained, fastpeft.load_adapter):
        torch.manual_seed(11)
        with pytest.warns(UserWarning, match="seed") if load is fastpeft.load_adapter else contextlib.nullcontext():
            loaded.append(result(load(tiny(family), tmp_path / "hf"), batch()))
    close(loaded[1], loaded[0], 1e-5)
    close(loaded[1], result(ours, batch()), 1e-5)
    assert_same_merged(hf, ours, batch())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_bias_is_as_in_peft(family, tmp_path):
    build = functools.partial(tiny, family)
    hf, ours = pair_of(build, {**TARGETS[family], "lora_bias": True, "task_type": "CAUSAL_LM"})
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    randomise(hf, ours)
    assert_same_step(hf, ours, batch())
    assert_same_files(hf, ours, tmp_path)
    assert_interchangeable(hf, ours, build, batch(), tmp_path)
    if family == "gpt2":
        assert_same_merged(hf, ours, batch())
    else:  # Llama's layers have no bias to merge into
        before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*lora_bias"):
            ours.merge_and_unload()
        assert all(torch.equal(before[name], parameter) for name, parameter in ours.named_parameters())


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["embed_tokens", "q_proj"]),
        ("llama", ["lm_head", "q_proj"]),
        ("llama", r".*(embed_tokens|q_proj)"),
        ("llama", ["model.embed_tokens", "q_proj"]),  # peft saves base weights only for the bare name
        ("llama-tied", ["embed_tokens", "lm_head", "q_proj"]),
        ("gpt2", ["wte", "wpe", "c_attn"]),
        ("gpt2", ["wte", "lm_head", "c_attn"]),
        ("phi", ["lm_head", "q_proj"]),  # with a bias
        ("gemma3", ["embed_tokens", "q_proj"]),  # multiplies its output by embed_scale
        ("bart", ["shared", "q_proj"]),
        ("t5", ["shared", "q"]),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_targeted_embeddings_are_as_in_peft(family, targets, use_dora, tmp_path):
    task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "CAUSAL_LM"
    build = functools.partial(tiny, family, task)
    hf, ours = pair_of(build, {"target_modules": targets, "use_dora": use_dora, "task_type": task})
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    randomise(hf, ours)
    inputs = batch(task)
    assert_same_step(hf, ours, inputs)
    assert_same_files(hf, ours, tmp_path)
    assert_interchangeable(hf, ours, build, inputs, tmp_path)
    if family in ("llama", "phi"):
        assert_same_merged(hf, ours, inputs)
    else:  # tied: peft's merged head is not what it was (off by 2 to 20 here), ours is
        before = result(ours, inputs)
        with pytest.warns(UserWarning, match=r"shared its weight .* tie_weights\(\)"):
            merged = ours.merge_and_unload()
        close(result(merged, inputs), before, 1e-5)


@pytest.mark.parametrize("init", ["gaussian", False])
def test_embeddings_start_as_in_peft(init):
    hf, ours = patched_pair("llama", {"target_modules": ["embed_tokens"], "init_lora_weights": init})
    assert_same_start(hf, ours)
    randomise(hf, ours)
    assert_same_step(hf, ours, batch())


HALF = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
    "embeddings": {"target_modules": ["embed_tokens", "wte", "q_proj", "c_attn"]},
}


@torch.no_grad()
def assert_as_exact(hf, ours, dtype) -> None:
    """Our rms error against peft's model in float64 is at most 1.1 of peft's own."""
    oracle = copy.deepcopy(hf).double()
    errors = [0.0, 0.0]
    for rows in (9, 12, 20):  # 369 rows of logits: with a few, the ratio of two equally good ones varies by 10 %
        inputs = batch(rows=rows)
        exact = result(oracle, inputs)
        for i, model in enumerate((hf, ours)):
            found = result(model, inputs)
            assert found.dtype == dtype
            errors[i] += float((found.double() - exact).square().sum())
    assert 0 < errors[1] <= 1.1**2 * errors[0]


@pytest.mark.filterwarnings("ignore:target_modules has")
@pytest.mark.parametrize("variant", HALF)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision_starts_as_in_peft_and_is_as_exact(family, dtype, autocast_adapter_dtype, variant, tmp_path):
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    settings = {**TARGETS[family], **HALF[variant]}
    hf, ours = patched_pair(family, settings, dtype=dtype, **options)
    assert_same_start(hf, ours)
    randomise(hf, ours)
    assert_same_files(hf, ours, tmp_path)
    assert_as_exact(hf, ours, dtype)
    for model in (hf, ours):
        model(**batch()).loss.backward()
    found = by_base_name(ours)
    for name, parameter in by_base_name(hf).items():
        assert (found[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            assert found[name].grad.dtype == parameter.grad.dtype
            cosine = torch.cosine_similarity(found[name].grad.flatten().double(), parameter.grad.flatten().double(), 0)
            assert cosine > 0.99 or not parameter.grad.any(), (name, cosine)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_autocast_is_as_exact_as_in_peft(family, settings):
    """Each batch with an adapter of its own: how the numbers of one are rounded is the same in every row."""
    targets = TARGETS.get(family, {"target_modules": ["query", "value", "dense"]})
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    hf, ours = patched_pair(family, {**targets, **settings}, task=task)
    errors, slopes = [0.0, 0.0], [0.0, 0.0]
    for rows in (5, 8, 11):
        randomise(hf, ours, seed=rows)
        oracle, inputs = copy.deepcopy(hf).double(), batch(task, rows=rows)
        oracle.zero_grad()
        exact = oracle(**inputs)
        exact.loss.backward()
        for i, model in enumerate((hf, ours)):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**inputs)
            output.loss.backward()
            errors[i] += float((output.logits.double() - exact.logits).square().sum())
            wanted = by_base_name(oracle)
            for name, parameter in by_base_name(model).items():
                if parameter.requires_grad:
                    slope = wanted[name].grad
                    assert parameter.grad.dtype == torch.float32
                    slopes[i] += float((parameter.grad - slope).square().sum() / slope.square().sum().clamp(min=1e-12))
    assert 0 < errors[1] <= 1.1**2 * errors[0]
    assert 0 < slopes[1] <= 1.1**2 * slopes[0]


@torch.no_grad()
def test_dropout_has_the_mean_and_the_spread_of_peft():
    hf, ours = patched_pair("llama", {**LLAMA, "lora_dropout": 0.3, "r": 8})
    randomise(hf, ours)
    inputs = batch(length=4)
    assert torch.equal(result(ours, inputs), result(hf, inputs))
    samples = []
    for model in (hf.train(), ours.train()):
        torch.manual_seed(3)
        samples.append(torch.stack([result(model, inputs) for _ in range(200)]))
    means = [sample.mean(0) for sample in samples]
    spreads = [sample.var(0) for sample in samples]
    standard_error = ((spreads[0] + spreads[1]) / 200).sqrt()
    difference = (means[1] - means[0]) / standard_error
    # 776 strongly correlated standard normal numbers
    assert difference.square().mean() < 2.5 and difference.abs().max() < 6
    assert 0.8 < (spreads[1].mean() / spreads[0].mean()) < 1.25
    assert (means[0] - result(hf.eval(), inputs)).abs().max() < 20 * standard_error.max()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_dropout_of_the_base_is_that_of_peft(family):
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"

    def build():
        model = tiny(family, task)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        return model

    hf, ours = pair_of(build, {"task_type": task})
    randomise(hf, ours)
    found = []
    for model in (hf.train(), ours.train()):
        torch.manual_seed(1)
        found.append(result(model, batch(task)))
    close(found[1], found[0], 1e-5)
    assert not torch.allclose(found[0], result(hf.eval(), batch(task)), rtol=0.01)


CHECKPOINTS = [{"use_reentrant": False}, {"use_reentrant": True}]


def gradients(model, inputs, seed=5) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found and all(grad is not None for grad in found.values())
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", CHECKPOINTS, ids=["direct", "reentrant"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "all"}], ids=["plain", "dora", "bias"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_checkpointing_changes_no_bit_and_dropout_is_drawn_again(family, settings, kwargs, before):
    import fastpeft

    config = fastpeft.LoraConfig(r=4, lora_dropout=0.4, task_type="CAUSAL_LM", **TARGETS[family], **settings)
    torch.manual_seed(11)
    plain = fastpeft.patch(tiny(family), config).train()
    model = tiny(family)
    if before:
        model.gradient_checkpointing_enable(kwargs)
    torch.manual_seed(11)
    model = fastpeft.patch(model, config).train()
    if not before:
        model.gradient_checkpointing_enable(kwargs)
    assert any(module.__dict__.get("gradient_checkpointing") for module in model.modules())
    randomise(plain, model)
    expected, found = gradients(plain, batch()), gradients(model, batch())
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name
    other = gradients(model, batch(), seed=6)
    assert any(not torch.equal(other[name], grad) for name, grad in expected.items())
    model.gradient_checkpointing_disable()
    again = gradients(model, batch())
    assert all(torch.equal(again[name], grad) for name, grad in expected.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", CHECKPOINTS, ids=["direct", "reentrant"])
def test_checkpointing_is_as_in_peft(kwargs):
    hf, ours = patched_pair("llama", LLAMA)
    randomise(hf, ours)
    for model in (hf.train(), ours.train()):
        model.gradient_checkpointing_enable(kwargs)
    assert_same_step(hf, ours, batch())


def test_question_answering_of_a_loaded_adapter_is_as_in_peft(tmp_path):
    import fastpeft

    hf, _ = patched_pair("bert", {}, task="QUESTION_ANS")
    randomise(hf)
    hf.save_pretrained(tmp_path)
    ours = fastpeft.load_adapter(tiny("bert", "QUESTION_ANS"), tmp_path)
    inputs = batch("QUESTION_ANS")
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])  # which peft does not hand on
    close(result(ours, inputs), result(hf, inputs), 1e-5)
