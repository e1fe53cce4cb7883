"""What the Gluon kernels share: names that changed between Triton versions, dependent launches, score arithmetic."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Newer names first: Triton 3.6 spells both differently.
async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def launch_next():
    """Let the next launch begin: it waits for the end of this one before it reads what this one writes."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_previous():
    """Wait for the previous launch, which this one may overlap: programmatic dependent launch, sm_90."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def softcapped(s, cap):
    """As query.softcapped."""
    return cap - 2.0 * cap / (gl.exp2(s) + 1.0)


@gluon.jit
def halves(x):
    """[16, N] -> rows 0-7 and 8-15, which are in the same thread."""
    return gl.split(gl.permute(gl.reshape(x, [2, 8, x.shape[1]]), (1, 2, 0)))
