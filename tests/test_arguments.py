"""Every public call with one bad argument after the other: TypeError or ValueError that names it; unusual good values
work as the usual ones do."""

import inspect
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from contract import arguments, public
from sdo_models import ConvModel, tiny_unet
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sdo_fast
import swformer_fast as sf

diffusers = pytest.importorskip("diffusers")

# the calls ------------------------------------------------------------------------------------------------------------

Call = tuple[Callable[..., Any], dict[str, Any]]
"""A function and its arguments by name, all of them good."""
CALLS: dict[str, Callable[[], Call]] = {}
"""Each makes its call anew."""


def of_function(name: str) -> Call:
    function = getattr(sf.functional, name)
    inputs = dict(zip(inspect.signature(function).parameters, public(name, arguments(name, 1, 4, 6, 6)), strict=False))
    options = {"haar_idwt2d": {"output_size": (5, 6)}, "fourier_mix": {"training": True, "momentum": 0.1, "eps": 0.1}}
    return function, {**inputs, **options.get(name, {})}


def of_constructor(kind: type[nn.Module]) -> Call:
    kinds = {sf.SWFormer: [sf.SWFormer], sf.SWFormerBlock: [sf.SWFormerBlock, sf.MultiDomainMixer]}.get(kind, [kind])
    parameters = {name: p for k in kinds for name, p in inspect.signature(k).parameters.items()}
    inputs = {name: p.default for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    return kind, inputs | ({"dim": 8} if "dim" in inputs else {}) | (
        {"widths": [4, 4, 4], "depths": [1, 1, 1, 1, 1]} if "widths" in inputs else {}
    )


def of_forward(kind: type[nn.Module]) -> Call:
    constructor, inputs = of_constructor(kind)
    module = constructor(**inputs)
    first, *_ = inspect.signature(module.forward).parameters
    image = torch.rand(2, 3 if kind is sf.SWFormer else 8, 16, 20)
    options = {sf.SWFormer: {"all_scales": True}, sf.HaarIDWT2d: {"output_size": (31, 40)}}
    return module.forward, {first: image, **options.get(kind, {})}


for name in sf.functional.__all__:
    CALLS[name] = partial(of_function, name)
for kind in (getattr(sf, name) for name in sf.__all__):
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        CALLS[kind.__name__] = partial(of_constructor, kind)
        CALLS[f"{kind.__name__}.forward"] = partial(of_forward, kind)


def tensors(count: int) -> list[Tensor]:
    return list(torch.randn(count, 2, 3, 4, 4).unbind())


def numbers(*names: str) -> dict[str, float]:
    return {name: 0.5 + k for k, name in enumerate(names)}


def scheduler() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False)


@cache
def pixels() -> Any:
    return sdo_fast.from_pipeline(diffusers.DDIMPipeline(tiny_unet(), scheduler()), num_inference_steps=3)


def entering(module: Any) -> Callable[[str], None]:
    def call(name: str) -> None:
        with module.use_backend(name):
            pass

    return call


def sampler(**options: Any) -> Any:
    return sdo_fast.ShortcutSampler(ConvModel(), scheduler(), 4, **options)


def step() -> Call:
    x, cond, uncond, *terms, out = tensors(6)
    factors = numbers("guidance", "a", "b", "clip", "c", "pred_x", "pred_eps")
    inputs = {"x": x, "cond": cond, "uncond": uncond, "terms": terms, "scales": [0.5, 2.0], "out": out, **factors}
    return sdo_fast.functional.sampler_step, inputs


def shortcut() -> Call:
    grad, x, cond, uncond, *out = tensors(7)
    factors = numbers("a", "b", "guidance", "clip", "c", "pred_x", "pred_eps")
    inputs = {"grad": grad, "x": x, "cond": cond, "uncond": uncond, "out": tuple(out), **factors}
    return sdo_fast.functional.shortcut_backward, inputs


