"""Arithmetic of blocks in Triton's interpreter by one call of numpy each, which is what it comes to in the end: of two
operands of one type, or of one and a number that the type holds. All else, and every error, is the interpreter's own.

Part of `interpreter_speed`, which installs it.
"""

import operator

import numpy as np
from triton.language import core, standard
from triton.runtime.interpreter import TensorHandle
from triton.runtime.interpreter import interpreter_builder as builder

from tests.interpreter_tape import asked, computed, lose

RANGES = {"int32": (-(2**31), 2**31), "int64": (-(2**63), 2**63), "uint32": (0, 2**32)}
NUMPY = {"int32": np.int32, "int64": np.int64, "uint32": np.uint32}
NUMPY |= {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}
ARITHMETIC = {"__add__": np.add, "__sub__": np.subtract, "__mul__": np.multiply}
REFLECTED = {"__radd__": np.add, "__rsub__": np.subtract, "__rmul__": np.multiply}
COMPARISONS = {"__lt__": np.less, "__le__": np.less_equal, "__gt__": np.greater, "__ge__": np.greater_equal}
BITWISE = {"__and__": np.bitwise_and, "__or__": np.bitwise_or, "__xor__": np.bitwise_xor}


def quick_operators(slow: dict) -> dict:
    """Name -> function in the place of the operator of `triton.language.tensor` in `slow`, which serves the rest."""
    quick = {name: _arithmetic(slow[name], function) for name, function in ARITHMETIC.items()}
    quick |= {name: _reflected(slow[name], function) for name, function in REFLECTED.items()}
    quick |= {name: _comparison(slow[name], function) for name, function in COMPARISONS.items()}
    quick |= {name: _bitwise(slow[name], function) for name, function in BITWISE.items()}
    quick["__add__"] = _of_pointers(slow["__add__"], quick["__add__"])
    return quick | {"__getitem__": _getitem(slow["__getitem__"])}


def _arithmetic(slow, function):
    def quick(self, other, **options):
        if (found := operands(self, other)) is None:
            return slow(self, other, **options)
        left, right, kind, dtype = found
        return _tensor(computed(function, left, right), dtype, kind)

    return quick


def _reflected(slow, function):
    def quick(self, other, **options):
        if type(other) is core.tensor or (found := operands(self, other)) is None:
            return slow(self, other, **options)
        left, right, kind, dtype = found
        return _tensor(computed(function, right, left), dtype, kind)

    return quick


def _comparison(slow, function):
    def quick(self, other, **options):
        if (found := operands(self, other)) is None:
            return slow(self, other, **options)
        left, right, kind, dtype = found
        return _tensor(computed(function, left, right), dtype, kind.with_element_ty(core.int1))

    return quick


def _bitwise(slow, function):
    def quick(self, other, **options):
        if self.dtype.name == "int1":
            found = _truth_values(self, other)
        else:
            found = operands(self, other) if self.dtype.name in RANGES else None
        if found is None:
            return slow(self, other, **options)
        left, right, kind, dtype = found
        return _tensor(computed(function, left, right), dtype, kind)

    return quick


def _of_pointers(slow, numbers):
    def quick(self, other, **options):
        """A pointer and signed integers, or numbers."""
        if not self.dtype.is_ptr():
            return numbers(self, other, **options)
        integers = type(other) is core.tensor and other.dtype.name in ("int32", "int64")
        if (kind := of_both(self.type, other.type) if integers else None) is None:
            return slow(self, other, **options)
        if not self.type.is_block() and kind.is_block():
            kind = kind.with_element_ty(self.type)
        return core.tensor(builder.create_addptr(self.handle, other.handle), kind)

    return quick


def _getitem(slow):
    known = {}

    def quick(self, places, **options):
        """New dimensions of size one."""
        if type(places) is not tuple or not self.type.is_block():
            return slow(self, places, **options)
        new = tuple(each is None for each in places)
        whole = all(each is None or each == slice(None) for each in places)
        if not whole or len(new) - sum(new) != len(self.type.shape):
            return slow(self, places, **options)
        data, key = (
            computed(operator.getitem, self.handle.data, places),
            (id(self.type.shape), self.type.scalar.name, new),
        )
        if key not in known:
            known[key] = (
                core.block_type(self.type.scalar, list(data.shape)),
                self.type.shape,
            )  # kept, and its id with it
        return _tensor(data, self.handle.dtype.scalar, known[key][0])

    return quick


def _tensor(data, dtype, kind):
    """As the interpreter makes one, of numbers that are known to fit their type."""
    handle = TensorHandle.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    return core.tensor(handle, kind)


def operands(one, other):
    """(the numbers of one and the other, the result's type, that of its numbers), or None where that is not plain."""
    name = one.dtype.name
    if name not in NUMPY or (builder.options.sanitize_overflow and name in RANGES):
        return None
    if type(other) is not core.tensor:
        value = _number(other.value if type(other) is core.constexpr else other, name)
        return None if value is None else (one.handle.data, value, one.type, one.handle.dtype.scalar)
    if other.dtype is not one.dtype:
        if {name, other.dtype.name} != {"int32", "int64"}:
            return None
        one, other = _widened(one), _widened(other)
    kind = of_both(one.type, other.type)
    return None if kind is None else (one.handle.data, other.handle.data, kind, one.handle.dtype.scalar)


