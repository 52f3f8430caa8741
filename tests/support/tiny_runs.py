"""The main job with a net of one block, and what its runs restore to."""

from digit_steps import first_state

from reference.configs import digits
from reference.data import input_pipeline, sources
from reference.run import methods, train

BATCH = 16


def tiny(method='conadv', *, steps=3, **overrides):
  """The main job's config with a net of one block and a few steps."""
  config = digits.get_config()
  config.update_from_flattened_dict(
    {
      'method': method,
      'batch_size': BATCH,
      'epochs': (steps - 0.5) * BATCH / 1437,
      'lars.warmup_epochs': BATCH / 1437,
      'model.stage_sizes': (1,),
      'model.filters': 4,
      'run.log_every': 1,
      'run.evaluate_every': steps,
      'run.checkpoint_every': 2,
      **overrides,
    }
  )
  return config


def make_targets(config):
  """A state and an iterator to restore to."""
  mesh = train.make_mesh(config.batch_size)
  place = train.make_placement(mesh)
  source = sources.open_source(config.data)
  batches = input_pipeline.train_batches(source, config, skipped={})
  model = train.make_model(config, num_classes=source.num_classes)
  tx, _, _ = train.make_optimizer(config, images=len(source.train))
  grad_fn = methods.make_gradient(model, config, mesh)
  first = [place(next(batches))]
  return first_state(config, model, tx, grad_fn, mesh, first), batches
