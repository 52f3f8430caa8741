"""Draws the figures of the site: `python docs/make_figures.py`.

Each is written twice, for light and for dark pages, to docs/figures. Those of a
training run take a minute or two on two CPU cores.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np
import optax
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parent.parent))

import conadv_optax as conadv
from reference import input_pipeline, methods, sources, step, train
from reference.configs import digits

FOLDER = Path(__file__).parent / 'figures'
CLEAN, ADVERSARIAL = '#2f7fd1', '#e0762a'
STEPS = 337


def save(
  name: str, draw: Callable[..., None], *args: Any, size: tuple[float, float]
) -> None:
  """Draws on transparent ground, in the colours of light and of dark pages."""
  for theme, style in (('light', 'default'), ('dark', 'dark_background')):
    with (
      plt.style.context(style),
      matplotlib.rc_context(
        {
          'axes.spines.right': False,
          'axes.spines.top': False,
          'font.size': 10,
          'svg.hashsalt': name,
        }
      ),
    ):
      figure, axes = plt.subplots(figsize=size, layout='constrained')
      draw(axes, *args)
      figure.savefig(
        FOLDER / f'{name}-{theme}.svg',
        transparent=True,
        metadata={'Date': None},
      )
      plt.close(figure)


def timeline(axes: Axes) -> None:
  """Who computes what when, for a staleness of 0, 1 and 2."""
  attack, training, steps = 1.0, 3.0, 4
  rows: list[tuple[str, list[tuple[float, float, str, str]]]] = []
  blocks: list[tuple[float, float, str, str]] = []
  for t in range(steps):
    start = t * (attack + training)
    blocks.append((start, attack, f'{t}', ADVERSARIAL))
    blocks.append((start + attack, training, f'train on {t}', CLEAN))
  rows.append(('staleness 0: one device', blocks))
  for tau in (1, 2):
    trained = [
      (attack * tau + t * training, training, f'train on {t}', CLEAN)
      for t in range(steps)
    ]
    attacked = [(t * attack, attack, f'{t}', ADVERSARIAL) for t in range(tau)]
    attacked += [
      (attack * tau + t * training, attack, f'{t + tau}', ADVERSARIAL)
      for t in range(steps)
    ]
    rows.append((f'staleness {tau}: training', trained))
    rows.append((f'staleness {tau}: attack', attacked))
  for y, (_, row) in enumerate(rows):
    for start, length, label, colour in row:
      axes.barh(
        y, length - 0.08, left=start, height=0.7, color=colour, alpha=0.85
      )
      axes.text(
        start + length / 2 - 0.04,
        y,
        label,
        ha='center',
        va='center',
        color='white',
        fontsize=9,
      )
  axes.set_yticks(range(len(rows)), [name for name, _ in rows])
  axes.invert_yaxis()
  axes.set_xlabel('time, in units of one attack pass')
  axes.tick_params(axis='y', length=0)


def schedules(axes: Axes) -> None:
  """The published warm-ups and decays, by epoch."""
  for name, peak, warmup, epochs, power in (
    ('16,384', 25.0, 5, 7116 * 16384 / 1281167, 2.0),
    ('32,768', 31.2, 25, 3558 * 32768 / 1281167, 2.0),
    ('98,304', 43.0, 41, 1301 * 98304 / 1281167, 1.6),
  ):
    epoch = np.linspace(0, epochs, 400)
    rate = conadv.polynomial_warmup(
      peak, 1000, round(1000 * epochs / warmup), power=power
    )
    axes.plot(
      epoch, [float(rate(e * 1000 / warmup)) for e in epoch], label=name
    )
  axes.set_xlabel('epoch')
  axes.set_ylabel('learning rate')
  axes.legend(title='batch', frameon=False)


def observe(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
  """Trains on the digits; the statistics and trust ratios of each step."""
  source = sources.digits()
  mesh = train.make_mesh(config.batch_size)
  place = train.make_placement(mesh)
  batches = input_pipeline.train_batches(
    source, config, skipped={}, images=('image',)
  )
  model = train.make_model(config, num_classes=source.num_classes)
  tx, _, _ = train.make_optimizer(config, images=len(source.train))
  grad_fn = methods.make_gradient(model, config, mesh)
  state = train.make_state(
    config, model, tx, grad_fn, mesh, [place(next(batches))]
  )

  @jax.jit
  def step_fn(state: step.TrainState, batch: step.Batch) -> Any:
    (_, aux), grads, waiting = grad_fn.value_and_grad(
      state.params,
      state.conadv_state,
      batch,
      model_state=state.model_state,
      key=jax.random.fold_in(state.key, state.step),
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    ratios = jax.tree.map(
      lambda w, g: (
        1e-3
        * jnp.linalg.norm(w)
        / (jnp.linalg.norm(g) + config.lars.weight_decay * jnp.linalg.norm(w))
      ),
      conadv.dual_bn.main(state.params),
      conadv.dual_bn.main(grads),
    )
    state = state._replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      model_state=aux.model_state,
      opt_state=opt_state,
      conadv_state=waiting,
    )
    return state, ratios

  rows = []
  for _ in range(STEPS):
    state, ratios = step_fn(state, place(next(batches)))
    rows.append(
      jax.device_get(
        {
          'ratios': ratios,
          **{
            name: conadv.dual_bn.select(state.model_state, name)
            for name in ('main', 'adversarial')
          },
        }
      )
    )
  batches.close()
  return rows


def named(tree: Any) -> dict[str, np.ndarray]:
  """Leaves by their path."""
  return {
    '/'.join(str(key.key) for key in path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def shades(count: int) -> np.ndarray:
  """Colours from the first layer to the last, for light and dark ground."""
  return plt.get_cmap('viridis')(np.linspace(0.3, 0.85, count))


def beside(axes: Axes) -> None:
  """A legend to the right of the curves."""
  axes.legend(
    frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5)
  )


def statistics(axes: Axes, rows: list[dict[str, Any]]) -> None:
  """How far the two running means of each norm layer are apart."""
  layers = [
    name.removesuffix('/mean')
    for name in named(rows[0]['main'])
    if name.endswith('mean')
  ]
  for layer, colour in zip(layers, shades(len(layers)), strict=True):
    distance = []
    for row in rows:
      main, adversarial = named(row['main']), named(row['adversarial'])
      gap = adversarial[f'{layer}/mean'] - main[f'{layer}/mean']
      distance.append(np.mean(np.abs(gap) / np.sqrt(main[f'{layer}/var'])))
    axes.plot(distance, color=colour, label=layer, linewidth=1)
  axes.set_xlabel('step')
  axes.set_ylabel('distance of the means,\nin standard deviations')
  beside(axes)


def trust_ratios(axes: Axes, rows: list[dict[str, Any]]) -> None:
  """LARS's ratio for each kernel."""
  kernels = [
    name for name in named(rows[0]['ratios']) if name.endswith('kernel')
  ]
  for name, colour in zip(kernels, shades(len(kernels)), strict=True):
    values = [named(row['ratios'])[name] for row in rows]
    axes.semilogy(
      values, color=colour, label=name.removesuffix('/kernel'), linewidth=1
    )
  axes.set_xlabel('step')
  axes.set_ylabel('trust ratio')
  beside(axes)


def main() -> None:
  """All of them."""
  FOLDER.mkdir(exist_ok=True)
  save('timeline', timeline, size=(8, 3.2))
  save('schedules', schedules, size=(6, 3.2))
  rows = observe(digits.get_config())
  save('statistics', statistics, rows, size=(8, 3.6))
  save('trust_ratios', trust_ratios, rows, size=(8, 3.6))


if __name__ == '__main__':
  main()
