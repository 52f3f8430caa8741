"""Draws the figures of the site: `python docs/make_figures.py`.

Each is written twice, for light and for dark pages, to docs/figures. Those of a
training run take a minute or two on two CPU cores. What the benchmarks measured
is drawn from the CSV that they wrote, and is not measured again.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

import conadv_optax as conadv
from conadv_optax import hessian
from reference.benchmarks import figures
from reference.benchmarks.steps import ROWS
from reference.configs import (
  digits,
  imagenet,
  imagenet_4k,
  imagenet_8k,
  imagenet_16k,
  imagenet_32k,
  imagenet_64k,
  imagenet_96k,
)
from reference.data import input_pipeline, sources
from reference.run import methods, parts, step
from reference.study import report, results
from reference.tools import hessian_figure, pages, tables
from reference.tools.pages import ADVERSARIAL, CLEAN

DOCS = Path(__file__).parent
FOLDER = DOCS / 'figures'
STEPS = 337
# Of the spectrum: products of a random start, and random starts.
DEGREE, PROBES = 24, 2
# What the study of prices calls a step of the benchmarks.
VARIANTS = {
  'vanilla': 'plain',
  'conadv': 'ConAdv',
  'conadv_fraction_20': 'fraction 0.2',
  'conadv_half_attack': 'half attack',
  'conadv_half': 'half',
  'conadv_half_fraction_35': 'half fraction 0.35',
  'conadv_quarter': 'quarter',
  'conadv_reuse': 'reuse',
  'conadv_reuse_fraction_20': 'reuse + fraction 0.2',
}


def timeline(figure: Figure) -> None:
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
  axes = figure.subplots()
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


def schedules(figure: Figure) -> None:
  """Warm-up and decay of each ImageNet config, by epoch."""
  configs = [
    file.get_config()
    for file in (
      imagenet_4k,
      imagenet_8k,
      imagenet_16k,
      imagenet_32k,
      imagenet_64k,
      imagenet_96k,
    )
  ]
  axes = figure.subplots()
  for config, colour in zip(configs, shades(len(configs)), strict=True):
    _, schedule, steps = parts.make_optimizer(
      config, images=imagenet.TRAIN_IMAGES
    )
    epoch = np.linspace(0, config.epochs, 400)
    rate = jax.vmap(schedule)(jnp.asarray(epoch / config.epochs * steps))
    axes.plot(epoch, rate, color=colour, label=f'{config.batch_size:,}')
  axes.set_xlabel('epoch')
  axes.set_ylabel('learning rate')
  axes.legend(title='batch', frameon=False)


def observe(
  config: ml_collections.ConfigDict,
) -> tuple[list[dict[str, Any]], hessian.Spectrum]:
  """Trains on the digits.

  Returns:
    The statistics and trust ratios of each step, and the spectral density of
    the Hessian after the last.
  """
  source = sources.digits()
  mesh = parts.make_mesh(config.batch_size)
  place = parts.make_placement(mesh)
  batches = input_pipeline.train_batches(
    source, config, skipped={}, images=('image',)
  )
  model = parts.make_model(config, num_classes=source.num_classes)
  tx, _, _ = parts.make_optimizer(config, images=len(source.train))
  grad_fn = methods.make_gradient(model, config, mesh)
  described = parts.describe_state(config, model, tx, grad_fn, mesh)
  state = parts.make_state(
    config, model, tx, grad_fn, mesh, [place(next(batches))], described
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
  spectrum = hessian_figure.analyse(
    config,
    model,
    conadv.dual_bn.main(state.params),
    conadv.dual_bn.main(state.model_state),
    place(next(batches)),
    degree=DEGREE,
    probes=PROBES,
    micro_batches=1,
  )
  batches.close()
  return rows, spectrum


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


def statistics(figure: Figure, rows: list[dict[str, Any]]) -> None:
  """How far the two running means of each norm layer are apart."""
  layers = [
    name.removesuffix('/mean')
    for name in named(rows[0]['main'])
    if name.endswith('mean')
  ]
  axes = figure.subplots()
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


def trust_ratios(figure: Figure, rows: list[dict[str, Any]]) -> None:
  """LARS's ratio for each kernel."""
  kernels = [
    name for name in named(rows[0]['ratios']) if name.endswith('kernel')
  ]
  axes = figure.subplots()
  for name, colour in zip(kernels, shades(len(kernels)), strict=True):
    values = [named(row['ratios'])[name] for row in rows]
    axes.semilogy(
      values, color=colour, label=name.removesuffix('/kernel'), linewidth=1
    )
  axes.set_xlabel('step')
  axes.set_ylabel('trust ratio')
  beside(axes)


def spectral_density(figure: Figure, spectrum: hessian.Spectrum) -> None:
  """How many of the Hessian's eigenvalues lie where."""
  hessian_figure.plot(figure.subplots(), spectrum)


def cycles(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
  """What steps cost on a TPU beside the plain one, by variant of the study."""
  ratios = {row['row']: row['megacycles_ratio'] for row in rows}
  found = {variant: ratios[row] for variant, row in VARIANTS.items()}
  for k in (2, 5, 10):
    # One step in k attacks, and one trains on what it made.
    found[f'conadv_every_{k}'] = (ratios['ConAdv'] + k - 1) / k
  return found


def main() -> None:
  """All of them."""
  pages.save(FOLDER / 'timeline', timeline, size=(8, 3.2))
  pages.save(FOLDER / 'schedules', schedules, size=(6, 3.2))
  rows, spectrum = observe(digits.get_config())
  for draw in (statistics, trust_ratios):
    pages.save(FOLDER / draw.__name__, draw, rows, size=(8, 3.6))
  pages.save(FOLDER / 'spectrum', spectral_density, spectrum, size=(6, 3.2))
  for path in sorted(DOCS.glob('growth_*.csv')):
    figures.draw_growth(FOLDER / path.stem, tables.read_csv(path))
  scaling = (DOCS / 'scaling.md').read_text()
  for path in sorted(DOCS.glob('cost_*.csv')):
    rows = tables.read_csv(path)
    if 'schedule' in rows[0]:
      stem = path.stem.replace('cost', 'schedule')
      if f'figures/{stem}' in scaling:
        figures.draw_schedule(FOLDER / stem, rows)
    else:
      # Several devices share the cores of a CPU, and their times say little.
      alone = [x for x in rows if math.prod(ROWS[str(x['row'])].mesh) == 1]
      figures.draw_cost(FOLDER / path.stem, alone)
  v3 = tables.read_csv(DOCS / 'cost_v3_2x2.csv')
  page = (DOCS / 'results.md').read_text()
  for path in sorted(DOCS.glob('study_*.csv')):
    # Of the others the page has tables alone.
    if f'figures/{path.stem}_' in page:
      # The steps of that grid are those of the benchmark.
      is_price = path.stem == 'study_price'
      prices = {'cycles of TPU v3': cycles(v3)} if is_price else None
      report.draw(results.read(path), FOLDER, prices=prices)


if __name__ == '__main__':
  main()