def options() -> dict[str, Any]:
    """Those of a ShortcutSampler."""
    inputs = {name: p.default for name, p in inspect.signature(sdo_fast.SamplerConfig).parameters.items()}
    changed = {"num_inference_steps": 4, "start": 1, "guidance_scale": 2.0, "step_kwargs": {"eta": 0.0}}
    return {**inputs, **changed, "schedule_kwargs": {}, "reuse": sdo_fast.TrajectoryCache()}


def passing() -> dict[str, Any]:
    """The arguments of a sampler's call with guidance."""
    kwargs = {"model_kwargs": {"cond": torch.ones(2, 5)}, "uncond_kwargs": {"cond": torch.zeros(2, 5)}}
    return {"latents": tensors(1)[0], **kwargs, "generator": torch.Generator(), "progress": False}


def optimising() -> dict[str, Any]:
    factors = {"steps": 2, "lr": 0.1, "betas": (0.9, 0.9), "coarse_steps": 2, "constraint": "white", "progress": False}
    return {
        "sampler": sampler(),
        "latents": tensors(1)[0],
        "loss_fn": torch.sum,
        "callback": lambda *a: None,
        "clip_grad": 1.0,
        **factors,
    }


def optimising_otherwise() -> dict[str, Any]:
    """A function of two tensors by name, another optimiser, a loss without a gradient."""
    return {
        "sampler": lambda latents, cond=1.0: latents * cond,
        "latents": dict(zip(("latents", "cond"), tensors(2), strict=True)),
        "loss_fn": lambda image: image.flatten(1).sum(1),
        "optimizer": torch.optim.SGD,
        "estimate": sdo_fast.ScoreFunction(2),
        "steps": 1,
        "progress": False,
    }


def set_guidance(guidance_scale: float | Tensor | None) -> None:
    sampler().guidance_scale = guidance_scale


