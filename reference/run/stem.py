"""The first layer of a ResNet for ImageNet: 7x7, with a stride of 2.

Training never asks for the gradient to the pixels, and an attack for nothing
else. As the transpose of this convolution it has three channels, where the
matrix unit of a TPU is 128 wide: half as long as all of the attack's other
gradients. On blocks of 2x2 pixels it is that of a 4x4 convolution of stride 1
with twelve channels, and takes a third of that.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_DIMENSIONS = 'NHWC', 'HWIO', 'NHWC'


class Stem(nn.Module):
  """`nn.Conv(filters, (7, 7), (2, 2), padding=3, use_bias=False)`.

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
