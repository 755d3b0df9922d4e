"""QLoRA on a CPU and offline: an adapter is trained on a base whose weights are in 4 bits (arXiv 2305.14314).

    pip install fastpeft bitsandbytes accelerate
    python examples/qlora.py                   # --bits 8 --rank 16 --steps 300 --seed 1 --out DIR

The base is a tiny Llama that reads bytes. It learns the English prose of Python's own documentation, is saved, and is
loaded again in 4 bits; there the adapter learns Python code, which the base has never seen. Printed are the bytes of
the linear layers' weights, and the loss on files that are held out: of the base, with the adapter, and with the
adapter loaded from its files on a fresh base. With a model of your own the lines from `load` on stay as they are.
"""

import argparse
import logging
import pydoc_data.topics
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
import transformers

import fastpeft

BYTES = 256  # one token each
LENGTH, BATCH = 64, 8
BASE_STEPS, STEPS = 200, 120
BASE_RATE, RATE = 3e-3, 5e-3
HELD_OUT = 8  # files of code
OUT = Path("demo-output/qlora")


def prose() -> torch.Tensor:
    """The documentation that ships with Python, as bytes."""
    return tokens("\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))


def code() -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held out): modules of the standard library, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    texts = [path.read_text("utf-8") for path in files]
    return tokens("\n".join(texts[HELD_OUT:])), tokens("\n".join(texts[:HELD_OUT]))


def tokens(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches(text: torch.Tensor, steps: int, seed: int) -> list[torch.Tensor]:
    """Batches of BATCH excerpts of LENGTH tokens."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (steps, BATCH), generator=generator)
    return [torch.stack([text[start : start + LENGTH] for start in row]) for row in starts]


def train(model: torch.nn.Module, text: torch.Tensor, steps: int, rate: float, seed: int) -> None:
    """AdamW on everything that wants a gradient; the rate falls to zero."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for batch in batches(text, steps, seed):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def loss_of(model: torch.nn.Module, text: torch.Tensor) -> float:
    """Nats for each byte of held-out text."""
    model.eval()
    found = [float(model(input_ids=batch, labels=batch).loss) for batch in batches(text, 4, seed=0)]
    return sum(found) / len(found)


def pretrained(folder: Path, steps: int, seed: int) -> None:
    """A tiny Llama that has read the documentation, saved in bf16."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=BYTES, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    train(model, prose(), steps, BASE_RATE, seed)
    model.to(torch.bfloat16).save_pretrained(folder)


def load(folder: Path, bits: int) -> torch.nn.Module:
    """The base, quantised as it is read."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = {**four, "bnb_4bit_compute_dtype": torch.bfloat16} if bits == 4 else {"load_in_8bit": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**settings), dtype=torch.bfloat16, device_map="cpu"
    )
    return fastpeft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def weights(model: torch.nn.Module) -> tuple[int, int]:
    """(numbers, bytes) of the quantised layers' weights, with their scales."""
    layers = [module for module in model.modules() if fastpeft.quantised.entry_of(module) is not None]
    numbers = sum(module.in_features * module.out_features for module in layers)
    held = [tensor for module in layers for name, tensor in module.state_dict().items() if name != "bias"]
    return numbers, sum(tensor.nbytes for tensor in held)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an adapter on a quantised base.")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of the base's weights (default: 4)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: 16)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the adapter's training (default: {STEPS})")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, help=f"of the base's (default: {BASE_STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help=f"where the adapter is written (default: {OUT})")
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.base_steps, arguments.rank) < 1:
        parser.error("--steps, --base-steps and --rank: at least 1 is needed")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Everything. Returns 0, or 1 if the adapter has learnt nothing or is another one after loading."""
    arguments = parsed(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # not of every 8-bit product that it is made in fp16
    text, held_out = code()
    with tempfile.TemporaryDirectory() as folder:
        pretrained(Path(folder), arguments.base_steps, arguments.seed)
        model, fresh = load(Path(folder), arguments.bits), load(Path(folder), arguments.bits)
    numbers, size = weights(model)
    bits = 8 * size / numbers
    print(f"linear layers: {numbers:,} weights in {size:,} bytes, {bits:.2f} bits each; bf16 has {2 * numbers:,}")

    config = fastpeft.LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(arguments.seed)
    model = fastpeft.patch(model, config)
    fastpeft.print_trainable_parameters(model)
    before = loss_of(model, held_out)
    train(model, text, arguments.steps, RATE, arguments.seed)
    after = loss_of(model, held_out)
    model.save_pretrained(arguments.out)

    reloaded = loss_of(fastpeft.load_adapter(fresh, arguments.out), held_out)
    print(f"loss on held-out code: base {before:.3f}, adapter {after:.3f}, reloaded {reloaded:.3f} nats a byte")
    print(f"the adapter: {arguments.out}")
    return 0 if after < before and abs(reloaded - after) < 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
