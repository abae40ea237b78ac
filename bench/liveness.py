"""Weights on a live path: what a zero elsewhere in the network leaves without use.

A weight is live if it is not zero and lies on a path of weights that are not zero, from the image
to an output; the zeros among all the others are the effective sparsity (Vysogorets & Kempe, 2023,
JMLR 24, "Connectivity matters"). The values of weights do not count, so nothing cancels.

Paths are found by running the network itself, once forward and once backward, as a network in which
every step is positive and linear: a weight is 1 where it is not zero, an activation function is the
identity, a maximum is a mean, a difference is a sum. After every operation values, and on the way
back gradients, become 0 or 1, so that nothing overflows or underflows at any depth. A value is then
1 where a path from the image arrives, and a gradient is 1 where a path to an output begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from methods.functional import call_with


def live_weights(model: nn.Module, input_shape: Sequence[int]) -> dict[str, Tensor]:
    """Which elements of each parameter are live: a boolean tensor of its shape.

    Biases are nobody's path: those of convolutions, linear layers and normalisation are taken as
    zero, and they are not live themselves. What a forward pass adds from other parameters, such as
    position embeddings, begins a path as the image does. What an unknown operation touches is live,
    if it is not zero. Modes, buffers and gradients of the model are left as they were.

    Args:
        model: plain, on any device.
        input_shape: (channels, height, width), or whatever one example has.
    """
    with torch.inference_mode(False), torch.enable_grad(), plain_evaluation(model):
        weights = indicators(model)
        device = next((weight.device for weight in weights.values()), None)
        image = torch.ones(1, *input_shape, device=device, requires_grad=True)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # cuDNN may take transforms in which a sum of zeros is not exactly zero.
        with torch.backends.cudnn.flags(enabled=False), PathMode():
            output = call_with(model, {**buffers, **weights}, image)
        ends = [end.sum() for end in tree_leaves(output) if is_path(end)]
        names = [name for name, weight in weights.items() if weight.requires_grad]
        found = dict(
            zip(
                names,
                torch.autograd.grad(sum(ends), [weights[n] for n in names], allow_unused=True),
                strict=True,
            )
            if ends
            else ()
        )
    return {
        name: torch.zeros_like(parameter, dtype=torch.bool)
        if (gradient := found.get(name)) is None
        else (parameter != 0) & (gradient != 0)
        for name, parameter in model.named_parameters()
    }


def indicators(model: nn.Module) -> dict[str, Tensor]:
    """1 where a parameter is not zero, by its name; float32, ready for a gradient."""
    return {
        name: (parameter != 0).float().requires_grad_()
        for name, parameter in model.named_parameters()
    }


def is_path(value: object) -> bool:
    """Whether a value is part of the linear network, and not a constant, a size or an index."""
    return isinstance(value, Tensor) and value.requires_grad


@contextmanager
def plain_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without the fused kernel of attention layers; all modes come back."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(modes[model])  # modules may act on the call, for instance drop a cache
        for module, training in modes.items():
            module.training = training


class PathMode(TorchFunctionMode):
    """Makes every operation on a path positive and linear, and its result 0 or 1.

    Args:
        real: parameters by their indicators. Where they are given, constants are values too: a
            bias that is not zero is one, and so is what a normalisation makes of a channel of
            zeros. A value of 0 is then exactly zero in the network, whatever the image.
    """

    def __init__(self, real: Mapping[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.real = real

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            return None  # a path does not end where the network wants no gradient
        if not any(map(is_path, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if name == "__setitem__":
            return _write(*args)
        if (own := _OWN.get(func)) is not None:
            result = own(self, *args, **kwargs)
        else:
            result = _linear(func, name, *tree_map(_constant, (args, kwargs)))
        result = tree_map(_saturated, result)
        if name.endswith("_") and not name.startswith("__") and result is not args[0]:
            return args[0].copy_(result)
        return result

    def shift(self, bias: Tensor | None) -> Tensor | None:
        """A bias, where constants are values."""
        return None if self.real is None else bias


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return (value != 0).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient != 0).to(gradient.dtype)


def _saturated(value: Any) -> Any:
    return _Saturate.apply(value) if is_path(value) else value


def _constant(value: Any) -> Any:
    """1 for each number that is not zero, in tensors that are no path; indices stay."""
    if isinstance(value, Tensor) and not value.requires_grad and value.is_floating_point():
        return (value != 0).float()
    return value


def _write(target: Tensor, index: Any, value: Any) -> None:
    if not is_path(target):
        target.copy_(_constant(target))
    target[index] = _constant(value)


def _linear(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    """What the positive linear network has in the place of an operation."""
    bare = name.strip("_")
    if name == "__get__":  # shapes and the like; `.T`; `.data`, which a path goes through
        result = func(*args, **kwargs)
        return args[0] if _floating(result) and not is_path(result) else result
    if bare in _LINEAR:
        return func(*args, **kwargs)
    if bare in _IDENTITIES:
        return args[0]
    if bare in _GATES:
        return args[0] + 1
    if bare in _CASTS:
        result = func(*args, **kwargs)
        return args[0] if _floating(result) else result
    rule = _RULES.get(bare)
    if rule is not None:
        result = rule(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return _unknown(func, args, kwargs)


def _unknown(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Everything that goes in may reach everything that comes out, which may be anything."""
    with torch.no_grad():
        copies = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        result = func(*copies[0], **copies[1])
    reach = sum(_saturated(x.sum()) for x in tree_leaves((args, kwargs)) if is_path(x))
    return tree_map(
        lambda x: torch.ones_like(x, dtype=torch.float32) + reach if _is_number(x) else x, result
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _positive(value: Any) -> Any:
    """A second operand: of numbers the absolute value, of masks and integers 1 for non-zeros."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else (value != 0).float()
    return abs(value)


def _add(left: Any, right: Any, **_: Any) -> Any:
    return _positive(left) + _positive(right)


def _multiply(left: Any, right: Any) -> Any:
    return _positive(left) * _positive(right)


def _divide(left: Any, right: Any, **_: Any) -> Any:
    # What is divided by is not zero, whether a path reaches it or not.
    return _positive(left) * (right + 1 if isinstance(right, Tensor) else 1)


def _divide_into(right: Any, left: Any) -> Any:
    return _divide(left, right)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(exponent, Tensor):
        return NotImplemented
    return base if exponent > 0 else base + 1


def _clamp(x: Tensor, *bounds: Any, **named: Any) -> Any:
    found = [bound for bound in (*bounds, *named.values()) if bound is not None]
    if any(isinstance(bound, Tensor) for bound in found):
        return NotImplemented
    low = named.get("min", bounds[0] if bounds else None)
    high = named.get("max", bounds[1] if len(bounds) > 1 else None)
    zero_stays = (low is None or low <= 0) and (high is None or high >= 0)
    return x if zero_stays else x + 1


def _where(condition: Tensor, *choices: Any) -> Any:
    return _add(*choices) if len(choices) == 2 else NotImplemented


def _masked_fill(x: Tensor, mask: Tensor, value: Any) -> Any:
    return x + _positive(value != 0 if isinstance(value, Tensor) else bool(value))


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    if dim is None or isinstance(dim, Tensor):
        return NotImplemented
    return x.mean(dim, keepdim)


def _softmax(x: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Any:
    # Each weight of a softmax depends on all scores, and is above zero without any.
    return NotImplemented if dim is None else x + x.mean(dim, keepdim=True) + 1


def _max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    dilations = dilation if isinstance(dilation, Sequence) else [dilation]
    spatial = len(dilations) if isinstance(dilation, Sequence) else x.dim() - 2
    pool = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
    if return_indices or set(dilations) != {1} or spatial not in pool:
        return NotImplemented
    return pool[spatial](x, kernel_size, stride or kernel_size, padding, ceil_mode)


def _adaptive_max_pool(x: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    pool = {3: functional.adaptive_avg_pool1d, 4: functional.adaptive_avg_pool2d}
    if return_indices or x.dim() not in pool:
        return NotImplemented
    return pool[x.dim()](x, output_size)


def _interpolate(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if "bicubic" in (*args, *kwargs.values()):  # has negative weights
        return NotImplemented
    return functional.interpolate(x, *args, **kwargs)


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, *_: Any, **__: Any) -> Any:
    return x * (x.mean(dim, keepdim=True) + 1)


def _with_bias(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution or linear layer."""

    def call(
        mode: PathMode, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **kw: Any
    ) -> Tensor:
        x, weight = _constant(x), _constant(weight)
        return func(x, weight, mode.shift(_constant(bias)), *rest, **kw)

    return call


def _batch_norm(
    mode: PathMode,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """A scale for each channel: the shift of a channel of zeros does not make it live."""
    view = [1, -1] + [1] * (x.dim() - 2)
    y = x if weight is None else x * _constant(weight).view(view)
    if mode.real is None:
        return y
    if running_mean is None or running_var is None:  # takes its statistics from the image
        return y if bias is None else y + _constant(bias).view(view)
    gain, shift = (mode.real.get(p, p) for p in (weight, bias))  # type: ignore[arg-type]
    constant = -running_mean.double() / (running_var.double() + eps).sqrt()
    constant = constant if gain is None else constant * gain
    constant = constant if shift is None else constant + shift
    return y + (constant != 0).to(y.dtype).view(view)


def _affine(
    mode: PathMode, x: Tensor, weight: Tensor | None, bias: Tensor | None, view: Sequence[int]
) -> Tensor:
    x = x if weight is None else x * _constant(weight).view(view)
    bias = mode.shift(bias)
    return x if bias is None else x + _constant(bias).view(view)


def _layer_norm(
    mode: PathMode,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    # Even where the value is zero, the mean of the others is taken away from it.
    dims = tuple(range(-len(shape), 0))
    return _affine(mode, x + x.mean(dims, keepdim=True), weight, bias, tuple(shape))


def _rms_norm(
    mode: PathMode,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    return _affine(mode, x * (x.mean(dims, keepdim=True) + 1), weight, None, tuple(shape))


def _group_norm(
    mode: PathMode,
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    means = x.reshape(x.shape[0], groups, -1).mean(2)
    means = means.repeat_interleave(x.shape[1] // groups, 1).view(
        *x.shape[:2], *[1] * (x.dim() - 2)
    )
    return _affine(mode, x + means, weight, bias, [1, -1] + [1] * (x.dim() - 2))


def _attention(
    mode: PathMode,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Every query sees every key: masks may close pairs, here none is."""
    query, key, value = map(_constant, (query, key, value))
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    scores = _saturated(query @ key.transpose(-2, -1))
    if is_path(attn_mask):
        scores = scores + attn_mask
    return _saturated(_softmax(scores, -1)) @ value  # type: ignore[no-any-return]


_CONVOLUTIONS = [
    getattr(functional, f"conv{kind}{dims}d") for kind in ("", "_transpose") for dims in (1, 2, 3)
]

_OWN: dict[Any, Callable[..., Any]] = {
    **{func: _with_bias(func) for func in (*_CONVOLUTIONS, functional.linear)},
    functional.batch_norm: _batch_norm,
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.rms_norm: _rms_norm,
    functional.scaled_dot_product_attention: _attention,
}
"""Operations that treat a parameter in a way of its own."""

_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "radd", "iadd", "sub", "rsub", "isub", "subtract"), _add),
    **dict.fromkeys(("maximum", "minimum"), _add),
    **dict.fromkeys(("mul", "rmul", "imul", "multiply"), _multiply),
    **dict.fromkeys(("div", "truediv", "idiv", "itruediv", "divide", "true_divide"), _divide),
    **dict.fromkeys(("rdiv", "rtruediv"), _divide_into),
    "pow": _power,
    "clamp": _clamp,
    "clip": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "amax": _mean,
    "amin": _mean,
    "logsumexp": _mean,
    "softmax": _softmax,
    "log_softmax": _softmax,
    **dict.fromkeys([f"max_pool{dims}d" for dims in (1, 2, 3)], _max_pool),
    **dict.fromkeys([f"adaptive_max_pool{dims}d" for dims in (1, 2)], _adaptive_max_pool),
    "interpolate": _interpolate,
    "normalize": _normalize,
}
"""By the name of the function or method; NotImplemented sends it to the unknown ones."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_IDENTITIES = _names(
    "relu relu6 hardtanh leaky_relu rrelu elu selu celu gelu silu mish tanh hardswish softsign "
    "tanhshrink softshrink hardshrink threshold abs absolute neg negative sqrt square sin erf "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
    "detach nan_to_num log1p expm1"
)
"""Zero at zero (a threshold's value apart, which nobody sets), one number for one number."""

_GATES = _names("sigmoid hardsigmoid logsigmoid softplus exp exp2 log log2 cos rsqrt reciprocal")
"""Positive where nothing arrives."""

_CASTS = _names("to type type_as float half bfloat16 double cuda cpu")
"""Sums of half precision could overflow; paths stay in float32, where the image is."""

_LINEAR = _names(
    "view reshape view_as reshape_as permute transpose swapaxes swapdims movedim moveaxis t "
    "adjoint flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to repeat tile "
    "repeat_interleave cat concat concatenate stack hstack vstack split chunk tensor_split unbind "
    "getitem narrow select index_select gather take_along_dim contiguous clone roll flip "
    "rot90 diagonal tril triu mean sum cumsum pad unfold fold as_strided "
    "pixel_shuffle pixel_unshuffle channel_shuffle meshgrid "
    "matmul rmatmul mm bmm mv dot addmm addbmm baddbmm addmv einsum tensordot outer "
    "avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
)
"""Already positive and linear in each operand."""
