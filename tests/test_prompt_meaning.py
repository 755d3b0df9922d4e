"""Virtual tokens are tokens: a plain model whose vocabulary goes on with the prompt's rows computes the same of their
ids, [padding, prompt, tokens]. So in every family and task, with padding on either side, in one row or several, from
embeddings, in generation by every way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from tests.models import FAMILIES, HIDDEN, MORE_FAMILIES, OTHER_FAMILIES, VOCABULARY, batch, batch_for, tiny
from tests.peft_pair import close, quietly, result
from tests.prefix_pair import DECODERS, ENCODERS, SEQ2SEQ
from tests.prompt_pair import LENGTH, in_rows, of_tokens, oracle, padded, prompted, rows_of, settings_of, with_prompt

# Families whose models ask their embedding for more than the ids, or for these in another order.
_BERT, _BART = FAMILIES["bert"][1], FAMILIES["bart"][1]
_XL = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0}
STRANGE = {
    "longformer": ("longformer", {**_BERT, "attention_window": [4, 4]}),  # pads to its window
    "big_bird": ("big_bird", {**_BERT, "block_size": 4, "num_random_blocks": 1}),  # to its blocks, if rows are long
    "led": ("led", {**_BART, "max_encoder_position_embeddings": 64, "attention_dropout": 0.0, "attention_window": 4}),
    "xlnet": ("xlnet", {**_XL, "dropout": 0.0, "summary_last_dropout": 0.0}),  # (S, B)
    "xlm": (
        "xlm",
        {"vocab_size": VOCABULARY, "emb_dim": HIDDEN, "n_layers": 2, "n_heads": 4, "pad_index": 0, "pad_token_id": 0}
        | {"dropout": 0.0, "attention_dropout": 0.0},
    ),
    "mobilebert": ("mobilebert", {**_BERT, "embedding_size": 16, "intra_bottleneck_size": 16}),  # takes neighbours
}


@pytest.fixture(autouse=True)
def strange(monkeypatch):
    for family, entry in STRANGE.items():
        monkeypatch.setitem(OTHER_FAMILIES, family, entry)


CASES = [
    *((family, "CAUSAL_LM") for family in (*DECODERS, "xglm")),
    *((family, "SEQ_2_SEQ_LM") for family in (*SEQ2SEQ, "t5-wide", "led")),
    *((family, "SEQ_CLS") for family in ("llama", "mistral", "gemma2", "gemma3", "gpt2", "bloom", "opt", "mpt")),
    *((family, "SEQ_CLS") for family in (*ENCODERS, "t5", "bart", "albert", "electra-small", "distilbert")),
    *((family, "SEQ_CLS") for family in ("modernbert", "deberta-v2", "longformer", "xlnet", "mobilebert")),
    *((family, "TOKEN_CLS") for family in ("llama", "gpt2", "bloom", "t5", *ENCODERS, "longformer", "xlnet")),
    *((family, "TOKEN_CLS") for family in ("albert", "big_bird", "xlm")),
    *((family, "QUESTION_ANS") for family in ("llama", "gpt2", "bloom", "opt", "t5", "bart", *ENCODERS, "led")),
]
PER_TOKEN = ("TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM")


def same(found, expected, bound: float = 2e-5) -> None:
    assert found.shape == expected.shape
    close(found, expected, bound)


@torch.no_grad()
def assert_same_as_oracle(family: str, task: str, inputs: dict, model=None) -> None:
    ours = prompted(family, task) if model is None else model
    found = quietly(ours, **inputs, output_hidden_states=True)
    fed = with_prompt(inputs)
    if task == "SEQ_2_SEQ_LM":
        fed["labels"] = inputs["labels"]
    expected = quietly(oracle(family, task, rows_of(ours)), **fed, output_hidden_states=True)
    close(found.loss, expected.loss, 2e-5)
    assert found.keys() == expected.keys()
    mask = inputs["attention_mask"].bool()
    for name in ("logits", "start_logits", "end_logits"):
        if name in found and task in PER_TOKEN:
            assert found[name].shape[:2] == mask.shape
            same(found[name][mask], of_tokens(expected[name], inputs))
        elif name in found:
            same(found[name], expected[name])
    if "hidden_states" in found:
        assert len(found.hidden_states) == len(expected.hidden_states) > 1
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            if one.shape[:2] == mask.shape and family not in ("longformer", "big_bird"):
                same(one[mask], of_tokens(other, inputs))


@pytest.mark.parametrize(("family", "task"), CASES)
def test_virtual_tokens_are_tokens(family, task):
    for side in ("right", "left"):
        assert_same_as_oracle(family, task, padded(side, family, task))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom", "bert", "roberta"])
def test_with_positions_segments_and_no_mask(family):
    task = "TOKEN_CLS" if family in ENCODERS else "CAUSAL_LM"
    for side in ("right", "left"):
        inputs = padded(side, family, task)
        if family != "bloom":
            mask = inputs["attention_mask"]
            inputs["position_ids"] = (mask.cumsum(1) - 1 + 3).masked_fill(mask == 0, 1)
        if family in ("bert", "gpt2"):
            inputs["token_type_ids"] = torch.arange(9).expand(2, 9) % 2
        assert_same_as_oracle(family, task, inputs)
    inputs = padded("right", family, task)
    inputs.pop("attention_mask")
    whole = {**inputs, "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    ours = prompted(family, task)
    same(result(ours, inputs), result(ours, whole))
    if family == "roberta":  # which takes zeros for padding
        return
    positions = torch.arange(9)[None] if family != "bloom" else None
    if positions is not None:
        same(result(ours, {**inputs, "position_ids": positions}), result(ours, whole))
        same(result(ours, {**whole, "position_ids": positions}), result(ours, whole))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3", "mistral", "opt", "t5", "bart", "bert"])
@pytest.mark.parametrize("method", ["prompt", "lstm"])
def test_gradients_are_those_of_the_rows(family, method):
    task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    for side in ("right", "left"):
        inputs = padded(side, family, task)
        ours = prompted(family, task, method)
        ours(**inputs).loss.backward()
        rows = ours.prompt_encoder["default"].rows()
        model = oracle(family, task, rows.detach())
        model(**with_prompt(inputs)).loss.backward()
        embedding = model.get_encoder().get_input_embeddings() if task == "SEQ_2_SEQ_LM" else None
        embedding = model.get_input_embeddings() if embedding is None else embedding
        slopes = embedding.weight.grad[VOCABULARY:] / getattr(embedding, "embed_scale", 1)
        parameters = list(ours.prompt_encoder.parameters())
        expected = torch.autograd.grad(rows, parameters, slopes)
        assert any(slope.any() for slope in expected)
        greatest = max(float(slope.abs().max()) for slope in expected)
        for parameter, slope in zip(parameters, expected, strict=True):
            close(parameter.grad, slope, 2e-4, floor=1e-6 * greatest)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gpt2", "bloom", "gemma2", "gemma3", "opt", "bert", "roberta", "t5"]
)
def test_padding_changes_nothing(family):
    """A row alone, with padding behind it, and in front, where the base model is indifferent to that."""
    task = "SEQ_CLS"
    ours = prompted(family, task)
    inputs = batch_for(family, task)
    inputs.pop("labels")
    ids = inputs["input_ids"][-1:, :-2]
    alone = result(ours, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for side in ["right"] if family in ("bert", "roberta", "gpt2", "t5", "mistral") else ["right", "left"]:
        both = padded(side, family, task)
        both.pop("labels")
        same(result(ours, both)[-1:], alone)


# What comes back.


def test_a_result_has_no_places_for_virtual_tokens():
    ours, inputs = prompted(), padded("left", "llama", "CAUSAL_LM")
    found = ours(**inputs, output_hidden_states=True, output_attentions=False)
    assert found.logits.shape == (2, 9, VOCABULARY)
    assert {tuple(each.shape) for each in found.hidden_states} == {(2, 9, HIDDEN)}
    as_tuple = ours(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], found.loss)
    assert torch.equal(as_tuple[1], found.logits)
    positional = ours(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    assert torch.equal(positional.logits, found.logits)
    with pytest.raises(TypeError):
        ours(*[None] * 40)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "bert", "bloom"])
def test_places_for_virtual_tokens_can_be_had(family, side):
    task = "TOKEN_CLS" if family == "bert" else "CAUSAL_LM"
    ours = prompted(family, task, virtual_logits=True)
    inputs = padded(side, family, task)
    found = ours(**inputs)
    expected = oracle(family, task, rows_of(ours))(**with_prompt(inputs))
    close(found.loss, expected.loss, 2e-5)
    mask = with_prompt(inputs)["attention_mask"].bool()
    same(found.logits[mask], expected.logits[mask])
    same(found.loss, prompted(family, task)(**inputs).loss)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom", "gpt2"])
def test_logits_to_keep_is_of_tokens(family):
    ours, inputs = prompted(family), padded("left", family, "CAUSAL_LM")
    labels = inputs.pop("labels")
    mask = inputs["attention_mask"].bool()
    whole = ours(**inputs).logits
    for keep in (0, 1, 3, 9, 10, 12, 14, 30):
        expected = whole[:, -keep:] if 0 < keep < 9 else whole
        seen = mask[:, -keep:] if 0 < keep < 9 else mask
        found = ours(**inputs, logits_to_keep=keep).logits
        assert found.shape == expected.shape, keep
        same(found[seen], expected[seen])
    for places in (torch.tensor([8]), torch.tensor([3, 8, -2])):
        same(ours(**inputs, logits_to_keep=places).logits, whole[:, places])
    loss = ours(**inputs, labels=labels).loss
    same(ours(**inputs, labels=labels, logits_to_keep=9).loss, loss)
    # A loss of labels that were moved already, as parallel sequences have them; the first token has no label there.
    moved = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    found = ours(**inputs, labels=labels, shift_labels=moved).loss
    expected = torch.nn.functional.cross_entropy(whole.flatten(0, 1), moved.flatten(), ignore_index=-100)
    if family != "gpt2" or found.shape == expected.shape:
        same(found, expected)
    kept = ours(**inputs, labels=labels[:, -3:], logits_to_keep=3).loss
    same(kept, torch.nn.functional.cross_entropy(whole[:, -3:-1].flatten(0, 1), labels[:, -2:].flatten()))


@pytest.mark.parametrize("length", [6, 9, 10, 14, 20])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_a_decoder_says_is_left_whole(family, length):
    """However many tokens it has beside the encoder's 9 and 14 places."""
    ours = prompted(family)
    inputs = {**padded("left", family, "SEQ_2_SEQ_LM"), "labels": torch.arange(3, 3 + length).repeat(2, 1)}
    assert ours(**inputs).logits.shape == (2, length, VOCABULARY)
    assert_same_as_oracle(family, "SEQ_2_SEQ_LM", inputs, ours)


