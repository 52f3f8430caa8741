"""Every public name, what kind of thing it is, and arguments to call it with.

The names are found, not listed. Only the examples are: a public function
without one fails `test_contract.py`, so that none can be forgotten.
"""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import conadv_optax as conadv
from conadv_optax.attacks.targets import Targets
from conadv_optax.core.paths import Leaf
from conadv_optax.methods.batch_augment import BatchAugmentation


def plain_loss(params, batch):
  """A regression with one hidden layer."""
  dtype = params['head']['kernel'].dtype
  hidden = batch['x'].astype(dtype) @ params['dense']['kernel']
  hidden = jnp.tanh(hidden * params['norm']['scale'][None])
  output = (hidden @ params['head']['kernel'])[:, 0]
  return jnp.mean((output - batch['y'].astype(dtype)) ** 2)


def full_loss(params, model_state, batch, *, key):
  """The same with batch statistics, noise and an output of its own."""
  dtype = params['head']['kernel'].dtype
  hidden = batch['x'].astype(dtype) @ params['dense']['kernel']
  mean = jnp.mean(hidden, axis=0)
  old = model_state['norm']
  new_state = {
    'norm': {
      'calls': old['calls'] + 1,
      'mean': 0.9 * old['mean'] + 0.1 * mean.astype(jnp.float32),
    }
  }
  hidden = (hidden - mean[None]) * params['norm']['scale'][None]
  hidden += 0.01 * jax.random.normal(key, hidden.shape, dtype)
  output = (jnp.tanh(hidden) @ params['head']['kernel'])[:, 0]
  loss = jnp.mean((output - batch['y'].astype(dtype)) ** 2)
  return loss, (new_state, {'output': output, 'mean': jnp.mean(output)})


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return {
    'dense': {'kernel': jnp.asarray(rng.normal(size=(3, 4)), dtype)},
    'head': {'kernel': jnp.asarray(rng.normal(size=(4, 1)), dtype)},
    'norm': {'scale': jnp.asarray(np.ones(4), dtype)},
  }


def make_model_state():
  return jax.tree.map(
    jnp.asarray, {'norm': {'calls': np.int32(0), 'mean': np.zeros(4, 'f')}}
  )


def make_batch(seed, dtype=jnp.float32, size=8):
  rng = np.random.default_rng(100 + seed)
  x = rng.normal(size=(size, 3))
  noise = 0.1 * rng.normal(size=(size, 3))
  y = 3 * np.tanh(x[:, 0] - x[:, 1])
  return {
    'x': jnp.asarray(x, dtype),
    'x_augmented': jnp.asarray(x + noise, dtype),
    'y': jnp.asarray(y, jnp.float32),
  }


_WRAPS: dict[str, dict[str, Any]] = {
  'staleness-0': {'staleness': 0},
  'staleness-3': {'staleness': 3},
  'reuse_gradient': {'reuse_gradient': True, 'attack': conadv.fgsm(0.1)},
  'fraction': {'adversarial_fraction': 0.5, 'staleness': 1},
  'every': {'every': 2, 'staleness': 1},
  'everything': {
    'loss_fn': full_loss,
    'staleness': 2,
    'attack': conadv.pgd(0.1, steps=2),
    'weights': {'main': 0.5, 'adversarial': 0.3, 'augmented': 0.2},
    'extra_branches': {'augmented': 'x_augmented'},
    'has_state': True,
    'has_aux': True,
    'has_key': True,
  },
}
_WRAPS = {
  form: {'loss_fn': plain_loss, 'inputs': 'x', **arguments}
  for form, arguments in _WRAPS.items()
}
_FAST_ADVPROP = ('loss_fn', 'inputs', 'has_state', 'has_aux', 'has_key')
_LARS = {'learning_rate': 0.5, 'weight_decay': 1e-3, 'trust_coefficient': 0.1}
_TREE = conadv.dual_bn.Branched(
  {'kernel': jnp.ones((2, 2)), 'scale': jnp.ones(2)},
  {'adversarial': {'kernel': None, 'scale': jnp.zeros(2)}},
)

