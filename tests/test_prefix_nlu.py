"""Prefixes for understanding (P-tuning v2): classes of sequences and tokens, answers to questions, on encoders, on
encoder-decoder models and on decoders. Training, files, padding, checkpoints; beside peft where it works, and beside
the attention written out where it does not."""

import inspect

import pytest
import torch

import fastpeft
from tests.models import batch_for, differences, longer, snapshot, tiny
from tests.peft_pair import close, quietly, randomise, result
from tests.prefix_pair import LENGTH, assert_same_prefix_step, prefix_pair, prefixed, settings_of, step_gradients

TABLE = "prompt_encoder.default.embedding.weight"
TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
ENCODERS = ("bert", "roberta", "electra-small", "deberta-v2", "modernbert", "distilbert")
ENCODERS += ("albert", "albert-inner", "albert-one")
STACKS = [
    *((family, task) for family in ("t5", "t5-wide") for task in TASKS),
    *((family, task) for family in ("bart", "mbart") for task in ("SEQ_CLS", "QUESTION_ANS")),
    *(
        ("plbart", "SEQ_CLS"),
        ("mt5", "QUESTION_ANS"),
        ("umt5", "TOKEN_CLS"),
        ("whisper", "SEQ_CLS"),
        ("vit", "SEQ_CLS"),
    ),
]
DECODERS = [
    *((family, "SEQ_CLS") for family in ("llama", "mistral", "gemma3", "bloom", "gpt_neox", "falcon-new", "gptj")),
    *((family, "TOKEN_CLS") for family in ("qwen3", "gemma2", "mixtral", "gpt_oss", "bloom", "falcon-mq", "phi3")),
    *((family, "QUESTION_ANS") for family in ("gpt2", "opt", "qwen3_moe", "mistral-wide", "gpt_neo", "falcon-alibi")),
]
EVERY = [*((family, task) for family in ENCODERS for task in TASKS), *STACKS, *DECODERS]
# The last of nine tokens, of which a class is made, is behind a window of four.
PINNED = {family: {"prefix_window": "pin"} for family in ("mistral", "gemma3")}


def made(family: str, task: str, **settings):
    return prefixed(family, task, **PINNED.get(family, {}), **settings)


def read(model, inputs: dict) -> torch.Tensor:
    """The logits, of real tokens where there is a row for each."""
    found = result(model, inputs).detach()
    mask = inputs.get("attention_mask")
    if mask is None or found.shape[:2] != mask.shape:
        return found if found.ndim < 3 else found.masked_fill(mask[None] == 0, 0)
    return found[mask.bool()]


@pytest.mark.parametrize(("family", "task"), EVERY)
def test_it_trains_saves_loads_and_leaves(family, task, tmp_path):
    base, inputs = tiny(family, task), batch_for(family, task)
    before = snapshot(base)
    model = made(family, task, base=base).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("modules_to_save" in name for name in trained) and TABLE in trained
    optimiser, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(float(loss.detach()))
        for name, parameter in trained.items():
            # A bias moves the logits of all places alike, which changes no share of them.
            assert parameter.grad.any() or (task == "QUESTION_ANS" and name.endswith("bias")), name
        optimiser.step()
    losses.append(float(model(**inputs).loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1], losses
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)

    model.eval().save_pretrained(tmp_path)
    loaded = quietly(fastpeft.load_adapter, tiny(family, task), tmp_path)
    assert torch.equal(result(loaded, inputs), result(model, inputs))
    if "input_ids" in inputs:
        found = read(model, longer(inputs))
        close(found[..., : inputs["input_ids"].shape[1]] if found.ndim == 3 else found, read(model, inputs), 2e-6)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []


