"""What an op is as a value: schemas, places of gradients, flags, arguments, definitions; and the bundles."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

import swformer_fast as sf
from swformer_fast import parameters, reference
from swformer_fast.ops import CATALOGUE, Operator
from swformer_fast.ops._operator import Image, Number, Parameter, Statistic
from swformer_fast.parameters import flatten, unflatten
from swformer_fast.reference.multiscale_ffn import SCALES

KERNELS = sf.backends()["cpp"] == "available"
ROOT = Path(__file__).parent.parent
BUNDLE_OF: dict[str, Any] = {
    "fourier_mix": parameters.FourierParameters,
    "multiscale_ffn": parameters.FfnParameters,
    "channel_attention": parameters.AttentionParameters,
    "depthwise_gelu": parameters.SpatialParameters,
    "wavelet_mix": parameters.WaveletParameters,
}
BUNDLES = [kind for name, kind in vars(parameters).items() if hasattr(kind, "_fields") and not name.startswith("_")]


def no_limits(backend: str, *inputs: Any) -> str | None:
    return None


def no_example(*args: Any) -> tuple[Any, ...]:
    return ()


def scaled(x: Tensor, mean: Tensor | None, weight: Tensor, power: float) -> tuple[Tensor, Tensor]:
    centred = x if mean is None else x - mean[:, None, None]
    return weight[:, None, None] * centred.pow(power), centred.detach().square()


SCALED = Operator(
    "scaled",
    (Image("x"), Statistic("mean", optional=True), Parameter("weight"), Number("power", "float")),
    scaled,
    lambda x, *others: (torch.empty_like(x), torch.empty_like(x)),
    no_limits,
    no_example,
    outputs=("y", "squares"),
    kept=("squares",),
    residual=True,
    sums=True,
)
"""Something of everything."""
PLAIN = Operator("plain", (Image("x"),), torch.sin, torch.empty_like, no_limits, no_example)
JOINED = Operator(
    "joined",
    (Image("a"), Image("b", optional=True), Parameter("shift")),
    lambda a, b, shift: a + shift if b is None else a * b + shift,
    lambda a, b, shift: torch.empty_like(a),
    no_limits,
    no_example,
)


@pytest.mark.parametrize(
    ("operator", "schema", "backward"),
    [
        (PLAIN, "plain(Tensor x) -> Tensor", "plain_backward(Tensor grad, Tensor x, bool need_images) -> (Tensor)"),
        (
            JOINED,
            "joined(Tensor a, Tensor? b, Tensor shift) -> Tensor",
            "joined_backward(Tensor grad, Tensor a, Tensor? b, Tensor shift, bool need_images, bool need_parameters)"
            " -> (Tensor, Tensor, Tensor)",
        ),
        (
            SCALED,
            "scaled(Tensor x, Tensor? mean, Tensor weight, float power, Tensor? residual, bool need_sums)"
            " -> (Tensor y, Tensor sums, Tensor squares)",
            "scaled_backward(Tensor grad, Tensor? grad_sums, Tensor squares, Tensor x, Tensor? mean, Tensor weight,"
            " float power, bool need_images, bool need_parameters) -> (Tensor, Tensor)",
        ),
    ],
)
def test_schemas(operator: Operator, schema: str, backward: str) -> None:
    assert operator.schema == schema
    assert operator.backward_schema == backward


@pytest.mark.parametrize(
    ("operator", "places", "flags"),
    [
        (PLAIN, (0,), ("need_images",)),
        (JOINED, (0, 1, 2), ("need_images", "need_parameters")),
        (SCALED, (0, 2), ("need_images", "need_parameters")),
    ],
)
def test_places_and_flags(operator: Operator, places: tuple[int, ...], flags: tuple[str, ...]) -> None:
    assert operator.places == places
    assert operator.flags == flags


def test_backward_arguments() -> None:
    split = SCALED.backward_arguments(("grad", "of sums", "squares", "x", "mean", "weight", 2.0, True, False))
    assert split.grads == ("grad", "of sums")
    assert split.kept == ("squares",)
    assert split.inputs == ("x", "mean", "weight", 2.0)
    assert split.flags == {"need_images": True, "need_parameters": False}
    with pytest.raises(ValueError, match="zip"):
        SCALED.backward_arguments(("grad", "of sums", "squares", "x", "mean", "weight", 2.0, True))


def test_wanted() -> None:
    inputs = ("a", None, "shift")
    assert JOINED.wanted(inputs, {"need_images": True, "need_parameters": True}) == [0, 2]
    assert JOINED.wanted(inputs, {"need_images": False, "need_parameters": True}) == [2]
    assert JOINED.wanted(("a", "b", "shift"), {"need_images": True, "need_parameters": False}) == [0, 1]


def test_forward_by_the_definition() -> None:
    x, mean, weight, residual = torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3), torch.randn(2, 3, 4, 5)
    y, squares = scaled(x, mean, weight, 2.0)
    results = SCALED.forward(x, mean, weight, 2.0, residual, True)
    assert_close(results, (y + residual, (y + residual).sum((2, 3)), squares))
    results = SCALED.forward(x, mean, weight, 2.0, None, False)
    assert_close(results, (y, x.new_empty(0), squares))
    assert torch.equal(PLAIN.forward(x), x.sin())
    in_fp64 = SCALED.forward(x.double(), mean.double(), weight.double(), 2.0, None, True)
    assert {t.dtype for t in in_fp64} == {torch.float64}
    half = SCALED.forward(x.half(), mean.half(), weight.half(), 2.0, None, True)
    assert [t.dtype for t in half] == [torch.float16, torch.float32, torch.float16]


@pytest.mark.parametrize("of_sums", [False, True])
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True), (False, False)])
def test_backward_by_the_definition(flags: tuple[bool, bool], of_sums: bool) -> None:
    x, mean, weight = torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3)
    grad, grad_sums = torch.randn_like(x), torch.randn(2, 3) if of_sums else None
    gradients = SCALED.backward(grad, grad_sums, x, x, mean, weight, 3.0, *flags)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = scaled(leaves[0], mean, leaves[1], 3.0)[0]
    loss = (y * grad).sum() if grad_sums is None else (y * grad).sum() + (y.sum((2, 3)) * grad_sums).sum()
    expected = torch.autograd.grad(loss, leaves)
    assert_close(gradients, tuple(e if flag else x.new_empty(0) for e, flag in zip(expected, flags, strict=True)))
    fake = SCALED.fake_backward(grad, grad_sums, x, x, mean, weight, 3.0, *flags)
    assert [t.shape for t in fake] == [t.shape for t in gradients]


def test_what_is_not_needed_is_a_tensor_of_its_own() -> None:
    a, shift = torch.randn(1, 2, 3, 3), torch.randn(3)
    first, second, _ = JOINED.backward(a, a, a, shift, False, True)
    assert first is not second


def test_backward_gives_nothing_for_an_absent_input() -> None:
    a, shift = torch.randn(1, 2, 3, 3), torch.randn(3)
    gradients = JOINED.backward(a, a, None, shift, True, True)
    assert [tuple(t.shape) for t in gradients] == [(1, 2, 3, 3), (0,), (3,)]
    assert [t.shape for t in JOINED.fake_backward(a, a, None, shift, True, True)] == [t.shape for t in gradients]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_go_with_the_image_s_layout(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    forward, backward = SCALED.implementations(), SCALED.backward_implementations()
    y, _, squares = forward.reference(x, None, torch.randn(3), 2.0, None, True)
    assert y.is_contiguous(memory_format=layout)
    grads = backward.reference(torch.randn(2, 3, 4, 5), None, squares, x, None, torch.randn(3), 2.0, True, True)
    assert grads[0].is_contiguous(memory_format=layout)


def test_implementations_take_their_names_and_limits() -> None:
    refusing = Operator(
        "refusing", SCALED.inputs, scaled, SCALED.fake, lambda *args: repr(args), no_example, kept=("squares",)
    )
    forward, backward = refusing.implementations(), refusing.backward_implementations()
    assert (forward.name, backward.name) == ("refusing", "refusing_backward")
    assert forward.triton == backward.triton == "refusing"
    assert forward.sample is backward.sample is None
    assert forward.limits("cpp", 1, 2, 3, 4) == backward.limits("cpp", "grad", "kept", 1, 2, 3, 4, True, True)


def test_samples_are_small_and_of_the_same_kinds() -> None:
    generator, x = torch.Generator().manual_seed(0), torch.empty(8, 3, 100, 70)
    args = (x, None, torch.empty(3), 2.0)
    sample = SCALED.sample(generator, (*args, x, True))
    assert [tuple(a.shape) if isinstance(a, Tensor) else a for a in sample] == [
        (2, 3, 36, 38),
        None,
        (3,),
        2.0,
        (2, 3, 36, 38),
        True,
    ]
    grad, grad_sums, squares, *others = SCALED.backward_sample(generator, (x, x[..., 0, 0], x, *args, False, True))
    assert grad.shape == squares.shape == (2, 3, 36, 38)
    assert_close(grad_sums, grad.mean((2, 3)))
    assert torch.equal(squares, others[0].square())
    assert others[-2:] == [True, True]


# the catalogue --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=CATALOGUE)
def operator(request: pytest.FixtureRequest) -> Operator:
    return CATALOGUE[request.param]


def signature(schema: Any) -> tuple[list[str], list[str]]:
    """Types of arguments and results, in order."""
    return [str(a.type) for a in schema.arguments], [str(r.type) for r in schema.returns]


def names(schema: Any) -> list[str]:
    return [a.name for a in schema.arguments]


def schemas(operator: Operator) -> dict[str, str]:
    """The op's, and its backward op's if it has one, by name."""
    backward = {operator.backward_name: operator.backward_schema} if operator.differentiable else {}
    return {operator.name: operator.schema} | backward


def test_every_op_is_registered_under_its_schemas(operator: Operator) -> None:
    assert CATALOGUE[operator.name] is operator
    for name, schema in schemas(operator).items():
        registered = getattr(torch.ops.swformer_fast, name).default._schema
        parsed = torch._C.parse_schema(schema)
        assert parsed.name == name
        assert signature(registered) == signature(parsed)
        assert names(registered) == names(parsed)
        assert sf.backend.OPS[name].name == name
    assert operator.differentiable == (operator.backward_name in sf.backend.OPS)


def test_nothing_else_is_registered() -> None:
    assert set(sf.backend.OPS) == {name for operator in CATALOGUE.values() for name in schemas(operator)}


@pytest.mark.skipif(not KERNELS, reason="the extension is not built")
def test_kernels_take_what_their_ops_take(operator: Operator) -> None:
    """C++ and Python declare each op; types and order decide, and names but those of the flags."""
    kernels = torch.ops._swformer_fast
    for name, schema in schemas(operator).items():
        registered, declared = getattr(kernels, name).default._schema, torch._C.parse_schema(schema)
        assert signature(registered) == signature(declared)
        flags = len(operator.flags) if name == operator.backward_name else 0
        assert names(registered)[: len(names(registered)) - flags] == names(declared)[: len(names(declared)) - flags]


def test_every_op_has_a_definition_of_its_name(operator: Operator) -> None:
    assert callable(getattr(reference, operator.name))
    assert operator.name in reference.__all__


ELSEWHERE = {
    "tests/test_haar_dwt2d.py": "tests/test_haar.py",
    "tests/test_haar_idwt2d.py": "tests/test_haar.py",
    "benchmarks/bench_haar_dwt2d.py": "benchmarks/bench_haar.py",
    "benchmarks/bench_haar_idwt2d.py": "benchmarks/bench_haar.py",
    "benchmarks/bench_swformer_block.py": "benchmarks/bench_block.py",
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_op_is_found_by_its_name(name: str) -> None:
    """Definition, kernels, test and benchmark."""
    for path in (f"swformer_fast/reference/{name}.py", f"tests/test_{name}.py", f"benchmarks/bench_{name}.py"):
        assert (ROOT / ELSEWHERE.get(path, path)).exists(), path
    of_cpu = ROOT / "csrc" / "swformer" / "cpu"
    assert (of_cpu / f"{name}.cpp").exists() or (of_cpu / name).is_dir()


def test_the_table_of_support_names_every_op() -> None:
    rows = [line for line in (ROOT / "docs" / "support.md").read_text().splitlines() if line.startswith("| `")]
    assert set(CATALOGUE) <= {name for line in rows for name in line.split("|")[1].replace("`", "").strip().split(", ")}


def test_every_public_function_is_an_op() -> None:
    assert set(sf.functional.__all__) <= set(CATALOGUE)


def test_places_are_of_images_and_parameters(operator: Operator) -> None:
    kinds = [type(spec) for spec in operator.inputs]
    assert list(operator.places) == [i for i, kind in enumerate(kinds) if kind in (Image, Parameter)]
    assert kinds[0] is Image or set(kinds) == {Parameter, Number}
    flags = {Image: "need_images", Parameter: "need_parameters"}
    assert operator.flags == tuple(flag for kind, flag in flags.items() if kind in kinds)
    assert len({spec.name for spec in operator.inputs}) == len(operator.inputs)


def test_backward_arguments_of_the_catalogue(operator: Operator) -> None:
    """Each argument of the backward op comes back under the part that its name belongs to."""
    declared = names(torch._C.parse_schema(operator.backward_schema))
    split = operator.backward_arguments(declared)
    assert split.grads == ("grad", "grad_sums")[: 1 + operator.sums]
    assert split.kept == operator.kept
    assert split.inputs == tuple(spec.name for spec in operator.inputs)
    assert tuple(split.flags) == tuple(split.flags.values()) == operator.flags


def test_kept_outputs_are_outputs(operator: Operator) -> None:
    assert set(operator.kept) <= set(operator.outputs[1:])


# bundles --------------------------------------------------------------------------------------------------------------


def leaves(kind: Any) -> int:
    """How many tensors a bundle of this kind holds."""
    parts = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    parts = typing.get_type_hints(kind).values() if hasattr(kind, "_fields") else parts
    return sum(map(leaves, parts)) if parts else 1


@pytest.mark.parametrize("kind", BUNDLES)
def test_flatten_and_unflatten(kind: Any) -> None:
    size = leaves(kind)
    bundle = unflatten(kind, range(size))
    assert type(bundle) is kind
    assert flatten(bundle) == tuple(range(size))
    assert unflatten(kind, flatten(bundle)) == bundle


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (parameters.Norm, 4),
        (parameters.AttentionParameters, 4),
        (parameters.FfnParameters, 10),
        (parameters.FourierParameters, 16),
        (parameters.MixerParameters, 2 + 2 + 6 + 16 + 4 + 2),
    ],
)
def test_sizes_of_bundles(kind: Any, size: int) -> None:
    for other in (size - 1, size + 1, 0):
        with pytest.raises(ValueError, match=f"tensors must be as many as {kind.__name__} has, {size}, got {other}"):
            unflatten(kind, range(other))
    assert len(flatten(unflatten(kind, range(size)))) == size


def test_a_bundle_keeps_none() -> None:
    tensors = list(range(16))
    tensors[2] = tensors[3] = None  # no running statistics
    bundle = unflatten(parameters.FourierParameters, tensors)
    assert bundle.gate.norm.running_mean is None
    assert flatten(bundle) == tuple(tensors)


@pytest.mark.parametrize("name", BUNDLE_OF)
def test_bundles_fit_their_ops(name: str) -> None:
    """The tensors of a bundle are the op's inputs between the image and the numbers."""
    tensors = [spec for spec in CATALOGUE[name].inputs[1:] if not isinstance(spec, Number)]
    bundle = unflatten(BUNDLE_OF[name], [spec.name for spec in tensors])
    if name == "fourier_mix":
        assert bundle.gate.norm == ("gate_mean", "gate_variance", "gate_scale", "gate_shift")
        assert (bundle.value.weight, bundle.out_bias) == ("value_weight", "out_bias")
    elif name == "multiscale_ffn":
        expected = tuple((f"dw_weight{scale}", f"dw_bias{scale}") for scale in SCALES)
        assert bundle.depthwise == expected
    else:
        assert bundle == bundle._fields
