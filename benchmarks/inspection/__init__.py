"""What the kernels are, seen without a clock and, but for `tune` and `correct`, without a GPU."""
