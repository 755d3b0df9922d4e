"""Checkout only, absent from wheels: the kernels stand in the top-level folder of this name.

That folder must stay without an `__init__.py` of its own: it would shadow Hugging Face's package `kernels`, which
transformers imports.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
