"""The models of a step: one frozen base on the device, and around its parameters the frozen model, HF peft's and ours.

Three models of eight billion parameters do not fit beside each other; their modules do. `share` copies a model's
modules and keeps its parameters: the copies are wrapped and patched, and hold the same tensors, which nobody trains.
"""

import contextlib
import copy
import functools
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .baselines import Missing
from .dtypes import DTYPES
from .lora_linear_peers import AddmmLora
from .report import FLOOR
from .step_cases import METHODS, MODELS, Case

PEFT, COMPILED, ALGEBRA = "peft", "peft-compile", "addmm-algebra"
OURS, FUSED, LIGER = "fastpeft", "fastpeft-fused", "liger"
OF_PEFT = (PEFT, COMPILED, ALGEBRA)  # models of HF peft's
LABELS = {
    FLOOR: "the frozen model: forward, and backward down to its embeddings",
    PEFT: "HF peft, eager, its defaults",
    COMPILED: "HF peft, its defaults, every layer of the model under torch.compile",
    ALGEBRA: "HF peft's model, its linear layers the vendor's products, then addmm_: Unsloth's and Axolotl's algebra",
    OURS: "fastpeft",
    FUSED: "fastpeft, with projections that read one tensor as one op, and MLPs as one",
    LIGER: "fastpeft in a model with Liger's norms, MLP, rotary embedding and loss",
}
ONCE = ("pooler", "classifier", "score")  # modules that see one token of a sequence


@dataclass
class Model:
    """A module with what its forward runs in: Liger's replacements are global names of transformers' modules."""

    module: nn.Module
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.context():
            return self.module(**inputs).loss


def build_base(model: str, dtype: str, device: torch.device) -> nn.Module:
    """A frozen model of random weights, in train mode, made where it is used; nothing is downloaded."""
    import transformers

    found = MODELS[model]
    kind = "AutoModelForSequenceClassification" if found.task == "SEQ_CLS" else "AutoModelForCausalLM"
    config = getattr(transformers, found.config)(**found.arguments)
    torch.manual_seed(0)
    with torch.device(device):
        base = getattr(transformers, kind).from_config(config, dtype=DTYPES[dtype])
    return base.requires_grad_(False).train()


def share(base: nn.Module, convert: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter) -> nn.Module:
    """A copy of the modules with the same parameters, or with what `convert` makes of each; tied ones stay tied."""
    return copy.deepcopy(base, {id(parameter): convert(parameter) for parameter in base.parameters()})


