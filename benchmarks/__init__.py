"""`python -m benchmarks`: latency of every fast path against plain PyTorch, torch.compile and peers."""
