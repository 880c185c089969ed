"""graphed(model) and make_graphed_callables: what is captured when and copied where, with a stand-in for CUDA's graphs.

The stand-in repeats the operators of one run in the same memory. As of a CUDA graph, Python's part of a forward does
not run again: a number that it read, a branch that it took or a tensor that it held are those of the capture.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_close, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swformer_fast as sf
from benchmarks.inspection.launching import READING, HostWork, NoHostWork
from swformer_fast.graphed import WARM_UP, Graphed, Pool

# the stand-in ---------------------------------------------------------------------------------------------------------


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """In the place of a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.memory: list[Tensor] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in READING:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        inputs = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.memory += [t for t in tree_leaves(result) if isinstance(t, Tensor) and address(t) not in inputs]
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def poison(self) -> None:
        """What others that share the memory may do to it between replays, and what a capture leaves in it."""
        for tensor in self.memory:
            tensor.detach().fill_(torch.nan if tensor.is_floating_point() else 1)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and address(old) != address(new):
                    old.copy_(new)


class TapePool(Pool):
    """A pool of tapes on the CPU. `kind()` makes a class of its own for each test."""

    device_type = "cpu"
    pools: list[TapePool]
    depth = 0
    growth = staticmethod(lambda pool: 100)

    def __init__(self, device: torch.device) -> None:
        self.device, self.tapes, self.log = device, [], []
        self.pools.append(self)

    @classmethod
    def capturing(cls) -> bool:
        return TapePool.depth > 0

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any, int]:
        for _ in range(2):
            run()
        tape = Tape()
        TapePool.depth += 1
        try:
            with tape:
                result = run()
        finally:
            TapePool.depth -= 1
        tape.poison()
        self.tapes.append(tape)

        def replay() -> None:
            for other in self.tapes:
                if other is not tape:
                    other.poison()
            tape.replay()

        return replay, result, type(self).growth(self)

    def begin(self) -> None:
        self.log.append("begin")

    def end(self) -> None:
        self.log.append("end")

    def finish(self) -> None:
        self.log.append("finish")

    @classmethod
    def counts(cls) -> tuple[int, int]:
        """Captures and replays so far."""
        tapes = [tape for pool in cls.pools for tape in pool.tapes]
        return len(tapes), sum(tape.replays for tape in tapes)


def kind(growth: Callable[[TapePool], int] = lambda pool: 100) -> Any:
    return type("TapePool", (TapePool,), {"pools": [], "growth": staticmethod(growth)})


def rehearsed(model: nn.Module, max_graphs: int = 8, max_bytes: int | None = None, **options: Any) -> tuple[Any, Any]:
    pool = kind(**options)
    return Graphed(model, max_graphs, max_bytes, pool), pool


def block(dim: int = 8) -> nn.Module:
    return randomise(sf.SWFormerBlock(dim)).eval()


def network() -> nn.Module:
    return randomise(sf.SWFormer.from_preset("tiny")).eval()


def same(actual: Any, expected: Any) -> bool:
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


# values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_block_of_many_shapes_in_turn(mode: Any) -> None:
    model = block()
    fast, pool = rehearsed(model)
    sizes = [(1, 8, 16, 18), (2, 8, 16, 18), (1, 8, 18, 16), (1, 8, 7, 9)]
    kept = []
    with mode():
        for round_ in range(3):
            for size in sizes:
                x = torch.randn(size)
                y, expected = fast(x), model(x)
                assert torch.equal(y, expected)
                assert y.stride() == expected.stride()
                assert y.is_inference() == expected.is_inference()
                assert not y.requires_grad
                kept.append((y, expected))
            assert pool.counts() == (len(sizes), len(sizes) * (round_ + 1))
    assert all(torch.equal(*pair) for pair in kept)
    assert len(pool.pools) == 1


@torch.no_grad()
def test_network_and_its_options() -> None:
    model = network()
    fast, pool = rehearsed(model)
    for _ in range(2):
        x = torch.rand(1, 3, 20, 33)
        assert same(fast(x), model(x))
        assert same(fast(x, all_scales=True), model(x, all_scales=True))
        assert same(fast(x, "small"), model(x, "small"))
        assert isinstance(fast(x, all_scales=True), tuple)
    assert pool.counts() == (3, 8)


@torch.no_grad()
def test_a_graph_for_each_exit() -> None:
    model = network()
    fast, pool = rehearsed(model)
    for _ in range(2):
        for size in ((1, 3, 20, 33), (2, 3, 32, 16)):
            x = torch.rand(size)
            for exit in sf.EXITS:
                assert torch.equal(fast(x, exit=exit), model(x, exit=exit))
            assert same(fast(x, exits=("large", "small")), model(x, exits=("large", "small")))
    assert pool.counts() == (8, 16)
    assert fast.why_not(x, exit="small") == "a graph is replayed"
    assert fast.why_not(x, exits=("small", "large")) == "a graph is captured"