CALLS |= {
    "SWFormer.from_preset": lambda: (sf.SWFormer.from_preset, {"name": "tiny", "exit": "small"}),
    "accelerate": lambda: (sf.accelerate, {"model": nn.Identity()}),
    "graphed": lambda: (sf.graphed, {"model": nn.Identity(), "max_graphs": 3, "max_bytes": 10**9}),
    "restore_tiled": lambda: (
        sf.restore_tiled,
        {"model": nn.Identity(), "image": torch.rand(3, 20, 40), "tile": 16, "overlap": 4, "progress": False},
    ),
    "restore_tiled, an exit": lambda: (
        sf.restore_tiled,
        {"model": sf.SWFormer.from_preset("tiny"), "image": torch.rand(3, 20, 16), "tile": 16, "overlap": 4}
        | {"exit": "small", "progress": False},
    ),
    "SWFormer.forward, an exit": lambda: (
        sf.SWFormer.from_preset("tiny").forward,
        {"image": torch.rand(1, 3, 16, 20), "exit": "small"},
    ),
    "use_backend": lambda: (entering(sf), {"name": "auto"}),
    "why_not": lambda: (lambda function: sf.why_not(function, torch.ones(1, 4, 4, 4)), {"function": "haar_dwt2d"}),
    "sdo.use_backend": lambda: (entering(sdo_fast), {"name": "auto"}),
    "sdo.why_not": lambda: (lambda op_name: sdo_fast.why_not(op_name, torch.ones(3)), {"op_name": "sampler_step"}),
    "sampler_step": step,
    "sampler_step, tensor guidance": lambda: (
        sdo_fast.functional.sampler_step,
        dict(zip(("x", "cond", "uncond"), tensors(3), strict=True), guidance=torch.rand(2, 1, 1, 1), a=1.0, b=1.0),
    ),
    "shortcut_backward": shortcut,
    "coefficients": lambda: (
        sdo_fast.coefficients,
        {"scheduler": scheduler(), "num_inference_steps": 4, "start": 1, "step_kwargs": {}, "schedule_kwargs": {}},
    ),
    "ShortcutSampler": lambda: (
        sdo_fast.ShortcutSampler,
        {"model": ConvModel(), "scheduler": scheduler(), **options()},
    ),
    "ShortcutSampler.guidance_scale": lambda: (set_guidance, {"guidance_scale": torch.ones(2, 1, 1, 1)}),
    "ShortcutSampler.__call__": lambda: (sampler(guidance_scale=2.0).__call__, passing()),
    "ShortcutSampler.warm_up": lambda: (sampler(guidance_scale=2.0, start=2).warm_up, passing()),
    "ShortcutSampler.sample": lambda: (sampler(guidance_scale=2.0).sample, {**passing(), "path": "last"}),
    "ShortcutSampler.with_steps": lambda: (sampler().with_steps, {"num_inference_steps": 3}),
    "TrajectoryCache": lambda: (
        sdo_fast.TrajectoryCache,
        {"refresh": 0.1, "exact_every": 10, "cache": "v", "batched": False},
    ),
    "invert": lambda: (
        sdo_fast.invert,
        {"sampler": sampler(), "image_latents": tensors(1)[0], "upto": 1, "model_kwargs": {}, "uncond_kwargs": None}
        | {"iterations": 2, "progress": False},
    ),
    "optimize_latents": lambda: (sdo_fast.optimize_latents, optimising()),
    "optimize_latents, a function": lambda: (sdo_fast.optimize_latents, optimising_otherwise()),
    "whitened": lambda: (sdo_fast.whitened, {"z": tensors(1)[0]}),
    "ScoreFunction": lambda: (
        sdo_fast.ScoreFunction,
        {"samples": 4, "scale": 0.1, "generator": torch.Generator()},
    ),
    "ScoreFunction.gradient": lambda: (
        sdo_fast.ScoreFunction(2).gradient,
        {"loss_fn": lambda x: x.flatten(1).sum(1), "x": tensors(1)[0]},
    ),
    "from_pipeline": lambda: (
        sdo_fast.from_pipeline,
        {"pipe": diffusers.DDIMPipeline(tiny_unet(), scheduler()), "num_inference_steps": 3, "start": 0}
        | {"images_per_prompt": 2, "height": 16, "width": 8, "path": "last", "encode_kwargs": {}},
    ),
    "PipelineSampler.prepare_latents": lambda: (pixels().prepare_latents, {"generator": torch.Generator()}),
    "PipelineSampler.decode": lambda: (pixels().decode, {"x0": torch.rand(1, 1, 8, 8)}),
    "PipelineSampler.encode": lambda: (pixels().encode, {"image": torch.rand(1, 1, 8, 8)}),
}

# the values -----------------------------------------------------------------------------------------------------------

Path = tuple[Any, ...]
Values = dict[str, Callable[[], Any]]
ZERO_IS_GOOD = ("start", "path", "overlap", "upto", "steps")
ANY_SIZE_IS_GOOD = ("steps", "iterations", "exact_every", "images_per_prompt", "height", "width", "coarse_steps")
ANY_SIZE_IS_GOOD += ("max_bytes", "samples")
OF_THE_CALLER = ("ShortcutSampler", "PipelineSampler", "invert", "optimize_latents", "restore_tiled", "ScoreFunction")
OF_THE_CALLER += ("whitened",)
"""These give tensors to the caller's model: what it makes of a meta, fake or endless one is its own affair. `whitened`
takes one tensor and gives what PyTorch makes of it."""
WRONG: dict[str, list[Any]] = {
    "eps": [-1.0], "clip": [-1.0], "lr": [-1.0], "betas": [-0.5, 1.0], "refresh": [0.0, 2.0], "output_size": [99],
    "overlap": [8, 2.5], "tile": [24], "kernel_size": [2], "spatial_kernel": [2], "wavelet_kernel": [2],
    "start": [4], "upto": [4], "path": [4], "ratio": [0.1], "ffn_ratio": [0.1], "split": [0.3],
}  # fmt: skip
"""By name: what else that argument does not take."""


