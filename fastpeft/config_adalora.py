"""AdaLoRA's configuration."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fastpeft.config_base import PeftType, is_count, is_int, is_number, refuse
from fastpeft.config_lora import LoraConfig

MOST_ROWS = 1 << 16  # far beyond the width of any layer

# Fields of LoRA's that peft accepts for AdaLoRA and that change nothing there: name -> (neutral value, advice).
_IDLE = {
    "r": (8, "AdaLoRA's ranks are init_r and target_r; set those"),
    "use_rslora": (False, "AdaLoRA scales by lora_alpha / init_r; leave it False"),
    "lora_bias": (False, "AdaLoRA has no bias of its own; leave it False"),
    "alpha_pattern": ({}, "AdaLoRA has one lora_alpha for all layers; leave it empty"),
}


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA (Zhang et al., arXiv 2303.10512), with peft's fields: each layer begins with init_r triplets of a
    singular value and two vectors, and a schedule of total_step steps takes away all but target_r a layer on average.

    tinit, tfinal: steps at the start and at the end in which nothing is taken away; between them the budget falls with
    the cube of what is left, and every deltaT steps the least important triplets go. beta1, beta2: how slowly the
    importances and their uncertainties change (equations 9 and 10). orth_reg_weight: how strongly the vectors are held
    to be orthogonal (gamma).
    rank_pattern: which triplets are left, by `<path>.lora_E`; the allocator writes it.
    """

    rank_pattern: dict | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    method: ClassVar[PeftType | None] = PeftType.ADALORA
    tuner: ClassVar[str] = "fastpeft.tuners.adalora_injection"

    @property
    def final_step(self) -> int:
        """The step at which the ranks are settled."""
        return self.total_step - self.tfinal

    @property
    def effective_alpha(self) -> float:
        """lora_alpha, or init_r for one that is not positive, as in peft."""
        return self.lora_alpha if self.lora_alpha > 0 else float(self.init_r)

    def normalise(self) -> None:
        pattern = self.rank_pattern
        super().normalise()
        if pattern is None or not isinstance(pattern, Mapping):
            self.rank_pattern = pattern
        else:
            self.rank_pattern = {_without_adapter(key): _as_list(value) for key, value in pattern.items()} or None

    def validate(self) -> None:
        super().validate()
        for name in ("init_r", "deltaT"):
            if not is_count(getattr(self, name)):
                refuse(name, getattr(self, name), "must be an int of at least 1")
        if self.init_r > MOST_ROWS:
            refuse("init_r", self.init_r, f"the most is {MOST_ROWS}")
        for name in ("target_r", "tinit", "tfinal"):
            value = getattr(self, name)
            if not is_int(value) or value < 0:
                refuse(name, value, "must be an int from 0 up")
        for name in ("beta1", "beta2"):
            if not is_number(getattr(self, name)) or not 0 < getattr(self, name) < 1:
                refuse(name, getattr(self, name), "must be a number above 0 and below 1")
        if not is_number(self.orth_reg_weight) or self.orth_reg_weight < 0:
            refuse("orth_reg_weight", self.orth_reg_weight, "must be a finite number from 0 up")
        if self.use_dora:
            refuse("use_dora", True, "AdaLoRA does not go with DoRA; set it to False")
        if self.target_parameters:
            refuse("target_parameters", self.target_parameters, "AdaLoRA adapts modules alone; leave it out")
        self._validate_schedule()

    def _validate_schedule(self) -> None:
        total = self.total_step
        if total is None and self.inference_mode:
            return
        if not is_count(total):
            refuse("total_step", total, "AdaLoRA needs the number of training steps, an int of at least 1")
        if self.tinit >= total - self.tfinal:
            why = f"total_step={total} and tfinal={self.tfinal} leave no steps after it in which ranks can fall"
            refuse("tinit", self.tinit, f"{why}; lower tinit or tfinal, or raise total_step")

    def validate_new(self) -> None:
        for name, (neutral, advice) in _IDLE.items():
            if getattr(self, name) != neutral:
                refuse(name, getattr(self, name), advice)
        if not isinstance(self.init_lora_weights, bool):
            refuse("init_lora_weights", self.init_lora_weights, "AdaLoRA has True and False; choose one of them")
        if self.rank_pattern is not None:
            refuse("rank_pattern", self.rank_pattern, "the allocator writes it in training; leave it out")
        if self.target_r >= self.init_r:
            warnings.warn(
                f"target_r={self.target_r} is not below init_r={self.init_r}, so all ranks stay as they are",
                stacklevel=3,
            )

    def trains(self, key: str) -> bool:
        return True

    def kept_of(self, path: str) -> list[bool] | None:
        """Which of the init_r triplets of a layer are left; None if nothing says so."""
        return (self.rank_pattern or {}).get(f"{path}.lora_E")

    def _validate_patterns(self, name: str, fits: Callable[[object], bool], wanted: str) -> None:
        if name != "rank_pattern":
            super()._validate_patterns(name, fits, wanted)
            return
        pattern = self.rank_pattern
        if pattern is None:
            return
        if not isinstance(pattern, dict):
            refuse(name, pattern, "must be a dict from layers to lists of booleans, or None")
        for key, kept in pattern.items():
            if not isinstance(key, str) or not key.endswith(".lora_E"):
                refuse(f"a key of {name}", key, "must be the path of a layer with .lora_E behind it")
            if not isinstance(kept, list) or not all(isinstance(each, bool) for each in kept):
                refuse(f"{name}[{key!r}]", kept, "must be a list of booleans")
            if len(kept) != self.init_r:
                refuse(
                    f"{name}[{key!r}]",
                    kept,
                    f"has {len(kept)} entries and init_r is {self.init_r}; one for each is needed",
                )


def _without_adapter(key: object) -> object:
    """A key as peft writes it; in memory it has the adapter's name at its end."""
    found = re.fullmatch(r"(.+\.lora_E)\.[A-Za-z0-9_-]+", key) if isinstance(key, str) else None
    return found[1] if found else key


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, list | tuple) else value