@torch.no_grad()
def test_one_option_is_not_another_that_equals_it() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, k: Any = 2, *, names: Any = ()) -> Any:
            return {"y": x * 3 if k is True else x * 2, "n": len(names), "none": None}

    fast, pool = rehearsed(Scaled())
    x = torch.randn(3)
    for k, times in ((1, 2), (True, 3), (1.0, 2)):
        assert torch.equal(fast(x, k)["y"], times * x)
        assert torch.equal(fast(x, k=k)["y"], times * x)
    assert fast(x, names=("a", "b"))["n"] == 2
    assert fast(x, names=["a"]).keys() == {"y", "n", "none"}
    assert pool.counts()[0] == 8


@torch.no_grad()
def test_an_output_that_is_the_input_or_comes_twice() -> None:
    fast, _ = rehearsed(nn.Identity())
    x, other = torch.randn(2, 3).unbind()
    y = fast(x)
    fast(other)
    assert torch.equal(y, x)
    y.zero_()
    assert torch.equal(fast(other), other)
    assert x.abs().sum() > 0


@torch.no_grad()
def test_strides_of_the_input() -> None:
    model = block()
    fast, pool = rehearsed(model)
    x = torch.randn(2, 8, 16, 18)
    last = x.contiguous(memory_format=torch.channels_last)
    strided, transposed = torch.randn(2, 8, 16, 36)[..., ::2], torch.randn(2, 8, 18, 16).transpose(2, 3)
    repeated = x[:1].expand_as(x)
    for image, captures in ((x, 1), (strided, 1), (transposed, 1), (repeated, 1), (last, 2), (x, 2), (last, 2)):
        y, expected = fast(image), model(image)
        assert_close(y, expected)
        assert y.stride() == expected.stride()
        assert pool.counts()[0] == captures


# what a graph stands on -----------------------------------------------------------------------------------------------


class Square(nn.Module):
    """With all that a graph stands on, and a switch of Python's that no replay reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.weight.to(x.dtype) + self.shift) * (2 if self.training else 1)


class Quantised(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias, scale = linear.bias, linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().char())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Negative(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def turned(m: Square) -> None:
    m.weight.data = m.weight.data.t()  # same address, shape and dtype


def cut(m: Square) -> None:
    m.inner.weight.data, m.inner.bias.data = m.inner.weight.data[:4], m.inner.bias.data[:4]  # same address and strides


def swapped(m: Square) -> None:
    m.inner = Quantised(m.inner)


def reclassed(m: Square) -> None:
    m.inner.__class__ = Negative


def overridden(m: Square) -> None:
    m.inner.forward = lambda x: x


def assigned(m: Square) -> None:
    m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True)


def retyped(m: Square) -> None:
    """The weight's own memory as another dtype: every second of its numbers is 0 then."""
    m.weight.copy_(m.weight.bfloat16())
    m.weight.data = m.weight.data.view(torch.bfloat16)[:, :6].as_strided((6, 6), (6, 1))


CHANGES: list[Callable[[Square], Any]] = [turned, cut, swapped, reclassed, overridden, assigned, retyped]
CHANGES += [
    lambda m: setattr(m, "weight", nn.Parameter(m.weight * 2)),
    lambda m: setattr(m, "shift", torch.zeros(6)),
    lambda m: m.inner.register_parameter("bias", None),
    lambda m: setattr(m, "inner", nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))),
    lambda m: m.train(),
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_module_is_captured_anew(change: Callable[[Square], Any]) -> None:
    model = Square().eval()
    fast, pool = rehearsed(model)
    x = torch.randn(3, 6)
    assert torch.equal(fast(x), model(x))
    fast(x[:1])
    before = model(x)
    change(model)
    assert model(x).shape != before.shape or not torch.allclose(model(x), before)
    assert fast.why_not(x) == "a graph is captured"
    for _ in range(2):
        y, expected = fast(x), model(x)
        assert torch.equal(y, expected)
        assert pool.counts()[0] == 3
    assert fast.why_not(x) == "a graph is replayed"
    assert len(fast._graphs.by_key) == 1  # the others went with what they stood on


@torch.no_grad()
def test_a_moved_module_is_captured_anew() -> None:
    model = Square().eval()
    fast, pool = rehearsed(model)
    x = torch.randn(3, 6)
    y = fast(x)
    old = [p.data for p in model.parameters()]  # keeps its memory from coming back
    model.double().float()
    for tensor in old:
        tensor.zero_()
    assert torch.equal(fast(x), y)
    assert pool.counts()[0] == 2


