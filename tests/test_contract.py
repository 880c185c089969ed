"""What every op of the catalogue keeps, on every backend that runs here; files of one op hold what is particular."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from contract import (
    CATALOGUE,
    DTYPES,
    GPU,
    arguments,
    as_list,
    check,
    detached,
    device_of,
    differentiable,
    gradients,
    kernels,
    leaves,
    op_of,
    public,
    random_grads,
    refusal,
)
from helpers import LAYOUTS, SIZES, assert_close, fp64, num_threads, poisoned_memory, value_and_grads
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import swformer_fast as sf
from benchmarks.inspection.interpret import Session, watch
from swformer_fast.ops._operator import Image, Parameter

PAIRS = kernels()
CPP = [name for name, backend in PAIRS if backend == "cpp"]
DIFFERENTIABLE = [name for name, operator in CATALOGUE.items() if operator.differentiable]
TRITON = [name for name, backend in PAIRS if backend == "triton"]
OF_IMAGES = [name for name, operator in CATALOGUE.items() if operator.takes_image]
BACKENDS = [*((name, "reference") for name in CATALOGUE), *PAIRS]
FUNCTIONS = sf.functional.__all__
LAST = torch.channels_last
optional = pytest.mark.parametrize("optional", [True, False], ids=["full", "bare"])


def of(backend: str, name: str, *shape: int, **options: Any) -> list[Any]:
    """`arguments` where that backend takes them."""
    return arguments(name, *shape, device=device_of(backend), **options)


@pytest.fixture(autouse=True)
def faster_interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Counting patches Triton's interpreter once a launch, not at every call."""
    interpreted = "triton" in request.node.name and not GPU
    with watch(Session()) if interpreted else nullcontext():
        yield


def run_check(name: str, backend: str, args: list[Any], grad: Tensor | None = None) -> None:
    """`check` on that backend, or on the reference where the backend says in words why it cannot run."""
    reason = refusal(name, backend, args)
    if reason is None:
        with sf.use_backend(backend):
            check(name, args, grad)
        return
    assert len(reason) > 40
    with sf.use_backend(backend), pytest.raises(RuntimeError, match="it cannot run"):
        op_of(name)(*args)
    if args[0].dtype.itemsize > 2:  # the reference computes in the image's own dtype
        with sf.use_backend("reference"):
            check(name, args, grad)


# values and gradients -------------------------------------------------------------------------------------------------


@optional
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CPP)
def test_cpp(name: str, size: tuple[int, int], dtype: torch.dtype, optional: bool) -> None:
    if (name, size, optional) == ("fourier_mix", (1, 1), False):
        pytest.skip("the batch's statistics of one frequency leave gradients of rounding errors")
    run_check(name, "cpp", arguments(name, 2, 3, *size, dtype=dtype, optional=optional))


@pytest.mark.parametrize(
    ("dtype", "size", "optional"),
    [(torch.float32, (5, 7), False), (torch.float32, (1, 2), True), *((dtype, (5, 7), True) for dtype in DTYPES)],
)
@pytest.mark.parametrize("name", TRITON)
def test_triton(name: str, size: tuple[int, int], dtype: torch.dtype, optional: bool) -> None:
    run_check(name, "triton", of("triton", name, 2, 3, *size, dtype=dtype, optional=optional))


@optional
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CATALOGUE)
def test_reference(name: str, size: tuple[int, int], optional: bool) -> None:
    run_check(name, "reference", arguments(name, 2, 3, *size, dtype=torch.float64, optional=optional))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 20])
@pytest.mark.parametrize("name", CPP)
def test_layouts(name: str, channels: int, layout: str, dtype: torch.dtype) -> None:
    args = arguments(name, 2, channels, 19, 37, dtype=dtype, layout=layout)
    run_check(name, "cpp", args)
    assert_memory_format(name, args)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        *((torch.float32, layout) for layout in ("channels_last", "sliced", "transposed", "expanded")),
        (torch.bfloat16, "channels_last"),
    ],
)
@pytest.mark.parametrize("name", TRITON)
def test_layouts_of_triton(name: str, dtype: torch.dtype, layout: str) -> None:
    args = of("triton", name, 2, 3, 5, 8, dtype=dtype, layout=layout)
    run_check(name, "triton", args)
    assert_memory_format(name, args)


