"""The library's U-Net in fewer passes over memory: the same parameters and the same function, layer by layer.

A step of it spends more time on moving activations than on arithmetic: normalisations of a dozen passes, copies between
channels first and last, and products with fp32 parameters that undo autocast's bf16. The layers here keep channels last
and the precision of their input. In bf16 that rounds more often: the error of an output is a third larger than the
library's, and that of its gradient half as much again.
"""

from typing import Any, TypeVar

import torch
from denoising_diffusion_pytorch import classifier_free_guidance as with_classes
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from torch import Tensor, nn
from torch.nn import functional as F

T = TypeVar("T", library.Unet, with_classes.Unet)


def with_fast_layers(unet: T) -> T:
    """Returns the same object, whose layers now have the classes below."""
    for module in unet.modules():
        if (fast := FAST_LAYERS.get(type(module))) is not None:
            # The new class has the same attributes, so the parameters stay where they are. A layer of any other class
            # stays as it is, and slow.
            module.__class__ = fast
        elif isinstance(module, nn.Sequential) and isinstance(module[0], library.Rearrange):
            module.__class__ = Downsample
    return unet


class UnitNorm(torch.autograd.Function):
    """x / |x| over the channels of [b, c, h, w]; backward, autograd would take three times as many passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        # 1e-12 is the bound of F.normalize, which the library uses: x = 0 stays 0.
        inverse = norm.clamp_min_(1e-12).reciprocal_().to(x.dtype)  # autocast makes norms fp32 on CUDA
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The derivative of x / |x|: what lies along y is removed, the rest is divided by |x|.
        y, inverse = ctx.saved_tensors
        along = (grad * y).sum(1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(inverse)


def unit_norm(x: Tensor) -> Tensor:
    return UnitNorm.apply(x)


class RMSNorm(nn.Module):
    """A unit norm, times a gain for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return unit_norm(x) * _gain(self).to(x.dtype)


class Block(library.Block):  # type: ignore[misc]
    """Convolution, normalisation, scale and shift by the time, SiLU."""

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.dropout(self.act(_scaled_and_shifted(self.norm, self.proj(x), scale_shift)))


class LinearAttention(library.LinearAttention):  # type: ignore[misc]
    """Attention without a softmax over pairs of pixels (Shen et al. 2018), all heads in one product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = _queries_keys_values(self.norm, self.to_qkv, x)  # each [b, h * w, heads * d]
        memory_k, memory_v = (m.flatten(0, 1).t().expand(b, -1, -1).to(k.dtype) for m in self.mem_kv)
        k, v = torch.cat((memory_k, k), 1), torch.cat((memory_v, v), 1)
        return self.to_out(_image(_linear_attention(q, k, v, self.heads, self.scale), h, w))


class Attention(library.Attention):  # type: ignore[misc]
    """Attention over all pairs of pixels."""

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        pixels = _queries_keys_values(self.norm, self.to_qkv, x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in pixels)  # [b, heads, h * w, d]
        memory_k, memory_v = (m.expand(b, -1, -1, -1).to(k.dtype) for m in self.mem_kv)
        out = self.attend(q, torch.cat((memory_k, k), 2), torch.cat((memory_v, v), 2))
        return self.to_out(_image(out.transpose(1, 2).flatten(-2), h, w))


class Downsample(nn.Sequential):
    """Space-to-depth and a convolution of 1 x 1, which is a convolution of 2 x 2 with stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        convolution: Any = self[1]
        # The library lines channels up as (c, p1, p2), the order in which a convolution of 2 x 2 keeps its weights.
        return F.conv2d(x, convolution.weight.view(len(convolution.weight), -1, 2, 2), convolution.bias, stride=2)


class Doubled(torch.autograd.Function):
    """Makes four of each pixel of [b, c, h, w]; compiled for a GPU, torch's own gradient adds in a random order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # A mean with divisor 1 is a sum, here over the four copies of a pixel.
        return F.avg_pool2d(grad, 2, divisor_override=1)


class Upsample(nn.Upsample):
    """Twice the height and width, by the nearest pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


