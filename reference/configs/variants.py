"""The variants that every study has, by name.

Each is the fields of a study's config that it overrides.
"""

from typing import Any

CONADV = {'method': 'conadv'}


def fast_advprop(
  adversarial_fraction: float, *, epsilon: float
) -> dict[str, Any]:
  """Fast AdvProp with another share of the batch and another radius."""
  numbers = {'adversarial_fraction': adversarial_fraction, 'epsilon': epsilon}
  return {'method': 'fast_advprop', 'methods': {'fast_advprop': numbers}}


def make_section() -> dict[str, dict[str, Any]]:
  """A start for the `study.overrides` of a config."""
  return {
    'vanilla': {},
    'advprop': {'method': 'advprop'},
    'conadv': CONADV,
    'conadv_tau_4': {**CONADV, 'staleness': 4},
    'conadv_tau_16': {**CONADV, 'staleness': 16},
    'conadv_untargeted': {
      **CONADV,
      'methods': {'conadv': {'targets': 'none'}},
    },
    'conadv_fraction': {
      **CONADV,
      'methods': {'conadv': {'adversarial_fraction': 0.2}},
    },
    'conadv_reuse': {'method': 'conadv_reuse'},
  }
