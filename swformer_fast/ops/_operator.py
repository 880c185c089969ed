"""What an op is, as a value, and what makes it one of torch.library's: the only file that talks to torch.library.

An `Operator` describes; its methods are plain Python. `register` defines the op and, if it is differentiable, its
backward op, and gives both their gradients. Both run through `backend.run`, so one schema serves all backends; the
gradient of a backward op (double backward) is taken through the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backend, self_test
from .._layout import as_output, as_tuple, empty
from ..backend import PACKAGE, Implementations

_LIB = torch.library.Library(PACKAGE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_AUTOGRAD_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
for _key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradFunctionality"):
    _AUTOGRAD_KEYS = _AUTOGRAD_KEYS | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))


def _as_result(tensors: tuple[Any, ...]) -> Any:
    """What an op returns whose schema says so many."""
    return tensors if len(tensors) > 1 else tensors[0]


# inputs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """A map (B, C, H, W); the flag `need_images` asks for the gradients of all."""

    name: str
    optional: bool = False
    need = "need_images"

    @property
    def schema(self) -> str:
        return f"Tensor{'?' * self.optional} {self.name}"


@dataclass(frozen=True)
class Parameter(Image):
    """A tensor of a layer; the flag `need_parameters` asks for the gradients of all."""

    need = "need_parameters"


@dataclass(frozen=True)
class Statistic(Image):
    """A tensor without a gradient."""

    need = ""


@dataclass(frozen=True)
class Number:
    """A number or a flag, `kind` as in a schema."""

    name: str
    kind: str
    need = ""

    @property
    def schema(self) -> str:
        return f"{self.kind} {self.name}"


Input = Image | Number


# operators ------------------------------------------------------------------------------------------------------------


class BackwardArguments(NamedTuple):
    """Of a backward op: `NAME_backward(grad[, grad_sums], *kept, *inputs, *flags)`."""

    grads: tuple[Any, ...]
    kept: tuple[Any, ...]
    inputs: tuple[Any, ...]
    flags: dict[str, bool]


@dataclass(frozen=True)
class Operator:
    """An op: what it takes and gives, its definition and what its backends cannot take."""

    name: str
    inputs: tuple[Input, ...]
    definition: Callable[..., Any]
    """Of the inputs, in plain PyTorch: the result or, in order, the results less the sums."""
    fake: Callable[..., Any]
    """Results like the definition's, empty."""
    limits: Callable[..., str | None]
    """limits(backend, *inputs): why that backend cannot take these inputs, or None."""
    example: Callable[[int, int, int, int, bool], tuple[Any, ...]]
    """example(B, C, H, W, optional): shapes of inputs that go with an image, and values of the numbers, on which tests
    and tools run the op; with every optional input or with none."""
    outputs: tuple[str, ...] = ("y",)
    """Names of the results less the sums. The first is differentiable."""
    kept: tuple[str, ...] = ()
    """Names of outputs after the first that the backward op takes."""
    residual: bool = False
    """Whether one more input, the last and optional, is added to the result; the result's gradient is its own."""
    sums: bool = False
    """Whether the second result, differentiable too, is the first one's sum over the pixels, (B, C), if one more
    input, the last, is true; empty else."""
    differentiable: bool = True
    products: bool = False
    """Whether the Triton kernels hold matrix products, which are tested before their first use."""

    # schemas

    @property
    def backward_name(self) -> str:
        return f"{self.name}_backward"

    @property
    def results(self) -> tuple[str, ...]:
        """Names of all results, in order."""
        first, *others = self.outputs
        return first, *["sums"] * self.sums, *others

    @property
    def schema(self) -> str:
        inputs = [i.schema for i in self.inputs]
        inputs += ["Tensor? residual"] * self.residual + ["bool need_sums"] * self.sums
        names = self.results
        results = f"({', '.join(f'Tensor {name}' for name in names)})" if len(names) > 1 else "Tensor"
        return f"{self.name}({', '.join(inputs)}) -> {results}"

    @property
    def backward_schema(self) -> str:
        arguments = ["Tensor grad", *["Tensor? grad_sums"] * self.sums, *(f"Tensor {k}" for k in self.kept)]
        arguments += [*(i.schema for i in self.inputs), *(f"bool {flag}" for flag in self.flags)]
        results = ["Tensor" for _ in self.places]
        return f"{self.backward_name}({', '.join(arguments)}) -> ({', '.join(results)})"

    # inputs

    @property
    def takes_image(self) -> bool:
        """Whether the first input is a map, whose dtype is the result's; else all are parameters."""
        return type(self.inputs[0]) is Image

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Of the inputs that have a gradient. The backward op gives one for each, in order."""
        return tuple(i for i, spec in enumerate(self.inputs) if spec.need)

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """What a backward op is asked for."""
        return tuple(dict.fromkeys(self.inputs[i].need for i in self.places))

    def backward_arguments(self, args: Sequence[Any]) -> BackwardArguments:
        grads, kept, inputs = 1 + self.sums, len(self.kept), len(self.inputs)
        ends = (grads, grads + kept, grads + kept + inputs)
        flags = dict(zip(self.flags, args[ends[2] :], strict=True))
        return BackwardArguments(
            tuple(args[: ends[0]]), tuple(args[ends[0] : ends[1]]), tuple(args[ends[1] : ends[2]]), flags
        )

    def wanted(self, inputs: Sequence[Any], flags: Mapping[str, bool]) -> list[int]:
        """Places of the inputs whose gradients the flags ask for."""
        return [i for i in self.places if flags[self.inputs[i].need] and inputs[i] is not None]

    # the op in plain PyTorch

    def forward(self, *args: Any) -> Any:
        """The op by its definition."""
        count = len(self.inputs)
        y, *others = as_tuple(self.definition(*args[:count]))
        if self.residual and args[count] is not None:
            y = y + args[count]
        return _as_result((y, *self._sums(y, args), *others))

    def fake_forward(self, *args: Any) -> Any:
        y, *others = as_tuple(self.fake(*args[: len(self.inputs)]))
        return _as_result((y, *self._sums(y, args), *others))

    def _sums(self, y: Tensor, args: Sequence[Any]) -> tuple[Tensor, ...]:
        if not self.sums:
            return ()
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        return (y.sum((2, 3), dtype=dtype) if args[-1] else y.new_empty(0, dtype=dtype),)

    def gradients(
        self, grads: Sequence[Any], inputs: Sequence[Any], wanted: Sequence[int], create_graph: bool
    ) -> dict[int, Tensor]:
        """Through the definition: for each wanted place its gradient, from those of the result and the sums."""
        output, grad = as_tuple(self.definition(*inputs))[0], grads[0]
        for of_sums in grads[1:]:
            grad = grad if of_sums is None else grad + of_sums[..., None, None]
        tensors = [inputs[i] for i in wanted]
        results = torch.autograd.grad(
            output, tensors, grad.to(output.dtype), create_graph=create_graph, allow_unused=True
        )
        return {i: torch.zeros_like(t) if g is None else g for i, t, g in zip(wanted, tensors, results, strict=True)}

    def backward(self, *args: Any) -> Any:
        """The backward op by the definition."""
        grads, _, inputs, flags = self.backward_arguments(args)
        wanted = self.wanted(inputs, flags)
        with recording():
            leaves = [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(inputs)]
            gradients = self.gradients(grads, leaves, wanted, False) if wanted else {}

        def owned(i: int) -> Tensor:
            g = gradients[i]
            memory = g.untyped_storage()
            # Behind a concatenation it is a part of another gradient.
            shared = memory._cdata == grads[0].untyped_storage()._cdata or memory.nbytes() > g.nbytes
            return as_output(inputs[i], g.clone() if shared else g)

        return _as_result(tuple(owned(i) if i in gradients else grads[0].new_empty(0) for i in self.places))

    def fake_backward(self, *args: Any) -> Any:
        grads, _, inputs, flags = self.backward_arguments(args)
        wanted = self.wanted(inputs, flags)
        shapes = (inputs[i].shape if i in wanted else (0,) for i in self.places)
        likes = (inputs[i] if i in wanted else grads[0] for i in self.places)
        return _as_result(tuple(empty(like, *shape) for like, shape in zip(likes, shapes, strict=True)))

    # what the backends run

    def implementations(self) -> Implementations:
        return Implementations(
            self.name,
            self.name,
            self._formatted(self.forward),
            self.fake_forward,
            self.limits,
            self.sample if self.products else None,
        )

    def backward_implementations(self) -> Implementations:
        begin = 1 + self.sums + len(self.kept)
        end = begin + len(self.inputs)
        return replace(
            self.implementations(),
            name=self.backward_name,
            reference=self.backward,
            fake=self.fake_backward,
            limits=lambda backend, *args: self.limits(backend, *args[begin:end]),
            sample=self.backward_sample if self.products else None,
        )

    def _formatted(self, implementation: Callable[..., Any]) -> Callable[..., Any]:
        """Its maps in the memory format that goes with the first image."""

        def call(*args: Any) -> Any:
            return _as_result(tuple(as_output(args[0], result) for result in as_tuple(implementation(*args))))

        return call

    # small random arguments, on which products are tested

    def sample(self, generator: torch.Generator, args: Sequence[Any]) -> tuple[Any, ...]:
        def one(arg: Any, image: bool) -> Any:
            make = self_test.image if image else self_test.parameter
            return make(generator, arg) if isinstance(arg, Tensor) else arg

        count = len(self.inputs)
        inputs = (one(a, spec.need == Image.need) for a, spec in zip(args[:count], self.inputs, strict=True))
        return *inputs, *(one(a, True) for a in args[count:])

    def backward_sample(self, generator: torch.Generator, args: Sequence[Any]) -> tuple[Any, ...]:
        grads, kept, inputs, flags = self.backward_arguments(args)
        small = self.sample(generator, inputs)
        y, *others = as_tuple(self.definition(*small))
        grad = torch.randn(y.shape, generator=generator, dtype=y.dtype, device="cpu")
        of_sums = (None if g is None else grad.mean((2, 3)) for g in grads[1:])
        return grad, *of_sums, *others[: len(kept)], *small, *(True for _ in flags)


# torch.library --------------------------------------------------------------------------------------------------------

CATALOGUE: dict[str, Operator] = {}
"""Every op by name."""


def register(operator: Operator) -> Operator:
    """Make `operator` an op of torch.ops.swformer_fast, with its backward op and gradients."""
    CATALOGUE[operator.name] = operator
    _define(operator.schema, operator.implementations())
    if operator.differentiable:
        _define(operator.backward_schema, operator.backward_implementations())
        _register_gradient(operator.name, _Backward(operator), operator.forward)
        _register_gradient(operator.backward_name, _DoubleBackward(operator), operator.backward)
        _under_autocast(operator.name, _with_image_cast if operator.takes_image else _as_they_are)
        _under_autocast(operator.backward_name, _as_they_are)
    return operator


def _define(schema: str, implementations: Implementations) -> None:
    name = implementations.name
    backend.OPS[name] = implementations
    _LIB.define(schema, tags=_TAGS)
    _LIB.impl(name, lambda *args: backend.run(implementations, args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{PACKAGE}::{name}", implementations.fake, lib=_LIB)


def _under_autocast(name: str, prepare: Callable[..., tuple[Any, ...]]) -> None:
    """Under autocast the op takes prepare(device, *args) and computes as outside it."""
    op = getattr(torch.ops.swformer_fast, name)

    def kernel(device: str, key: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*prepare(device, *args))

        return call

    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        _LIB.impl(name, kernel(device, getattr(torch._C.DispatchKey, key)), key)


def _with_image_cast(device: str, x: Tensor, *args: Any) -> tuple[Any, ...]:
    """The first argument in the autocast dtype; parameters are read in their own."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)), *args


