"""What the scripts of this folder would download: a tokenizer of whole words, and sentences to train on."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant"]
WORDS = [f"w{number}" for number in range(90)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """The vocabulary of the models in `tests.models`; `</s>` ends what it encodes."""
    ids = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=TEMPLATE, model_max_length=64,
    )  # fmt: skip


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(7 * number + 3 * place * place) % len(WORDS)] for place in range(length))


def summaries(rows: int) -> Dataset:
    documents = [sentence(number, 8 + number % 3) for number in range(rows)]
    return Dataset.from_dict({"document": documents, "summary": [" ".join(d.split()[:3]) for d in documents]})


def instructions(rows: int) -> Dataset:
    """Alpaca's columns."""
    return Dataset.from_dict(
        {
            "instruction": [sentence(number, 3) for number in range(rows)],
            "input": [sentence(number + 30, 2) if number % 2 else "" for number in range(rows)],
            "output": [sentence(number + 60, 3 + number % 3) for number in range(rows)],
        }
    )


def chats(rows: int) -> Dataset:
    turns = [("user", lambda number: sentence(number, 3)), ("assistant", lambda number: sentence(number + 9, 4))]
    messages = [[{"role": role, "content": text(number)} for role, text in turns] for number in range(rows)]
    return Dataset.from_dict({"messages": messages})


def preferences(rows: int) -> Dataset:
    """A prompt, an answer to prefer, and one not to."""
    columns = {
        "prompt": [sentence(number, 3) for number in range(rows)],
        "chosen": [" " + sentence(number + 20, 3 + number % 3) for number in range(rows)],
        "rejected": [" " + sentence(number + 40, 2 + number % 2) for number in range(rows)],
    }
    return Dataset.from_dict(columns)


def labelled(rows: int, per_word: bool = False) -> Dataset:
    """Sentences with one of three labels, or one for each word."""
    texts = [sentence(number, 5 + number % 3) for number in range(rows)]
    by_word = [[len(word) % 3 for word in text.split()] for text in texts]
    return Dataset.from_dict({"text": texts, "label": by_word if per_word else [sum(each) % 3 for each in by_word]})
