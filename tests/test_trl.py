"""TRL's trainers with patched models: the losses of the same script with HF peft, one model in memory, going on."""

import copy
import os
import shutil
import warnings

import datasets
import peft
import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fastpeft
from fastpeft.integrations import trainer as ours
from tests.models import differences, snapshot, tiny

WORDS = [f"w{number}" for number in range(90)]
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}

METHODS = {
    "dropout": ("LoraConfig", {**LORA, "lora_dropout": 0.5}),
    "lora": ("LoraConfig", LORA),
    "head": ("LoraConfig", {**LORA, "modules_to_save": ["lm_head"]}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
}


@pytest.fixture(autouse=True)
def _no_state_of_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def tokenizer():
    names = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "user", "assistant"]
    made = Tokenizer(models.WordLevel({word: id for id, word in enumerate(names + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]",
        chat_template=TEMPLATE,
    )  # fmt: skip


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(7 * number + 3 * place * place) % 90] for place in range(length))


TEXTS = {"text": [sentence(number, 4 + number % 5) for number in range(8)]}
CHATS = {
    "messages": [
        [{"role": "user", "content": sentence(n, 3)}, {"role": "assistant", "content": sentence(n + 9, 4)}]
        for n in range(8)
    ]
}
PAIRS = {
    "prompt": [sentence(number, 3) for number in range(8)],
    "chosen": [" " + sentence(number + 20, 3 + number % 3) for number in range(8)],
    "rejected": [" " + sentence(number + 40, 2 + number % 2) for number in range(8)],
}


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def settings_for(kind, directory, **more):
    more = {"max_steps": 4, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, **more}
    return kind(
        str(directory), per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=1, **more,
    )  # fmt: skip


def model_of(library, method: str, perturb=False):
    """A model with the method's adapter by `library`, which is not neutral if `perturb`."""
    kind, settings = METHODS[method]
    torch.manual_seed(3)
    base = tiny()
    if library is fastpeft:
        model = quiet(fastpeft.patch, base, getattr(fastpeft, kind)(task_type="CAUSAL_LM", **settings))
        if method == "prompt":
            base._fastpeft.quirky.add("default")
    else:
        model = quiet(peft.get_peft_model, base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
    if perturb:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return model


def logged(trainer, *keys) -> list[tuple]:
    keys = keys or ("loss",)
    return [tuple(e[key] for key in keys) for e in trainer.state.log_history if "loss" in e]


def assert_same_losses(trainers, *keys) -> None:
    """`trainers` may make them one by one: GRPO draws with the seed that is set when a trainer is made."""
    found = []
    for trainer in trainers:
        quiet(trainer.train)
        found += [logged(trainer, *keys)]
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    assert len(set(found[0])) == 4


def sft(kind, model, directory, tokenizer, data=TEXTS, **more):
    settings = settings_for(trl.SFTConfig, directory, **more)
    return quiet(kind, model, settings, train_dataset=datasets.Dataset.from_dict(data), processing_class=tokenizer)


@pytest.mark.parametrize("method", [each for each in METHODS if each != "dropout"])  # whose masks are drawn otherwise
def test_sft_has_the_losses_of_peft(method, tmp_path, tokenizer):
    assert_same_losses(
        [
            sft(trl.SFTTrainer, model_of(peft, method), tmp_path / "hf", tokenizer),
            sft(ours.SFTTrainer, model_of(fastpeft, method), tmp_path / "ours", tokenizer),
        ],
        *("loss", "mean_token_accuracy", "entropy", "grad_norm"),
    )


@pytest.mark.parametrize(
    "more", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "packing": True}]
)
def test_sft_of_conversations_in_other_modes(more, tmp_path, tokenizer):
    data = TEXTS if "packing" in more else CHATS
    more = {**more, "max_length": 16} if "packing" in more else more
    configs = [library.LoraConfig(task_type="CAUSAL_LM", **LORA) for library in (peft, fastpeft)]
    trainers = []
    for kind, config, name in ((trl.SFTTrainer, configs[0], "hf"), (ours.SFTTrainer, configs[1], "ours")):
        arguments = settings_for(trl.SFTConfig, tmp_path / name, **more)
        rows = datasets.Dataset.from_dict(data)
        trainers.append(
            quiet(kind, tiny(), arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
        )
    assert_same_losses(trainers)


def dpo(kind, model, directory, tokenizer, config=None, **more):
    settings = settings_for(trl.DPOConfig, directory, **more)
    return quiet(
        kind, model, args=settings, train_dataset=datasets.Dataset.from_dict(PAIRS), processing_class=tokenizer,
        peft_config=config,
    )  # fmt: skip


DPO_KEYS = ("loss", "rewards/margins", "logps/chosen", "logits/rejected", "grad_norm")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora", {}),
        ("dropout", {}),
        ("head", {}),
        ("prefix", {}),
        ("prompt", {}),
        ("lora", {"precompute_ref_log_probs": True}),
        ("lora", {"gradient_checkpointing": True}),
    ],
    ids=["lora", "dropout", "head", "prefix", "prompt", "precomputed", "checkpointed"],
)
def test_dpo_has_the_losses_of_peft(method, more, tmp_path, tokenizer):
    """Of an adapter that was trained before: the reference is what it was."""
    trainers = [
        dpo(kind, model_of(library, method, perturb=True), tmp_path / library.__name__, tokenizer, **more)
        for kind, library in ((trl.DPOTrainer, peft), (ours.DPOTrainer, fastpeft))
    ]
    assert_same_losses(trainers, *DPO_KEYS)
    model = trainers[1].model
    assert set(model.peft_config) == {"default", "ref"} and model.active_adapters == ["default"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)


