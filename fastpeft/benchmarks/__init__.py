"""Checkout only, absent from wheels: the benchmarks stand in the top-level folder of this name."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