@torch.no_grad()
def test_weights_that_change_in_place_are_read() -> None:
    model, other = block(), block()
    fast, pool = rehearsed(model)
    x = torch.randn(1, 8, 16, 18)
    first = fast(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(fast(x), other(x))
    assert not torch.equal(fast(x), first)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(1.25)
    assert torch.equal(fast(x), model(x))
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(fast(x), model(x))
    assert pool.counts()[0] == 1


@torch.no_grad()
def test_accelerate_and_casts_reach_the_graphs() -> None:
    model = randomise(sf.reference.SWFormerBlock(8)).eval()
    fast, pool = rehearsed(model)
    x = torch.randn(1, 8, 16, 18)
    assert torch.equal(fast(x), model(x))
    sf.accelerate(model)
    assert torch.equal(fast(x), model(x))
    fast.double()
    assert torch.equal(fast(x.double()), model(x.double()))
    assert pool.counts()[0] == 3


def _precision(value: str) -> Any:
    @contextmanager
    def setting() -> Iterator[None]:
        torch.set_float32_matmul_precision(value)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")

    return setting


def _precision_of(products: Any, value: str) -> Any:
    @contextmanager
    def setting() -> Iterator[None]:
        before = products.fp32_precision
        products.fp32_precision = value
        try:
            yield
        finally:
            products.fp32_precision = before

    return setting


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        lambda: sf.use_backend("reference"),
        _precision("high"),
        _precision("medium"),
        _deterministic,
        lambda: torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        _precision_of(torch.backends.cuda.matmul, "tf32"),
        _precision_of(torch.backends.cudnn.conv, "ieee"),
    ],
    ids=["bf16", "fp16", "backend", "high", "medium", "deterministic", "cudnn", "tf32 products", "exact convolutions"],
)
def test_settings_have_graphs_of_their_own(setting: Any) -> None:
    torch.set_float32_matmul_precision("highest")  # which is not the same as never set
    model = block()
    fast, pool = rehearsed(model)
    for _ in range(2):
        for context in (nullcontext, setting):
            with context():
                x = torch.randn(1, 8, 16, 18)
                y, expected = fast(x), model(x)
            assert y.dtype == expected.dtype
            assert torch.equal(y, expected)
    assert pool.counts() == (2, 4)


@torch.no_grad()
def test_dtypes_have_graphs_of_their_own() -> None:
    model = nn.PixelShuffle(2)
    fast, pool = rehearsed(model)
    for _ in range(2):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
            x = torch.randint(9, (1, 4, 3, 3)).to(dtype)
            assert torch.equal(fast(x), model(x))
            assert fast(x).dtype == dtype
    assert pool.counts()[0] == 4


# memory ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_graph_used_longest_ago_goes() -> None:
    fast, pool = rehearsed(nn.ReLU(), max_graphs=2)
    a, b, c = (torch.randn(n) for n in (2, 3, 4))
    replayed = {}
    for x in (a, b, a, c):
        assert torch.equal(fast(x), x.relu())
    for name, x in zip("abc", (a, b, c), strict=True):
        replayed[name] = fast.why_not(x) == "a graph is replayed"
    assert replayed == {"a": True, "b": False, "c": True}
    assert pool.counts() == (3, 4)
    assert pool.pools[0].log.count("finish") == 1  # its last replay may still be running
    assert torch.equal(fast(b), b.relu())
    assert fast.why_not(a) == "a graph is captured"
    assert len(pool.pools) == 1


@torch.no_grad()
def test_a_pool_without_graphs_is_not_used_again() -> None:
    """PyTorch refuses a capture into a pool that has had graphs and has none."""
    fast, pool = rehearsed(nn.ReLU(), max_graphs=1)
    for n in (2, 3, 4):
        fast(torch.randn(n))
    assert [len(p.tapes) for p in pool.pools] == [1, 1, 1]
    fast.clear()
    assert fast._graphs.pool is None
    assert pool.pools[-1].log[-1] == "finish"
    fast(torch.randn(4))
    assert len(pool.pools) == 4


def by_size(pool: TapePool) -> int:
    """The pool grows by what the last graph takes beyond the largest before."""
    sizes = [tape.memory[0].nbytes for tape in pool.tapes]
    return max(0, sizes[-1] - max(sizes[:-1], default=0))


@torch.no_grad()
def test_max_bytes() -> None:
    fast, pool = rehearsed(nn.ReLU(), max_bytes=100, growth=lambda pool: 4 * pool.tapes[-1].memory[0].numel())
    a, b, c, large = (torch.randn(n) for n in (10, 12, 20, 26))
    for x in (a, b):
        fast(x)
    assert fast._graphs.bytes == 88
    assert torch.equal(fast(c), c.relu())  # with the others 168
    assert fast._graphs.bytes == 80
    assert [fast.why_not(x) for x in (a, b, c)] == ["a graph is captured", "a graph is captured", "a graph is replayed"]
    for _ in range(2):
        captures = pool.counts()[0]
        assert torch.equal(fast(large), large.relu())
        assert "needs more than 100 bytes" in fast.why_not(large)
    assert pool.counts()[0] == captures  # it is not tried again
    assert torch.equal(fast(a), a.relu())
    assert "needs more than 100 bytes" in fast.why_not(large)
    fast.clear()
    assert fast.why_not(large) == "a graph is captured"