CHECKPOINTS = [{"use_reentrant": False}, {"use_reentrant": True}]
CHECKPOINTED = [
    *(
        (family, "SEQ_CLS")
        for family in ("bert", "electra-small", "deberta-v2", "modernbert", "t5", "bart", "whisper", "vit")
    ),
    *((family, "TOKEN_CLS") for family in ("roberta", "deberta-v2", "t5")),
    *((family, "QUESTION_ANS") for family in ("distilbert", "t5-wide", "mbart")),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kwargs", CHECKPOINTS, ids=["direct", "reentrant"])
@pytest.mark.parametrize(("family", "task"), CHECKPOINTED)
def test_checkpointing_changes_no_gradient(family, task, kwargs):
    inputs = batch_for(family, task)
    expected = step_gradients(made(family, task), inputs)
    model = made(family, task)
    model.gradient_checkpointing_enable(kwargs)
    assert any(module.__dict__.get("gradient_checkpointing") for module in model.modules())
    found = step_gradients(model, inputs)
    greatest = max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():  # that of a bias of answers is rounding errors
        assert (found[name] - grad).norm() <= 1e-6 * max(grad.norm(), 0.1 * greatest), name


# Beside peft, beyond the families whose every task test_hf_parity_prefix has.

SERVED = [
    *(("electra-small", task) for task in TASKS),
    *(("xlm-roberta", "TOKEN_CLS"), ("camembert", "QUESTION_ANS")),
    *((family, "SEQ_CLS") for family in ("mistral", "bloom", "opt", "gptj", "falcon")),
    *((family, "TOKEN_CLS") for family in ("qwen3", "gemma", "bloom", "mixtral", "phi3", "gpt_oss")),
    *((family, "QUESTION_ANS") for family in ("opt", "bloom", "qwen3_moe", "gpt_neo", "gpt_neox")),
]


@pytest.mark.parametrize(("family", "task"), SERVED)
def test_a_task_is_as_in_peft(family, task):
    hf, ours = prefix_pair(family, task)
    randomise(hf, ours)
    assert_same_prefix_step(hf, ours, batch_for(family, task), 2e-6)


# Beside attention that is written out, where peft refuses.


class WrittenOut:
    """An attention function for transformers: the prefix's keys and values in front of the others, at the positions
    before them. A call takes the next layer's."""

    def __init__(self, model, table: torch.Tensor, width: int):
        self.table, self.width, self.layer = table, width, 0
        self.first = next((m for m in model.modules() if hasattr(m, "relative_attention_bias")), None)

    def __call__(self, module, query, key, value, mask, scaling=None, position_bias=None, sliding_window=None, **_):
        heads, size = query.shape[1], query.shape[2]
        start = 2 * self.layer * self.width
        self.layer += 1
        pair = self.table[:, start : start + 2 * self.width].unflatten(1, (2, heads, -1)).permute(1, 2, 0, 3)
        pair = pair[:, None].expand(-1, len(query), -1, -1, -1)
        key, value = torch.cat((pair[0], key), 2), torch.cat((pair[1], value), 2)
        scores = scaling * query @ key.transpose(2, 3)
        places = torch.arange(-LENGTH, size)
        if position_bias is not None:
            scores = scores + self.first.compute_bias(LENGTH + size, LENGTH + size)[:, :, LENGTH:]
        if sliding_window is not None:
            seen = (places[LENGTH:, None] - places).abs() < sliding_window
            scores = scores.masked_fill(~seen, -torch.inf)
        if mask is not None:
            virtual = torch.ones(len(query), 1, size, LENGTH, dtype=torch.bool)
            scores = scores.masked_fill(~torch.cat((virtual, mask.expand(len(query), -1, -1, -1)), 3), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "TOKEN_CLS") for family in ("albert", "albert-inner", "albert-one", "distilbert", "modernbert")),
        *((family, "TOKEN_CLS") for family in ("t5", "t5-wide")),
        *((family, "SEQ_CLS") for family in ("vit", "whisper", "distilbert")),
    ],
)
def test_it_is_the_attention_written_out(family, task):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    inputs = batch_for(family, task)
    ours = prefixed(family, task)
    found = ours(**inputs)
    found.loss.backward()
    table = ours.get_parameter(TABLE)
    copy = table.detach().clone().requires_grad_()
    plain = tiny(family, task).requires_grad_(False)
    if "position_ids" in inspect.signature(type(plain).forward).parameters:
        inputs["position_ids"] = torch.arange(LENGTH, LENGTH + inputs["input_ids"].shape[1])[None]
    function = WrittenOut(plain, copy, ours.peft_config["default"].token_dim)
    AttentionInterface.register("written_out", function)
    AttentionMaskInterface.register("written_out", sdpa_mask)
    plain.set_attn_implementation("written_out")
    expected = plain(**inputs)
    expected.loss.backward()
    assert function.layer == ours.peft_config["default"].num_layers
    close(read(lambda **_: found, inputs), read(lambda **_: expected, inputs), 1e-5)
    assert copy.grad.norm() > 0 and (table.grad - copy.grad).norm() <= 1e-5 * copy.grad.norm()