def test_dpo_beside_a_new_adapter_compares_with_the_base_and_drops_nothing(tmp_path, tokenizer):
    config = {**LORA, "lora_dropout": 0.5}
    trainers = [
        dpo(kind, tiny(), tmp_path / library.__name__, tokenizer, library.LoraConfig(task_type="CAUSAL_LM", **config))
        for kind, library in ((trl.DPOTrainer, peft), (ours.DPOTrainer, fastpeft))
    ]
    assert_same_losses(trainers, *DPO_KEYS)
    model = trainers[1].model
    assert set(model.peft_config) == {"default"}
    assert trainers[1].ref_model.model is model
    assert model.peft_config["default"].lora_dropout == 0.5


def test_dpo_goes_on_bit_for_bit(tmp_path, tokenizer):
    more = {"save_strategy": "steps", "save_steps": 2}
    whole = dpo(ours.DPOTrainer, model_of(fastpeft, "lora", perturb=True), tmp_path / "whole", tokenizer, **more)
    quiet(whole.train)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "halves/checkpoint-2")
    second = dpo(ours.DPOTrainer, model_of(fastpeft, "lora"), tmp_path / "halves", tokenizer, **more)
    quiet(second.train, resume_from_checkpoint=True)
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in second.model.named_parameters())
    files = os.listdir(tmp_path / "halves/checkpoint-4")
    assert "ref" in files and "adapter_model.safetensors" in files and "model.safetensors" not in files


def reward(completions, **kwargs):
    return [float(len(set(completion.split()))) for completion in completions]


def test_grpo_has_the_losses_of_peft(tmp_path, tokenizer):
    def trainers():
        for kind, library in ((trl.GRPOTrainer, peft), (ours.GRPOTrainer, fastpeft)):
            settings = settings_for(
                trl.GRPOConfig, tmp_path / library.__name__, beta=0.1, num_generations=2, max_completion_length=5,
            )  # fmt: skip
            made = quiet(
                kind, model_of(library, "lora", perturb=True), reward_funcs=reward, args=settings,
                train_dataset=datasets.Dataset.from_dict({"prompt": PAIRS["prompt"]}), processing_class=tokenizer,
            )  # fmt: skip
            assert made.beta == made.args.beta == 0.1
            yield made

    assert_same_losses(trainers(), "loss", "kl", "reward")


