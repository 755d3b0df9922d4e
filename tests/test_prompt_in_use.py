"""Prompts in everything that a model lives through: checkpointed, compiled, in half precision, copied, hooked,
offloaded, with an embedding of another width."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import fastpeft
from tests.models import HIDDEN, batch, differences, longer, snapshot, tiny
from tests.peft_pair import WEIGHTS, close, randomise, result
from tests.prefix_pair import step_gradients
from tests.prompt_pair import LENGTH, METHODS, oracle, padded, prompted, rows_of, with_prompt
from tests.test_prompt_adapters import TABLE, TASKS, of_table, two

# Checkpointing, compilation, precision.


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prompt", "mlp"])
@pytest.mark.parametrize("family", TASKS)
def test_checkpointing_gives_the_same_gradients(family, method, reentrant, when):
    task = TASKS[family]
    inputs = padded("left", family, task)
    expected = step_gradients(prompted(family, task, method), inputs)
    base = tiny(family, task)
    if when == "before":
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = prompted(family, task, method, base=base)
    if when == "after":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = step_gradients(model, inputs)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        close(found[name], grad, 1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_the_with_may_end_before_backward(kwargs):
    model = two()
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_(True)
    if kwargs is not None:
        model.train().gradient_checkpointing_enable(kwargs)
    with fastpeft.use_adapter(model, "b"):
        loss = model(**batch()).loss
    loss.backward()
    assert model.prompt_encoder["a"].embedding.weight.grad is None
    expected = step_gradients(of_table(rows_of(model, "b")), batch())[TABLE]
    close(model.prompt_encoder["b"].embedding.weight.grad, expected, 1e-6)


def shallow(family: str = "llama", method: str = "prompt", **more) -> torch.nn.Module:
    """Of one layer: tracing takes a time for each, and prompts are in front of them all."""
    task = TASKS[family]
    return prompted(family, task, method, base=tiny(family, task, layers=1), **more)


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "method", "quirks"),
    [("llama", "prompt", False), ("bert", "mlp", True), ("t5", "prompt", False)],
)
def test_compiled_it_is_one_graph(family, method, quirks, compiler):
    model, inputs = shallow(family, method, hf_quirks=quirks), padded("left", family, TASKS[family])
    expected = model(**inputs)
    slopes = step_gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for _ in range(3):
        found = compiled.eval()(**inputs)
    close(found.logits, expected.logits, 1e-5)
    close(found.loss, expected.loss, 1e-5)
    for _ in range(3):
        again = step_gradients(compiled, inputs)
    for name, grad in slopes.items():
        close(again[f"_orig_mod.{name}"], grad, 1e-5)
    with torch.no_grad():
        compiled.eval()(**inputs)
    assert compiler.frame_count <= 3, compiler.frame_count  # eval, train, no_grad


def test_compiled_other_lengths_are_no_storm(compiler):
    model = shallow()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for length in (6, 7, 9, 12, 15, 17):
            inputs = batch(length=length)
            close(compiled(**inputs).logits, model(**inputs).logits, 1e-5)
    assert compiler.frame_count <= 2, compiler.frame_count


def test_compiled_by_a_whole_backend():
    torch._dynamo.reset()
    model, inputs = shallow(), padded("left", "llama", "CAUSAL_LM")
    slopes = step_gradients(model, inputs)
    found = step_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    close(found[f"_orig_mod.{TABLE}"], slopes[TABLE], 1e-5)
    torch._dynamo.reset()


def test_compiled_rows_of_several_sequences_are_refused():
    """Without a word only the first of them would have a prompt."""
    torch._dynamo.reset()
    model, ids = shallow(), batch()["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        close(compiled(input_ids=ids, position_ids=plain).logits, model(input_ids=ids).logits, 1e-5)
        with pytest.raises(RuntimeError, match="position_ids that begin anew"):
            compiled(input_ids=ids, position_ids=plain % 5)
    torch._dynamo.reset()


@pytest.mark.parametrize(("part", "how"), [("", "break"), ("embed_tokens", "disable")])
def test_parts_that_are_not_compiled_know_of_the_prompt(part, how):
    torch._dynamo.reset()
    model, inputs = shallow(), padded("left", "llama", "CAUSAL_LM")
    expected = result(model, inputs)
    module = model.model.get_submodule(part)
    if how == "break":
        module.register_forward_pre_hook(lambda *args: torch._dynamo.graph_break())
    else:
        module.forward = torch._dynamo.disable(module.forward)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        close(result(compiled, inputs), expected, 1e-5)
    close(result(model, inputs), expected, 1e-5)
    batches = [inputs, padded("right", "llama", "CAUSAL_LM"), batch(length=5)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda given: result(compiled, given), batches))
    for values, given in zip(found, batches, strict=True):
        close(values, result(model, given), 1e-5)
    torch._dynamo.reset()


def test_compiled_generation_by_hand():
    """Decoding in compiled code with a cache that is filled outside of it."""
    torch._dynamo.reset()
    model, ids = prompted(), batch()["input_ids"][:1]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        compiled = torch.compile(model, backend="eager")
        found = compiled(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    close(found, expected, 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_autocast(family, method):
    """The loss and the gradients are near those in fp32, as the plain model's are under autocast; parameters stay."""
    task = TASKS[family]
    model, inputs = prompted(family, task, method), padded("left", family, task)
    expected, slopes = model(**inputs).loss, step_gradients(model, inputs)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    close(loss.float(), expected, 5e-2)
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and slopes[name].norm() > 1e-2 * max(each.norm() for each in slopes.values()):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.cosine_similarity(parameter.grad.flatten(), slopes[name].flatten(), 0) > 0.9


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_lstm_that_the_processor_has_not_in_half_precision_is_computed_in_fp32(dtype, has, monkeypatch):
    """torch's own raises under autocast."""
    model, kinds = prompted(method="lstm"), []
    (lstm,) = (module for module in model.modules() if isinstance(module, torch.nn.LSTM))

    def forward(rows):
        kinds.append(torch.is_autocast_enabled("cpu"))
        return rows.new_zeros(*rows.shape[:-1], 2 * lstm.hidden_size), None

    lstm.forward = forward
    for kind, of in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda of=of: has == (of == dtype))
    with torch.autocast("cpu", dtype):
        model(**batch())
    assert kinds == [has]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_on_a_half_precision_base_is_fp32(method, dtype, tmp_path):
    model = prompted(method=method, base=tiny(dtype=dtype))
    grads = step_gradients(model, batch())
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    fastpeft.save_adapter(model.eval(), tmp_path)
    assert load_file(tmp_path / WEIGHTS)["prompt_embeddings"].dtype == torch.float32
    loaded = fastpeft.load_adapter(tiny(dtype=dtype), tmp_path)
    close(result(loaded, batch()).float(), result(model, batch()).float(), 2e-2)


