"""The support matrix: every method on every task of every family, and what each of these cells must do, in the same
words for fastpeft and for Hugging Face peft.

`tests/test_matrix.py` runs a part of it, `python -m tests.matrix_report` all of it.
"""

import contextlib
import functools
import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tests.models import batch_for, config_of, has_class, longer, tiny
from tests.peft_pair import by_base_name, result

DECODERS = (
    *("llama", "mistral", "mistral-wide", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"),
    *("mixtral", "qwen3_moe", "gpt_oss", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt"),
)
ENCODER_DECODERS = ("t5", "t5-wide", "mt5", "bart", "mbart", "pegasus", "whisper")
ENCODERS = (
    *("bert", "roberta", "electra", "electra-small", "distilbert", "albert", "modernbert", "deberta-v2", "vit"),
)
FAMILIES = (*DECODERS, *ENCODER_DECODERS, *ENCODERS)
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
LENGTH = 4  # virtual tokens
STEPS, RATE = 3, 1e-3
LEARNED = 0.1  # the loss of a model that is sure where the answers are
NEW_TOKENS = 4
SPOKEN = ("whisper",)  # whose `generate` is one of its own


@dataclass(frozen=True)
class Method:
    """A method: its configuration's class in both libraries, and the settings of the cells."""

    config: str
    settings: dict


METHODS = {
    "lora": Method("LoraConfig", {"r": 4, "lora_alpha": 8}),
    "adalora": Method("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 8, "lora_alpha": 8}),
    "prefix": Method("PrefixTuningConfig", {"num_virtual_tokens": LENGTH}),
    "p-tuning": Method("PromptEncoderConfig", {"num_virtual_tokens": LENGTH, "encoder_hidden_size": 16}),
    "prompt": Method("PromptTuningConfig", {"num_virtual_tokens": LENGTH}),
    "adapter": Method("AdaptionPromptConfig", {"adapter_len": LENGTH, "adapter_layers": 2}),
}


@dataclass(frozen=True)
class Cell:
    family: str
    task: str
    method: str

    def __str__(self) -> str:
        return f"{self.family} {self.task} {self.method}"

    def base(self) -> torch.nn.Module:
        return tiny(self.family, self.task)

    def inputs(self) -> dict[str, torch.Tensor]:
        inputs = batch_for(self.family, self.task)
        mask = inputs.get("attention_mask")
        window = getattr(config_of(self.family, self.task), "sliding_window", None)
        if mask is not None and window and self.task == "SEQ_CLS":
            # The last token, of which the class is made, sees a prompt no farther away than the windows of all layers.
            inputs = {key: value[:, 4:] if value.shape == mask.shape else value for key, value in inputs.items()}
            mask = inputs["attention_mask"]
        if mask is not None and self.task == "TOKEN_CLS":
            inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
        return inputs

    def config(self, library, **more) -> Any:
        method = METHODS[self.method]
        return getattr(library, method.config)(task_type=self.task, **method.settings, **more)


@functools.cache
def offers(family: str, task: str) -> bool:
    """Whether transformers has a class for the task of this family."""
    if task == "CAUSAL_LM" and family not in DECODERS:
        return False  # where there is one, it is a part of the model, or reads both ways
    return has_class(family, task)


def cells() -> list[Cell]:
    """All that transformers has a class for."""
    every = itertools.product(FAMILIES, TASKS)
    return [Cell(*pair, method) for pair in every if offers(*pair) for method in METHODS]


@dataclass(frozen=True)
class Library:
    """One of the two: how it wraps a model, by itself and told what it asks for; how it loads an adapter, and goes on
    to the next step of training."""

    name: str
    unaided: Callable[[torch.nn.Module, Cell], torch.nn.Module]
    wrap: Callable[[torch.nn.Module, Cell], torch.nn.Module]
    load: Callable[[torch.nn.Module, Path], torch.nn.Module]
    stepped: Callable[[torch.nn.Module, int], None]


def ours(**options) -> Library:
    import fastpeft

    def stepped(model, step):
        if any(config.peft_type == "ADALORA" for config in model.peft_config.values()):
            fastpeft.update_and_allocate(model, step)

    def wrap(base, cell):
        return fastpeft.patch(base, cell.config(fastpeft), **options)

    return Library("fastpeft", wrap, wrap, fastpeft.load_adapter, stepped)


def peft_s() -> Library:
    import peft

    def stepped(model, step):
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)

    def unaided(base, cell):
        return peft.get_peft_model(base, cell.config(peft))

    def wrap(base, cell):
        random = torch.get_rng_state()
        try:
            return unaided(base, cell)
        except ValueError as error:
            asked = _asked_for(cell) if re.search("specify|target", str(error)) else {}
            if not asked:
                raise
        torch.set_rng_state(random)
        return peft.get_peft_model(cell.base(), cell.config(peft, **asked))

    return Library("peft", unaided, wrap, peft.PeftModel.from_pretrained, stepped)


def _asked_for(cell: Cell) -> dict:
    """What peft asks the user for where it finds no default of its own: fastpeft's."""
    config = ours().wrap(cell.base(), cell).peft_config["default"]
    names = ("target_modules", "token_dim", "num_attention_heads", "num_layers")
    found = {name: getattr(config, name, None) for name in names}
    return {} if cell.method == "adapter" else {name: value for name, value in found.items() if value}


def made(library: Library, cell: Cell) -> torch.nn.Module:
    """An adapted model, in eval mode, with gates open and nothing neutral."""
    torch.manual_seed(11)
    model = library.wrap(cell.base(), cell).eval()
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and any(each in name for each in ("lora_", "adaption_")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def read(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """The logits, of real tokens where there is one row for each token; those of virtual ones are left out."""
    with torch.no_grad():
        found = result(model, inputs)
    mask = inputs.get("attention_mask")
    if mask is None or found.ndim < 3:
        return found
    answers = "start_positions" in inputs  # (2, B, T) and not (B, T, N)
    if not answers and found.shape[1] < mask.shape[1]:
        return found
    found = (found if answers else found.movedim(-1, 0))[..., -mask.shape[1] :]
    return found[..., mask.bool()]


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= bound, f"logits differ by {error:.1e} of the greatest"


def finds_defaults(library: Library, cell: Cell, folder: Path) -> None:
    """Nothing need be said of the model: which modules are targets, and how large what is."""
    library.unaided(cell.base(), cell)


def trains(library: Library, cell: Cell, folder: Path) -> None:
    """Three steps on one batch: the loss falls, compared without dropout, and everything trainable has a gradient."""
    torch.manual_seed(11)
    model, inputs = library.wrap(cell.base(), cell).train(), cell.inputs()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained, "nothing is trainable"
    if cell.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        heads = [name for name in trained if not any(part in name for part in ("lora_", "prompt", "adaption_"))]
        assert heads, "the head is not trained"
    optimiser, before = torch.optim.AdamW(trained.values(), lr=RATE), _loss(model, inputs)
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        model(**inputs).loss.backward()
        optimiser.step()
        library.stepped(model, step)
    # The bias of an answer's logits moves all places alike, which changes no share of them.
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.any() and not n.endswith("bias")]
    assert not without, f"no gradient for {without[0]}"
    after = _loss(model, inputs)
    assert after < before, f"the loss went from {before:.4f} to {after:.4f}"


@torch.no_grad()
def _loss(model: torch.nn.Module, inputs: dict) -> float:
    model.eval()
    loss = float(model(**inputs).loss)
    model.train()
    return loss


def reloads(library: Library, cell: Cell, folder: Path) -> None:
    """A saved adapter on a fresh base gives the same logits."""
    model, inputs = made(library, cell), cell.inputs()
    model.save_pretrained(folder)
    loaded = library.load(cell.base(), folder)
    options = {"hf_quirks": False} if library.name == "fastpeft" else {}
    assert not options or not loaded._fastpeft.quirky
    close(read(loaded.eval(), inputs), read(model, inputs))


def ignores_padding(library: Library, cell: Cell, folder: Path) -> None:
    """A row gives the same alone, with padding behind it, and beside longer rows."""
    inputs = cell.inputs()
    if "attention_mask" not in inputs:
        return
    model = made(library, cell)
    expected = read(model, inputs)
    close(read(model, longer(inputs)), expected)
    mask = inputs["attention_mask"]
    count = int(mask[-1].sum())
    alone = {k: v[-1:, :count] if v.shape == mask.shape else v[-1:] for k, v in inputs.items()}
    last = expected[-1:] if expected.ndim < 2 or cell.task in ("SEQ_CLS", "SEQ_2_SEQ_LM") else expected[..., -count:]
    close(read(model, alone).reshape(last.shape), last)


def checkpoints(library: Library, cell: Cell, folder: Path) -> None:
    """Gradient checkpointing, of both kinds, changes no gradient."""
    if not cell.base().supports_gradient_checkpointing:
        return
    model = made(library, cell)
    expected = _gradients(model, cell)
    greatest = max(float(each.norm()) for each in expected.values())
    for reentrant in (False, True):
        model = made(library, cell) if reentrant else model
        if library.name == "peft" and reentrant:
            model.enable_input_require_grads()  # as its documentation says
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = _gradients(model, cell)
        for name, each in expected.items():
            error = float((found[name] - each).norm())
            assert error <= 1e-5 * max(float(each.norm()), 0.1 * greatest), f"the gradient of {name} differs"


def _gradients(model: torch.nn.Module, cell: Cell) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(17)  # some heads drop out
    model(**cell.inputs()).loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, f"no gradient for {missing[0]}"
    return found


def answers(library: Library, cell: Cell, folder: Path) -> None:
    """A model that has learned where the answers are says so, by its logits of real tokens; it is told of segments."""
    if cell.task != "QUESTION_ANS":
        return
    model, inputs = made(library, cell).train(), cell.inputs()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-2, weight_decay=0.0)
    for _ in range(40):
        optimiser.zero_grad()
        loss = model(**inputs).loss
        if float(loss) < LEARNED:
            break
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        output = model.eval()(**inputs)
    tokens = inputs["input_ids"].shape[1]
    for which in ("start", "end"):
        found = output[f"{which}_logits"][:, -tokens:].argmax(1)
        wanted = inputs[f"{which}_positions"]
        assert torch.equal(found, wanted), f"the {which} is found at {found.tolist()}, not at {wanted.tolist()}"
    if getattr(model.config, "type_vocab_size", 0) > 1:
        segments = torch.ones_like(inputs["input_ids"])
        read_with = read(model, {**inputs, "token_type_ids": segments})
        assert not torch.equal(read_with, read(model, inputs)), "token_type_ids make no difference"


def generates(library: Library, cell: Cell, folder: Path) -> None:
    """Greedy decoding gives what one argmax after the other gives, and the logits before the first: with and without a
    cache, with a static one, and whatever stands in front as padding; as far as the base model does that."""
    if cell.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or cell.family in SPOKEN:
        return
    model = made(library, cell)
    expected = _by_hand(model, cell)
    for mode in _able(cell.family, cell.task):
        try:
            difference = _difference(MODES[mode](model, cell), expected)
        except Exception as error:
            raise AssertionError(f"{mode}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        assert not difference, f"{mode}: {difference}"


@functools.cache
def _able(family: str, task: str) -> tuple[str, ...]:
    """The modes that are right in the base model."""
    cell, out = Cell(family, task, ""), []
    base = cell.base().eval()
    expected = _by_hand(base, cell)
    for mode, decode in MODES.items():
        with contextlib.suppress(RuntimeError, ValueError, IndexError, AttributeError):
            if not _difference(decode(base, cell), expected):
                out.append(mode)
    return tuple(out)


Decoded = tuple[torch.Tensor, torch.Tensor]  # (rows, NEW_TOKENS), and the logits (rows, vocabulary) of the first


def _difference(found: Decoded, expected: Decoded) -> str:
    error = float((found[1] - expected[1]).abs().max() / expected[1].abs().max())
    if error > 1e-5:
        return f"logits differ by {error:.1e} of the greatest"
    return "" if torch.equal(found[0], expected[0]) else "other tokens than one argmax after the other"


def _prompts(cell: Cell) -> torch.Tensor:
    return batch_for(cell.family, cell.task)["input_ids"][:, :6]


@torch.no_grad()
def _by_hand(model: torch.nn.Module, cell: Cell) -> Decoded:
    """Without a cache."""
    prompts = _prompts(cell)
    causal, logits = cell.task == "CAUSAL_LM", []
    ids = prompts if causal else torch.full((len(prompts), 1), model.config.decoder_start_token_id)
    for _ in range(NEW_TOKENS):
        inputs = {"input_ids": ids} if causal else {"input_ids": prompts, "decoder_input_ids": ids}
        logits.append(model(**inputs, use_cache=False).logits[:, -1])
        ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), 1)
    return ids[:, -NEW_TOKENS:], logits[0]


@torch.no_grad()
def _generated(model: torch.nn.Module, ids: torch.Tensor, **options) -> Decoded:
    for each in (model, getattr(model, "base_model", model)):
        if getattr(each, "generation_config", None) is not None:
            each.generation_config.eos_token_id = None
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW_TOKENS, **wanted, **options)
    return out.sequences[:, -NEW_TOKENS:], out.logits[0]


