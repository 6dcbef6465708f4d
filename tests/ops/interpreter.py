"""Triton's interpreter, made to round fp32 to bf16 as a GPU does (it cuts the digits off), to
multiply matrices of bf16 (it multiplies their bits), to round an fma once (before 3.9, twice), to
count with numpy 2.4 (before 3.8 it takes the number of an array [1], which that refuses), and to
spread a truth value over a block as one (3.9 makes a number of it, which no mask may be).

conftest.py imports it; it changes nothing where nothing is interpreted.
"""

import numpy as np

from mae_fast.ops import dispatch

if dispatch.interpreting():
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_to_nearest(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # ties to even
        nearest = np.where(np.isnan(src.data), 0x7FC0, nearest)
        return TensorHandle(nearest.astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_to_nearest

    dot = InterpreterBuilder.create_dot

    def dot_of_values(self, a, b, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return dot(self, a, b, *args)

    InterpreterBuilder.create_dot = dot_of_values

    fma = InterpreterBuilder.create_fma

    def fma_rounded_once(self, x, y, z):
        if z.dtype.scalar != tl.float32:
            return fma(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), tl.float32)

    InterpreterBuilder.create_fma = fma_rounded_once

    splat = InterpreterBuilder.create_splat

    def splat_of_truth(self, block, value):
        if value.data.dtype != bool:
            return splat(self, block, value)
        return TensorHandle(np.broadcast_to(value.data, block.shape), tl.int1)

    InterpreterBuilder.create_splat = splat_of_truth

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
