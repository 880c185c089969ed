"""What the tests of the Triton kernels share."""

from benchmarks.interpret import count_traffic

__all__ = ["count_traffic"]
