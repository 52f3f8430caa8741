"""What takes the second moment of groups asks that it is there."""

from typing import Any

import jax.numpy as jnp

from conadv_optax.core.paths import named


def check_second_moment(second_moment: Any, gradients: Any, call: str) -> None:
  """There is a second moment, of the structure and shapes of the gradients."""
  if second_moment is None:
    raise ValueError(
      "This needs the second moment of the groups' gradients. Given none. Let "
      'the gradient function return it, `conadv.data_parallel(grad_fn, mesh, '
      'second_moment=True)` or `conadv.accumulate(grad_fn, 8, '
      f'second_moment=True)`, and pass it on: `{call}`.'
    )
  given, wanted = (
    {path: jnp.shape(leaf) for path, leaf in named(tree).items()}
    for tree in (second_moment, gradients)
  )
  if given != wanted:
    different = sorted(set(given.items()) ^ set(wanted.items()), key=str)
    raise ValueError(
      '`second_moment` must have the structure and shapes of the gradients. '
      f'They differ in {different[:3]}. It is that of the same step, before '
      'anything else changes the gradients; under `optax.masked` say '
      '`mask_compatible_extra_args=True`.'
    )