def assert_memory_format(name: str, args: list[Any]) -> None:
    """Maps are channels_last where the image is, else contiguous; so are the images' gradients."""
    y, *_ = outputs = as_list(op_of(name)(*args))
    last = args[0].shape[1] > 1 and args[0].is_contiguous(memory_format=LAST) and not args[0].is_contiguous()
    maps = [y] if y.dim() == 4 else []
    if name in DIFFERENTIABLE:
        maps += [g for g in gradients(outputs, random_grads(outputs[:1]), args, [0]) if g is not None and g.dim() == 4][
            :1
        ]
    for t in maps:
        assert t.is_contiguous(memory_format=LAST if last and t.shape[1] > 1 else torch.contiguous_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout_of_x", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name in CPP if name in DIFFERENTIABLE])
def test_layouts_of_the_gradient(name: str, layout_of_x: str, dtype: torch.dtype, layout: str) -> None:
    args = arguments(name, 2, 20, 9, 33, dtype=dtype, layout=layout_of_x)
    run_check(name, "cpp", args, gradient_of(name, args, layout))


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
@pytest.mark.parametrize("layout_of_x", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name in TRITON if name in DIFFERENTIABLE])
def test_layouts_of_the_gradient_of_triton(name: str, layout_of_x: str, layout: str) -> None:
    args = of("triton", name, 2, 3, 4, 7, layout=layout_of_x)
    run_check(name, "triton", args, gradient_of(name, args, layout))


def gradient_of(name: str, args: list[Any], layout: str) -> Tensor:
    """A gradient of the first result, in that layout."""
    shape = as_list(CATALOGUE[name].fake(*args[: len(CATALOGUE[name].inputs)]))[0].shape
    grad = torch.randint(1, 65, shape).to(args[0]) / 64
    return LAYOUTS[layout](grad) if grad.dim() == 4 else grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_parameters_of_half_precision(name: str, backend: str, dtype: torch.dtype) -> None:
    run_check(name, backend, of(backend, name, 2, 3, 9, 12, dtype=dtype, parameter_dtype=dtype))


@pytest.mark.parametrize("layout", ["strided", "sliced", "transposed"])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_layouts_of_parameters(name: str, backend: str, layout: str) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if t.dim() > 1 and layout == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        return LAYOUTS["strided" if t.dim() == 1 and layout == "transposed" else layout](t)

    args = of(backend, name, 2, 3, 9, 12)
    for i, spec in enumerate(CATALOGUE[name].inputs):
        if isinstance(args[i], Tensor) and spec.need != Image.need:
            args[i] = laid_out(args[i].detach()).requires_grad_(args[i].requires_grad)
    run_check(name, backend, args)


def needs_of(name: str) -> list[int]:
    return [i for i, a in enumerate(arguments(name, 1, 2, 3, 4)) if isinstance(a, Tensor) and a.requires_grad]


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in BACKENDS if n in DIFFERENTIABLE])
def test_each_gradient_alone(name: str, backend: str) -> None:
    """The gradient of one input is the same whatever else is asked for."""
    args = of(backend, name, 2, 3, 6, 9)
    with sf.use_backend(backend):
        outputs = as_list(op_of(name)(*args))
        places = differentiable(CATALOGUE[name], args)
        grads = random_grads(outputs)
        everything = dict(zip(needs_of(name), gradients(outputs, grads, args, places), strict=True))
        places_alone = everything if backend != "triton" else needs_of(name)[:: len(everything) - 1 or 1]
        for place in places_alone:
            alone = detached(args, lambda i, place=place: i == place)
            with poisoned_memory():
                (actual,) = gradients(as_list(op_of(name)(*alone)), grads, alone, places)
            assert_close(actual, everything[place], torch.float32, f"gradient {place}")


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in BACKENDS if n in DIFFERENTIABLE])
def test_nothing_where_nothing_is_asked_for(name: str, backend: str) -> None:
    operator = CATALOGUE[name]
    args = detached(of(backend, name, 1, 2, 5, 6, optional=False))
    inputs = args[: len(operator.inputs)]
    with sf.use_backend(backend):
        y, *others = outputs = as_list(op_of(name)(*args))
        kept = [dict(zip(operator.results, outputs, strict=True))[k] for k in operator.kept]
        backward = op_of(operator.backward_name)
        grads = as_list(
            backward(torch.ones_like(y), *[None] * operator.sums, *kept, *inputs, *[False] * len(operator.flags))
        )
    assert [g.numel() for g in grads] == [0] * len(operator.places)
    if operator.sums:
        assert others[0].shape == (0,)
        assert others[0].dtype == torch.float32
        assert_close(y, as_list(op_of(name)(*args[:-1], True))[0])


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if CATALOGUE[name].sums])
def test_sums_that_are_not_asked_for_have_no_gradient(name: str) -> None:
    *args, _ = arguments(name, 1, 2, 5, 6)
    assert not op_of(name)(*args, False)[1].requires_grad
    assert op_of(name)(*args, True)[1].requires_grad