# Copies, hooks, offloading.


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(family, how):
    task = TASKS[family]
    model, inputs = prompted(family, task, "mlp"), padded("left", family, task)
    expected = result(model, inputs).detach()
    other = how(model)
    assert torch.equal(result(other, inputs), expected)
    randomise(other)
    assert torch.equal(result(model, inputs), expected)
    moved = result(other, inputs).detach()
    assert not torch.allclose(moved, expected)
    if family == "t5":
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        ids = inputs["input_ids"]
        assert torch.equal(other.generate(ids, **options), how(other).generate(ids, **options))
    fastpeft.unpatch(model)
    assert torch.equal(result(other.eval(), inputs), moved)
    fastpeft.unpatch(other)
    assert torch.equal(result(other, inputs), result(tiny(family, task), inputs))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_accelerates_hooks_on_every_module(family, when):
    task = TASKS[family]
    inputs = padded("left", family, task)
    expected = result(prompted(family, task), inputs)
    base = tiny(family, task)
    plain = result(base, inputs)

    def hook_up(model):
        for module in list(model.modules()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=module is model))

    if when == "before":
        hook_up(base)
    before = snapshot(base)
    model = prompted(family, task, base=base)
    if when == "after":
        hook_up(model)
    assert torch.equal(result(model, inputs), expected)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    ids = inputs["input_ids"]
    assert torch.equal(model.generate(ids, **options), prompted(family, task).generate(ids, **options))
    fastpeft.unpatch(model)
    assert torch.equal(result(model, inputs), plain)
    if when == "before":
        assert differences(before, snapshot(model)) == []
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(result(model, inputs), plain)