def places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All that arguments hold, and where: bundles and sequences too."""
    if path:
        yield path, value
    if hasattr(value, "_asdict") or not path:
        parts = list((value._asdict() if path else value).items())
    else:
        parts = list(enumerate(value)) if isinstance(value, (list, tuple)) else []
    for key, part in parts:
        yield from places(part, (*path, key))


def replaced(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    first, *inner = path
    if isinstance(value, dict):
        return {**value, first: replaced(value[first], tuple(inner), new)}
    if isinstance(first, str):
        return value._replace(**{first: replaced(getattr(value, first), tuple(inner), new)})
    return type(value)(replaced(part, tuple(inner), new) if i == first else part for i, part in enumerate(value))


def hint_of(function: Callable[..., Any], inputs: Mapping[str, Any], path: Path) -> str:
    """The annotation of the argument, or of the bundle's field."""
    if len(path) == 1 or not isinstance(path[-1], str):
        parameters = inspect.signature(function).parameters
        return str(parameters[path[0]].annotation) if path[0] in parameters else ""
    bundle = next(value for place, value in places(inputs) if place == path[:-1])
    return str(type(bundle).__annotations__[path[-1]])


def constants(values: Mapping[str, Any]) -> Values:
    return {kind: partial(lambda value: value, value) for kind, value in values.items()}


def bad_tensors(t: Tensor) -> Values:
    dtypes = (torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn)
    rank = t[None] if t.dim() == 1 else t.flatten()
    others = {"list": t.tolist(), "numpy": t.numpy(), "rank": rank, "number": 3.0, "dtype": torch.float32}
    return {**{str(dtype): partial(t.to, dtype) for dtype in dtypes}, **constants(others)}


def of_other_layouts(t: Tensor) -> Values:
    """Tensors that are not what they seem: a kernel that takes them for dense ones may end the process."""
    return {
        "qint8": lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "COO": t.to_sparse,
        "CSR": (torch.ones_like(t) if t.dim() > 1 else torch.ones(2, 2)).to_sparse_csr,
        "mkldnn": t.float().to_mkldnn,
        "nested": lambda: torch.nested.nested_tensor([t, t]),
        "jagged": lambda: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        "fake": lambda: FakeTensorMode().from_tensor(t),
        "meta": lambda: t.to("meta"),
        **{
            f"2^50 along {i}": partial(torch.ones(1).expand, *t.shape[:i], 2**50, *t.shape[i + 1 :])
            for i in {0, t.dim() - 1}
        },
    }


def bad_numbers(value: Any, name: str, hint: str) -> Values:
    values = {"str": "3", "list": [value], "complex": 1j, "0-d": torch.tensor(value), "many": torch.ones(2, 3)}
    if isinstance(value, int) and "float" not in hint and name != "split":
        values |= {"half": value + 0.5, "-1": -1, "bool": True} | ({} if name in ZERO_IS_GOOD else {"0": 0})
        values |= {} if name in ANY_SIZE_IS_GOOD else {"2^70": 1 << 70, "huge": 10**400}
    else:
        values |= {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 10**400}
    return constants(values | {f"{other!r}": other for other in WRONG.get(name, ())})


