"""A tiny Llama whose layers fit every quantisation, saved once, and quantised anew for each test."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch

from tests.peft_pair import quietly

KINDS = ("nf4", "nf4-double", "fp4", "int8")
TORCHAO = ("ao-int8", "ao-float8", "ao-int4")


@functools.cache
def checkpoint() -> Path:
    """The directory of the model in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # bitsandbytes' CPU kernel needs multiples of 32 outputs and 64 inputs.
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tempfile.mkdtemp(prefix="fastpeft-quantised-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder)
    return Path(folder)


def settings(kind: str, dtype: torch.dtype = torch.float32):
    """transformers' configuration of a quantisation."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if not kind.startswith("ao"):
        name, _, more = kind.partition("-")
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=more == "double",
            bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype if more == "storage" else torch.uint8,
        )  # fmt: skip
    return TorchAoConfig(torchao_config(kind))


def torchao_config(kind: str):
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if kind == "ao-int8":
        return Int8WeightOnlyConfig()
    if kind == "ao-float8":
        return Float8WeightOnlyConfig()
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def load(kind: str, dtype: torch.dtype = torch.float32):
    """The model, quantised, in eval mode."""
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": settings(kind, dtype), "dtype": dtype, "device_map": "cpu"}
    return quietly(AutoModelForCausalLM.from_pretrained, checkpoint(), **options).eval()