@torch.no_grad()
def test_graphs_share_their_memory() -> None:
    fast, pool = rehearsed(nn.ReLU(), max_bytes=100, growth=by_size)
    for n in (25, 24, 3, 20, 25, 24):
        x = torch.randn(n)
        assert torch.equal(fast(x), x.relu())
    assert pool.counts() == (4, 6)
    assert fast._graphs.bytes == 100


@torch.no_grad()
def test_out_of_memory_takes_the_other_graphs_first() -> None:
    def growth(pool: TapePool) -> int:
        if len(pool.tapes) > 1 or pool.tapes[-1].memory[0].numel() > 9:
            raise torch.OutOfMemoryError("out of memory")
        return 1

    fast, _ = rehearsed(nn.ReLU(), growth=growth)
    a, b, large = (torch.randn(n) for n in (2, 3, 10))
    assert torch.equal(fast(a), a.relu())
    assert torch.equal(fast(b), b.relu())
    assert fast.why_not(a) == "a graph is captured"
    assert fast.why_not(b) == "a graph is replayed"
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            fast(large)
        assert fast._graphs.pool is None
    assert torch.equal(fast(a), a.relu())


@torch.no_grad()
def test_captures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    fast, _ = rehearsed(nn.ReLU())
    with caplog.at_level(logging.INFO, "swformer_fast"):
        fast(torch.ones(2))
        fast(torch.ones(2))
    assert [r.getMessage() for r in caplog.records] == ["a CUDA graph is captured for torch.float32 (2,): 100 bytes"]


# where the module is called -------------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


def dispatching() -> Any:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    return Watching()


@contextmanager
def capturing() -> Iterator[None]:
    TapePool.depth += 1
    try:
        yield
    finally:
        TapePool.depth -= 1


@contextmanager
def global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        yield
    finally:
        handle.remove()


IMAGE = torch.randn(2, 8, 16, 18)
CASES: dict[str, tuple[str, Callable[[nn.Module], Any], Tensor, Any]] = {
    "meta": ("the input is on meta", lambda m: m.to("meta"), IMAGE.to("meta"), torch.no_grad),
    "grad": ("gradients are needed", lambda m: None, IMAGE, torch.enable_grad),
    "grad of the input": (
        "gradients are needed", lambda m: m.requires_grad_(False), IMAGE.clone().requires_grad_(), torch.enable_grad,
    ),
    "training": ("BatchNorm2d is in training", lambda m: m.train(), IMAGE, torch.no_grad),
    "one in training": ("BatchNorm2d is in training", lambda m: m.norm2.train(), IMAGE, torch.no_grad),
    "hook": (
        "a forward hook of SpatialBranch",
        lambda m: m.mixer.spatial.register_forward_hook(lambda *a: None), IMAGE, torch.no_grad,
    ),
    "pre-hook": (
        "a forward hook of SWFormerBlock", lambda m: m.register_forward_pre_hook(lambda *a: None), IMAGE, torch.no_grad,
    ),
    "global hook": ("a hook of all modules", lambda m: None, IMAGE, global_hook),
    "subclass": ("no plain dense tensor", lambda m: None, IMAGE.as_subclass(Subclass), torch.no_grad),
    "empty": ("the input is empty", lambda m: None, IMAGE[:0], torch.no_grad),
    "capture": ("another graph is being captured", lambda m: None, IMAGE, capturing),
    "dispatch mode": ("a dispatch mode", lambda m: None, IMAGE, dispatching),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_module_is_called(name: str) -> None:
    reason, prepare, x, context = CASES[name]
    model = block()
    prepare(model)
    expected = copy.deepcopy(model)
    fast, pool = rehearsed(model)
    with torch.set_grad_enabled("grad" in name), context():
        assert reason in fast.why_not(x)
        assert fast.why_not(x).startswith("the module is called: ")
        y, e = fast(x), expected(x)
    if name == "meta":
        assert y.shape == e.shape
    else:
        assert torch.equal(y, e)
        assert all(map(torch.equal, model.buffers(), expected.buffers()))
    assert y.requires_grad == ("grad" in name)
    assert not pool.pools


class Adding(nn.Module):
    def forward(self, x: Tensor, other: Any = None, **others: Any) -> Tensor:
        return x if other is None else x + other


def test_arguments_that_no_key_holds() -> None:
    fast, pool = rehearsed(Adding())
    x, other = torch.randn(2, 3).unbind()
    for _ in range(2):
        other = other + 1
        assert torch.equal(fast(x, other), x + other)
        assert torch.equal(fast(x, other=other), x + other)
        assert torch.equal(fast(x=x, other=other), x + other)
    assert fast.why_not(x, other).endswith("an argument beside the input is a Tensor")
    assert fast.why_not(x, others={}).endswith("an argument beside the input is a dict")
    assert fast.why_not(x=x).endswith("its first argument is no plain dense tensor")
    assert fast.why_not(x.to_sparse()).endswith("its first argument is no plain dense tensor")
    assert not pool.pools


def test_parameters_elsewhere_or_of_other_kinds() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity()).requires_grad_(False)
    fast, pool = rehearsed(model)
    x = torch.randn(2, 3)
    model[1].register_buffer("far", torch.empty(2, device="meta"))
    assert "parameters or buffers are on meta, the input is on cpu" in fast.why_not(x)
    assert torch.equal(fast(x), model(x))
    del model[1].far
    model[0].weight = nn.Parameter(model[0].weight.as_subclass(Subclass), requires_grad=False)
    assert "a parameter or buffer is a Subclass" in fast.why_not(x)
    assert torch.equal(fast(x), model(x))
    lazy, _ = rehearsed(nn.LazyLinear(3))
    with torch.no_grad():
        assert "hook of LazyLinear" in lazy.why_not(x)  # which makes its parameters
        lazy(x)
        assert torch.equal(lazy(x), lazy.module(x))
        assert lazy.why_not(x) == "a graph is replayed"
    assert not pool.pools