CONVERSIONS = {
    *(("fp16", "fp32"), ("fp32", "fp16"), ("fp32", "fp64"), ("fp64", "fp32"), ("int32", "int64"), ("int64", "int32")),
    *(("int32", "uint32"), ("int64", "uint32"), ("uint32", "int64"), ("int32", "fp32"), ("uint32", "fp32")),
}  # fmt: skip


def converted(value, scalar):
    """A value in another type of numbers, which numpy's `astype` gives, or None where the interpreter does more."""
    pair = value.type.scalar.name, scalar.name
    if pair in CONVERSIONS:
        data = computed(np.ndarray.astype, value.handle.data, NUMPY[pair[1]])
    elif pair in (("bf16", "fp32"), ("fp32", "bf16")):
        if asked(bool, computed(_any_subnormal, value.handle.data)):  # the interpreter has its own way
            return None
        data = computed(_widened_bf16 if pair[0] == "bf16" else _cut_to_bf16, value.handle.data)
    else:
        return None
    return _tensor(data, scalar, value.type.with_element_ty(scalar) if value.type.is_block() else scalar)


def _any_subnormal(data):
    if data.itemsize == 2:
        words = data.view(np.uint16)
        return np.any(((words & 0x7F80) == 0) & ((words & 0x7F) != 0), keepdims=True)
    words = data.view(np.uint32)
    return np.any(((words & 0x7F800000) == 0) & ((words & 0x7FFFFF) != 0), keepdims=True)


def _widened_bf16(data):
    return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _cut_to_bf16(data):
    return (data.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def splat(value, block):
    """A scalar as a block of this one's shape."""
    data = value.handle.data
    kind = block.with_element_ty(value.type)
    return _tensor(computed(np.full, block.shape.values, data, data.dtype), value.handle.dtype.scalar, kind)


REDUCTIONS = (
    (standard._sum_combine, np.sum), (standard._elementwise_max, np.nanmax), (standard._elementwise_min, np.nanmin)
)  # fmt: skip


def quick_reduction(slow):
    """In the place of `ReduceOps.apply`: sums and extremes of one tensor of numbers."""

    def quick(self, given):
        function = next((each for combine, each in REDUCTIONS if combine is self.combine_fn), None)
        (tensor,) = given if isinstance(given, tuple) and len(given) == 1 else (given,)
        if function is None or type(tensor) is not core.tensor or tensor.dtype.name not in NUMPY:
            lose()
            return slow(self, given)
        self.check_tensor((tensor,))
        dtype = tensor.dtype
        data = computed(_reduced, tensor.handle.data, function, self.axis, self.keep_dims, NUMPY[dtype.name])
        block = self.keep_dims or (self.axis is not None and len(tensor.type.shape) > 1)
        result = _tensor(data, dtype.scalar, core.block_type(dtype, list(data.shape)) if block else dtype)
        return (result,) if isinstance(given, tuple) else result

    return quick


def _reduced(data, function, axis, keepdims, dtype):
    result = function(data, axis=axis, keepdims=keepdims)
    return result.astype(dtype) if result.shape else np.array([result]).astype(dtype)


def _number(value, name):
    """In numpy's type of this name, or None where Triton would take or refuse it in another way."""
    if name not in RANGES:
        return np.array([value], NUMPY[name]) if type(value) in (int, float) else None
    low, high = RANGES[name]
    return np.array([value], NUMPY[name]) if type(value) is int and low <= value < high else None


def _widened(integers):
    """In int64, which Triton takes int32 and int64 to."""
    if integers.dtype is core.int64:
        return integers
    kind = integers.type.with_element_ty(core.int64) if integers.type.is_block() else core.int64
    return _tensor(computed(np.ndarray.astype, integers.handle.data, np.int64), core.int64, kind)


def _truth_values(one, other):
    """As `operands`."""
    if type(other) is not core.tensor or other.dtype is not one.dtype:
        return None
    left, right, kind = one.handle.data, other.handle.data, of_both(one.type, other.type)
    if kind is None or not left.dtype == right.dtype == np.bool_:
        return None
    return left, right, kind, one.handle.dtype.scalar


_joined = {}


def of_both(a, b):
    """The type of a result of operands of types a and b, of the numbers of a; None where they do not suit."""
    if not b.is_block() or (a.is_block() and a.shape is b.shape):
        return a
    if not a.is_block():
        return b
    key = id(a.shape), id(b.shape), a.scalar.name
    if key not in _joined:
        _joined[key] = _broadcast(a, b), a.shape, b.shape  # which are kept, and their ids with them
    return _joined[key][0]


def _broadcast(a, b):
    first, second = a.shape.values, b.shape.values
    if len(first) != len(second) or any(m != n and 1 not in (m, n) for m, n in zip(first, second, strict=True)):
        return None
    return core.block_type(a.scalar, list(map(max, first, second)))