@optional
@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0")
@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in BACKENDS if n != "fold_norm"])  # it has none
def test_empty_batch(name: str, backend: str, optional: bool) -> None:
    operator = CATALOGUE[name]
    args = of(backend, name, 0, 3, 8, 9, optional=optional)
    with sf.use_backend(backend), poisoned_memory():
        outputs = as_list(op_of(name)(*args))
        fakes = as_list(operator.fake_forward(*args))
        assert [t.shape for t in outputs] == [t.shape for t in fakes]
        if name in DIFFERENTIABLE:
            grads = gradients(outputs, random_grads(outputs), args, differentiable(operator, args))
            assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, leaves(args), strict=True))


# kinds of numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in BACKENDS if n in FUNCTIONS])
def test_autocast(name: str, backend: str) -> None:
    function, definition = getattr(sf.functional, name), getattr(sf.reference, name)
    args = public(name, of(backend, name, 2, 3, 8, 9))
    with nullcontext() if refusal(name, backend, of(backend, name, 2, 3, 8, 9)) else sf.use_backend(backend):
        with torch.autocast(device_of(backend), torch.bfloat16):
            y = function(*args)
        y.float().sum().backward()
    with torch.autocast(device_of(backend), torch.bfloat16):
        assert function(args[0].double(), *args[1:]).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    assert_close(y, definition(*fp64(tuple(args))), torch.bfloat16)
    assert all(t.grad.dtype == torch.float32 for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad)


@optional
@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in PAIRS if n in DIFFERENTIABLE and b != "triton"])
def test_backward_inside_autocast_is_the_same(name: str, backend: str, optional: bool) -> None:
    args = arguments(name, 2, 3, 8, 9, optional=optional)
    places = differentiable(CATALOGUE[name], args)
    with sf.use_backend(backend):
        outputs = as_list(op_of(name)(*args))
        expected = gradients(outputs, random_grads(outputs), args, places)
        with torch.autocast("cpu", torch.bfloat16):
            actual = gradients(outputs, random_grads(outputs), args, places)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_inputs_that_change_before_backward_are_noticed(name: str) -> None:
    """Statistics too: autograd's version counters see every tensor."""
    operator = CATALOGUE[name]
    for i, spec in enumerate(operator.inputs):
        args = arguments(name, 1, 2, 4, 5)
        if not isinstance(spec, Image):
            continue
        outputs = as_list(op_of(name)(*args))
        with torch.no_grad():
            args[i].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs[0].sum().backward()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in PAIRS if n in OF_IMAGES])