@torch.no_grad()
def test_a_decoder_that_decodes_its_input():
    ours = prompted("bart")
    inputs = padded("right", "bart", "SEQ_2_SEQ_LM")
    inputs.pop("labels")
    found = ours(**inputs).logits
    expected = oracle("bart", "SEQ_2_SEQ_LM", rows_of(ours))(**with_prompt(inputs)).logits
    assert found.shape == (2, 9, VOCABULARY)
    same(found, expected[:, LENGTH:])


def test_features_of_a_model_without_a_head():
    for family, task in (("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("bart", "SEQ_2_SEQ_LM")):
        inputs = padded("left", family, task)
        inputs.pop("labels")
        ours = prompted(family, "FEATURE_EXTRACTION", base=tiny(family, task).base_model)
        expected = oracle(family, task, rows_of(ours), tiny(family, task).base_model)(**with_prompt(inputs))
        mask = inputs["attention_mask"].bool()
        found = ours(**inputs).last_hidden_state
        assert found.shape == (2, 9, HIDDEN)
        same(found[mask], of_tokens(expected.last_hidden_state, inputs))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "t5", "bart"])
def test_embeddings_in_place_of_ids(family):
    task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "TOKEN_CLS" if family == "bert" else "CAUSAL_LM"
    for side in ("right", "left"):
        ours, inputs = prompted(family, task), padded(side, family, task)
        expected = ours(**inputs)
        ids = inputs.pop("input_ids")
        stack = ours.get_encoder() if task == "SEQ_2_SEQ_LM" else ours
        found = ours(**inputs, inputs_embeds=stack.get_input_embeddings()(ids))
        same(found.loss, expected.loss)
        mask = inputs["attention_mask"].bool()
        if task == "SEQ_2_SEQ_LM":
            same(found.logits, expected.logits)
        else:
            same(found.logits[mask], expected.logits[mask])


