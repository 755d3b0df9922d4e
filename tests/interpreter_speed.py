"""Triton's interpreter without what it does over and over for nothing: the same values, in a tenth of the time.

Most of its time goes into Python: every call of a device function patches the whole of `triton.language` again, every
value makes its type anew, every sum of integers is checked for overflow although nobody hears of it, as `device_assert`
is silent unless `overflow_checks` is in force, and every program of a grid works out the same calls as the one before
it (`interpreter_tape`). What is left out here changes no value, which `test_instruments.py` and
`test_interpreter_tape.py` show: with and without, kernels return the same bits and touch the same bytes.

It knows the inside of one version. With another the interpreter is left as it is shipped, slower and no less right.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import types

import numpy as np

KNOWN = "3.9.0"
_undo = contextlib.ExitStack()


def _replace(owner, name, value) -> None:
    _undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def install() -> None:
    """Until `uninstall`, if Triton is of the known version."""
    import triton

    if triton.__version__ == KNOWN:
        _patch_the_language_once_a_launch()
        _remember_what_to_patch()
        _remember_what_was_rewritten()
        _leave_out_silent_checks()
        _remember_types()
        _answer_at_once()
        _broadcast_as_before()
        _draw_at_once()
        _play_back()


def uninstall() -> None:
    _undo.close()


@contextlib.contextmanager
def as_shipped():
    """The interpreter as Triton has it, within the block."""
    uninstall()
    try:
        yield
    finally:
        install()


class _Scope:
    """What a launch's patches are undone with; those of a call within a launch stay, as the interpreter leaves them."""

    def __init__(self, restore):
        self.restore = restore


def _patch_the_language_once_a_launch() -> None:
    """A device function's call finds the language patched by the launch or by a call before it."""
    from triton import language
    from triton.runtime import interpreter

    original, patched = interpreter._patch_lang, set()

    @functools.cache
    def languages(fn):
        known = {language.__name__, language.core.__name__}
        return {m.__name__ for m in fn.__globals__.values() if inspect.ismodule(m) and m.__name__ in known}

    def patch(fn):
        wanted, within = languages(fn), bool(patched)
        if within and wanted and wanted <= patched:
            return _Scope(lambda: None)
        scope = original(fn)
        patched.update(wanted)
        if within:
            return scope

        def restore():
            patched.clear()
            scope.restore()

        return _Scope(restore)

    _replace(interpreter, "_patch_lang", patch)


def _remember_what_to_patch() -> None:
    """Which names of the language are functions that the interpreter serves; those of tensors in short."""
    from triton import language
    from triton.language import core, math
    from triton.runtime import interpreter

    from tests.interpreter_arithmetic import quick_operators

    semantic = interpreter.interpreter_semantic

    def served(function):
        inside = getattr(function, "__wrapped__", function)  # of what only asks whether it was given a `_semantic`
        return lambda *args, _semantic=None, **options: inside(*args, _semantic=semantic, **options)

    known = {
        owner: {name: served(function) for name, function in inspect.getmembers(owner, core.is_builtin)}
        for owner in (language, core, core.tensor, math, core.tensor_descriptor_base)
    }
    known[core.tensor].update(quick_operators(known[core.tensor]))

    def patch_builtin(owner, builder, scope):
        for name, function in known[owner].items():
            scope.set_attr(owner, name, function)

    _replace(interpreter, "_patch_builtin", patch_builtin)


def _remember_what_was_rewritten() -> None:
    """A function of the same code as one before, as in a copy of a module, is rewritten as that one was."""
    from triton.runtime import interpreter

    original, known = interpreter.FunctionRewriter.rewrite_ast, {}

    def rewrite_ast(self):
        fn = self.fn
        key = fn.__code__, repr(fn.__annotations__), repr(fn.__defaults__), repr(fn.__kwdefaults__), repr(self.kwargs)
        if (code := known.get(key)) is None:
            rewritten = original(self)
            if rewritten is not fn:
                known[key] = rewritten.__code__
            return rewritten
        for name, value in vars(interpreter).items():
            fn.__globals__.setdefault(name, value)
        again = types.FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__)
        again.__kwdefaults__, again.__annotations__ = fn.__kwdefaults__, fn.__annotations__
        return again

    _replace(interpreter.FunctionRewriter, "rewrite_ast", rewrite_ast)