def _behind_padding(model: torch.nn.Module, cell: Cell) -> Decoded:
    ids = _prompts(cell)
    mask = F.pad(torch.ones_like(ids), (3, 0))
    return _generated(model, F.pad(ids, (3, 0)), attention_mask=mask)


MODES: dict[str, Callable[[torch.nn.Module, Cell], Decoded]] = {
    "greedy": lambda model, cell: _generated(model, _prompts(cell)),
    "no cache": lambda model, cell: _generated(model, _prompts(cell), use_cache=False),
    "static cache": lambda model, cell: _generated(model, _prompts(cell), cache_implementation="static"),
    "left padding": _behind_padding,
}

CHECKS: dict[str, Callable[[Library, Cell, Path], None]] = {
    "defaults": finds_defaults,
    "trains": trains,
    "reloads": reloads,
    "padding": ignores_padding,
    "checkpointing": checkpoints,
    "answers": answers,
    "generates": generates,
}


def with_gradients(library: Library, cell: Cell) -> torch.nn.Module:
    """As `made`, with the gradients of one step."""
    model = made(library, cell)
    model(**cell.inputs()).loss.backward()
    return model


@functools.lru_cache(maxsize=1)
def _stepped_by_peft(cell: Cell) -> torch.nn.Module:
    return with_gradients(peft_s(), cell)


