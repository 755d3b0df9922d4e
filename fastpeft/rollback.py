"""A model that others have begun to change, as it was."""

import contextlib

from torch import nn


@contextlib.contextmanager
def put_back_on_failure(model: nn.Module, values: bool = False):
    """Around what gives modules of a model other classes, children, hooks or attributes: if it fails, they have those
    that they had, and parameters their `requires_grad`; with `values` also their values, where these are at hand: there
    is a copy of them on the CPU meanwhile."""
    modules = [(each, type(each), dict(vars(each)), _contents(each)) for each in model.modules()]
    parameters = [(each, each.requires_grad) for each in model.parameters()]
    held = filter(_is_at_hand, model.parameters() if values else ())
    copies = [(each, each.data, each.detach().to("cpu", copy=True)) for each in held]
    try:
        yield
    except BaseException:
        for module, kind, attributes, contents in modules:
            module.__class__ = kind
            vars(module).update(attributes)
            for added in vars(module).keys() - attributes.keys():
                del vars(module)[added]
            for each, before in contents:
                each.clear()
                each.update(before)
        for parameter, data, before in copies:
            parameter.data = data.copy_(before)
        for parameter, wanted in parameters:
            parameter.requires_grad_(wanted)
        raise


def _is_at_hand(parameter: nn.Parameter) -> bool:
    """Whether its values are numbers in memory: neither packed by a quantised layer, nor offloaded, nor sharded."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta


def _contents(module: nn.Module) -> list[tuple[dict, dict]]:
    """A module's dictionaries: of children, parameters, hooks, …, and what is in them."""
    return [(each, dict(each)) for each in vars(module).values() if isinstance(each, dict)]
