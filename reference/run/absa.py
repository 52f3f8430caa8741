"""ABSA's evaluations: once an epoch the curvature decides on the batch.

References:
  Yao et al., `Large batch size training of neural networks with adversarial
  training and second-order information <https://arxiv.org/abs/1810.01021>`_,
  2018
"""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv
from reference.data import input_pipeline, sources
from reference.run import methods, models, objective, step

_ITERATIONS = 10


def make_growth(
  model: models.Model,
  config: ml_collections.ConfigDict,
  source: sources.Source,
  place: Callable[[Any], step.Batch],
  mesh: Mesh,
  *,
  host: int,
  hosts: int,
) -> Callable[[step.TrainState, int], step.TrainState]:
  """A function that updates the controller at the end of each epoch.

  The eigenvalue is that of the Hessian on one fixed batch of training images,
  drawn by the seed and not augmented, with running statistics.

  Args:
    model: of the parameters.
    config: of the run.
    source: where the images are.
    place: puts a batch on the devices.
    mesh: the devices.
    host: number of this host.
    hosts: how many there are.

  Returns:
    A function of a state and the number of steps done, which returns the state
    to go on with.
  """
  controller = methods.make_controller(config)
  loss_fn = objective.make_evaluation_loss(model, config)
  rng = np.random.default_rng(config.seed)
  chosen = rng.permutation(len(source.train))[: config.batch_size]
  [elements] = input_pipeline.held_out_batches(
    source._replace(held_out=[source.train[int(i)] for i in chosen]),
    config,
    batch_size=config.batch_size,
    skipped={},
    host=host,
    hosts=hosts,
  )
  batch = place(elements)

  def evaluate(
    params: Any, batch_stats: Any, batch: step.Batch, state: conadv.AbsaState
  ) -> conadv.AbsaState:
    matvec = conadv.hessian.operator(
      lambda params, batch: loss_fn(params, batch_stats, batch),
      params,
      batch,
      micro_batches=config.accumulate,
      denominator=objective.count_images,
    )
    pairs = conadv.hessian.top_eigenpairs(
      matvec,
      params,
      1,
      key=jax.random.key(config.seed),
      iterations=_ITERATIONS,
    )
    return controller.update(pairs.values[0], state)

  compiled = jax.jit(evaluate, out_shardings=NamedSharding(mesh, P()))

  def grow(state: step.TrainState, done: int) -> step.TrainState:
    epochs, before = (
      number * config.batch_size // len(source.train)
      for number in (done, done - 1)
    )
    if epochs == before:
      return state
    return state._replace(
      absa=compiled(state.params, state.model_state, batch, state.absa)
    )

  return grow