def bad(path: Path, value: Any, hint: str) -> Values:
    """Values that the argument does not take in place of this one."""
    name = [part for part in path if isinstance(part, str)][-1]
    if isinstance(value, Tensor):
        t = value.detach()
        values = bad_tensors(t) | ({"negative": lambda: negative_view(t)} if "out" in path else {})
    elif isinstance(value, bool):
        values = constants({"str": "no", "complex": 1j, "list": [], "many": torch.ones(2)})
    elif isinstance(value, (int, float)):
        values = bad_numbers(value, name, hint)
    else:
        others = {"number": 2.5, "str": "other", "array": np.ones(2), "object": object(), "tensor": torch.ones(2, 3)}
        if hasattr(value, "_fields"):
            kind = sf.parameters.SpatialParameters
            others |= {"tuple": tuple(value), "list": list(value), "other bundle": kind(value[0], value[1])}
        elif isinstance(value, (list, tuple)):
            others |= {"short": value[:-1], "long": type(value)([*value, value[0]])}
        values = constants(others)
    good = {
        ("None",): value is None or "None" in hint or name == "generator" or name.startswith("running"),
        ("tensor", "0-d", "many"): "Tensor" in hint and not isinstance(value, (Tensor, list)),
        ("number", "rank"): "float" in hint and isinstance(value, Tensor),
        ("array",): name == "scales",
    }
    skipped = [kind for kinds, holds in good.items() if holds for kind in kinds]
    return {kind: make for kind, make in (values | {"None": lambda: None}).items() if kind not in skipped}


def negative_view(t: Tensor) -> Tensor:
    """The same values, stored with the other sign."""
    return torch.complex(t, -t).conj().imag


class Subclass(Tensor):
    pass


def unusual(path: Path, value: Any, hint: str) -> Values:
    """Other values that mean the same."""
    if isinstance(value, Tensor):
        t = value.detach()
        others = {} if "out" in path else {"negative": negative_view(t), "Parameter": nn.Parameter(t)}
        return constants({"subclass": t.as_subclass(Subclass), **others})
    if isinstance(value, bool):
        return constants({"numpy": np.bool_(value), "int": int(value)})
    if isinstance(value, (int, float)):
        kinds = (np.float64, np.float32) if isinstance(value, float) else (np.int64,)
        return constants({kind.__name__: kind(value) for kind in kinds if float(kind(value)) == value})
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and "depthwise" not in path:
        return constants({"other sequence": (tuple if isinstance(value, list) else list)(value)})
    return {}


# the checks -----------------------------------------------------------------------------------------------------------


def new_call(name: str) -> Call:
    torch.manual_seed(0)
    return CALLS[name]()


def problem(name: str, path: Path, new: Any) -> str | None:
    """What is wrong with how the call refuses the argument at `path`, or None."""
    function, inputs = new_call(name)
    names = [part for part in path if isinstance(part, str)]
    names += ["image"] if names[-1] in ("x", "y") else []
    try:
        function(**replaced(inputs, path, new))
    except (TypeError, ValueError) as error:
        named = any(re.search(rf"\b{n}\b", str(error)) for n in names)
        # Where a side is free another argument disagrees.
        free = isinstance(new, Tensor) and not new.is_nested and 2**50 in new.shape
        return None if named or free else f"unnamed {type(error).__name__}: {str(error)[:150]}"
    except Exception as error:
        honest = re.search("can't allocate memory|Storage size calculation overflowed", str(error))
        return None if honest else f"{type(error).__name__}: {str(error)[:150]}"
    return "accepted"


def problems(name: str, make: Callable[[Path, Any, str], Values]) -> dict[str, str]:
    function, inputs = new_call(name)
    function(**inputs)
    wrongs = {}
    for path, value in places(inputs):
        for kind, new in make(path, value, hint_of(function, inputs, path)).items():
            if kind.startswith(("fake", "meta", "2^50")) and name.startswith(OF_THE_CALLER):
                continue
            wrong = problem(name, path, new())
            if wrong:
                wrongs[f"{'.'.join(map(str, path))} = {kind}"] = wrong
    return wrongs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_a_bad_argument_is_named(name: str) -> None:
    assert not problems(name, bad)


def dangerous(path: Path, value: Any, hint: str) -> Values:
    return of_other_layouts(value.detach()) if isinstance(value, Tensor) else {}