@pytest.mark.parametrize("when", ["patched", "peft_config"])
def test_vllm_is_refused_which_would_not_have_the_adapter(when, tmp_path, tokenizer):
    settings = settings_for(trl.GRPOConfig, tmp_path, num_generations=2)
    settings.use_vllm = True  # afterwards: TRL asks for the package
    model = model_of(fastpeft, "lora") if when == "patched" else tiny()
    config = None if when == "patched" else fastpeft.LoraConfig(r=2, target_modules=["q_proj"])
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match="use_vllm=True: TRL hands vLLM the weights of a peft.PeftModel"):
        ours.GRPOTrainer(model, reward_funcs=reward, args=settings, peft_config=config)
    assert differences(before, snapshot(model)) == []


def test_after_unpatching_the_model_is_trl_s(tmp_path, tokenizer):
    model = model_of(fastpeft, "lora")
    trainer = sft(ours.SFTTrainer, model, tmp_path, tokenizer)
    fastpeft.unpatch(model)
    ids = torch.arange(3, 9)[None]
    found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert found.loss.item() == pytest.approx(tiny()(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert trainer.model is model and "_fastpeft" not in model.__dict__


def test_what_trl_cannot_train_is_refused_before_anything_changes(tmp_path, tokenizer):
    head = fastpeft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]}, task_type="CAUSAL_LM")
    model = fastpeft.patch(tiny(), head)
    for kind, make in ((ours.SFTTrainer, sft), (ours.DPOTrainer, dpo)):
        with pytest.raises(fastpeft.PatchError, match="a LoRA on the model's head is not trained under TRL"):
            make(kind, model, tmp_path, tokenizer)
    with pytest.raises(fastpeft.PatchError, match="peft_config beside a model that is patched and has 'default'"):
        dpo(ours.DPOTrainer, model, tmp_path, tokenizer, copy.copy(head))
    with pytest.raises(fastpeft.PatchError, match="peft_config beside model='somewhere': load the model first"):
        dpo(ours.DPOTrainer, "somewhere", tmp_path, tokenizer, head)
    model = model_of(fastpeft, "lora")
    with pytest.raises(fastpeft.PatchError, match="sync_ref_model=True needs a second model"):
        dpo(ours.DPOTrainer, model, tmp_path, tokenizer, sync_ref_model=True)
    model.add_adapter("ref", model.peft_config["default"])
    with pytest.raises(fastpeft.PatchError, match="active are 'default', and there are 'default', 'ref'"):
        dpo(ours.DPOTrainer, model, tmp_path, tokenizer)
    assert "forward" not in model.__dict__ and set(model.peft_config) == {"default", "ref"}


def test_peft_models_are_handled_as_trl_does(tmp_path, tokenizer):
    assert_same_losses(
        [
            sft(trl.SFTTrainer, model_of(peft, "lora"), tmp_path / "hf", tokenizer),
            sft(ours.SFTTrainer, model_of(peft, "lora"), tmp_path / "ours", tokenizer),
        ]
    )


def test_a_refusal_leaves_the_model_as_it_was(tmp_path, tokenizer):
    head = fastpeft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, "target_modules": ["lm_head"]})
    plain = fastpeft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    model = tiny()
    with pytest.raises(fastpeft.PatchError, match="a LoRA on the model's head"):
        dpo(ours.DPOTrainer, model, tmp_path, tokenizer, head)
    with pytest.raises(fastpeft.PatchError, match="sync_ref_model=True"):
        dpo(ours.DPOTrainer, model, tmp_path, tokenizer, plain, sync_ref_model=True)
    assert "_fastpeft" not in model.__dict__ and not any("lora_" in name for name, _ in model.named_parameters())
