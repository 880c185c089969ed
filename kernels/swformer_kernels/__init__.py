"""Triton kernels of swformer_fast: one file per op family, `@triton.jit` functions and their launchers."""