_DIAGONAL = jnp.array([1.0, 5.0, -9.0, 3.0])
_VECTORS = {
  'matvec': lambda v: _DIAGONAL * v,
  'like': _DIAGONAL,
  'key': jax.random.key(0),
}
_NET = {
  'loss_fn': plain_loss,
  'params': make_params(),
  'batch': make_batch(0),
}

EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
  'added_leaf': {
    'noise': {'name': 'noise', 'like': lambda batch: batch['x']},
  },
  'accumulate': {
    form: {'grad_fn': _WRAPS[form], 'micro_batches': 2}
    for form in ('staleness-0', 'reuse_gradient', 'everything')
  },
  'absa': {
    'default': {'max_micro_batches': 8},
    'plain': {'max_micro_batches': 8, 'shrink': None, 'patience': None},
  },
  'agvm': {
    # Without `norm`, whose factor all branches share.
    'two-modules': {
      'optimizer': optax.sgd(0.1),
      'groups': 2,
      'anchor': 'dense',
      'modules': ['dense', 'head'],
      'every': 1,
    }
  },
  'adaptive_multi_steps': {'sgd': {'optimizer': optax.sgd(0.1)}},
  'concurrent': {
    f'{form}-{axis_type.name.lower()}': {
      'grad_fn': _WRAPS[form],
      'mesh': jax.make_mesh(
        (rows, 3),
        ('data', 'role'),
        (axis_type,) * 2,
        devices=jax.devices()[: 3 * rows],
      ),
    }
    for form, rows, axis_type in (
      ('staleness-3', 1, AxisType.Auto),
      ('fraction', 2, AxisType.Explicit),
    )
  },
  'batch_augment': {
    'noise': {
      'augment_fn': lambda key, example: {
        **example,
        'x': example['x'] + jax.random.normal(key, example['x'].shape),
      },
      'copies': 3,
    }
  },
  'data_parallel': {
    f'{form}-{axis_type.name.lower()}': {
      'grad_fn': _WRAPS[form],
      'mesh': jax.make_mesh(
        (2,), ('data',), (axis_type,), devices=jax.devices()[:2]
      ),
    }
    for form, axis_type in {
      'staleness-0': AxisType.Auto,
      'reuse_gradient': AxisType.Explicit,
      'fraction': AxisType.Explicit,
      'everything': AxisType.Auto,
    }.items()
  },
  'diffusion': {
    'everyone': {
      'grad_fn': plain_loss,
      'mesh': jax.make_mesh((4,), ('data',), devices=jax.devices()[:4]),
      'weights': jnp.ones((4, 4)) / 4,
    }
  },
  'dual_bn.main': {'branched': {'tree': _TREE}},
  'dual_bn.replace': {
    'adversarial': {
      'tree': _TREE,
      'branch': 'adversarial',
      'new': {'kernel': jnp.ones((2, 2)), 'scale': jnp.full(2, 3.0)},
    }
  },
  'dual_bn.select': {
    'adversarial': {'tree': _TREE, 'branch': 'adversarial'},
    'main': {'tree': _TREE, 'branch': 'main'},
  },
  'dual_bn.split': {
    'model': {'params': make_params(), 'model_state': make_model_state()}
  },
  'exclude_norm_and_bias': {
    'model': {'params': make_params()},
    'state': {'params': make_params(), 'model_state': make_model_state()},
    'branched': {'params': _TREE},
  },
  'extrapolate': {
    'fraction-past': {
      'grad_fn': _WRAPS['fraction'],
      'extrapolation': 0.1,
    },
    'everything-noise': {
      'grad_fn': _WRAPS['everything'],
      'extrapolation': optax.sgd(0.01, momentum=0.5),
      'direction': 'noise',
    },
  },
  'fast_advprop': {
    form: {
      **{k: v for k, v in _WRAPS[form].items() if k in _FAST_ADVPROP},
      'attack': conadv.pgd(0.1),
      'adversarial_fraction': 0.25,
    }
    for form in ('staleness-0', 'everything')
  },
  'fast_fgsm': {
    'default': {'epsilon': 0.1},
    'bounds': {'epsilon': 0.1, 'bounds': (-1.0, 1.0)},
  },
  'fgsm': {
    'default': {'epsilon': 0.1},
    'l2': {'epsilon': 0.1, 'norm': 'l2', 'bounds': (-1.0, 1.0)},
  },
  'hessian.input_operator': {'net': {**_NET, 'inputs': 'x'}},
  'hessian.operator': {
    'net': _NET,
    'micro-batches': {**_NET, 'micro_batches': 2},
  },
  'hessian.smoothed_density': {
    'default': {
      'spectrum': conadv.hessian.Spectrum(jnp.ones((1, 2)), jnp.ones((1, 2))),
      'grid': jnp.linspace(0.0, 2.0, 5),
    }
  },
  'hessian.spectral_density': {'diagonal': _VECTORS},
  'hessian.top_eigenpairs': {'diagonal': {**_VECTORS, 'n': 2}},
  'hessian.trace': {'diagonal': _VECTORS},
  'lars': {
    'separate-scaled': _LARS,
    'joint-scaled-all': {**_LARS, 'trust_ratio': 'joint', 'mask': True},
    'separate-raw-nesterov': {
      **_LARS,
      'momentum_over': 'raw',
      'nesterov': True,
    },
    'joint-raw-limited': {
      **_LARS,
      'trust_ratio': 'joint',
      'momentum_over': 'raw',
      'eps': 1e-3,
      'max_trust_ratio': 0.1,
    },
  },
  'legw': {
    'default': {
      'base_peak': 1.0,
      'base_warmup_epochs': 1.0,
      'base_batch': 10,
      'batch': 40,
      'num_examples': 100,
      'epochs': 10.0,
    }
  },
  'metropolis_weights': {'everyone': {'neighbours': jnp.ones((4, 4))}},
  'noise_scale': {'default': {'batch_size': 64, 'groups': 8}},
  'normalized': {
    'scalar': {'epsilon': 0.1, 'mean': 0.5, 'std': 0.5},
    'channels': {'epsilon': 0.1, 'mean': jnp.zeros(3), 'std': jnp.ones(3)},
  },
  'perturb': {
    'half': {
      **_NET,
      'attack': conadv.fgsm(0.1),
      'inputs': 'x',
      'adversarial_fraction': 0.5,
    }
  },
  'overfitting_guard': {'default': {}, 'strict': {'max_drop': 0.1}},
  'pgd': {
    'default': {'epsilon': 0.1},
    'l2': {'epsilon': 0.1, 'norm': 'l2', 'steps': 3, 'start_from_clean': 0.2},
    'from-clean': {'epsilon': 0.1, 'steps': 2, 'random_start': False},
  },
  'polynomial_warmup': {
    'warmup': {'peak': 8.0, 'warmup_steps': 5, 'total_steps': 20},
    'no-warmup': {'peak': 8.0, 'warmup_steps': 0, 'total_steps': 20},
  },
  'plain': {'state': {'loss_fn': plain_loss}},
  'random_targets': {
    'default': {'num_classes': 5},
    'renamed': {'num_classes': 2, 'label': 'y'},
  },
  'sam': {
    'staleness-0': {'grad_fn': _WRAPS['staleness-0'], 'radius': 0.05},
    'everything-looksam': {
      'grad_fn': _WRAPS['everything'],
      'radius': 0.05,
      'every': 2,
      'penalty': 0.8,
      'adaptive': 'layer',
      'mask': conadv.exclude_norm_and_bias,
      'gap_weight': 0.2,
    },
  },
  'scale_by_gsnr': {
    'default': {},
    'wide': {'min_ratio': 0.0, 'max_ratio': 3.0},
  },
  'scale_learning_rate': {
    'linear': {'base': 0.1, 'base_batch': 256, 'batch': 1024},
    'sqrt': {'base': 0.1, 'base_batch': 256, 'batch': 64, 'rule': 'sqrt'},
  },
  'sharpness': {
    'net': {**_NET, 'radius': 0.1, 'key': jax.random.key(0), 'steps': 2}
  },
  'sparse_sam': {
    'staleness-3-fisher': {
      'grad_fn': _WRAPS['staleness-3'],
      'radius': 0.05,
      'refresh_every': 2,
      'num_samples': 4,
      'fisher': plain_loss,
    },
    'everything-dynamic': {
      'grad_fn': _WRAPS['everything'],
      'radius': 0.05,
      'refresh_every': 2,
      'rule': 'dynamic',
      'drop_rate': optax.linear_schedule(0.5, 0.0, 10),
    },
  },
  'staleness_report': {
    'linf': {
      'grad_fn': conadv.wrap(plain_loss, attack=conadv.fgsm(0.1), inputs='x'),
      'old_params': make_params(),
      'params': jax.tree.map(lambda x: 0.5 - x, make_params()),
      'batch': make_batch(0),
    }
  },
  'wrap': _WRAPS,
}