def _draw_at_once() -> None:
    """The rounds of Philox on whole arrays of 32-bit words, as `triton.language.random.philox_impl` does them."""
    from triton.language import core, random

    from tests.interpreter_tape import computed

    original = random.philox_impl
    factors, keys = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)), (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
    half = np.uint64(32)

    def rounds(number, *given):
        words, key = given[:4], given[4:]
        for _ in range(number):
            even, odd = (word.astype(np.uint64) * factor for word, factor in zip(words[::2], factors, strict=True))
            words = (
                (odd >> half).astype(np.uint32) ^ words[1] ^ key[0],
                odd.astype(np.uint32),
                (even >> half).astype(np.uint32) ^ words[3] ^ key[1],
                even.astype(np.uint32),
            )
            key = [each + step for each, step in zip(key, keys, strict=True)]
        return words

    def philox_impl(c0, c1, c2, c3, k0, k1, n_rounds=random.N_ROUNDS_DEFAULT):
        words, key = [each.handle.data for each in (c0, c1, c2, c3)], [each.handle.data for each in (k0, k1)]
        if any(each.dtype != np.uint32 for each in words + key) or len({each.shape for each in words}) > 1:
            return original(c0, c1, c2, c3, k0, k1, n_rounds)
        words = computed(rounds, core._unwrap_if_constexpr(n_rounds), *words, *key)
        handle = c0.handle
        return tuple(core.tensor(type(handle)(word, handle.dtype.scalar), c0.type) for word in words)

    _replace(random, "philox_impl", philox_impl)


def _play_back() -> None:
    """Programs that do what one before them did; and what they are written down by."""
    from triton.runtime import interpreter

    from tests.interpreter_arithmetic import quick_reduction
    from tests.interpreter_tape import Player, asked, lose, number, truth

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: asked(number, self.handle.data))
        scope.set_attr(tensor, "__bool__", lambda self: asked(truth, self.handle.data))

    def run(self, *arguments, grid, warmup, **options):
        if not warmup:
            player = Player(self.rewrite())
            interpreter.GridExecutor(player, self.arg_names, grid, self.pre_run_hooks)(*arguments, **options)

    def scan(self, given):
        lose()
        return apply(self, given)

    apply = interpreter.ReduceScanOpInterface.apply
    _replace(interpreter, "_patch_lang_tensor", patch_lang_tensor)
    _replace(interpreter.InterpretedFunction, "run", run)
    _replace(interpreter.ReduceScanOpInterface, "apply", scan)
    interpreter.ReduceOps.apply = quick_reduction(scan)
    _undo.callback(delattr, interpreter.ReduceOps, "apply")