# Several sequences in one row.

PARTS = [[4, 5], [9], [2, 3, 4]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3", "qwen2", "phi", "gpt_neox"])
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_sequences_that_share_a_row_are_apart(family, given):
    ours = prompted(family)
    ids = batch(rows=3)["input_ids"].masked_fill(batch(rows=3)["input_ids"] == 0, 7)
    positions = torch.stack([torch.cat([torch.arange(n) for n in sizes]) for sizes in PARTS])
    begins = positions == 0
    labels = ids.masked_fill(begins, -100)
    tokens = {"input_ids": ids} if given == "ids" else {"inputs_embeds": ours.get_input_embeddings()(ids)}
    packed = ours(**tokens, position_ids=positions, labels=labels, output_hidden_states=True)
    assert packed.logits.shape == (3, 9, VOCABULARY)
    total, count = 0.0, 0
    for row, sizes in enumerate(PARTS):
        at = 0
        for size in sizes:
            part = slice(at, at + size)
            alone = ours(
                input_ids=ids[row : row + 1, part], labels=labels[row : row + 1, part], output_hidden_states=True
            )
            same(packed.logits[row, part], alone.logits[0])
            same(packed.hidden_states[1][row, part], alone.hidden_states[1][0])
            total, count, at = total + alone.loss * (size - 1), count + size - 1, at + size
    same(packed.loss, total / count)
    packed.loss.backward()
    found = ours.prompt_encoder["default"].embedding.weight.grad.clone()
    ours.zero_grad()
    (total / count).backward()
    close(found, ours.prompt_encoder["default"].embedding.weight.grad, 1e-4)


@torch.no_grad()
def test_one_row_of_positions_packs_every_row():
    ours = prompted()
    ids = batch(rows=3)["input_ids"]
    positions = torch.cat((torch.arange(4), torch.arange(5)))[None]
    found = ours(input_ids=ids, position_ids=positions).logits
    same(found, ours(input_ids=ids, position_ids=positions.expand(3, -1)).logits)
    same(found[:, 4:], ours(input_ids=ids[:, 4:]).logits)
    with pytest.raises(fastpeft.PatchError, match="logits_to_keep: several sequences share a row"):
        ours(input_ids=ids, position_ids=positions, logits_to_keep=2)


@torch.no_grad()
def test_an_encoder_packs_nothing():
    """Its tokens see each other whatever their positions; there is one prompt in front of them."""
    ours, ids = prompted("bert", "TOKEN_CLS"), batch()["input_ids"]
    positions = torch.cat((torch.arange(4), torch.arange(5))).expand(2, -1)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    expected = oracle("bert", "TOKEN_CLS", rows_of(ours))(**with_prompt(inputs)).logits[:, LENGTH:]
    inputs.pop("attention_mask")
    same(ours(**inputs).logits, expected)


# Memory.


class Copies(TorchDispatchMode):
    """The concatenations whose results have a row of numbers for each place."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.stack) and out.shape[-1:] == (HIDDEN,):
            self.seen.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "t5", "bert"])
def test_no_row_is_copied_to_stand_behind_the_prompt(family, side):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "TOKEN_CLS" if family == "bert" else "CAUSAL_LM"
    ours = prompted(family, task).train()
    inputs = padded("right" if side == "none" else side, family, task)
    if side == "none":
        inputs.pop("attention_mask")
    with Copies() as copies:
        ours(**inputs).loss.backward()
    assert copies.seen == []


@pytest.mark.parametrize("packed", [False, True])
def test_the_prompts_gradient_is_summed_in_fp32(packed):
    """Of a half-precision base with many rows: the sum's own rounding would show."""
    rows, count = 256, 3
    ours = prompted(base=tiny(dtype=torch.bfloat16), num_virtual_tokens=count)
    embedding, table = ours.get_input_embeddings(), ours.prompt_encoder["default"].embedding.weight
    assert table.dtype == torch.float32
    ids = torch.randint(3, VOCABULARY, (rows, 4), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(2).repeat(rows, 2) if packed else None
    seen = []
    embedding.register_forward_hook(lambda module, args, out: out.register_hook(seen.append) and None)
    ours(input_ids=ids, position_ids=positions).logits.float().square().mean().backward()
    places = [range(count), range(count + 2, 2 * count + 2)] if packed else [range(count)]
    exact = sum(seen[0][:, list(each)].double().sum(0) for each in places)
    assert seen[0].dtype == torch.bfloat16 and table.grad.dtype == torch.float32
    assert (table.grad - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_prompt_once(dtype):
    ours = prompted(base=tiny(dtype=dtype))
    inputs = padded("left", "llama", "CAUSAL_LM")
    expected = oracle("llama", "CAUSAL_LM", rows_of(ours).to(dtype), tiny(dtype=dtype))(**with_prompt(inputs))
    found = ours(**inputs)
    assert found.logits.dtype == dtype
    mask = inputs["attention_mask"].bool()
    assert torch.equal(found.logits[mask], of_tokens(expected.logits, inputs))


def test_in_rows_puts_it_where_it_says():
    """The oracle's own instrument."""
    values = torch.arange(6).view(2, 3)
    assert in_rows(values, [0, 2], torch.tensor([8, 9])).tolist() == [[8, 9, 0, 1, 2], [3, 4, 8, 9, 5]]
    assert settings_of("llama")["num_virtual_tokens"] == LENGTH and set(MORE_FAMILIES) > {"mpt"}
