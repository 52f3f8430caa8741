"""The order of `update`: what was measured, the state, and the rest."""

from typing import Any

import jax
import jax.numpy as jnp

from conadv_optax.core.numeric import describe


def check_order(
  call: str, state: Any, kind: type, *, measured: Any = 0.0
) -> None:
  """The state is of its kind, and what was measured a scalar."""
  is_leaf = jax.tree_util.all_leaves([measured])
  is_scalar = is_leaf and not jnp.ndim(measured)
  if not is_scalar or not isinstance(state, kind):
    given, wanted = (
      (state, kind.__name__) if is_scalar else (measured, 'scalar')
    )
    raise TypeError(
      '`update` takes what was measured, then the state, then the rest, as '
      f'`optax` does. Given {describe(given):.80} in place of the {wanted}. '
      f'Write `{call}`.'
    )