def peft_runs(cell: Cell) -> bool:
    """Whether HF peft computes a step of this cell."""
    return not attempt(_stepped_by_peft, cell)


def equals_peft(cell: Cell) -> None:
    """Logits and gradients of one step are HF peft's, with fastpeft as peft does it where that is wrong."""
    pair, inputs = (with_gradients(ours(hf_quirks=True), cell), _stepped_by_peft(cell)), cell.inputs()
    found, expected = (read(model, inputs) for model in pair)
    gradients = [
        {name: each.grad for name, each in by_base_name(model).items() if each.requires_grad} for model in pair
    ]
    close(found, expected)
    shared = gradients[0].keys() & gradients[1].keys()
    assert shared, "no parameter in common"
    greatest = max(float(gradients[1][name].norm()) for name in shared)
    for name in shared:
        expected = gradients[1][name]
        error = float((gradients[0][name] - expected).norm())
        assert error <= 1e-4 * max(float(expected.norm()), 0.1 * greatest), f"the gradient of {name} differs"


def outcome(library: Library, cell: Cell, check: str, folder: Path) -> str:
    """ "" if the check passes, else what went wrong, in one line."""
    return attempt(CHECKS[check], library, cell, folder)


def attempt(check: Callable, *args) -> str:
    """ "" if a check passes, else what went wrong, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(*args)
    except Exception as error:  # whatever a library raises is what the table says of it
        words = " ".join(str(error).split()) or type(error).__name__
        return words if isinstance(error, AssertionError) else f"{type(error).__name__}: {words}"
    return ""