def _leave_out_silent_checks() -> None:
    """`interpreter.overflow_checks` asks for them again."""
    from triton.runtime.interpreter import interpreter_builder as builder

    _replace(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def _remember_types() -> None:
    """Types are values: those of one shape share what was worked out for the first."""
    from triton.language import core
    from triton.runtime import interpreter

    make_block, with_element, numpy_type = (
        core.block_type.__init__, core.block_type.with_element_ty, interpreter._get_np_dtype
    )  # fmt: skip
    blocks, dtypes = {}, {}

    def init_block(self, element_ty, shape):
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        key = (element_ty.name, *(core._unwrap_if_constexpr(size) for size in sizes))
        if (known := blocks.get(key)) is None:
            make_block(self, element_ty, shape)
            self.parts, self.others = None, {}
            blocks[key] = self
        else:
            self.__dict__.update(known.__dict__)
            self.element_ty = element_ty

    def with_element_ty(self, scalar_ty):
        if scalar_ty.is_ptr():
            return with_element(self, scalar_ty)
        if (other := self.others.get(scalar_ty.name)) is None:
            other = self.others[scalar_ty.name] = with_element(self, scalar_ty)
        return other

    def parts(shape):
        return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))

    scalar = parts(())

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.is_block():
            if type.parts is None:
                type.parts = parts(type.shape)
            self.shape, self.numel = type.parts
        else:
            self.shape, self.numel = scalar

    def get_np_dtype(tt_dtype):
        if (known := dtypes.get(tt_dtype.name)) is None:
            known = dtypes[tt_dtype.name] = numpy_type(tt_dtype)
        return known

    _replace(core.block_type, "__init__", init_block)
    _replace(core.block_type, "with_element_ty", with_element_ty)
    _replace(core.tensor, "__init__", init_tensor)
    _replace(interpreter, "_get_np_dtype", get_np_dtype)


def _answer_at_once() -> None:
    """Questions whose answer is plain, or was given before."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    from tests.interpreter_arithmetic import converted

    unwrap, cast, check = core._unwrap_if_constexpr, TritonSemantic.cast, TritonSemantic.binary_op_type_checking_impl
    promote, promoted = TritonSemantic.computation_type_impl, {}
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype, core.pointer_type, core.block_type}

    def unwrap_if_constexpr(o):
        kind = type(o)
        return o if kind in plain else o.value if kind is core.constexpr else unwrap(o)

    def binary_op_type_checking_impl(self, lhs, rhs, *options, **more):
        alike = type(lhs) is type(rhs) is core.tensor and lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr()
        if alike and len(options) < 4 and not more.get("div_or_mod"):  # of one type of numbers: nothing to promote
            return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, *options, **more)

    def cast_unless_same(self, input, dst_ty, *rounding):
        if input.type.scalar is dst_ty.scalar:
            return input
        result = converted(input, dst_ty.scalar) if rounding in ((), (None,)) else None
        return cast(self, input, dst_ty, *rounding) if result is None else result

    def computation_type_impl(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod
        if (known := promoted.get(key)) is None:
            known = promoted[key] = promote(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return known

    _replace(core, "_unwrap_if_constexpr", unwrap_if_constexpr)
    _replace(TritonSemantic, "binary_op_type_checking_impl", binary_op_type_checking_impl)
    _replace(TritonSemantic, "cast", cast_unless_same)
    _replace(TritonSemantic, "computation_type_impl", computation_type_impl)


def _broadcast_as_before() -> None:
    """Blocks of two shapes that met before, and a scalar to a block; equal ones need nothing."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    from tests.interpreter_arithmetic import splat

    original, met = TritonSemantic.broadcast_impl_value, {}

    def to_shape(self, value, shape):
        if value.type.shape.values == shape:
            return value
        return self.make_tensor(
            self.builder.create_broadcast(value.handle, shape), core.block_type(value.type.scalar, shape)
        )

    def broadcast_impl_value(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        if not left.is_block():
            return (splat(lhs, right), rhs) if right.is_block() else original(self, lhs, rhs)
        if not right.is_block():
            return lhs, splat(rhs, left)
        if left.shape is right.shape:
            return lhs, rhs
        pair = id(left.shape), id(right.shape)
        if (known := met.get(pair)) is not None:
            return to_shape(self, lhs, known[2]), to_shape(self, rhs, known[2])
        lhs, rhs = original(self, lhs, rhs)
        if len(left.shape) == len(right.shape):
            met[pair] = left.shape, right.shape, lhs.type.shape.values  # which are kept, and their ids with them
        return lhs, rhs

    _replace(TritonSemantic, "broadcast_impl_value", broadcast_impl_value)