def widened(base: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same values in a wider type. What transformers computes in fp32 whatever the type (norms, rotary angles)
    stays so, in all alike."""
    return share(base, lambda parameter: nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def frozen(base: nn.Module) -> Model:
    """The floor: no adapter, and embeddings that want a gradient, so that backward runs through every layer."""
    module = share(base)
    module.enable_input_require_grads()
    return Model(module)


def adapted(name: str, base: nn.Module, case: Case, backend: str | None = None) -> Model:
    """HF peft's or our model on the parameters of `base`, its adapter drawn from one seed. backend: of ours.

    Raises Missing where the library is not installed, has no such method, or none for such a model, and where a variant
    has nothing to change.
    """
    if name in _VARIANTS and case.method != "lora":
        raise Missing(f"{case.method} has no layers of plain LoRA")
    module, context = share(base), contextlib.nullcontext
    if name == LIGER:
        context = _surround(module)
    wrap, config_class, refusals = _peft(case) if name in OF_PEFT else _ours(case, backend)
    torch.manual_seed(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = wrap(module, config_class(**case.options())).train()
    except refusals as error:
        library = PEFT if name in OF_PEFT else OURS
        raise Missing(f"{library} has no {case.method} for {type(base).__name__}: {error}") from error
    if name in _VARIANTS:
        _VARIANTS[name](module)
    return Model(module, context)


def _compile(module: nn.Module) -> None:
    """Layer by layer: they share what is compiled of the first, where the whole model would take minutes."""
    count = module.config.num_hidden_layers
    for layers in module.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            for layer in layers:
                layer.compile(dynamic=False)


def _by_algebra(module: nn.Module) -> None:
    """An autograd function in the place of each adapted linear layer's forward."""
    from peft.tuners.lora import Linear

    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.forward = functools.partial(_algebra, layer)


def _algebra(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x (..., K) through peft's layer around an nn.Linear; the adapter's matrices are rounded to x's type."""
    base, (name,) = layer.base_layer, layer.active_adapters
    a, b = (each[name].weight.to(x.dtype) for each in (layer.lora_A, layer.lora_B))
    dropout, rows = getattr(layer.lora_dropout[name], "p", 0.0), x.reshape(-1, x.shape[-1])
    return AddmmLora.apply(rows, base.weight, base.bias, a, b, layer.scaling[name], dropout).view(*x.shape[:-1], -1)


def _fuse(module: nn.Module) -> None:
    """Which projections read one tensor is seen in a call, which is not to be the one that is checked."""
    import fastpeft

    fastpeft.fuse(module)
    device = next(module.parameters()).device
    with torch.no_grad():
        module(input_ids=torch.ones(1, 8, dtype=torch.int64, device=device))


_VARIANTS = {COMPILED: _compile, ALGEBRA: _by_algebra, FUSED: _fuse}  # of models with LoRA, once they are made


def _peft(case: Case):
    try:
        import peft
    except ImportError as error:
        raise Missing(f"peft cannot be imported: {error}") from error
    return peft.get_peft_model, getattr(peft, METHODS[case.method].config), (ValueError,)


def _ours(case: Case, backend: str | None):
    import fastpeft
    from fastpeft.errors import ConfigError, TargetError

    method = METHODS[case.method]
    if method.peft_type not in fastpeft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise Missing(f"fastpeft has no tuner for {method.peft_type}")

    def wrap(module, config):
        return fastpeft.patch(module, config, backend=backend)

    return wrap, getattr(fastpeft, method.config), (ConfigError, TargetError)


def _surround(module: nn.Module) -> Callable[[], contextlib.AbstractContextManager]:
    """Liger's kernels in this module alone. It also replaces names in transformers' own module, which all models look
    up; these are put back, and hold only in the context that is returned."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Missing("liger_kernel is not installed")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
        from liger_kernel.utils import infer_device
    except ImportError as error:
        raise Missing(f"liger_kernel cannot be imported: {error}") from error
    if infer_device() == "cpu":
        raise Missing("liger_kernel finds no GPU for its kernels")
    kind = module.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise Missing(f"liger_kernel has nothing for {kind}")
    names = vars(sys.modules[type(module).__module__])
    before = dict(names)
    try:
        _apply_liger_kernel_to_instance(model=module)
        changed = {name: value for name, value in names.items() if before.get(name) is not value}
    finally:
        names.update(before)
    return lambda: _exchanged(names, changed)


@contextlib.contextmanager
def _exchanged(names: dict, others: dict) -> Iterator[None]:
    kept = {name: names[name] for name in others}
    names.update(others)
    try:
        yield
    finally:
        names.update(kept)


def inputs_of(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, and labels of the task."""
    size, vocabulary = (case.batch, case.seq), case.geometry.vocabulary
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(vocabulary, size, generator=generator)
    labels = ids if case.geometry.task == "CAUSAL_LM" else torch.randint(2, size[:1], generator=generator)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the name that it has in a model that we patched."""
    prompts = getattr(module, "_is_prompt_learning", False)
    return {_our_name(name, prompts): p for name, p in module.named_parameters() if p.requires_grad}


def _our_name(name: str, prompts: bool) -> str:
    name = re.sub(r"(attn)\.model\.", r"\1.", name)
    name = re.sub(r"(\.adaption_(?:prompt|gate))\.\w+$", r"\1", name)
    return name.removeprefix("base_model." if prompts else "base_model.model.").removeprefix("base_model.")


@torch.no_grad()
def stir(module: nn.Module) -> None:
    """As in the middle of training: what starts as zeros (B, gates) gets values, so that no gradient is zero."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in sorted(trained(module).items()):
        if not parameter.any():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * 0.02 if parameter.dim() > 1 else 0.5 + 0.1 * values)


@torch.no_grad()
def load(values: dict[str, torch.Tensor], module: nn.Module) -> None:
    """Writes what `trained` named elsewhere. Raises ValueError unless the names and shapes are the same."""
    found = trained(module)
    shapes = [{name: tuple(p.shape) for name, p in each.items()} for each in (found, values)]
    if shapes[0] != shapes[1]:
        differing = sorted(map(str, shapes[0].items() ^ shapes[1].items()))[:4]
        raise ValueError(f"the two adapters differ: {', '.join(differing)}")
    for name, parameter in found.items():
        parameter.copy_(values[name])


def model_flops(base: nn.Module, case: Case) -> int:
    """Operations of one step of the frozen model, forward and backward down to the embeddings.

    A linear layer of n weights takes 2n a token forward and 2n for the gradient of its input; frozen weights have no
    gradient. Attention takes 4·B·H·S²·D a layer forward (scores, weighted values) and twice that backward, half of it
    where it is causal. Adapters, recomputation, and what is no product of matrices are not counted.
    """
    tokens, linear = case.batch * case.seq, 0
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            seen = case.batch if any(part in ONCE for part in name.split(".")) else tokens
            linear += 4 * module.weight.numel() * seen
    geometry = case.geometry
    pairs = case.batch * case.seq**2 / (2 if geometry.causal else 1)
    return linear + int(12 * pairs * geometry.heads * geometry.depth * base.config.num_hidden_layers)
