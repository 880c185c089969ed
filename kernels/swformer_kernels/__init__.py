"""Triton kernels of swformer_fast: `@triton.jit` functions and their launchers in a file an op, named as the op.

Files with an underscore hold what several ops share, or a part of one op.
"""