def test_infinities_and_nan_propagate(name: str, backend: str, layout: str, value: float) -> None:
    """What is not finite stands where it does in the definition, and reaches nothing else."""
    args = of(backend, name, 2, 3, 9, 14, layout=layout)
    with torch.no_grad():
        for i, (image, row, column) in enumerate(((0, 2, -1), (0, -1, 0), (1, 4, 4))):
            args[0][image, i, row, column] = value
    if refusal(name, backend, args):
        backend = "reference"
    with sf.use_backend(backend):
        outputs = as_list(op_of(name)(*args))
    for a, e in zip(outputs, as_list(CATALOGUE[name].forward(*fp64(args))), strict=True):
        assert torch.equal(a.isfinite(), e.isfinite())
        torch.testing.assert_close(a[e.isfinite()].double(), e[e.isfinite()].double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", list(product((0.0, 0.5, 1.0), repeat=2)))
@pytest.mark.parametrize("size", [(32, 42), (31, 17), (9, 70)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name in CPP if name in DIFFERENTIABLE and name in OF_IMAGES])
def test_nan_reaches_the_gradients_that_it_reaches_in_the_definition(
    name: str, layout: str, size: tuple[int, int], place: tuple[float, float]
) -> None:
    """From one pixel of the image or of the result's gradient: at a corner, at an edge, in the middle."""

    def put(t: Tensor) -> None:
        sides = zip(place, t.shape[2:], strict=True)
        row, column = (int(share * (side - 1)) for share, side in sides)
        t[0, 1, row, column] = float("nan")

    def results(function: Callable[..., Any], args: list[Any], grad: Tensor) -> list[Tensor | None]:
        y = as_list(function(*args))[0]
        return [y, *torch.autograd.grad(y, leaves(args), grad.to(y.dtype), allow_unused=True)]

    for spoil in ("image", "gradient"):
        args = arguments(name, 1, 3, *size, layout=layout)
        grad = gradient_of(name, args, "contiguous")
        if spoil == "image":
            with torch.no_grad():
                put(args[0])
        elif grad.dim() == 4:
            put(grad)
        pairs = zip(results(op_of(name), args, grad), results(CATALOGUE[name].forward, fp64(args), grad), strict=True)
        for a, e in pairs:
            assert a is None or torch.equal(a.isfinite(), e.isfinite())


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_same_bits_in_every_run_and_for_every_number_of_threads(name: str, backend: str) -> None:
    args = of(backend, name, *((3, 8, 96, 70) if backend == "cpp" else (2, 3, 6, 9)))
    places = differentiable(CATALOGUE[name], args)

    def run() -> list[Tensor]:
        outputs = as_list(op_of(name)(*args))
        grads = gradients(outputs, random_grads(outputs), args, places) if places else []
        return [*outputs, *grads]

    with sf.use_backend(backend):
        first = run()
        for threads in (1, 2, 3, 4, 8) if backend == "cpp" else (1,):
            with num_threads(threads):
                again = run()
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# torch's own machinery ------------------------------------------------------------------------------------------------


@optional
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_opcheck(name: str, backend: str, optional: bool) -> None:
    operator = CATALOGUE[name]
    args = of(backend, name, 2, 2, 4, 5, optional=optional)
    last = detached([a.contiguous(memory_format=LAST) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args])
    # The interpreter is slow: of Triton's kernels it is asked what they mutate and alias.
    partly = ("test_schema", "test_faketensor")[: 1 if backend == "triton" else 2]
    with nullcontext() if refusal(name, backend, last) else sf.use_backend(backend):
        torch.library.opcheck(op_of(name), tuple(last), test_utils=partly)
    with nullcontext() if refusal(name, backend, args) else sf.use_backend(backend):
        every = ("test_autograd_registration", *partly, "test_aot_dispatch_dynamic")
        torch.library.opcheck(op_of(name), tuple(args), test_utils=partly if backend == "triton" else every)
        if name not in DIFFERENTIABLE:
            return
        outputs = [t.detach() for t in as_list(op_of(name)(*args))]
        named = dict(zip(operator.results, outputs, strict=True))
        of_sums = [torch.randn(outputs[0].shape[:2], device=outputs[0].device) if optional else None] * operator.sums
        inputs = detached(args[: len(operator.inputs)])
        for flags in ((True, True), (True, False), (False, True)):
            tensors = (torch.randn_like(outputs[0]), *of_sums, *(named[k] for k in operator.kept), *inputs)
            torch.library.opcheck(
                op_of(operator.backward_name), (*tensors, *flags[: len(operator.flags)]), test_utils=partly
            )


@optional
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck_twice(name: str, optional: bool) -> None:
    """Of the definition, through the op and its backward op."""
    args = arguments(name, 1, 2, 3, 4, dtype=torch.float64, optional=optional)
    places = differentiable(CATALOGUE[name], args)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        filled = [next(remaining) if isinstance(a, Tensor) and a.requires_grad else a for a in args]
        return tuple(as_list(op_of(name)(*filled))[i] for i in places)

    assert torch.autograd.gradcheck(function, leaves(args))
    assert torch.autograd.gradgradcheck(function, leaves(args))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name in CPP])