def public_names(module: types.ModuleType = conadv, prefix: str = '') -> dict:
  """Every public name by its path, modules entered."""
  names = {}
  for name in module.__all__:
    value = getattr(module, name)
    names[prefix + name] = value
    if inspect.ismodule(value):
      names |= public_names(value, f'{prefix}{name}.')
  return names


def public_functions() -> dict[str, Callable[..., Any]]:
  return {k: v for k, v in public_names().items() if inspect.isroutine(v)}


def kind(function: Callable[..., Any]) -> str:
  """What a public function makes, by its return annotation."""
  returned = typing.get_type_hints(function).get('return')
  # As in optax, a `scale_by_*` leaves the step to what comes after it.
  scales = function.__name__.startswith('scale_by_')
  for made, name in (
    (optax.GradientTransformation, 'scaling' if scales else 'optimizer'),
    (conadv.GradientFunction, 'gradient'),
    (conadv.Attack, 'attack'),
    (conadv.BatchController, 'controller'),
  ):
    if inspect.isclass(returned) and issubclass(returned, made):
      return name
  return {
    conadv.NoiseScale: 'monitor',
    conadv.OverfittingGuard: 'monitor',
    optax.Schedule: 'schedule',
    float: 'schedule',
    Targets: 'targets',
    conadv.hessian.Operator: 'operator',
    BatchAugmentation: 'augmentation',
    Leaf: 'leaf',
    conadv.Diffusion: 'agents',
    np.ndarray: 'numbers',
  }.get(returned, 'helper')


