"""ResNet v1.5, from a net for 8-pixel digits to ResNet-50.

References:
  He et al., `Deep Residual Learning for Image Recognition
  <https://arxiv.org/abs/1512.03385>`_, 2015
  Goyal et al., `Accurate, Large Minibatch SGD
  <https://arxiv.org/abs/1706.02677>`_, 2017 (stride on the 3x3, last scale 0)
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

Layer = Callable[..., Any]
_DIMENSIONS = 'NHWC', 'HWIO', 'NHWC'


class Model(Protocol):
  """What a run asks of a model; a Linen module with `num_classes` has it."""

  @property
  def num_classes(self) -> int:
    """Width of the logits."""

  @property
  def init(self) -> Callable[..., Any]:
    """`init(key, images, train=False)`: 'params', perhaps 'batch_stats'."""

  @property
  def apply(self) -> Callable[..., Any]:
    """`apply(variables, images, train=, mutable=, rngs=)`: as Linen's."""


class Stem(nn.Module):
  """`nn.Conv(filters, (7, 7), (2, 2), padding=3, use_bias=False)`.

  But for the gradient to the pixels, which training never asks for, and an
  attack for nothing else. As the transpose of this convolution it has three
  channels, where the matrix unit of a TPU is 128 wide. On blocks of 2x2 pixels
  it is that of a 4x4 convolution of stride 1 with twelve channels, and takes a
  third of the time.

  Attributes:
    filters: channels of the result.
    dtype: of the computation.
    kernel_init: of 'kernel', float32 (7, 7, C, filters).
  """

  filters: int
  dtype: Any
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (B, H / 2, W / 2, filters), rounded up."""
    shape = 7, 7, x.shape[-1], self.filters
    kernel = self.param('kernel', self.kernel_init, shape)
    return convolve(x.astype(self.dtype), kernel.astype(self.dtype))


@jax.custom_jvp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolution of images (B, H, W, C) with (7, 7, C, F), stride 2, padding 3.

  Args:
    x: images, of the dtype of the kernel.
    kernel: of the layer.
  """
  padding = (3, 3), (3, 3)
  return jax.lax.conv_general_dilated(
    x, kernel, (2, 2), padding, dimension_numbers=_DIMENSIONS
  )