class PreNorm(with_classes.PreNorm):  # type: ignore[misc]
    """A normalisation before attention, whose gain the attention below takes into its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, self.norm)


class BlockWithClasses(with_classes.Block):  # type: ignore[misc]
    """As above; the time comes with the class."""

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.act(_scaled_and_shifted(self.norm, self.proj(x), scale_shift))


class LinearAttentionWithClasses(with_classes.LinearAttention):  # type: ignore[misc]
    """As above, without a memory."""

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        q, k, v = _queries_keys_values(norm, self.to_qkv, x)
        return self.to_out(_image(_linear_attention(q, k, v, self.heads, self.scale), *x.shape[2:]))


class AttentionWithClasses(with_classes.Attention):  # type: ignore[misc]
    """As above, without a memory."""

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        pixels = _queries_keys_values(norm, self.to_qkv, x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in pixels)  # [b, heads, h * w, d]
        out = (q * self.scale @ k.transpose(2, 3)).softmax(-1) @ v
        return self.to_out(_image(out.transpose(1, 2).flatten(-2), *x.shape[2:]))


class Embedding(nn.Embedding):
    """A row for each class. The gradient is a sum in a fixed order; compiled for a GPU, torch's own is none."""

    def forward(self, classes: Tensor) -> Tensor:
        is_class = classes[:, None] == torch.arange(self.num_embeddings, device=classes.device)
        return torch.where(is_class[..., None], self.weight, 0).sum(1)  # all but one of the numbers added are 0


FAST_LAYERS = {
    nn.Upsample: Upsample,
    nn.Embedding: Embedding,
    with_classes.RMSNorm: RMSNorm,
    with_classes.PreNorm: PreNorm,
    with_classes.Block: BlockWithClasses,
    with_classes.LinearAttention: LinearAttentionWithClasses,
    with_classes.Attention: AttentionWithClasses,
    library.RMSNorm: RMSNorm,
    library.Block: Block,
    library.LinearAttention: LinearAttention,
    library.Attention: Attention,
}


def _gain(norm: Any) -> Tensor:
    """What an RMSNorm multiplies channels with, [1, c, 1, 1]."""
    gain: Tensor = norm.g * norm.g.shape[1] ** 0.5
    return gain


def _scaled_and_shifted(norm: nn.Module, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None) -> Tensor:
    """Normalises x [b, c, h, w], and lets scale and shift [b, c, 1, 1] follow if there are any."""
    x, gain = unit_norm(x), _gain(norm)
    if scale_shift is None:
        return x * gain.to(x.dtype)
    scale, shift = scale_shift
    return torch.addcmul(shift.to(x.dtype), x, (gain * (scale + 1)).to(x.dtype))


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Computes the attention of q, k and v [b, n, heads * d], all heads in one product of matrices."""
    # Both keep the precision of their input: CUDA's autocast would write fp32, which is twice the bytes.
    q = q.unflatten(-1, (heads, -1)).softmax(-1, dtype=q.dtype).flatten(-2)
    context = k.softmax(1, dtype=k.dtype).transpose(1, 2) @ v  # [b, heads * d, heads * d]
    head = torch.arange(context.shape[-1], device=q.device) // (context.shape[-1] // heads)
    # A head may see only itself, so all but the blocks on the diagonal becomes 0. One large product needs no copies; a
    # product for each head would.
    return q @ torch.where(head[:, None] == head, context * scale, 0)


def _queries_keys_values(norm: nn.Module, convolution: nn.Conv2d, x: Tensor) -> tuple[Tensor, ...]:
    """Computes q, k and v of the pixels of x [b, c, h, w], each [b, h * w, heads * d]."""
    pixels = unit_norm(x).flatten(2).transpose(1, 2)  # [b, h * w, c]: no copy with channels last
    weights = convolution.weight.flatten(1) * _gain(norm).flatten()  # there are fewer weights than pixels
    q, k, v = (F.linear(pixels, weight) for weight in weights.chunk(3))
    return q, k, v


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """Views [b, h * w, c] as [b, c, h, w] with channels last."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))
