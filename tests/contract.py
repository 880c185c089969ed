"""What holds for every op of the catalogue: its arguments, and the check against its definition in fp64."""

import inspect
import math
import typing
from collections.abc import Callable, Sequence
from itertools import compress, product
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, assert_close, fp64, poisoned_memory
from torch import Tensor

import swformer_fast as sf
from swformer_fast.ops import CATALOGUE, Operator
from swformer_fast.ops._operator import Image, Number, Statistic
from swformer_fast.parameters import unflatten

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KERNELS = [name for name, state in sf.backends().items() if name != "reference" and state.startswith("available")]
"""The backends that can run here beside the reference."""
needs_cpp = pytest.mark.skipif("cpp" not in KERNELS, reason="the compiled extension was not built")
Arguments = list[Any]
GPU = torch.cuda.is_available()


def kernels() -> list[tuple[str, str]]:
    """(op, backend) for every op and every backend beside the reference that has it."""
    return [
        (name, backend)
        for name, backend in product(CATALOGUE, KERNELS)
        if "has no" not in (refusal(name, backend, arguments(name, 1, 2, 2, 2, device=device_of(backend))) or "")
    ]


def refusal(name: str, backend: str, args: Sequence[Any]) -> str | None:
    """Why that backend cannot run the op on these arguments."""
    try:
        with sf.use_backend(backend):
            sf.backend.choose(sf.backend.OPS[name], tuple(args))
    except RuntimeError as error:
        return str(error)
    return None


def device_of(backend: str) -> str:
    """Where that backend's tensors are in tests: Triton's kernels are interpreted where there is no GPU."""
    return "cuda" if backend == "triton" and GPU else "cpu"


def op_of(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.swformer_fast, name)


# arguments ------------------------------------------------------------------------------------------------------------


def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights as a trained network's, so that every GELU sees both sides, of a mean that keeps gradients' sums from
    cancelling, and so filters; small biases, so that nothing saturates."""
    if name.endswith(("_lo", "_hi", "variance")):
        return 0.5 + torch.rand(shape, dtype=torch.float64)
    scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    return (torch.randn(shape, dtype=torch.float64) + 0.3) * scale


def image(shape: tuple[int, ...], mean: float = 0.5) -> Tensor:
    """Random pixels whose mean is not 0, so that it matters."""
    return torch.randn(shape, dtype=torch.float64) + mean


def arguments(
    name: str,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    optional: bool = True,
    parameter_dtype: torch.dtype | None = None,
    mean: float = 0.5,
    kernel: int = 3,
    device: str = "cpu",
) -> Arguments:
    """Random arguments for op `name` on an image (B, C, H, W): all that can have a gradient requires one. Depthwise
    convolutions have kernels of side `kernel`."""
    operator = CATALOGUE[name]
    parameter_dtype = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)

    def one(spec: Any, size: Any) -> Any:
        if size is None or isinstance(spec, Number):
            return size
        if isinstance(spec, Statistic):
            return (0.5 + torch.rand(size, dtype=torch.float64)).to(device, parameter_dtype)
        is_image = spec.need == Image.need
        if not is_image and size[2:] == (3, 3):
            size = (*size[:2], kernel, kernel)
        tensor = LAYOUTS[layout](image(size, mean).to(device, dtype)) if is_image else parameter(spec.name, size)
        tensor = tensor if is_image else tensor.to(device, parameter_dtype)
        return tensor.requires_grad_(operator.differentiable)

    args = [one(i, size) for i, size in zip(operator.inputs, operator.example(*shape, optional), strict=True)]
    if operator.residual:
        size = operator.fake(*args).shape
        args.append(LAYOUTS[layout](image(size).to(device, dtype)).requires_grad_() if optional else None)
    return [*args, optional] if operator.sums else args


def leaves(args: Sequence[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def detached(args: Sequence[Any], needs: Callable[[int], bool] = lambda place: False) -> Arguments:
    """The arguments as leaves of their own, with a gradient for those at the places that `needs` names."""
    return [a.detach().requires_grad_(needs(i)) if isinstance(a, Tensor) else a for i, a in enumerate(args)]


def public(name: str, args: Sequence[Any]) -> list[Any]:
    """The op's arguments as the public function takes them: in a bundle where it takes one, and without options."""
    function = getattr(sf.functional, name)
    pairs = zip(args[1:], CATALOGUE[name].inputs[1:], strict=False)
    tensors = [a for a, spec in pairs if not isinstance(spec, Number)]
    hints = typing.get_type_hints(function)
    kind = hints[list(inspect.signature(function).parameters)[1]]
    return [args[0], unflatten(kind, tensors)] if hasattr(kind, "_fields") else [args[0], *tensors]


# results --------------------------------------------------------------------------------------------------------------


def as_list(outputs: Any) -> list[Any]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def differentiable(operator: Operator, args: Sequence[Any]) -> list[int]:
    """Places of the outputs that have a gradient."""
    return [0, *[1] * (operator.sums and args[-1])] if operator.differentiable else []


def random_grads(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Multiples of 1/64, the same numbers in every dtype; of one sign: sums that cancel are as inexact in PyTorch."""
    return [
        torch.randint(1, 65, t.shape, generator=torch.Generator().manual_seed(i)) / 64 for i, t in enumerate(outputs)
    ]


def gradients(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], args: Sequence[Any], places: Sequence[int]
) -> list[Tensor | None]:
    chosen = [outputs[i] for i in places]
    return list(
        torch.autograd.grad(
            chosen,
            leaves(args),
            [grads[i].to(outputs[i]) for i in places],
            retain_graph=True,
            allow_unused=True,
        )
    )


def check(name: str, args: Sequence[Any], grad: Tensor | None = None) -> list[Tensor]:
    """Assert that the op's results, and the gradients through each of them and through all, are within TOLERANCE of
    the definition's on fp64 copies. `grad` is the first result's gradient. Returns the results."""
    operator, dtype = CATALOGUE[name], args[0].dtype
    in_fp64 = fp64(list(args))
    expected = as_list(operator.forward(*in_fp64))
    places = differentiable(operator, args)
    grads = random_grads([expected[i] for i in places])
    if grad is not None:
        grads[0] = grad
    with poisoned_memory():
        outputs = as_list(op_of(name)(*args))
        through_subsets = [gradients(outputs, grads, args, chosen) for chosen in subsets(places)]
    fakes = as_list(operator.fake_forward(*args))
    assert [(t.dtype, t.shape) for t in outputs] == [(t.dtype, t.shape) for t in fakes]
    accumulation_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for i, (a, e) in enumerate(zip(outputs, expected, strict=True)):
        of_pixels = a.dtype == dtype or (operator.sums and i == 1)
        # In local_branches a convolution that rounds its weights to bf16 comes before what is summed.
        of_dtype = of_pixels or (name == "local_branches" and dtype == torch.bfloat16)
        assert_close(a, e, dtype if of_dtype else accumulation_dtype, f"output {i}")
    for chosen, actual in zip(subsets(places), through_subsets, strict=True):
        assert_close(actual, gradients(expected, grads, in_fp64, chosen), dtype, f"gradient through {chosen}")
    return outputs


def subsets(places: Sequence[int]) -> list[list[int]]:
    """All of `places`, and each choice of some."""
    choices = product((True, False), repeat=len(places))
    return [list(compress(places, choice)) for choice in choices if any(choice)]