@pytest.fixture(scope="module")
def in_a_process() -> dict[str, dict[str, str]]:
    run = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-200:] + run.stderr[-1000:]
    return {name: wrongs for name, wrongs in map(json.loads, run.stdout.splitlines()) if wrongs is not None}


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_of_another_layout_is_named(name: str, in_a_process: dict[str, dict[str, str]]) -> None:
    assert not in_a_process[name]


def outcome(call: Call) -> list[Any]:
    function, inputs = call
    torch.manual_seed(1)
    with torch.no_grad():
        result = function(**inputs)
    if isinstance(result, nn.Module):
        return [repr(result)]
    result = result.latents if hasattr(result, "latents") else result
    return [t.as_subclass(Tensor) for t in tree_leaves(result) if isinstance(t, Tensor)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_an_unusual_argument_works(name: str) -> None:
    expected = outcome(new_call(name))
    function, inputs = new_call(name)
    for path, value in places(inputs):
        for new in unusual(path, value, hint_of(function, inputs, path)).values():
            function, fresh = new_call(name)
            actual = outcome((function, replaced(fresh, path, new())))
            assert len(actual) == len(expected)
            for a, e in zip(actual, expected, strict=True):
                assert a == e if isinstance(e, str) else torch.allclose(a, e, 1e-4, 1e-6, equal_nan=True), path


# tensors of one kind --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sf.functional.__all__)
def test_all_tensors_may_be_fake_or_meta(name: str) -> None:
    function, inputs = new_call(name)
    shape = function(**inputs).shape
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = {key: tree_map_only(Tensor, mode.from_tensor, value) for key, value in inputs.items()}
    meta = {key: tree_map_only(Tensor, lambda t: t.to("meta"), value) for key, value in inputs.items()}
    first, *_ = inputs
    for tensors in (fake, meta, {**inputs, first: fake[first]}):
        with mode if tensors is not meta else torch.device("meta"):
            assert function(**tensors).shape == shape


@pytest.mark.parametrize("name", sf.functional.__all__)
def test_inference_tensors_are_as_in_pytorch(name: str) -> None:
    """They work where nothing is recorded, and are refused where autograd would save them, as by F.conv2d."""
    function, inputs = new_call(name)
    inputs = {key: tree_map_only(Tensor, Tensor.detach, value) for key, value in inputs.items()} | (
        {"training": False} if name == "fourier_mix" else {}
    )
    expected, (first, x, *_) = function(**inputs), next(iter(inputs.items()))
    with torch.inference_mode():
        inputs[first] = x.clone()
    assert torch.equal(function(**inputs), expected)
    name, value = list(inputs.items())[1]
    inputs[name] = tree_map_only(Tensor, lambda t: t.clone().requires_grad_(), value)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        function(**inputs)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        nn.functional.conv2d(inputs[first], torch.ones(1, x.shape[1], 1, 1, requires_grad=True))


@pytest.mark.parametrize(
    ("name", "path", "side"),
    [
        ("fourier_mix", "out_weight", 0),
        ("fourier_mix", "in_weight", 0),
        ("multiscale_ffn", "in_weight", 0),
        ("multiscale_ffn", "out_weight", 0),
        ("channel_attention", "w1", 0),
        ("depthwise_gelu", "weight", 2),
    ],
)
def test_weights_without_elements_are_refused(name: str, path: str, side: int) -> None:
    """By PyTorch's convolution they are as well."""
    function, inputs = new_call(name)
    place = ("parameters", path) if "parameters" in inputs else (path,)
    value = next(value for where, value in places(inputs) if where == place)
    with pytest.raises(ValueError, match=rf"{path} must have "):
        function(**replaced(inputs, place, value.narrow(side, 0, 0)))


if __name__ == "__main__":
    # Expanded views of 2^50 elements shall fail at once where nobody refuses them.
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    for name in CALLS:
        print(json.dumps([name, None]), flush=True)
        print(json.dumps([name, problems(name, dangerous)]), flush=True)