def test_transforms_traces_and_compilers_see_the_operators() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).requires_grad_(False)
    fast, pool = rehearsed(model)
    x = torch.randn(4, 3)
    assert torch.equal(torch.func.vmap(fast)(x), model(x))
    assert torch.equal(torch.jit.trace(fast, x, check_trace=False)(x + 1), model(x + 1))
    assert torch.equal(torch.compile(fast, backend="eager", fullgraph=True)(x), model(x))
    assert torch.equal(torch.export.export(fast, (x,)).module()(x), model(x))
    assert not pool.pools


def test_gradients_and_hooks_of_the_caller() -> None:
    model = block()
    fast, pool = rehearsed(model)
    x = torch.randn(1, 8, 16, 18, requires_grad=True)
    grads = torch.autograd.grad(fast(x).square().sum(), (x, *fast.parameters()))
    assert same(grads, torch.autograd.grad(model(x).square().sum(), (x, *model.parameters())))
    assert not pool.pools
    seen: list[Any] = []
    fast.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        ys = [fast(x), fast(2 * x)]
    assert same(seen, ys)
    assert pool.counts() == (1, 2)


def test_dropout_in_training_is_captured_and_batch_statistics_too() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Dropout(0.5))
    fast, pool = rehearsed(model)
    with torch.no_grad():
        ys = [fast(torch.ones(64, 3).normal_()) for _ in range(2)]
    assert pool.counts() == (1, 2)
    assert not torch.equal(ys[0] == 0, ys[1] == 0)


# errors ---------------------------------------------------------------------------------------------------------------


class Reading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) < 3 else x / x.max().item()


