"""Which folder is which package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# Named by hand: in an sdist nothing under fastpeft/ leads find_packages to them, and the wheel would lack the kernels.
ELSEWHERE = {"fastpeft.kernels": "kernels", "fastpeft.benchmarks": "benchmarks"}

setup(
    packages=sorted({*find_packages(include=["fastpeft", "fastpeft.*"]), *ELSEWHERE}),
    package_dir=ELSEWHERE,
    package_data={"fastpeft": ["measured/*.json"]},  # tables of measured choices: see fastpeft/tables.py
)