def test_double_backward(name: str, backend: str) -> None:
    """Of a penalty on the gradients, in fp32."""

    def penalty(function: Callable[..., Any], args: list[Any]) -> list[Tensor | None]:
        outputs = as_list(function(*args))
        loss = sum(outputs[i].square().mean() for i in differentiable(CATALOGUE[name], args))
        first = torch.autograd.grad(loss, leaves(args), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves(args), allow_unused=True))

    args = arguments(name, 2, 3, 7, 8)
    with nullcontext() if refusal(name, backend, args) else sf.use_backend(backend):
        actual = penalty(op_of(name), args)
    for a, e in zip(actual, penalty(CATALOGUE[name].forward, fp64(args)), strict=True):
        e = None if e is None or e.norm() < 1e-9 else e
        assert (a is None or a.norm() < 1e-4) if e is None else (a - e).norm() < 1e-4 * e.norm()


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in BACKENDS if b != "triton"])
def test_compiles_without_graph_breaks(name: str, backend: str) -> None:
    def call(x: Tensor, *others: Any) -> Tensor:
        outputs = as_list(op_of(name)(x.sin(), *others))
        return sum(outputs[i].square().mean() for i in differentiable(CATALOGUE[name], args) or [0])

    torch._dynamo.reset()
    args = arguments(name, 2, 3, 9, 12)
    with sf.use_backend(backend):
        compiled = torch.compile(call, fullgraph=True)
        if name not in DIFFERENTIABLE:
            assert_close(compiled(*args), call(*args))
            return
        actual = value_and_grads(compiled, args, torch.ones(()))
        assert_close(actual, value_and_grads(call, args, torch.ones(())), torch.float32)


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in BACKENDS if n in DIFFERENTIABLE and b != "triton"])
def test_saves_the_inputs_and_what_its_backward_takes(name: str, backend: str) -> None:
    args, saved = arguments(name, 1, 3, 16, 16), []
    with sf.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = as_list(op_of(name)(*args))
    pairs = zip(args, CATALOGUE[name].inputs, strict=False)
    inputs = [a for a, spec in pairs if isinstance(spec, Image)]
    kept = [t for t in saved if all(t.data_ptr() != a.data_ptr() for a in inputs)]
    assert {t.data_ptr() for t in inputs} <= {t.data_ptr() for t in saved}
    assert len(kept) == len(CATALOGUE[name].kept)
    assert all(any(t.data_ptr() == o.data_ptr() for o in outputs[1:]) for t in kept)


