"""The Triton kernels, compiled for GPUs that need not be there: registers, spills, shared memory, access widths."""

import ast

import pytest

from benchmarks.inspection.compilation import resources
from benchmarks.inspection.launches import LAUNCHES
from benchmarks.inspection.machine_code import ROOT, SHARED_LIMIT, TARGETS, Resources

triton = pytest.importorskip("triton", reason="triton is not installed")

VERSION = ".".join(triton.__version__.split(".")[:2])
KERNELS = ROOT / "kernels" / "swformer_kernels"
MAIN_TARGETS = ("sm_80", "sm_90", "gfx942")
PARTIAL_SUMS = (
    "spectrum_parameters_kernel",
    "spectrum_moments_kernel",
    "pointwise_parameters_kernel",
    "attention_sums_kernel",
    "ffn_in_parameters_kernel",
)
"""Kernels that write nothing but partial sums."""
PRODUCTS = ("pointwise", "multiscale_ffn", "fourier_mix")
"""Families of matrix products."""
NO_PRODUCTS = ("ffn_low_kernel", "ffn_downsample_kernel", "ffn_depthwise_backward_kernel")
"""Kernels without matrix products, of launches that have some."""
TAKES_PRECISION = ("spectrum_mix_kernel", "spectrum_mix_backward_kernel", "spectrum_parameters_kernel")
"""Kernels whose products a launch may ask to be "ieee"."""
SLOW_TF32 = ("sm_86",)
"""Targets whose matrix units take tf32 no faster than fp32 is taken without them."""
EXACT = (" fp32", " alone")
"""In the names of launches whose products are exact, the fastest way."""
SMALL = ("sum_", "attention_network", "attention_parameters", "compose", "batch_statistics", "fold_")
"""Kernels of partial sums, of the few numbers that channel attention makes of an image, and of parameters alone."""

AS_TF32X3 = {("3.6", "sm_100")}
"""Versions of Triton and targets that take the Fourier branch's products in tf32x3: they get "ieee" wrong."""

SPILLS = {
    # Two columns a lane would spare them and double the traffic.
    ("3.9", "sm_100", "wavelet_mix_backward 5x5 bf16 channels_last 2x40x256x256"): 13,
    ("3.6", "sm_100", "wavelet_mix_backward 5x5 bf16 channels_last 2x40x256x256"): 33,
    ("3.6", "sm_100", "wavelet_mix_backward 5x5 bf16 channels_last 2x40x64x64"): 8,
    ("3.6", "sm_100", "wavelet_mix_backward 5x5 fp32 channels_last 2x40x256x256"): 35,
    # Four columns a lane would spare them and halve the accesses' width.
    ("3.6", "sm_100", "wavelet_mix_backward 3x3 bf16 2x40x256x256"): 8,
    ("3.6", "sm_100", "wavelet_mix_backward 3x3 bf16 2x40x64x64"): 72,
    # The assembler's choice, which fits half as many programs again on a multiprocessor.
    ("3.6", "sm_86", "depthwise_gelu_backward fp32 channels_last 2x40x256x256"): 4,
}
"""Accesses to spilled registers, where there are any, by version of Triton."""


def _check(result: Resources) -> None:
    assert result.spills <= SPILLS.get((VERSION, result.target, result.launch), 0), result
    assert result.shared <= SHARED_LIMIT, result
    assert result.occupancy > 0, result
    if result.kernel.startswith(SMALL):
        # Exact products, where there are any.
        assert result.tensor_core == 0 or result.target.startswith("gfx"), result
        return
    stored = result.width
    if result.target.startswith("gfx") and result.needs_tensor_core and "bf16" in result.launch:
        stored = 64  # a thread has four neighbours of a product, and they are stored as they are
    assert max(result.loads) >= result.width, result
    if result.kernel not in PARTIAL_SUMS:
        assert max(result.stores) >= min(stored, result.width), result
    # Those of AMD take fp32 numbers as they are.
    products = result.needs_tensor_core if result.target.startswith("sm_") else result.family in PRODUCTS
    products &= not (result.target in SLOW_TF32 and any(part in result.launch for part in EXACT))
    products |= (VERSION, result.target) in AS_TF32X3 and result.kernel in TAKES_PRECISION
    assert (result.tensor_core > 0) == (products and result.kernel not in NO_PRODUCTS), result
    if result.width == 128 and not result.kernel.startswith("spectrum_"):
        # What is narrower are parameters and partial sums; those of the Fourier branch are matrices.
        assert set(result.loads) <= {32, 128}, result
        assert set(result.stores) <= {32, stored, 128}, result


@pytest.mark.parametrize(
    ("family", "target"),
    [
        # One target of each vendor: the FFN takes long to compile for sm_90.
        pytest.param(
            family, target, marks=[pytest.mark.slow] * (target == ("sm_90" if family == "multiscale_ffn" else "sm_80"))
        )
        for family in LAUNCHES
        for target in MAIN_TARGETS
    ],
)
def test_main_launches(family: str, target: str) -> None:
    results = resources((family,), (target,))
    assert results
    for result in results:
        _check(result)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", LAUNCHES)
def test_all_launches(family: str, target: str) -> None:
    for result in resources((family,), (target,), everything=True):
        _check(result)


@pytest.mark.parametrize(
    "family",
    # Those of the FFN read their own maps beside the given ones.
    [pytest.param(f, marks=[pytest.mark.slow] * (f != "wavelet_mix")) for f in LAUNCHES if f != "multiscale_ffn"],
)
def test_images_off_a_boundary(family: str) -> None:
    """A view that begins between two boundaries of 16 bytes is read element by element, however its rows are spaced."""
    for result in resources((family,), ("sm_90",), offset=1):
        if not result.kernel.startswith(SMALL):
            assert set(result.loads) == {32}, result


def test_every_kernel_is_launched() -> None:
    """Each `*_kernel` under kernels/ is reached by the launches of some family."""
    defined = {
        node.name
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    families = {path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_")}
    assert families == {*LAUNCHES, "swformer_block"}, "whose kernels are the others'"
    launched = {result.kernel for family in LAUNCHES for result in resources((family,), (MAIN_TARGETS[0],))}
    assert defined == launched


def test_launchers_are_annotated() -> None:
    """What mypy cannot ask of these files, whose kernels are not."""
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                arguments = [*node.args.args, *node.args.kwonlyargs, *filter(None, [node.args.vararg, node.args.kwarg])]
                assert all(a.annotation or a.arg == "self" for a in arguments), (path.name, node.name)
                assert node.returns, (path.name, node.name)
