"""Prefix tuning beside Hugging Face peft on whole models of every family: the start bit for bit, outputs, gradients,
files, loading. peft puts the prefix in the cache; here it is inside attention, and the numbers are the same."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from tests.models import MORE_FAMILIES, VOCABULARY, batch, tiny
from tests.peft_pair import (
    WEIGHTS,
    assert_interchangeable,
    assert_same_files,
    assert_same_line,
    assert_same_start,
    by_base_name,
    pair_of,
    quietly,
    randomise,
    result,
)
from tests.prefix_pair import (
    EVERY,
    LENGTH,
    SEQ2SEQ,
    assert_same_prefix_step,
    assert_within,
    padded_left,
    prefix_pair,
    real,
    settings_of,
    takes_positions,
    task_of,
    trained_gradients,
    with_positions,
)


def bound_of(family: str) -> float:
    return 1e-5 if family.endswith("t5") else 1e-6


def assert_same_life(hf, ours, build, task: str, directory, bound: float = 1e-6) -> None:
    """Start, printed line, a step with padding on either side, files, and loading in both directions."""
    assert_same_start(hf, ours)
    assert_same_line(hf, ours)
    randomise(hf, ours)
    inputs = batch(task)
    assert_same_prefix_step(hf, ours, inputs, bound)
    if task != "SEQ_2_SEQ_LM":
        assert_same_prefix_step(hf, ours, padded_left(inputs), bound)
    assert_same_files(hf, ours, directory)
    assert_interchangeable(hf, ours, build, inputs, directory)


@pytest.mark.parametrize("family", EVERY)
def test_a_family_is_as_in_peft(family, tmp_path):
    task, bound = task_of(family), bound_of(family)
    hf, ours = prefix_pair(family)
    assert_same_life(hf, ours, lambda: tiny(family, task), task, tmp_path, bound)
    if takes_positions(ours):
        assert_same_prefix_step(hf, ours, with_positions(batch(task)), bound)


VARIANTS = {
    "projection": {"prefix_projection": True, "encoder_hidden_size": 24},
    "projection-zero": {"prefix_projection": True, "init_weights": "zero"},
    "zero": {"init_weights": "zero"},
    "one": {"num_virtual_tokens": 1},
    "long": {"num_virtual_tokens": 21},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3", "mistral", "t5", "bart", "bert"])
def test_a_variant_is_as_in_peft(family, variant, tmp_path):
    task = task_of(family)
    hf, ours = prefix_pair(family, **VARIANTS[variant])
    if "zero" in variant:
        assert not any(tensor.any() for tensor in fastpeft.adapter_state_dict(ours).values() if len(tensor) == LENGTH)
    assert_same_life(hf, ours, lambda: tiny(family, task), task, tmp_path, bound_of(family))


HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, task) for family in ("bert", "roberta", "llama", "qwen2", "gpt2") for task in HEADS),
        *((family, "FEATURE_EXTRACTION") for family in ("bert", "llama")),
    ],
)
def test_a_task_is_as_in_peft(family, task, tmp_path):
    if task == "FEATURE_EXTRACTION":
        assert_same_features(family, tmp_path)
        return
    hf, ours = prefix_pair(family, task)
    assert_same_life(hf, ours, lambda: tiny(family, task), task, tmp_path)
    saved = load_file(tmp_path / "ours" / WEIGHTS)
    classifier = family in ("bert", "roberta") or (family, task) == ("gpt2", "TOKEN_CLS")
    head = "qa_outputs" if task == "QUESTION_ANS" else "classifier" if classifier else "score"
    assert any(name.startswith(f"base_model.{head}.") for name in saved) and "prompt_embeddings" in saved
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert all(name.startswith((f"{head}.modules_to_save.default.", "prompt_encoder.default.")) for name in trained)


def assert_same_features(family: str, directory) -> None:
    """Of a model without a head there is no loss."""
    kind, task = "PrefixTuningConfig", "CAUSAL_LM" if family == "llama" else "SEQ_CLS"

    def build():
        return tiny(family, task).base_model

    hf, ours = pair_of(build, settings_of(family, "FEATURE_EXTRACTION"), kind)
    inputs = {key: value for key, value in batch(task).items() if key != "labels"}
    outputs = [model(**inputs).last_hidden_state for model in (hf, ours)]
    mask = inputs["attention_mask"].bool()
    assert_within(outputs[1][mask], outputs[0][mask], 1e-6)
    for output in outputs:
        output[mask].square().mean().backward()
    slopes = [trained_gradients(model)["prompt_encoder.default.embedding.weight"] for model in (hf, ours)]
    assert (slopes[1] - slopes[0]).norm() <= 1e-5 * slopes[0].norm()
    assert_same_files(hf, ours, directory)
    loaded = quietly(fastpeft.load_adapter, build(), directory / "hf")
    assert torch.equal(loaded(**inputs).last_hidden_state, outputs[1])


@pytest.mark.parametrize("family", ["t5", "bart", "umt5", "m2m_100"])
def test_one_submodule_of_two_stacks_has_a_block_for_every_layer(family, tmp_path):
    """peft then mixes up its cache: cross-attention sees the prefix and the target, or the sizes do not fit. So the
    yardstick is peft with two submodules and twice as many layers, of whose table the blocks that it reads are ours."""
    bound, task = bound_of(family), "SEQ_2_SEQ_LM"
    _, ours = prefix_pair(family, num_transformer_submodules=1)
    hf = peft_with_layers(family, 4)
    table = by_base_name(ours)["prompt_encoder.default.embedding.weight"]
    theirs = by_base_name(hf)["prompt_encoder.default.embedding.weight"]
    with torch.no_grad():
        theirs.view(LENGTH, 8, -1)[:, [0, 1, 4, 5]] = table.view(LENGTH, 4, -1)
    inputs = batch(task)
    outputs = [model(**inputs) for model in (hf, ours)]
    assert_within(outputs[1].logits, outputs[0].logits, bound)
    for output in outputs:
        output.loss.backward()
    slope = theirs.grad.view(LENGTH, 8, -1)[:, [0, 1, 4, 5]].flatten(1)
    assert (table.grad - slope).norm() <= 1e-5 * slope.norm()
    assert table.grad.view(LENGTH, 4, -1).any(2).all()
    quietly(ours.save_pretrained, tmp_path)
    loaded = quietly(fastpeft.load_adapter, tiny(family, task), tmp_path)
    assert torch.equal(result(loaded, inputs), outputs[1].logits)


def peft_with_layers(family: str, layers: int):
    import peft

    config = peft.PrefixTuningConfig(**settings_of(family, num_layers=layers))
    return quietly(peft.get_peft_model, tiny(family, "SEQ_2_SEQ_LM"), config).eval()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_half_of_the_table_of_two_stacks_is_dead_as_in_peft(family):
    for model in prefix_pair(family):
        model(**batch("SEQ_2_SEQ_LM")).loss.backward()
        slope = by_base_name(model)["prompt_encoder.default.embedding.weight"].grad.view(LENGTH, 4, -1)
        assert slope.abs().sum((0, 2)).gt(0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("layers", [(3, 3), (4, 4), (4, 2)], ids=str)
def test_more_layers_than_two_share_their_blocks_as_in_peft(layers, tmp_path):
    """Decoder layers i and i + L/2 of an even number, and a permutation of an odd one."""
    import transformers

    config = copy.deepcopy(tiny("t5", "SEQ_2_SEQ_LM").config)
    config.num_layers, config.num_decoder_layers = layers

    def build():
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(copy.deepcopy(config)).eval()

    hf, ours = pair_of(build, settings_of("t5"), "PrefixTuningConfig")
    assert_same_life(hf, ours, build, "SEQ_2_SEQ_LM", tmp_path, 1e-5)


ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 16},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    | {"original_max_position_embeddings": 12, "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rotations_are_as_in_peft(kind):
    """dynamic and longrope ask how far the positions reach: here beyond what they were trained for, by the prefix."""
    import transformers

    settings = {**tiny().config.to_dict(), "rope_parameters": {**ROPE[kind], "rope_theta": 10000.0}}
    settings["max_position_embeddings"] = 12 if kind == "dynamic" else 64

    def build():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()

    hf, ours = pair_of(build, settings_of("llama"), "PrefixTuningConfig")
    assert_same_prefix_step(hf, ours, batch())
    assert_same_prefix_step(hf, ours, padded_left(batch(length=4)))


@torch.no_grad()
def assert_as_exact(hf, ours, dtype) -> None:
    """Our rms error against peft's model in float64 is at most 1.1 of peft's own."""
    oracle = copy.deepcopy(hf).double()
    errors = [0.0, 0.0]
    for rows in (9, 12, 20):
        inputs = batch(rows=rows)
        mask = inputs["attention_mask"].bool()
        exact = result(oracle, inputs)[mask]
        for i, model in enumerate((hf, ours)):
            found = result(model, inputs)[mask]
            assert found.dtype == dtype
            errors[i] += float((found.double() - exact).square().sum())
    assert 0 < errors[1] <= 1.1**2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "gptj"])
def test_half_precision_starts_as_in_peft_and_is_as_exact(family, dtype, tmp_path):
    hf, ours = prefix_pair(family, dtype=dtype)
    assert_same_start(hf, ours)  # the table stays fp32
    assert_same_files(hf, ours, tmp_path)
    assert_as_exact(hf, ours, dtype)
    slopes = []
    for model in (hf, ours):
        model(**batch()).loss.backward()
        slopes.append(trained_gradients(model)["prompt_encoder.default.embedding.weight"])
    assert slopes[1].dtype == slopes[0].dtype == torch.float32
    assert torch.cosine_similarity(slopes[0].flatten(), slopes[1].flatten(), 0) > 0.99


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_autocast_is_as_exact_as_in_peft(family, projection):
    """Each batch with a prefix of its own: how the numbers of one are rounded is the same in every row."""
    hf, ours = prefix_pair(family, prefix_projection=projection)
    task = task_of(family)
    errors, slopes = [0.0, 0.0], [0.0, 0.0]
    for rows in range(3, 21, 2):
        randomise(hf, ours, seed=rows)
        oracle, inputs = copy.deepcopy(hf).double(), batch(task, rows=rows)
        oracle.zero_grad()
        exact = oracle(**inputs)
        exact.loss.backward()
        wanted = trained_gradients(oracle)
        for i, model in enumerate((hf, ours)):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**inputs)
            output.loss.backward()
            errors[i] += float((real(output.logits, inputs).double() - real(exact.logits, inputs)).square().sum())
            for name, grad in trained_gradients(model).items():
                slope = wanted[name]
                assert grad.dtype == torch.float32
                slopes[i] += float((grad - slope).square().sum() / slope.square().sum().clamp(min=1e-12))
    assert 0 < errors[1] <= 1.1**2 * errors[0]
    assert 0 < slopes[1] <= 1.1**2 * slopes[0]


# The example of the original walk-through: BLOOM with 24 layers, 16 heads of 64, batch 8, 30 virtual tokens.


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations make; those that are only expanded hold nothing."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor) and 0 not in each.stride():
                self.seen.add(tuple(each.shape))
        return out


BATCH, TOKENS, VIRTUAL, LAYERS, HEADS_OF_BLOOM, DEPTH = 8, 64, 30, 24, 16, 64


@functools.cache
def bloom_of_the_example():
    """Its feed-forward part is narrow, which costs attention nothing and makes the test cheap."""
    import transformers

    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=HEADS_OF_BLOOM * DEPTH, n_layer=LAYERS, n_head=HEADS_OF_BLOOM
    )
    with torch.device("meta"):
        model = transformers.BloomForCausalLM(config)
        for block in model.transformer.h:
            block.mlp.dense_h_to_4h = torch.nn.Linear(config.hidden_size, 64)
            block.mlp.dense_4h_to_h = torch.nn.Linear(64, config.hidden_size)
    model = model.to_empty(device="cpu")
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(noise.roll(97 * index)[: parameter.numel()].view(parameter.shape))
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.add_(1)
    model.tie_weights()
    return model.eval()


def copies_of_the_prefix(shapes) -> set:
    """Those with a batch of virtual tokens in them, alone or in front of the sequence's, and a head's width."""
    return {
        shape
        for shape in shapes
        if shape[:1] in ((BATCH,), (BATCH * HEADS_OF_BLOOM,)) and {VIRTUAL, VIRTUAL + TOKENS} & set(shape[1:])
    }


def test_the_original_example_without_a_copy_of_the_prefix():
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
    hf, ours = pair_of(lambda: copy.deepcopy(bloom_of_the_example()), settings, "PrefixTuningConfig")
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": True}

    past = [tensor for layer in hf.get_prompt(BATCH).layers for tensor in (layer.keys, layer.values)]
    assert len(past) == 2 * LAYERS
    assert {tuple(tensor.shape) for tensor in past} == {(BATCH, HEADS_OF_BLOOM, VIRTUAL, DEPTH)}

    found, outputs = [], []
    for model in (hf, ours):
        with Shapes() as shapes:
            outputs.append(model(**inputs))
        found.append(copies_of_the_prefix(shapes.seen))
    assert {(BATCH, HEADS_OF_BLOOM, VIRTUAL, DEPTH), (BATCH, HEADS_OF_BLOOM, VIRTUAL + TOKENS, DEPTH)} <= found[0]
    assert found[1] <= {(BATCH, HEADS_OF_BLOOM, TOKENS, VIRTUAL)}  # scores, which pass
    cache = outputs[1].past_key_values
    assert len(cache.layers) == LAYERS
    shapes = {tuple(tensor.shape) for layer in cache.layers for tensor in (layer.keys, layer.values)}
    assert shapes == {(BATCH, HEADS_OF_BLOOM, TOKENS, DEPTH)}
    held = {name: tuple(tensor.shape) for name, tensor in (*ours.named_parameters(), *ours.named_buffers())}
    assert [name for name, shape in held.items() if VIRTUAL in shape] == ["prompt_encoder.default.embedding.weight"]

    difference, expected = (outputs[1].logits - outputs[0].logits).norm(), outputs[0].logits.norm()
    assert difference <= 1e-6 * expected, float(difference / expected)
    for output in outputs:
        output.loss.backward()
    slopes = [trained_gradients(model)["prompt_encoder.default.embedding.weight"] for model in (hf, ours)]
    assert (slopes[1] - slopes[0]).norm() <= 1e-5 * slopes[0].norm()


def test_the_second_table_is_of_families_that_the_first_lacks():
    from tests.models import FAMILIES

    assert not FAMILIES.keys() & MORE_FAMILIES.keys() and set(SEQ2SEQ) < {*FAMILIES, *MORE_FAMILIES}
