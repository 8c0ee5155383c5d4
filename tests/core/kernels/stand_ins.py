"""Attention libraries that a machine without a GPU can run: their contracts, computed densely.

`flash_forward` and `flash_backward` are the form of flash-attention with everything that our
adapters must get right: they refuse tensors that the library would misread, leave garbage where it
leaves memory as it was, and have its conventions for rows that see no key. In float64, so that
adapters are checked in value against the oracle. Nothing here is used outside of tests.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tests.oracle import visible

GARBAGE = math.nan


@dataclass(frozen=True)
class Form:
    """How a library differs from others in the same form.

    Args:
        blind_lse: softmax_lse of a row that sees no key.
        padded_packed_lse: packed softmax_lse is [segments, h, longest], not [h, rows].
        window_is_clamped: an edge that is not below the keys counts as unbounded, and beside a
            left edge an unbounded right one as the number of keys.
    """

    blind_lse: float = math.inf
    padded_packed_lse: bool = False
    window_is_clamped: bool = True


def check_aligned(*tensors: Tensor) -> None:
    """Rows and heads start where 16 bytes can be loaded at once: a GPU faults elsewhere."""
    for x in tensors:
        size = x.element_size()
        steps = [size * s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        assert x.stride(-1) == 1, (x.shape, x.stride())
        assert all(place % 16 == 0 for place in (x.data_ptr(), *steps)), (x.data_ptr(), steps)
        assert all(steps), "cuDNN knows no stride of 0"


def check_tensors(*tensors: Tensor) -> None:
    """q, k, v, out, dout: one head dim that the library has, dense in the last dim."""
    check_aligned(*tensors)
    for x in tensors:
        assert x.shape[-1] == tensors[0].shape[-1], [x.shape for x in tensors]
        assert x.shape[-1] % 8 == 0 and x.shape[-1] <= 256, x.shape


def check_bounds(bounds: Tensor, rows: int) -> list[int]:
    """cu_seqlens as integers."""
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and bounds.dim() == 1, bounds
    values = bounds.tolist()
    assert values[0] == 0 and values == sorted(values) and values[-1] <= rows, (values, rows)
    return values


def segments(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, longest: tuple):
    """Slices of rows and keys that see each other, of tensors with the batch flattened."""
    if cu_q is None or cu_k is None:
        assert q.dim() == 4 and k.dim() == 4, (q.shape, k.shape)
        nq, nk = q.shape[1], k.shape[1]
        bounds_q, bounds_k = ([n * x for n in range(q.shape[0] + 1)] for x in (nq, nk))
    else:
        assert q.dim() == 3 and k.dim() == 3, (q.shape, k.shape)
        bounds_q, bounds_k = check_bounds(cu_q, q.shape[0]), check_bounds(cu_k, k.shape[0])
        assert len(bounds_q) == len(bounds_k), (bounds_q, bounds_k)
        found = tuple(max(b - a for a, b in pairwise(x)) for x in (bounds_q, bounds_k))
        assert found[0] <= longest[0] and found[1] == longest[1], (found, longest)
        if longest[0] == 1:  # a shortcut for decoding: q.reshape([segments, ...])
            assert len(bounds_q) - 1 == len(q), (bounds_q, q.shape)
    pairs = zip(pairwise(bounds_q), pairwise(bounds_k), strict=True)
    return [(slice(*rows), slice(*keys)) for rows, keys in pairs]


def mask_of(nq: int, nk: int, causal: bool, window: tuple, longest_k: int, form: Form) -> Tensor:
    """Bottom-right aligned, with the library's own reading of the window."""
    left, right = (-1 if edge is None or edge < 0 else edge for edge in window)
    if form.window_is_clamped:
        left, right = (-1 if edge >= longest_k else edge for edge in (left, right))
        if left >= 0 and right < 0 and not causal:
            right = longest_k
    if causal:
        right = 0
    return visible(nq, nk, window_size=(left, right))


