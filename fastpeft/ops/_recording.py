"""A function of straight lines, written while another one runs: what that does to tensors, in order (`_programs`)."""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from keyword import iskeyword
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastpeft.ops._quick_tensors import quick_empty, quick_part

MOST = 200  # lines: what takes more is no call whose Python counts

# What is asked of a tensor and `TensorGuards` cover; of one that was made in the function, which comes out alike, these
# as well.
_FIELDS = ("shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "is_meta", "nbytes", "itemsize", "requires_grad")
_METHODS = ("stride", "size", "dim", "numel", "is_contiguous", "is_floating_point", "element_size", "get_device")
_COVERED = {getattr(Tensor, name).__get__ for name in _FIELDS}
_COVERED |= {getattr(Tensor, name) for name in (*_METHODS, "__len__")} | {torch.promote_types}
_OF_OWN = {Tensor._is_view, Tensor.storage_offset}

# What makes new memory, of what values is nobody's business.
_ALLOCATIONS = {torch.empty, torch.empty_like, Tensor.new_empty, torch.empty_strided}

_CONSTANTS = (torch.dtype, torch.device, torch.memory_format, torch.layout)


class _Line(NamedTuple):
    """Its text, the tensors that it names, those that it makes, and whether it does nothing else."""

    text: str
    names: set[str]
    makes: set[str]
    pure: bool


def _changes_tensors(func, kwargs) -> bool:
    """Whether it may: in place, or where its results are written into what it is given."""
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.is_mutable
    return getattr(func, "__name__", "_").endswith("_") or "out" in kwargs


def _kernels():
    from fastpeft.kernels import _common  # which imports triton

    return _common


class Recording(TorchFunctionMode):
    """Within it what is called with tensors, and what is launched if there are `launches`, becomes lines of a program.

    Nothing is written of what only asks, as `_COVERED`, or gives the tensor that it was given. Anything that a line
    cannot say, or that the guards do not cover, and the recording is `refused`: such as how many there are `drawn`, or
    in what is made of these.
    """

    def __init__(self, tensors: Sequence[Tensor | None], drawn: Sequence[Tensor], launches: bool):
        super().__init__()
        self._kernels = _kernels() if launches else None
        tensors = (*tensors, *drawn)
        self._parameters = [f"given_{number}" for number in range(len(tensors))]
        self._unsized = set(self._parameters[len(tensors) - len(drawn) :])
        self._names: dict[int, str] = {}  # by id, of those that are alive
        self._deaths: list[weakref.ref] = []
        self._lines: list[_Line] = []
        self._mentioned: set[str] = set()
        self._constants: dict[str, object] = {}
        self._device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
        self.refused = False
        for tensor, name in zip(tensors, self._parameters, strict=True):
            if tensor is not None:
                self.refused |= id(tensor) in self._names  # that it is there twice need not be so, later
                self._name(tensor, name)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._unsized and (func in _COVERED or func in _ALLOCATIONS) and args:
            self.refused |= self._names.get(id(args[0])) in self._unsized
        if func in _COVERED or (func in _OF_OWN and not self._is_given(args[0])):
            return out
        changes = _changes_tensors(func, kwargs)
        if changes or not (
            (isinstance(out, Tensor) and id(out) in self._names)
            or self._writes_allocation(func, kwargs, out)
            or self._writes_parts(args, out)
        ):
            self._write(self._constant(func), args, kwargs, out, not changes)
        return out

    @contextlib.contextmanager
    def watching(self):
        """The block in which everything is written down."""
        with self._kernels.watched_launches(self._launch) if self._kernels else contextlib.nullcontext(), self:
            yield

    def _launch(self, kernel, grid, on, arguments, options) -> None:
        launcher = functools.partial(kernel[grid], **options)
        self._write(self._constant(launcher), arguments, {}, None, False)
        for option in options.values():  # which the program keeps
            self.refused |= isinstance(option, Tensor)
            self._source(option)
        with torch._C.DisableTorchFunction(), self._kernels.on_device_of(on):  # the interpreter is made of torch
            launcher(*arguments)

    def _writes_allocation(self, func, kwargs, out) -> bool:
        """Whether it was one, of plain memory, and is written as a quicker one."""
        make = quick_empty(self._device.type) if func in _ALLOCATIONS and not kwargs.get("pin_memory") else None
        if make is None or not self._is_plain(out) or not out.is_contiguous():
            return False
        self._write(self._constant(make), (out.shape, out.stride(), out.dtype), {}, out, True)
        return True

    def _writes_parts(self, args, out) -> bool:
        """Whether all that came of it are other views of the memory of its first argument, and are written as such."""
        results, take = list(out) if isinstance(out, (tuple, list)) else [out], quick_part()
        whole = args[0] if args and isinstance(args[0], Tensor) else None
        if take is None or whole is None or self._names.get(id(whole)) in self._unsized:
            return False
        if not results or not all(self._is_part(each, whole) for each in results):
            return False
        for each in results:
            where = each.storage_offset() - whole.storage_offset()
            self._write(self._constant(take), (whole, each.shape, each.stride(), where), {}, each, True)
        return True

    def _is_plain(self, tensor) -> bool:
        """Of torch's own kind, on the device of the call, with values that are as they are stored."""
        return (
            type(tensor) is Tensor
            and tensor.layout is torch.strided
            and tensor.device == self._device
            and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
        )

    def _is_part(self, view, whole: Tensor) -> bool:
        return (
            self._is_plain(view)
            and id(view) not in self._names
            and view.dtype is whole.dtype
            and whole.layout is torch.strided
            and not (whole.is_conj() or whole.is_neg())
            and view.untyped_storage()._cdata == whole.untyped_storage()._cdata
        )

    def _name(self, tensor: Tensor, name: str) -> None:
        """Until it is let go of, as it is when nobody records."""
        key = id(tensor)
        self._names[key] = name
        self._deaths.append(weakref.ref(tensor, lambda _: self._names.pop(key, None)))

    def _is_given(self, tensor) -> bool:
        return self._names.get(id(tensor), "given").startswith("given")

    def _write(self, function: str, args, kwargs, out, pure: bool) -> None:
        """A line, `pure` if nothing but its results comes of it."""
        self._mentioned = set()
        given = [self._source(each) for each in args]
        given += [f"{name}={self._source(each)}" for name, each in kwargs.items()]
        line, several = f"{function}({', '.join(given)})", isinstance(out, (tuple, list))
        results = list(out) if several else [out]
        if not all(each is None or isinstance(each, Tensor) for each in results) or any(map(iskeyword, kwargs)):
            self.refused = True  # a number that was read from a tensor, or what no line can say
        makes = set()
        for each in results:
            if isinstance(each, Tensor) and id(each) not in self._names:
                self._name(each, f"made_{len(self._deaths)}")
                makes.add(self._names[id(each)])
        if makes:
            names = ["_" if each is None else self._source(each) for each in results]
            line = f"{', '.join(names)}{',' * several} = {line}"
        if not self._unsized.isdisjoint(self._mentioned):
            self._unsized |= makes
        self._lines.append(_Line(line, self._mentioned, makes, pure and bool(makes)))
        self.refused |= len(self._lines) > MOST

    def _constant(self, value) -> str:
        name = next((name for name, each in self._constants.items() if each is value), f"fixed_{len(self._constants)}")
        self._constants[name] = value
        return name

    def _source(self, value) -> str:
        """An expression for it."""
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            if name is None:  # from elsewhere: another call's may be another
                self.refused = True
                return "None"
            self._mentioned.add(name)
            return name
        if type(value) in (tuple, list, torch.Size):
            inner = "".join(f"{self._source(each)}, " for each in value)
            return f"[{inner}]" if type(value) is list else f"({inner})"
        if type(value) is slice:
            return f"slice({self._source(value.start)}, {self._source(value.stop)}, {self._source(value.step)})"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if not (isinstance(value, _CONSTANTS) or type(value).__module__.startswith("triton.language")):
            self.refused = True
        return self._constant(value)

    def program(self, result) -> Callable | None:
        """Takes what the recorded function took, and gives what it gave, `result`: tensors and None in tuples and
        lists. None, if the recording was refused."""
        self._mentioned = set()
        lines, used = [f"return {self._source(result)}"], self._mentioned | set(self._parameters)
        if self.refused:
            return None
        for line in reversed(self._lines):
            if line.pure and line.makes.isdisjoint(used):  # for nobody, or for somebody else: a finaliser, a signal
                continue
            if last := sorted(line.names - used):
                lines.append(f"del {', '.join(last)}")
            lines.append(line.text)
            used |= line.names
        if self._device.type == "cuda":
            lines = [f"    {line}" for line in lines] + [f"with {self._constant(self._kernels.on_device_of)}(given_0):"]
        body = "\n    ".join(reversed(lines))
        scope = dict(self._constants)
        exec(f"def program({', '.join(self._parameters)}):\n    {body}", scope)
        return scope["program"]