@pytest.fixture
def without_accelerate_s_state():
    """It has one state a process, which another test's Trainer may have made, and may yet make."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("without_accelerate_s_state")
def test_accelerator_prepares_a_patched_model():
    """It puts a forward on the root that goes on to ours, which may be there after the patch is gone."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, inputs = prompted(), padded("left", "llama", "CAUSAL_LM")
    with torch.autocast("cpu", torch.bfloat16):
        expected = result(model, inputs).float()
    prepared = accelerator.prepare(model)
    assert torch.equal(result(prepared, inputs), expected)
    step_gradients(prepared, inputs)
    fastpeft.unpatch(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = result(tiny(), inputs).float()
    close(result(model, inputs), expected, 1e-2)
    assert torch.equal(result(accelerator.unwrap_model(model, keep_fp32_wrapper=False), inputs), result(tiny(), inputs))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_forward_on_the_root_is_called_with_virtual_tokens(family):
    task, seen = TASKS[family], []
    base = tiny(family, task)
    original = base.forward

    def forward(*args, **kwargs):
        seen.append(kwargs["input_ids"].shape[1])
        return original(*args, **kwargs)

    base.forward = forward
    before = snapshot(base)
    model = prompted(family, task, base=base)
    inputs = padded("left", family, task)
    assert torch.equal(result(model, inputs), result(prompted(family, task), inputs))
    assert seen == [9 + LENGTH]
    fastpeft.unpatch(model)
    assert base.forward is forward and differences(before, snapshot(base)) == []


def test_a_hook_on_the_embedding_sees_what_the_model_sees():
    model, seen = prompted(), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    result(model, batch())
    assert seen == [(2, 9 + LENGTH, HIDDEN)]


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_offloaded_base(family, when, init):
    task = TASKS[family]
    inputs = padded("left", family, task)
    expected = result(prompted(family, task, prompt_tuning_init=init), inputs)
    if when == "before":
        model = prompted(family, task, base=cpu_offload(tiny(family, task), "cpu"), prompt_tuning_init=init)
        assert model.prompt_encoder["default"].embedding.weight.device.type == "cpu"
        model(**inputs).loss.backward()
        assert model.prompt_encoder["default"].embedding.weight.grad.any()
    else:
        model = cpu_offload(prompted(family, task, prompt_tuning_init=init), "cpu")
    with torch.no_grad():
        assert torch.equal(result(model, inputs), expected)


@pytest.mark.parametrize("family", ["albert", "electra-small"])
def test_a_row_is_as_wide_as_the_embedding(family, tmp_path):
    model = prompted(family, "SEQ_CLS", "mlp")
    assert model.peft_config["default"].token_dim == 16
    assert model.prompt_encoder["default"].embedding.weight.shape == (LENGTH, 16)
    fastpeft.save_adapter(model, tmp_path)
    loaded = fastpeft.load_adapter(tiny(family, "SEQ_CLS"), tmp_path)
    close(result(loaded, longer(batch("SEQ_CLS"))), result(model, batch("SEQ_CLS")), 1e-5)
    step_gradients(fastpeft.load_adapter(tiny(family, "SEQ_CLS"), tmp_path, trainable=True), batch("SEQ_CLS"))


def test_an_embedding_narrower_than_the_model_like_opt_350m(tmp_path):
    import transformers

    settings = {**tiny("opt").config.to_dict(), "word_embed_proj_dim": 16}

    def build():
        torch.manual_seed(0)
        return transformers.OPTForCausalLM(transformers.OPTConfig(**settings)).eval()

    for token_dim in (None, 16, HIDDEN):
        model = prompted("opt", base=build(), token_dim=token_dim)
        assert model.prompt_encoder["default"].embedding.weight.shape == (LENGTH, 16)
    inputs = padded("left", "opt", "CAUSAL_LM")
    expected = oracle("opt", "CAUSAL_LM", rows_of(model), build())(**with_prompt(inputs))
    close(model(**inputs).loss, expected.loss, 1e-5)
    fastpeft.save_adapter(model, tmp_path)
    assert torch.equal(result(fastpeft.load_adapter(build(), tmp_path), inputs), result(model, inputs))