# Symbolic zeros: without a gradient to the pixels there is no work for it.
@functools.partial(convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
  x, kernel = primals
  dx, dkernel = tangents
  result = convolve(x, kernel)
  parts = []
  if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
    parts.append(convolve(x, dkernel))
  if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
    parts.append(_convolve_blocks(dx, kernel))
  return result, sum(parts) if parts else jnp.zeros_like(result)


def _convolve_blocks(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same, with the 2x2 pixels of a block as channels of one."""
  batch, height, width, channels = x.shape
  # The window begins three pixels before a block's first: one more row and
  # column of zeros, and it begins with a block.
  rows, columns = -(-height // 2), -(-width // 2)
  odd = (0, 2 * rows - height), (0, 2 * columns - width)
  x = jnp.pad(x, ((0, 0), *odd, (0, 0)))
  x = x.reshape(batch, rows, 2, columns, 2, channels)
  kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
  kernel = kernel.reshape(4, 2, 4, 2, channels, -1)
  return jax.lax.conv_general_dilated(
    x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1),
    kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * channels, -1),
    (1, 1),
    ((2, 1), (2, 1)),
    dimension_numbers=_DIMENSIONS,
  )


class PlainBlock(nn.Module):
  """A 3x3 convolution, no shortcut; (B, H, W, C) to (B, H', W', filters).

  Attributes:
    filters: channels of the result.
    stride: of the convolution; H' = H / stride.
    conv: factory of convolutions, padded as 3x3 ones are.
    norm: factory of norm layers.
  """

  filters: int
  stride: int
  conv: Layer
  norm: Layer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """The block's output for `x`."""
    x = self.conv(self.filters, (3, 3), (self.stride, self.stride))(x)
    return nn.relu(self.norm()(x))


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut; (B, H, W, C) to (B, H', W', filters).

  Attributes:
    filters: channels of the result.
    stride: of the first convolution; H' = H / stride.
    conv: factory of convolutions, padded as 3x3 ones are.
    norm: factory of norm layers.
  """

  filters: int
  stride: int
  conv: Layer
  norm: Layer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """The block's output for `x`."""
    strides = (self.stride, self.stride)
    y = self.conv(self.filters, (3, 3), strides)(x)
    y = nn.relu(self.norm()(y))
    y = self.conv(self.filters, (3, 3))(y)
    y = self.norm(scale_init=nn.initializers.zeros)(y)
    if x.shape != y.shape:
      x = self.conv(
        self.filters, (1, 1), strides, padding='VALID', name='shortcut'
      )(x)
      x = self.norm(name='shortcut_norm')(x)
    return nn.relu(x + y)


class BottleneckBlock(nn.Module):
  """1x1, 3x3, 1x1 and a shortcut; (B, H, W, C) to (B, H', W', 4 * filters).

  Attributes:
    filters: channels of the 3x3 convolution, a quarter of the result's.
    stride: of the 3x3 convolution (v1.5); H' = H / stride.
    conv: factory of convolutions, padded as 3x3 ones are.
    norm: factory of norm layers.
  """

  filters: int
  stride: int
  conv: Layer
  norm: Layer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """The block's output for `x`."""
    strides = (self.stride, self.stride)
    y = self.conv(self.filters, (1, 1), padding='VALID')(x)
    y = nn.relu(self.norm()(y))
    y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), strides)(y)))
    y = self.conv(4 * self.filters, (1, 1), padding='VALID')(y)
    y = self.norm(scale_init=nn.initializers.zeros)(y)
    if x.shape != y.shape:
      x = self.conv(
        4 * self.filters, (1, 1), strides, padding='VALID', name='shortcut'
      )(x)
      x = self.norm(name='shortcut_norm')(x)
    return nn.relu(x + y)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
  'plain': PlainBlock,
  'basic': BasicBlock,
  'bottleneck': BottleneckBlock,
}
# Of 3x3 windows. They differ where the stride is 2 and the side even: the one
# pads at its end alone, the other, PyTorch's, on both.
PADDINGS: dict[str, Any] = {'same': 'SAME', 'symmetric': ((1, 1), (1, 1))}


class ResNet(nn.Module):
  """A ResNet; parameters, statistics and logits are float32.

  ResNet-50 is `stage_sizes=(3, 4, 6, 3), filters=64, block='bottleneck',
  stem='imagenet'`.

  Attributes:
    num_classes: width of the logits.
    stage_sizes: blocks of each stage; every stage after the first halves the
      image and doubles the channels.
    filters: channels of the first stage.
    block: 'basic' or 'bottleneck'; 'plain' for a net without shortcuts.
    stem: 'imagenet' (7x7 of stride 2 and a pool of stride 2), 'small' (3x3) or
      'strided' (3x3 of stride 2).
    dtype: of the computation between input and logits.
    padding: of 3x3 windows, 'same' or 'symmetric', as in PyTorch.
  """

  num_classes: int
  stage_sizes: tuple[int, ...]
  filters: int
  block: str
  stem: str
  dtype: Any
  padding: str = 'same'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Logits (B, num_classes) of images (B, H, W, C), any float dtype."""
    padding = PADDINGS[self.padding]
    kernel_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
    conv = functools.partial(
      nn.Conv,
      padding=padding,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=kernel_init,
    )
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    x = x.astype(self.dtype)
    if self.stem == 'imagenet':
      x = Stem(self.filters, self.dtype, kernel_init, name='stem')(x)
      x = nn.relu(norm(name='stem_norm')(x))
      x = nn.max_pool(x, (3, 3), (2, 2), padding=padding)
    else:
      strides = (2, 2) if self.stem == 'strided' else (1, 1)
      x = conv(self.filters, (3, 3), strides, name='stem')(x)
      x = nn.relu(norm(name='stem_norm')(x))
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        x = BLOCKS[self.block](
          filters=self.filters * 2**stage,
          stride=2 if stage > 0 and index == 0 else 1,
          conv=conv,
          norm=norm,
        )(x)
    x = x.mean((1, 2), dtype=jnp.float32)
    return nn.Dense(
      self.num_classes, kernel_init=nn.initializers.normal(0.01), name='head'
    )(x)