def _as_they_are(device: str, *args: Any) -> tuple[Any, ...]:
    return args


@contextmanager
def recording() -> Iterator[None]:
    """Kernels of ops run below autograd; inside, autograd records."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD_KEYS), torch.enable_grad():
        yield


def _transformed(args: Sequence[Any]) -> bool:
    """Whether torch.func transforms the call, or an argument carries a tangent (forward mode)."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )


def _register_gradient(name: str, rule: _Backward | _DoubleBackward, definition: Callable[..., Any]) -> None:
    """As torch.library.register_autograd; its generality takes longer than the kernels on small images.

    Transforms of torch.func and forward mode go through the definition: PyTorch has rules for what it is made of.
    """
    op = getattr(torch.ops.swformer_fast, name).default
    below, any_requires_grad = torch._C._after_autograd_keyset, torch._C._any_requires_grad

    def redispatch(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            output = redispatch(keyset, args)
            rule.save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            return None, *rule.backward(ctx, *grads)

    def dispatch(keyset: Any, *args: Any) -> Any:
        if _transformed(args):
            return definition(*args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return Gradient.apply(keyset, *args)
        return redispatch(keyset, args)

    _LIB.impl(name, dispatch, "Autograd", with_keyset=True)


class _Saved:
    """The inputs of an op across its backward pass: tensors by autograd, which notices if they change, numbers as they
    are."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.places = operator.places
        self.tensors = [i for i, spec in enumerate(operator.inputs) if isinstance(spec, Image)]

    def save_inputs(self, ctx: Any, before: Sequence[Any], inputs: Sequence[Any]) -> None:
        """`before`: tensors that go first."""
        ctx.save_for_backward(*before, *(inputs[i] for i in self.tensors))
        ctx.constants = [None if i in self.tensors else a for i, a in enumerate(inputs)]

    def restored(self, ctx: Any, saved: Sequence[Any]) -> list[Any]:
        inputs = list(ctx.constants)
        for i, tensor in zip(self.tensors, saved, strict=True):
            inputs[i] = tensor
        return inputs


class _Backward(_Saved):
    """The gradient of an op: its backward op."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator)
        self.kept = tuple(operator.results.index(name) for name in operator.kept)
        needs = [operator.inputs[i].need for i in self.places]
        self.of_flags = [[i for i, need in zip(self.places, needs, strict=True) if need == f] for f in operator.flags]
        self.backward_op = getattr(torch.ops.swformer_fast, operator.backward_name)

    def save(self, ctx: Any, args: tuple[Any, ...], output: Any) -> None:
        op = self.operator
        self.save_inputs(ctx, [output[i] for i in self.kept], args[: len(op.inputs)])
        ctx.set_materialize_grads(False)  # the outputs after the first may have none
        if op.sums and not args[-1]:
            ctx.mark_non_differentiable(output[1])

    def backward(self, ctx: Any, *output_grads: Any) -> tuple[Any, ...]:
        op = self.operator
        grad, *of_sums = output_grads[: 1 + op.sums]
        if all(g is None for g in (grad, *of_sums)):
            return (None,) * (len(op.inputs) + op.residual + op.sums)
        needs = ctx.needs_input_grad[1:]
        flags = [any([needs[i] for i in places]) for places in self.of_flags]
        saved = ctx.saved_tensors  # once: activation checkpointing forbids a second look
        result: list[Any] = [None] * len(op.inputs)
        if any(flags):
            inputs = self.restored(ctx, saved[len(op.kept) :])
            full = grad
            if full is None:
                full = inputs[0].new_zeros(()).expand(*of_sums[0].shape, *inputs[0].shape[2:])
            grads = as_tuple(self.backward_op(full, *of_sums, *saved[: len(op.kept)], *inputs, *flags))
            for i, g in zip(self.places, grads, strict=True):
                result[i] = g if needs[i] else None
        return *result, *[grad if needs[-1] else None] * op.residual, *[None] * op.sums


class _DoubleBackward(_Saved):
    """The gradient of a backward op, through the definition."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator)
        self.moves = [True] * (1 + operator.sums) + [i in self.places for i in self.tensors]
        """Of the saved tensors, which can have a gradient."""

    def save(self, ctx: Any, args: tuple[Any, ...], output: Any) -> None:
        arguments = self.operator.backward_arguments(args)
        self.save_inputs(ctx, arguments.grads, arguments.inputs)
        ctx.flags = arguments.flags

    def backward(self, ctx: Any, *grad_grads: Tensor) -> tuple[Any, ...]:
        op, outputs = self.operator, 1 + self.operator.sums
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views keep the path to the caller's graph, so that third derivatives are right as well.
            alive: list[Any] = [
                t if t is None or not moves else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
                for t, moves in zip(ctx.saved_tensors, self.moves, strict=True)
            ]
            inputs = self.restored(ctx, alive[outputs:])
            wanted = op.wanted(inputs, ctx.flags)
            first = op.gradients(alive[:outputs], inputs, wanted, True)
            cotangents = dict(zip(self.places, grad_grads, strict=True))
            pairs = [(first[i], cotangents[i].to(first[i].dtype)) for i in wanted if first[i].requires_grad]
            second = torch.autograd.grad(
                [f for f, _ in pairs],
                [t for t in alive if t is not None and t.requires_grad],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        gradients = iter(second)
        ordered = [None if t is None or not t.requires_grad else next(gradients) for t in alive]
        result: list[Any] = [None] * len(op.inputs)
        for i, g in zip(self.tensors, ordered[outputs:], strict=True):
            result[i] = g
        return *ordered[:outputs], *[None] * len(op.kept), *result, *[None] * len(op.flags)
