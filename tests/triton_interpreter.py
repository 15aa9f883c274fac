"""Repairs Triton's interpreter for tests without a GPU. Import it before anything that imports triton.

What is wrong in triton 3.6 to 3.9 and mended here: bf16 is stored as uint16 and computed on as such, casts to it
truncate; loop variables of `range` are Python ints without `.to`; every call of a jitted helper patches
`triton.language` anew (0.5 ms, most of the time of a small test); an address outside every argument's memory, which a
GPU may or may not notice, is read and written all the same, and is an error here. What makes it fast is in
quick_interpreter.
"""

from __future__ import annotations

import ast
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from quick_interpreter import quicken

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
BF16 = tl.bfloat16


def widen(bits: Any) -> Any:
    """bf16 bits as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> Any:
    """float32 as bf16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle: Any) -> bool:
    return hasattr(handle, "dtype") and handle.dtype.scalar.name == "bf16"


def mend_bf16() -> None:
    dot, binary, unary, cast = Builder.create_dot, Builder.binary_op, Builder.unary_op, Builder.cast_impl
    fp_to_fp = Builder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if is_bf16(a) or is_bf16(b):
            a, b = Handle(widen(a.data), tl.float32), Handle(widen(b.data), tl.float32)
        return dot(self, a, b, d, *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, op)
        out = op(widen(left.data), widen(right.data))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(narrow(out), BF16)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return Handle(narrow(op(widen(x.data))), BF16) if is_bf16(x) else unary(self, x, op)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == BF16 and after != BF16:
            return Handle(widen(source.data).astype(interpreter._get_np_dtype(target)), after)
        if after == BF16 and before != BF16:
            return Handle(narrow(source.data.astype(np.float32)), after)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if BF16 in (source.dtype.scalar, target.scalar):
            return self.cast_impl(source, target)
        return fp_to_fp(self, source, target, rounding)

    Builder.create_dot, Builder.binary_op, Builder.unary_op, Builder.cast_impl = (
        create_dot,
        binary_op,
        unary_op,
        cast_impl,
    )
    Builder.create_fp_to_fp = create_fp_to_fp
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, f"create_{name}", lambda self, source, target: self.cast_impl(source, target))
    Builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value], np.float32)), BF16)


def mend_reductions() -> None:
    """Sums, scans, maxima of bf16 go through float32."""
    apply = interpreter.ReduceScanOpInterface.apply

    def tensor(handle: Any, dtype: Any) -> Any:
        shape = list(handle.data.shape)
        return tl.core.tensor(handle, tl.block_type(dtype, shape) if shape else dtype)

    def up(x: Any) -> Any:
        return tensor(Handle(widen(x.handle.data), tl.float32), tl.float32) if x.dtype == BF16 else x

    def down(x: Any) -> Any:
        return tensor(Handle(narrow(x.handle.data), BF16), BF16) if x.dtype == tl.float32 else x

    def mended(self: Any, given: Any) -> Any:
        several = isinstance(given, tuple)
        inputs = given if several else (given,)
        if not any(isinstance(x, tl.core.tensor) and x.dtype == BF16 for x in inputs):
            return apply(self, given)
        out = apply(self, tuple(up(x) for x in inputs) if several else up(given))
        return tuple(down(o) for o in out) if isinstance(out, tuple) else down(out)

    interpreter.ReduceScanOpInterface.apply = mended


class Index(int):
    """A loop variable that casts like a tensor."""

    def to(self, dtype: Any, **_: Any) -> Any:
        return interpreter._implicit_cvt(int(self)).to(dtype)


def steps(*bounds: Any) -> Any:
    values = [int(b.handle.data.reshape(-1)[0]) if isinstance(b, tl.tensor) else int(b) for b in bounds]
    return (Index(i) for i in range(*values))


def mend_loops() -> None:
    compile_and_exec = interpreter.FunctionRewriter._compile_and_exec

    class Ranges(ast.NodeTransformer):
        def visit_For(self, node: ast.For) -> ast.For:
            self.generic_visit(node)
            call = node.iter
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range":
                call.func = ast.copy_location(ast.Name(id="_steps", ctx=ast.Load()), call.func)
            return node

    def mended(self: Any, tree: Any) -> Any:
        self.fn.__globals__["_steps"] = steps
        return compile_and_exec(self, ast.fix_missing_locations(Ranges().visit(tree)))

    interpreter.FunctionRewriter._compile_and_exec = mended


def patch_once_a_launch() -> None:
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[int] = set()
    depth = [0]

    class Nothing:
        def restore(self) -> None: ...

    def patch_lang(fn: Any) -> Any:
        module = id(fn.__globals__)
        if depth[0] and module in seen:
            return Nothing()
        scope = patch(fn)
        seen.add(module)
        return scope

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            return call(self, *args, **kwargs)
        finally:
            depth[0] -= 1
            if not depth[0]:
                seen.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, launch


def refuse_strays() -> None:
    """Addresses of loads and stores must lie in the storage of an argument of the launch."""
    load, store, call = Builder.create_masked_load, Builder.create_masked_store, interpreter.GridExecutor.__call__
    ranges: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any, what: str) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(pointers.data)
        if not mask.data.all():
            addresses = addresses[np.asarray(mask.data).astype(bool)]
        if addresses.size:
            first, last = int(addresses.min()), int(addresses.max())
            if any(start <= first and last + size <= end for start, end in ranges):
                return
            inside = np.zeros(addresses.shape, bool)
            for start, end in ranges:
                inside |= (addresses >= start) & (addresses + size <= end)
            if not inside.all():
                far = addresses[~inside].astype(np.int64)
                near = [(int(far.min()) - start, int(far.max()) - start, end - start) for start, end in ranges]
                raise IndexError(f"{what} outside every argument; first and last byte, size for each: {near}")

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest)

    def plain_store(self: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        mask = Handle(np.ones_like(pointers.data, dtype=bool), tl.int1)
        return self.create_masked_store(pointers, value, mask, *rest)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = list(ranges)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        spans = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
        ranges[:] = [(start, start + size) for start, size in spans]
        try:
            return call(self, *args, **kwargs)
        finally:
            ranges[:] = before

    Builder.create_masked_load, Builder.create_masked_store, Builder.create_store = (
        masked_load,
        masked_store,
        plain_store,
    )
    interpreter.GridExecutor.__call__ = launch


mend_bf16()
mend_reductions()
mend_loops()
patch_once_a_launch()
refuse_strays()
quicken()
