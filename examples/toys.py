"""What the small examples run on where no `--model` is given: models of random weights, a tokenizer that is trained on
the spot, and sentences that are put together of a few words. Nothing is downloaded.

    model, tokenizer = toys.load("AutoModelForCausalLM", None)       # or the directory of a model of your own
"""

import argparse
import functools
import pydoc_data.topics
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 600
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WHO = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo", "Ida", "Jack"]
WHERE = ["Athens", "Berlin", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome", "Tokyo"]
WHEN = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class Trip(NamedTuple):
    """A sentence, and what it tells."""

    text: str
    who: str
    where: str
    when: str


def trips(count: int, seed: int) -> list[Trip]:
    """Sentences such as "On Friday Ida took the train to Oslo." """
    generator = torch.Generator().manual_seed(seed)
    forms = (
        "On {when} {who} took the train to {where}.",
        "{who} went to {where} on {when}.",
        "It was {when}, and {who} flew to {where}.",
    )

    def one_of(words):
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    found = []
    for _ in range(count):
        who, where, when = one_of(WHO), one_of(WHERE), one_of(WHEN)
        found.append(Trip(one_of(forms).format(who=who, where=where, when=when), who, where, when))
    return found


def prose() -> str:
    """The documentation that ships with Python."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def blocks(tokenizer: Any, text: str, count: int, length: int) -> list[dict]:
    """`count` rows of `length` tokens out of a text, with the tokens as labels."""
    ids = tokenizer(text[: 12 * count * length], add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, count * length, length)]
    return [{"input_ids": row, "labels": row} for row in rows if len(row) == length]


@functools.cache
def tokenizer() -> Any:
    """Byte pairs, of Python's documentation and of `trips`; a pair of texts is what BERT makes of it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([*(trip.text for trip in trips(2000, 0)), prose()[:100_000]], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=CHAT,
    )  # fmt: skip


def configuration(auto_class: str) -> Any:
    """Of a tiny Llama, BART or BERT. The weights of the first two are drawn from a wider range than usual: what is not
    trained, the head above all, is too small otherwise for an adapter to say much through it."""
    names = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, **names}
    if auto_class == "AutoModelForCausalLM":
        return transformers.LlamaConfig(
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1, **sizes
        )
    if auto_class == "AutoModelForSeq2SeqLM":
        return transformers.BartConfig(
            d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=128, init_std=0.1, dropout=0.0,
            attention_dropout=0.0, decoder_start_token_id=2, forced_eos_token_id=None, **names,
        )  # fmt: skip
    return transformers.BertConfig(
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )


def load(auto_class: str, directory: str | None, seed: int = 0) -> tuple[torch.nn.Module, Any]:
    """A model of one of transformers' Auto classes with its tokenizer: of a local directory, or a tiny one, whose
    weights depend on nothing but the seed."""
    cls = getattr(transformers, auto_class)
    torch.manual_seed(seed)  # a head that the directory lacks is drawn as well
    if directory is None:
        return cls.from_config(configuration(auto_class)), tokenizer()
    if not (Path(directory) / "config.json").is_file():
        raise SystemExit(f"--model {directory}: no config.json there; the directory of a saved model is needed")
    own = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if own.pad_token is None:
        own.pad_token = own.eos_token
    return cls.from_pretrained(directory, local_files_only=True), own


def parser(name: str, about: str, steps: int, rate: float) -> argparse.ArgumentParser:
    """What every small example can be told; `about` is its docstring, of which the first line is shown."""
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--model", metavar="DIR", help="a saved model with its tokenizer (default: a tiny one)")
    made.add_argument("--steps", type=whole, default=steps, help=f"of training (default: {steps})")
    made.add_argument("--rate", type=float, default=rate, help=f"the learning rate (default: {rate})")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("demo-output") / name, help="where files go")
    return made


def whole(text: str) -> int:
    """A number of steps."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: at least 2 are needed")
    return int(text)