def scores_of(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """[h, nq, nk] of q [nq, h, d] and k [nk, hk, d], and their slope under the softcap."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if not softcap:
        return scores, torch.ones_like(scores)
    capped = torch.tanh(scores / softcap)
    return capped * softcap, 1 - capped**2


def flash_forward(q, k, v, *, cu_q, cu_k, longest, scale, causal, window, softcap=0.0, form=Form()):
    """(out, softmax_lse) as the library lays them out."""
    check_tensors(q, k, v)
    rows_q, rows_k, rows_v = (x.double().reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    out = torch.full_like(rows_q, GARBAGE)
    lse = torch.full((q.shape[-2], len(rows_q)), GARBAGE, dtype=torch.float64)
    for rows, keys in segments(q, k, cu_q, cu_k, longest):
        nq, nk = rows.stop - rows.start, keys.stop - keys.start
        # With one query torch and flash-attn forget about causal: the last row sees everything.
        sees = mask_of(
            nq, nk, causal and nq > 1, window, longest[1] if cu_q is not None else nk, form
        )
        scores, _ = scores_of(rows_q[rows], rows_k[keys], scale, softcap)
        scores = scores.masked_fill(~sees, -math.inf)
        normaliser = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - normaliser.masked_fill(normaliser == -math.inf, 0)[..., None])
        values = rows_v[keys].repeat_interleave(q.shape[-2] // k.shape[-2], dim=1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values)
        lse[:, rows] = normaliser.masked_fill(normaliser == -math.inf, form.blind_lse)
    out = out.reshape(q.shape).to(q.dtype)
    lse = lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    if cu_q is None:
        return out, lse.reshape(q.shape[2], q.shape[0], q.shape[1]).transpose(0, 1).contiguous()
    return out, pad_lse(lse, cu_q, longest[0]) if form.padded_packed_lse else lse


def flash_backward(
    dout, q, k, v, out, lse, *, cu_q, cu_k, longest, scale, causal, window, softcap=0.0, form=Form()
):
    """(dq, dk, dv), each as its input."""
    check_tensors(dout, q, k, v, out)
    assert lse.is_contiguous() and lse.dtype in (torch.float32, torch.float64), lse.stride()
    assert not bool((lse == -math.inf).any()), "exp(-inf - -inf)"
    if cu_q is None:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]), lse.shape
        lse = lse.transpose(0, 1).flatten(1)
    elif form.padded_packed_lse:
        assert lse.shape == (len(cu_q) - 1, q.shape[1], longest[0]), lse.shape
        lse = unpad_lse(lse, cu_q)
    assert lse.shape == (q.shape[-2], q.numel() // q.shape[-1] // q.shape[-2]), lse.shape
    flat = [x.double().reshape(-1, *x.shape[-2:]) for x in (dout, q, k, v, out)]
    dq, dk, dv = (torch.full_like(x, GARBAGE) for x in flat[1:4])
    group = q.shape[-2] // k.shape[-2]
    for rows, keys in segments(q, k, cu_q, cu_k, longest):
        nq, nk = rows.stop - rows.start, keys.stop - keys.start
        sees = mask_of(
            nq, nk, causal and nq > 1, window, longest[1] if cu_q is not None else nk, form
        )
        do, qs, o = (flat[n][rows] for n in (0, 1, 4))
        ks, vs = (flat[n][keys] for n in (2, 3))
        scores, slope = scores_of(qs, ks, scale, softcap)
        weights = torch.exp(scores - lse[:, rows, None].double()) * sees
        ks, vs = (x.repeat_interleave(group, dim=1) for x in (ks, vs))
        dweights = torch.einsum("qhd,khd->hqk", do, vs)
        dscores = weights * (dweights - (do * o).sum(-1).T[..., None]) * slope * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", dscores, ks)
        dk[keys] = torch.einsum("hqk,qhd->khd", dscores, qs).unflatten(1, (-1, group)).sum(2)
        dv[keys] = torch.einsum("hqk,qhd->khd", weights, do).unflatten(1, (-1, group)).sum(2)
    return tuple(
        g.reshape(x.shape).to(x.dtype) for g, x in zip((dq, dk, dv), (q, k, v), strict=True)
    )


def pad_lse(lse: Tensor, cu_q: Tensor, longest: int) -> Tensor:
    """[h, rows] as [segments, h, longest]; garbage behind the rows of each."""
    padded = torch.full((len(cu_q) - 1, len(lse), longest), GARBAGE, dtype=lse.dtype)
    for n, (start, stop) in enumerate(pairwise(cu_q.tolist())):
        padded[n, :, : stop - start] = lse[:, start:stop]
    return padded


def unpad_lse(lse: Tensor, cu_q: Tensor) -> Tensor:
    """Undo `pad_lse`."""
    bounds = pairwise(cu_q.tolist())
    return torch.cat(
        [x[:, : stop - start] for x, (start, stop) in zip(lse, bounds, strict=True)], 1
    )


class Aten:
    """torch.ops.aten with its CUDA attention computed here.

    Every call is given to the real operator on the meta device first, so what is no valid call of
    this torch fails, and the shapes and dtypes that come out are those of torch.
    """

    def __init__(self, cudnn_lse_column: bool = True) -> None:
        self.calls: list[str] = []
        self.cudnn_lse_column = cudnn_lse_column

    def _flash_attention_forward(self, *args, **options):
        meta = self._meta("_flash_attention_forward", args, options)
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, causal, debug = args
        assert dropout_p == 0.0 and debug is False
        out, lse = flash_forward(q, k, v, **_of_aten(cu_q, cu_k, max_q, max_k, causal, options))
        return _like(meta[:2], out, lse), lse, *[None] * 3

    def _flash_attention_backward(self, *args, **options):
        meta = self._meta("_flash_attention_backward", args, options)
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, *_ = args
        assert dropout_p == 0.0
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        options = _of_aten(cu_q, cu_k, max_q, max_k, causal, options)
        gradients = flash_backward(dout, q, k, v, out, lse, **options)
        _like(meta, *gradients)
        return gradients

    def _scaled_dot_product_cudnn_attention(self, *args, **options):
        meta = self._meta("_scaled_dot_product_cudnn_attention", args, options)
        *tensors, bias, with_lse, dropout_p, causal, debug = args
        q, k, v = (x.transpose(1, 2) for x in tensors)
        assert bias is None and with_lse is True and dropout_p == 0.0 and debug is False
        assert not causal or q.shape[1] == k.shape[1], "aligned at the top left corner"
        out, lse = flash_forward(q, k, v, **_of_cudnn(causal, options))
        out, column = out.transpose(1, 2), lse.unsqueeze(-1)
        _like(meta[:2], out, column)
        return out, column if self.cudnn_lse_column else lse, *[None] * 7

    def _scaled_dot_product_cudnn_attention_backward(self, *args, **options):
        meta = self._meta("_scaled_dot_product_cudnn_attention_backward", args, options)
        dout, q, k, v, out = (x.transpose(1, 2) for x in args[:5])
        # What torch's cache of plans does not tell apart must not differ.
        assert dout.is_contiguous() and q.is_contiguous() and out.is_contiguous()
        assert args[5].is_contiguous()
        lse, _, _, bias, cu_q, cu_k, max_q, max_k, dropout_p, causal = args[5:]
        assert bias is cu_q is cu_k is None and dropout_p == 0.0
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        assert lse.shape == (*out.transpose(1, 2).shape[:3], 1)[: 4 if self.cudnn_lse_column else 3]
        lse = lse.reshape(out.transpose(1, 2).shape[:3])
        gradients = flash_backward(dout, q, k, v, out, lse, **_of_cudnn(causal, options))
        gradients = tuple(x.transpose(1, 2) for x in gradients)
        _like(meta, *gradients)
        return gradients

    def _efficient_attention_forward(self, *args, **options):
        meta = self._meta("_efficient_attention_forward", args, options)
        q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout_p, mask, with_lse = args
        assert bias is cu_q is cu_k is None and dropout_p == 0.0 and with_lse is True
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        out, lse = efficient_forward(q, k, v, mask, options["scale"])
        _like(meta[:2], out, lse)
        return out, lse, *[None] * 4

    def _efficient_attention_backward(self, *args, **options):
        # torch 2.13 has no right meta function of this one: the schema must do.
        self._bind("_efficient_attention_backward", args, options)
        dout, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout_p = args[:12]
        mask, bias_gradient = args[14:]
        assert bias is cu_q is cu_k is None and dropout_p == 0.0 and bias_gradient is False
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        self.splits = options["num_splits_key"]
        return *efficient_backward(dout, q, k, v, out, lse, mask, options["scale"]), None

    def _meta(self, name: str, args: tuple, options: dict) -> tuple:
        self._bind(name, args, options)
        args, options = (
            torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("meta"), some)
            for some in (args, options)
        )
        return getattr(torch.ops.aten, name)(*args, **options)

    def _bind(self, name: str, args: tuple, options: dict) -> None:
        """As the dispatcher does: positional where there is a position, keywords that exist."""
        self.calls.append(name)
        arguments = getattr(torch.ops.aten, name).default._schema.arguments
        positional = [x for x in arguments if not x.kwarg_only]
        assert len(args) <= len(positional), name
        assert set(options) <= {x.name for x in arguments[len(args) :]}, (name, options)
        for argument in positional[len(args) :]:
            assert argument.has_default_value() or argument.name in options, (name, argument.name)


def _of_aten(cu_q, cu_k, max_q, max_k, causal, options: dict) -> dict:
    # None, not -1, is what kernels that torch may mount in place of its own read as unbounded.
    window = options["window_size_left"], options["window_size_right"]
    assert all(edge is None or edge >= 0 for edge in window), window
    assert not causal or window == (None, None), window
    return {
        "cu_q": cu_q,
        "cu_k": cu_k,
        "longest": (max_q, max_k),
        "scale": options["scale"],
        "causal": causal,
        "window": window,
    }


def _of_cudnn(causal: bool, options: dict) -> dict:
    none = {"cu_q": None, "cu_k": None, "longest": (0, 0), "window": (-1, -1)}
    return {**none, "scale": options["scale"], "causal": causal}


def _like(meta: tuple, *results: Tensor) -> Tensor:
    """The results have the shapes and dtypes that torch has; float64 stands for half precision."""
    for expected, actual in zip(meta, results, strict=True):
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        assert actual.dtype in (expected.dtype, torch.float64), (actual.dtype, expected.dtype)
    return results[0]


def _efficient_mask(nq: int, nk: int, mask: int) -> Tensor:
    assert mask in (0, 1), mask
    return torch.ones(nq, nk, dtype=torch.bool) if mask == 0 else torch.ones(nq, nk).tril().bool()


def efficient_forward(q, k, v, mask: int, scale: float):
    """As many heads in k as in q; rows of the lse padded to a multiple of 32, with +inf."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]
    assert all(x.shape[-1] % 8 == 0 for x in (q, k, v))
    check_aligned(q, k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    scores = scores.masked_fill(~_efficient_mask(q.shape[1], k.shape[1], mask), -math.inf)
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.exp(scores - lse[..., None]), v.double())
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def efficient_backward(dout, q, k, v, out, lse, mask: int, scale: float):
    """(dq, dk, dv)."""
    assert q.shape[2] == k.shape[2] == v.shape[2]
    assert lse.is_contiguous() and out.is_contiguous()
    assert dout.shape == out.shape == (*q.shape[:3], v.shape[3])
    check_aligned(dout, q, k, v, out)
    nq = q.shape[1]
    assert lse.shape[-1] == -(-nq // 32) * 32 and bool((lse[..., nq:] == math.inf).all())
    wide = [x.double() for x in (dout, q, k, v, out)]
    scores = torch.einsum("bqhd,bkhd->bhqk", wide[1], wide[2]) * scale
    weights = torch.exp(scores - lse[..., :nq, None].double())
    weights = weights * _efficient_mask(nq, k.shape[1], mask)
    dweights = torch.einsum("bqhd,bkhd->bhqk", wide[0], wide[3])
    delta = (wide[0] * wide[4]).sum(-1).transpose(1, 2)[..., None]
    dscores = weights * (dweights - delta) * scale
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, wide[2])
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, wide[1])
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, wide[0])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