def with_moment(tx: Any) -> Any:
  """An optimizer that is given a second moment of variance `abs(g)`."""

  def update(updates, state, params=None, **extra_args):
    def moment(g):
      g = g.astype(jnp.float32)
      return g**2 + jnp.abs(g)

    extra_args['second_moment'] = jax.tree.map(moment, updates)
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)


class Case(NamedTuple):
  """A public function with example arguments."""

  function: Callable[..., Any]
  arguments: dict[str, Any]

  def make(self, **overrides: Any) -> Any:
    """Calls the function; a wrapper of gradients gets one to wrap.

    Overrides that the function does not take are left out.
    """
    if not isinstance(self.arguments.get('grad_fn'), dict):
      taken = inspect.signature(self.function).parameters
      overrides = {k: v for k, v in overrides.items() if k in taken}
      made = self.function(**{**self.arguments, **overrides})
      if kind(self.function) == 'scaling':
        made = optax.chain(made, optax.sgd(0.1))
      takes_moment = '`second_moment=`' in (self.function.__doc__ or '')
      is_step = isinstance(made, optax.GradientTransformation)
      return with_moment(made) if is_step and takes_moment else made
    inner = conadv.wrap(**{**self.arguments['grad_fn'], **overrides})
    return self.function(**{**self.arguments, 'grad_fn': inner})


def cases(wanted: str, *, forms: tuple[str, ...] = ('',)) -> list[Any]:
  """The cases of all public functions of a kind, as test parameters.

  Args:
    wanted: the kind.
    forms: what the name of a form must start with, where a check is too slow
      for all of them.

  Returns:
    A list for `pytest.mark.parametrize`.
  """
  return [
    pytest.param(Case(function, arguments), id=f'{name}-{form}')
    for name, function in public_functions().items()
    if kind(function) == wanted
    for form, arguments in EXAMPLES.get(name, {}).items()
    if form.startswith(forms)
  ]