@torch.no_grad()
def test_a_failed_capture_raises_and_leaves_the_others() -> None:
    fast, pool = rehearsed(Reading())
    x = torch.randn(2)
    fast(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capturing"):
            fast(torch.ones(3))
    assert fast.why_not(x) == "a graph is replayed"
    assert torch.equal(fast(x + 1), x + 1)
    assert pool.counts() == (1, 2)
    fast.clear()
    with pytest.raises(RuntimeError, match="capturing"):
        fast(torch.ones(3))
    assert fast._graphs.pool is None


@torch.no_grad()
def test_errors_of_the_model_are_its_own() -> None:
    fast, _ = rehearsed(network())
    for size in ((1, 3, 16, 8), (1, 4, 16, 16)):
        with pytest.raises(ValueError, match="image must have shape"):
            fast(torch.rand(size))


@torch.no_grad()
def test_results_that_are_no_tensors() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(y=x)

    fast, _ = rehearsed(Odd())
    with pytest.raises(TypeError, match="must return tensors to be captured, got SimpleNamespace"):
        fast(torch.ones(2))


def test_arguments_of_graphed() -> None:
    assert isinstance(sf.graphed(nn.ReLU(), 3, 10**12), Graphed)
    with pytest.raises(TypeError, match="model must be"):
        sf.graphed(torch.relu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_graphs"):
        sf.graphed(nn.ReLU(), 0)
    with pytest.raises(ValueError, match="max_bytes"):
        sf.graphed(nn.ReLU(), max_bytes=0)
    with pytest.raises(ValueError, match="scripted or traced"):
        sf.graphed(nn.Sequential(torch.jit.trace(nn.ReLU(), torch.ones(1))))


def test_on_the_cpu_the_module_is_called() -> None:
    model = block()
    fast = sf.graphed(model)
    with torch.no_grad():
        assert fast.why_not(IMAGE) == "the module is called: the input is on cpu"
        assert torch.equal(fast(IMAGE), model(IMAGE))


# the module -----------------------------------------------------------------------------------------------------------


def test_state_dict_modes_and_moves_are_the_models() -> None:
    model = block()
    fast, _ = rehearsed(model)
    assert fast.module is model
    assert list(fast.state_dict()) == list(model.state_dict())
    outer, plain = nn.Sequential(fast), nn.Sequential(block())
    assert list(outer.state_dict()) == list(plain.state_dict())
    for theirs, ours in ((plain[0], fast), (plain, outer)):
        randomise(plain)
        ours.load_state_dict(theirs.state_dict())
        assert same(ours.state_dict(), theirs.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        fast.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fast.load_state_dict({**model.state_dict(), "more": torch.ones(1)})
    assert not fast.training
    assert fast.train() is fast
    assert model.norm1.training
    assert not fast.eval().module.training
    assert next(fast.to(torch.float64).module.parameters()).dtype == torch.float64
    assert not outer.training or Graphed(block().train()).training


@torch.no_grad()
def test_copies_capture_their_own() -> None:
    fast, pool = rehearsed(block(), max_graphs=3, max_bytes=1000)
    x = torch.randn(1, 8, 16, 18)
    y = fast(x)
    other = copy.deepcopy(fast)
    assert other.why_not(x) == "a graph is captured"
    for p in other.parameters():
        p.mul_(2)
    assert torch.equal(other(x), other.module(x))
    assert not torch.equal(other(x), y)
    assert torch.equal(fast(x), y)
    assert pool.counts()[0] == 2
    assert (other._graphs.max_graphs, other._graphs.max_bytes) == (3, 1000)

    fast = sf.graphed(block(), max_graphs=3)
    loaded = pickle.loads(pickle.dumps(fast))
    assert torch.equal(loaded(x), fast(x))
    assert loaded._graphs.max_graphs == 3
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), fast(x))


@torch.no_grad()
def test_one_wrapper_inside_another() -> None:
    inner, _ = rehearsed(nn.Linear(3, 3))
    outer, pool = rehearsed(nn.Sequential(inner, nn.ReLU()))
    for _ in range(3):
        x = torch.randn(2, 3)
        assert torch.equal(outer(x), inner.module(x).relu())
    assert pool.counts() == (1, 3)


def test_tiles_are_replays() -> None:
    model = network()
    fast, pool = rehearsed(model)
    image = torch.rand(3, 40, 70)
    for exit in ("small", None):
        restored, expected = (sf.restore_tiled(m, image, 32, 8, exit, progress=False) for m in (fast, model))
        assert torch.equal(restored, expected)
    captures, replays = pool.counts()
    assert (captures, replays) == (2, 12)


def test_threads_take_turns() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Sigmoid()).requires_grad_(False)
    fast, pool = rehearsed(model, max_graphs=2)
    wrong, errors = [], []

    def serve(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            for k in range(40):
                x = torch.randn(1 + (seed + k) % 3, 16, generator=generator)
                if not torch.equal(fast(x), model(x)):
                    wrong.append((seed, k))
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert not wrong
    for log in (p.log for p in pool.pools):
        calls = [entry for entry in log if entry != "finish"]
        assert calls == ["begin", "end"] * (len(calls) // 2)


# CUDA's part ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.cuda that notes what it is asked for."""
    events: list[Any] = []
    names = iter(("side", "other"))

    class Stream(SimpleNamespace):
        def wait_stream(self, stream: Any) -> None:
            events.append((self.name, "waits for", stream.name))

        def wait_event(self, event: Any) -> None:
            events.append((self.name, "waits for", event.name))

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        events.append(("on", stream.name))
        try:
            yield
        finally:
            events.append(("off", stream.name))

    @contextmanager
    def graph(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        events.append(("capture", pool, stream.name, capture_error_mode))
        yield
        events.append("captured")

    reserved = iter((100, 350))
    event = SimpleNamespace(
        name="last", record=lambda s: events.append(("record", s.name)), synchronize=lambda: events.append("finish")
    )
    replaced = {
        "device": lambda device: nullcontext(),
        "Stream": lambda device: Stream(name=next(names)),
        "Event": lambda: event,
        "current_stream": lambda device=None: Stream(name="main"),
        "stream": on,
        "CUDAGraph": lambda: SimpleNamespace(replay="replay"),
        "graph_pool_handle": lambda: "pool",
        "graph": graph,
        "synchronize": lambda: events.append("synchronize"),
        "empty_cache": lambda: events.append("empty_cache"),
        "memory_reserved": lambda: next(reserved),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return events


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_pool_captures_after_a_warm_up_on_its_stream(cuda: list[Any]) -> None:
    def run() -> str:
        assert not torch.is_autocast_cache_enabled()
        cuda.append("run")
        return "result"

    pool = Pool(torch.device("cuda", 0))
    assert pool.capture(run) == ("replay", "result", 250)
    assert torch.is_autocast_cache_enabled()
    warm_up = [("side", "waits for", "main"), ("on", "side"), *["run"] * WARM_UP, ("off", "side")]
    capture = [("on", "side"), ("capture", "pool", "side", "thread_local"), "run", "captured", ("off", "side")]
    assert cuda == [*warm_up, "synchronize", "empty_cache", *capture]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("kind_", [RuntimeError, torch.OutOfMemoryError])
def test_pool_after_a_failed_capture(cuda: list[Any], kind_: type[Exception]) -> None:
    error = kind_("not permitted when stream is capturing")

    def failing() -> None:
        if cuda.count("run") == WARM_UP:
            raise error
        cuda.append("run")

    with pytest.raises(kind_) as caught:
        Pool(torch.device("cuda", 0)).capture(failing)
    assert cuda[-1] == ("off", "side")
    if kind_ is RuntimeError:
        assert "the model cannot be captured in a CUDA graph" in str(caught.value)
        assert caught.value.__cause__ is error


def test_pool_orders_replays_on_all_streams(cuda: list[Any]) -> None:
    pool = Pool(torch.device("cuda", 0))
    pool.begin()
    pool.end()
    pool.finish()
    assert cuda == [("main", "waits for", "last"), ("record", "main"), "finish"]


# training: PyTorch's own make_graphed_callables on the same stand-in --------------------------------------------------


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """torch.cuda.make_graphed_callables captures tapes on the CPU: one of the forward, one of the backward."""
    tapes: list[Tape] = []

    def make() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    @contextmanager
    def graph(tape: Tape, pool: Any) -> Iterator[None]:
        with tape:
            yield

    replaced = {"CUDAGraph": make, "graph": graph, "Stream": object, "stream": nullcontext, "synchronize": lambda: None}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", object)
    return tapes


def step(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a training step."""
    x = x.clone().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y, (x, *model.parameters()), grad, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None), *(b.clone() for b in model.buffers())]


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` with its training steps as graphs, and the state that it had before."""
    before = copy.deepcopy(model.state_dict())
    unused = isinstance(model, sf.reference.SWFormer)  # its other heads
    model = torch.cuda.make_graphed_callables(model, (x.clone().requires_grad_(),), allow_unused_input=unused)
    model.load_state_dict(before)
    return model


@pytest.mark.parametrize(
    "name", ["block", "network", "reference", pytest.param("block on triton", marks=pytest.mark.slow)]
)
def test_make_graphed_callables(name: str, taped: list[Tape]) -> None:
    size = (2, 3, 16, 18) if name == "network" else (2, 8, 8, 6)
    eager = randomise(sf.SWFormer.from_preset("tiny") if name == "network" else sf.SWFormerBlock(8)).train()
    if name == "reference":
        eager = randomise(sf.reference.SWFormerBlock(8)).train()
    with sf.use_backend("triton") if "triton" in name else nullcontext():
        graphs = trained(copy.deepcopy(eager), torch.randn(size))
        forward, backward = taped
        for k in range(1 if "triton" in name else 2):
            x, grad = torch.randn(size) + k, torch.randn(size)
            for tape in taped:
                tape.replays = 0
            ours, theirs = step(graphs, x, grad), step(eager, x, grad)
            assert (forward.replays, backward.replays) == (1, 1)
            assert len(ours) == len(theirs)
            assert all(map(torch.equal, ours, theirs))
            for model in (eager, graphs):  # an optimizer's step, in place
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1.1)
        x = torch.randn(size)
        with torch.no_grad():
            assert torch.equal(graphs.eval()(x), eager.eval()(x))  # in another mode it calls the forward


@pytest.mark.parametrize("kind_", ["block", "network"])
def test_a_running_mean_over_all_batches_cannot_be_captured(kind_: str, taped: list[Tape]) -> None:
    """momentum=None: as nn.BatchNorm2d does, the host reads how many batches there were."""
    model = sf.SWFormerBlock(8) if kind_ == "block" else sf.SWFormer.from_preset("tiny")
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    size = (2, 8, 8, 6) if kind_ == "block" else (2, 3, 16, 18)
    with pytest.raises(RuntimeError, match="capturing"):
        trained(model.train(), torch.randn(size))
    fast, pool = rehearsed(model.eval())  # it changes nothing in evaluation
    with torch.no_grad():
        x = torch.randn(size)
        assert torch.equal(fast(x), model(x))
    assert pool.counts() == (1, 1)


@pytest.mark.parametrize("name", ["block", "network"])
def test_what_make_graphed_callables_runs_does_no_host_work(name: str) -> None:
    """Its forward, and its backward with gradients for input and parameters, in a GPU's place on the meta device."""
    pytest.importorskip("triton", reason="triton is not installed")
    with torch.device("meta"):
        model = sf.SWFormerBlock(8) if name == "block" else sf.SWFormer.from_preset("tiny")
        x = torch.empty(2, 8 if name == "block" else 3, 33, 50, requires_grad=True)
    inputs = (x, *model.train().parameters())
    with NoHostWork() as spy:
        y = model(x)
        torch.autograd.grad((y,), inputs, (torch.empty_like(y),), only_inputs=True, allow_unused=name == "network")
    assert spy.kernels
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with pytest.raises((HostWork, RuntimeError), match=r"waits for the device|meta"), NoHostWork():
        model(x)


# on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same algorithms with and without a graph, in fp32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["block", "derain"])
@torch.inference_mode()
def test_graphed_on_a_gpu(name: str, autocast: bool, exact: None) -> None:
    model = sf.SWFormerBlock(40) if name == "block" else sf.SWFormer.from_preset(name)
    model = randomise(model).eval().cuda()
    fast = sf.graphed(model, max_graphs=4)
    sizes = [(1, 40 if name == "block" else 3, *side) for side in ((64, 64), (50, 66), (128, 96))]
    options: list[dict[str, Any]] = [{}] if name == "block" else [{}, {"exit": "small"}, {"all_scales": True}]
    kept = []
    for round_ in range(3):
        for size in sizes:
            for option in options:
                x = torch.randn(size, device="cuda")
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    expected, y = model(x, **option), fast(x, **option)
                kept += zip(tree_leaves(y), tree_leaves(expected), strict=True)
        if round_ == 1:
            for p in model.parameters():
                p.mul_(0.9)
    torch.cuda.synchronize()
    assert all(e.isfinite().all() for _, e in kept)
    assert_close(*zip(*kept, strict=True), dtype=torch.bfloat16 if autocast else torch.float32)
    assert "graph" in fast.why_not(x)


@pytest.mark.gpu
@torch.inference_mode()
def test_graphed_on_streams_and_threads_of_a_gpu(exact: None) -> None:
    model = randomise(sf.SWFormerBlock(40)).eval().cuda()
    fast = sf.graphed(model)
    wrong: list[Any] = []

    @torch.inference_mode()
    def serve(side: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for k in range(20):
                x = torch.randn(1, 40, side, 64, device="cuda")
                y, expected = fast(x), model(x)
                stream.synchronize()
                try:
                    assert_close(y, expected)
                except AssertionError as error:
                    wrong.append((side, k, error))

    for side in (64, 48, 80):
        fast(torch.randn(1, 40, side, 64, device="cuda"))
        model(torch.randn(1, 40, side, 64, device="cuda"))
    torch.cuda.synchronize()
    threads = [threading.Thread(target=serve, args=(side,)) for side in (64, 48, 80, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
@torch.inference_mode()
def test_memory_of_graphs_on_a_gpu() -> None:
    """Graphs share their memory; it comes back, and a call needs no more of it than its result."""
    model = sf.SWFormerBlock(40).eval().cuda()
    fast = sf.graphed(model, max_graphs=4)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    images = [torch.randn(1, 40, 256 - 8 * k, 256, device="cuda") for k in range(4)]
    fast(images[0])
    one = fast._graphs.bytes
    assert one > images[0].nbytes
    for x in images:
        fast(x)
    assert fast._graphs.bytes < 2 * one
    allocated = torch.cuda.memory_allocated()
    for x in images:
        fast(x)
    assert torch.cuda.memory_allocated() == allocated
    small = sf.graphed(model, max_bytes=1)
    assert torch.equal(small(images[0]), small(images[0]))
    assert "more than 1 bytes" in small.why_not(images[0])
    fast.clear()
    small.clear()
    del images, x
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (32 << 20)


@pytest.mark.gpu
def test_a_failed_capture_on_a_gpu() -> None:
    fast = sf.graphed(Reading())
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="cannot be captured"):
            fast(torch.ones(3, device="cuda"))
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert (torch.ones(2, device="cuda") + 1).sum().item() == 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["block", "tiny"])
def test_make_graphed_callables_on_a_gpu(name: str, exact: None) -> None:
    size = (2, 8, 32, 34) if name == "block" else (2, 3, 32, 34)
    eager = sf.SWFormerBlock(8) if name == "block" else sf.SWFormer.from_preset(name)
    eager = randomise(eager).train().cuda()
    graphs = trained(copy.deepcopy(eager), torch.randn(size, device="cuda"))
    for _ in range(3):
        x, grad = torch.randn(size, device="cuda"), torch.randn(size, device="cuda")
        ours, theirs = step(graphs, x, grad), step(eager, x, grad)
        scale = max(t.norm().item() for t in theirs if t.is_floating_point())
        assert len(ours) == len(theirs)
        for a, e in zip(ours, theirs, strict=True):
            # A bias before a normalisation has a gradient of rounding errors alone.
            assert (a.double() - e.double()).norm().item() <= 1e-4 * e.double().norm().item() + 1e-6 * scale
        for model in (eager, graphs):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)