# What the sizes are.


def test_the_table_is_for_what_carries_it():
    """Layers of groups of layers; keys as wide as the model's own, not as the embeddings; each layer of a decoder."""
    shapes = {
        ("albert", "SEQ_CLS"): 2 * 4 * 32,
        ("albert-inner", "SEQ_CLS"): 2 * 8 * 32,
        ("electra-small", "SEQ_CLS"): 2 * 2 * 32,
        ("t5-wide", "SEQ_CLS"): 2 * 2 * 64,
        ("t5-wide", "TOKEN_CLS"): 2 * 2 * 64,
        ("bart", "QUESTION_ANS"): 2 * 2 * 32,
    }
    for (family, task), columns in shapes.items():
        assert made(family, task).get_parameter(TABLE).shape == (LENGTH, columns), family


@pytest.mark.parametrize(
    ("family", "task", "where"),
    [
        *(("t5", "SEQ_CLS", "decoder"), ("t5", "QUESTION_ANS", "decoder"), ("t5", "TOKEN_CLS", "encoder")),
        *(("bart", "SEQ_CLS", "decoder"), ("bart", "QUESTION_ANS", "decoder"), ("whisper", "SEQ_CLS", "encoder")),
    ],
)
def test_it_belongs_to_the_decoder_where_there_is_one(family, task, where):
    model = made(family, task)
    carriers = [path for path, m in model.named_modules() if getattr(m, "slices", list)()]
    assert (
        len(carriers) == 2
        and all(f"{where}." in path and "ttention" in path.lower() for path in carriers)
        or (all(f"{where}.layers" in path and path.endswith("self_attn") for path in carriers))
    )
    slope = step_gradients(model, batch_for(family, task))[TABLE]
    assert slope.view(LENGTH, 4, -1).any(2).all()


def test_a_prefix_pinned_in_windows_is_seen_by_every_token_of_modernbert():
    """Which has both kinds of layers."""
    seen = {}
    for window in ("slide", "pin"):
        model = prefixed("modernbert", "TOKEN_CLS", prefix_window=window)
        kinds = [layer.attn.sliding_window for layer in model.model.layers]
        assert kinds == [None, 5]
        logits = model(input_ids=batch_for("modernbert", "TOKEN_CLS")["input_ids"][:1]).logits[0, -1]
        (slope,) = torch.autograd.grad(logits.square().sum(), model.get_parameter(TABLE))
        seen[window] = slope.view(LENGTH, 4, -1).any(2).all(0).tolist()
    assert seen == {"slide": [True, True, False, False], "pin": [True, True, True, True]}


def test_the_projection_of_a_prefix_serves_shared_layers(tmp_path):
    inputs = batch_for("albert-inner", "SEQ_CLS")
    model = prefixed("albert-inner", "SEQ_CLS", prefix_projection=True, encoder_hidden_size=24)
    assert all(grad.any() for grad in step_gradients(model, inputs).values())
    model.eval().save_pretrained(tmp_path)
    loaded = quietly(fastpeft.load_adapter, tiny("albert-inner", "SEQ_CLS"), tmp_path)
    close(result(loaded, inputs), result(model, inputs), 1e-6)
    settings = settings_of("albert-inner", "SEQ_CLS", num_layers=4)
    with pytest.raises(fastpeft.ConfigError, match="num_layers"):
        fastpeft.patch(tiny("albert-inner", "SEQ_CLS"), fastpeft.PrefixTuningConfig(**settings))
