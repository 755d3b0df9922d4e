"""`prompt_embedding` on the Triton kernels, one launch forward and one backward."""

from fastpeft.kernels.prompt_embedding import grad_prompt as grad_prompt
from fastpeft.kernels.prompt_embedding import prepend as forward

__all__ = ["forward", "grad_prompt"]
