"""What the tests share: error measures, tolerances, memory layouts, gradients and operation counts."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 1e-2}
"""Largest relative RMS error, by the dtype under test, against the reference run in fp64."""

SIZES = [(1, 1), (2, 2), (1, 5), (63, 64), (64, 63), (65, 96), (96, 65)]
"""Heights and widths that together hold odd, even, tiny and non-square images."""


def rel_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of `actual - expected` over the RMS of `expected`, in fp64; 0 for two empty or two zero tensors."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    error, scale = (actual - expected).norm().item(), expected.norm().item()
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return error / scale


def assert_close(actual: Any, expected: Any, dtype: torch.dtype | None = None, what: str = "tensor") -> None:
    """Assert that each tensor of `actual` (a tensor or a nest of them) is within TOLERANCE of its peer in `expected`.

    The tolerance is that of `dtype`, by default of the actual tensor's own dtype; integers must be equal. NaN never
    passes.
    """
    actual_leaves, expected_leaves = tree_leaves(actual), tree_leaves(expected)
    assert len(actual_leaves) == len(expected_leaves), f"{len(actual_leaves)} tensors, not {len(expected_leaves)}"
    for index, (a, e) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        if a is None or e is None:
            assert a is e, f"{what} {index}: {a} instead of {e}"
            continue
        error, limit = rel_rms(a, e), TOLERANCE[dtype or a.dtype] if a.is_floating_point() else 0.0
        assert error <= limit, f"{what} {index} of shape {tuple(a.shape)}: relative RMS error {error:.2e} > {limit:.0e}"


def fp64(args: Any) -> Any:
    """A nest of arguments with every floating tensor as a detached contiguous fp64 copy that keeps requires_grad."""

    def convert(arg: Any) -> Any:
        if not isinstance(arg, Tensor) or not arg.is_floating_point():
            return arg
        return arg.detach().to(torch.float64, copy=True).contiguous().requires_grad_(arg.requires_grad)

    return tree_map(convert, args)


def value_and_grads(
    fn: Callable[..., Any], args: Sequence[Any], grad: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, list[Tensor | None]]:
    """`fn(*args, **kwargs)` and the gradients of `(output * grad).sum()`.

    One gradient for each tensor of `args` (nested tuples included) that requires one, in order. Without `grad`, random
    multiples of 1/64 in [-1, 1] that depend on the output's shape alone: the same numbers in every dtype.
    """
    output = fn(*args, **kwargs)
    if grad is None:
        grad = torch.randint(-64, 65, output.shape, generator=torch.Generator().manual_seed(0)) / 64
    leaves = [leaf for leaf in tree_leaves(tuple(args)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    gradient = grad.to(output) if grad.dtype != output.dtype or grad.device != output.device else grad
    return output.detach(), list(torch.autograd.grad(output, leaves, gradient, allow_unused=True))


def assert_matches(
    fn: Callable[..., Any], reference: Callable[..., Any], args: Sequence[Any], gradients: bool = True, **kwargs: Any
) -> None:
    """Assert that `fn(*args)` and its gradients are within TOLERANCE of `reference` on fp64 copies of `args`.

    The tolerance is that of the output's dtype, which must be the first argument's.
    """
    output, grads = value_and_grads(fn, args, **kwargs)
    expected, expected_grads = value_and_grads(reference, fp64(tuple(args)), **kwargs)
    assert output.dtype == args[0].dtype
    assert_close(output, expected, what="output")
    if gradients:
        assert_close(grads, expected_grads, output.dtype, what="gradient")


def _sliced(x: Tensor) -> Tensor:
    """A window of a larger buffer that is NaN outside the window."""
    buffer = x.new_full([n + 2 for n in x.shape], float("nan"))
    window = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    return window.copy_(x)


def _strided(x: Tensor) -> Tensor:
    """Every second column of a buffer that is NaN in between."""
    buffer = x.new_full([*x.shape[:-1], 2 * x.shape[-1]], float("nan"))
    return buffer[..., ::2].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "strided": _strided,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:1].expand_as(x),
}
"""Each turns a (B, C, H, W) tensor that needs no gradient into one with the same values in that layout; "expanded"
repeats the first image with stride 0. `.requires_grad_()` afterwards keeps the layout."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its kin return NaN (integers: the largest value), in C++ too."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def perturb(module: nn.Module) -> None:
    """Move every weight and statistic away from its special starting value."""
    for tensor in module.parameters():
        tensor.data.add_(torch.randn_like(tensor), alpha=0.1)
    for name, tensor in module.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)


def randomise(module: nn.Module) -> nn.Module:
    """Move scales (beta, gamma) and running statistics away from their starting values, as training does."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith(("beta", "gamma", "running_mean")):
                tensor.normal_()
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    return module


class _MacCounter(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d)}
        self.macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.conv2d and id(args[1]) in self.weights:
            weight, bias = args[1], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            self.macs += result.numel() * (weight[0].numel() + (bias is not None))
        return result


def count_macs(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> int:
    """Multiply-accumulates of the model's nn.Conv2d layers plus one per bias add; nothing else counts.

    The layers' weights are recognised where the convolution is called, so modules that pass `conv.weight` to a function
    count too. Works on the meta device.
    """
    with _MacCounter(model) as counter, torch.no_grad():
        model(*inputs, **kwargs)
    return counter.macs


def check_launchers(
    module: Any, reference: Callable[..., Tensor], grad: Tensor, x: Tensor, *parameters: Tensor
) -> None:
    """A branch's Triton launchers, with sums and their gradient, against its reference in fp64."""
    name, grad_sums = reference.__name__, torch.randn(x.shape[:2], device=x.device)
    with poisoned_memory():
        y, sums = getattr(module, name)(x, *parameters, True)
        grads = getattr(module, f"{name}_backward")(grad, grad_sums, x, *parameters, True, True)
    assert y.dtype == grads[0].dtype == x.dtype
    assert sums.dtype == torch.float32
    inputs = tuple(t.double().contiguous().requires_grad_() for t in (x, *parameters))
    expected = reference(*inputs)
    assert_close((y, sums), (expected, expected.sum((2, 3))), x.dtype, what="output")
    grad = grad.double() + grad_sums.double()[..., None, None]
    assert_close(grads, torch.autograd.grad(expected, inputs, grad), what="gradient")


def tf32(x: Tensor) -> Tensor:
    """fp32 numbers rounded to tf32's ten bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def with_field(bundle: Any, name: str, value: Any) -> Any:
    """`bundle` with another value in the field `name`, which may be one of a bundle within: "gate.norm"."""
    first, _, path = name.partition(".")
    return bundle._replace(**{first: with_field(getattr(bundle, first), path, value) if path else value})


def zero_kernel(monkeypatch: pytest.MonkeyPatch, name: str, *outputs: str) -> None:
    """Triton kernel `name` ends, wherever it is launched, by zeroing the arguments, or tuples of them, named."""
    modules = [m for key, m in sys.modules.items() if key.startswith("swformer_kernels.") and hasattr(m, name)]
    kernel = getattr(modules[0], name)

    class Zeroing:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                kernel[grid](*args, **kwargs)
                for tensor in tree_leaves([args[kernel.arg_names.index(output)] for output in outputs]):
                    if tensor is not None:
                        tensor.zero_()

            return launch

    for module in modules:
        monkeypatch.setattr(module, name, Zeroing())
