"""The ops, each one function: shapes in its docstring, torch and Triton behind it."""

from fastpeft.ops.lora_linear import dropout_mask, lora_linear, lora_linear_reference

__all__ = ["dropout_mask", "lora_linear", "lora_linear_reference"]