@optional
@pytest.mark.parametrize("name", CATALOGUE)
def test_flops_are_the_definition_s(name: str, optional: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    args = arguments(name, 2, 3, 8, 10, optional=optional)
    places = differentiable(CATALOGUE[name], args)

    def count(function: Callable[..., Any]) -> list[int]:
        counts = []
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                outputs = as_list(function(*args))
                if backward and places:
                    gradients(outputs, random_grads(outputs), args, places)
            counts.append(counter.get_total_flops())
        return counts

    assert count(op_of(name)) == count(CATALOGUE[name].forward)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_is_the_op(name: str) -> None:
    args = arguments(name, 1, 2, 6, 5, optional=False)
    expected = as_list(op_of(name)(*args))[0]
    options = {"output_size": (6, 5)} if name == "haar_idwt2d" else {}
    assert_close(getattr(sf.functional, name)(*public(name, args), **options), expected)


def first_of(function: Callable[..., Any], args: list[Any]) -> Tensor:
    return as_list(function(*args))[0]


@optional
@pytest.mark.parametrize(("name", "backend"), [(n, b) for n, b in BACKENDS if n in DIFFERENTIABLE])
def test_forward_mode(name: str, backend: str, optional: bool) -> None:
    """Tangents of all inputs, and those of the gradients (forward over reverse)."""
    args = of(backend, name, 2, 2, 4, 5, optional=optional)
    tangents = [torch.randn_like(a) if isinstance(a, Tensor) and a.requires_grad else None for a in args]

    def derivatives(function: Callable[..., Any], args: list[Any], tangents: list[Any]) -> list[Tensor]:
        with forward_ad.dual_level():
            pairs = zip(args, tangents, strict=True)
            duals = [a if t is None else forward_ad.make_dual(a.detach().requires_grad_(), t) for a, t in pairs]
            y = first_of(function, duals)
            grads = torch.autograd.grad(y.square().mean(), leaves(duals), create_graph=True)
            return [forward_ad.unpack_dual(t).tangent for t in (y, *grads)]

    with nullcontext() if refusal(name, backend, args) else sf.use_backend(backend):
        actual = derivatives(op_of(name), args, tangents)
    for a, e in zip(actual, derivatives(CATALOGUE[name].forward, fp64(args), fp64(tangents)), strict=True):
        assert (a - e).norm() < 1e-4 * e.norm() + 1e-6


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms(name: str) -> None:
    x, *others = detached(arguments(name, 2, 2, 4, 5))
    tangent, batch = torch.randn_like(x), torch.stack((x, x + 1))

    def results(function: Callable[..., Any]) -> list[Tensor]:
        def y(x: Tensor) -> Tensor:
            return first_of(function, [x, *others])

        def loss(x: Tensor) -> Tensor:
            return y(x).square().mean()

        func = torch.func
        products = func.jvp(y, (x,), (tangent,)), func.jvp(func.grad(loss), (x,), (tangent,))
        mapped = func.vmap(func.grad(loss))(batch)
        return [func.grad(loss)(x), func.vjp(y, x)[1](y(x))[0], *(t for pair in products for t in pair), mapped]

    assert_close(results(op_of(name)), results(CATALOGUE[name].forward))
    one_by_one = torch.stack([first_of(op_of(name), [element, *others]) for element in batch])
    assert_close(torch.func.vmap(lambda x: first_of(op_of(name), [x, *others]))(batch), one_by_one)


# the checks themselves ------------------------------------------------------------------------------------------------


def zeroed(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def shuffled(t: Tensor) -> Tensor:
    return t.flatten().roll(1).view_as(t)


@pytest.mark.parametrize("damage", [zeroed, shuffled])
@pytest.mark.parametrize(
    ("name", "op"), [(name, op) for name in CATALOGUE for op in (name, f"{name}_backward") if op in sf.backend.OPS]
)
def test_a_wrong_result_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, op: str, damage: Callable[[Tensor], Tensor]
) -> None:
    """Whichever result of a kernel is wrong, the checks above fail: they measure something."""
    kernel, names = sf.backend.OPS[op].reference, len(op_of(op).default._schema.returns)
    noticed = set()
    for optional, place in product((True, False), range(names)):
        args, empty = arguments(name, 2, 3, 5, 6, optional=optional), []

        def damaged(*args: object, place: int = place, empty: list[bool] = empty) -> object:
            results = as_list(kernel(*args))
            empty.append(results[place].numel() == 0)
            results[place] = damage(results[place])
            return results[0] if len(results) == 1 else tuple(results)

        def implementation(o: Any, backend: str, damaged: Any = damaged) -> Any:
            return damaged if o.name == op else o.reference

        with monkeypatch.context() as patch:
            patch.setattr(sf.backend, "_implementation", implementation)
            try:
                check(name, args)
            except AssertionError:
                noticed.add(place)
            else:
                assert all(empty)
    assert len(noticed) == names


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "x"),
    [
        (TypeError, "must be a torch.Tensor, got list", [1.0]),
        (
            TypeError,
            "must have dtype float32, float64, float16 or bfloat16, got torch.int64",
            torch.ones(1, 4, 4, 4).long(),
        ),
        (ValueError, r"must have shape \(B, C, H, W\), got \(4, 4\)", torch.ones(4, 4)),
        (ValueError, r"at least one channel, row and column, got shape \(1, 4, 0, 2\)", torch.ones(1, 4, 0, 2)),
        (ValueError, r"at least one channel, row and column, got shape \(1, 0, 3, 2\)", torch.ones(1, 0, 3, 2)),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_of_the_image(name: str, error: type[Exception], message: str, x: Any) -> None:
    _, *others = public(name, arguments(name, 1, 4, 4, 4))
    with pytest.raises(error, match=message):
        getattr(sf.functional, name)(x, *others)


@pytest.mark.parametrize("change", ["shape", "dtype", "type", "device"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_of_each_parameter(name: str, change: str) -> None:
    operator = CATALOGUE[name]
    changed: dict[str, Callable[[Tensor], Any]] = {
        "shape": lambda t: torch.ones(*t.shape[:1], t.shape[-1] + 4, *t.shape[1:]),
        "dtype": lambda t: t.detach().double(),
        "type": lambda t: 3,
        "device": lambda t: t.detach().to("meta"),
    }
    places = [i for i, spec in enumerate(operator.inputs) if isinstance(spec, Parameter)]
    assert places
    for place in places:
        args = arguments(name, 1, 4, 4, 4)
        args[place] = changed[change](args[place])
        with pytest.raises(TypeError if change in ("dtype", "type") else ValueError, match="must"):
            getattr(sf.functional, name)(*public(name, args))
