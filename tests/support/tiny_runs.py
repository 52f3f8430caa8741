"""The main job with a net of one block, and what its runs restore to."""

import pytest

from reference.configs import digits
from reference.data import input_pipeline, sources
from reference.run import checkpoint, methods, metrics, parts, train

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


def flags(config):
  """Those with which `reference.main` runs it."""
  default = checkpoint.fields(digits.get_config())
  return [
    f'--config.{name}={tuple(value) if isinstance(value, list) else value}'
    for name, value in checkpoint.fields(config).items()
    if value != default[name]
  ]


def break_at(monkeypatch, config, workdir, step):
  """Runs it until a row of this step is recorded, which ends it at once."""

  def add_and_break(record, row, add=metrics.add):
    add(record, row)
    if row['step'] == step:
      raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(metrics, 'add', add_and_break)
    with pytest.raises(KeyboardInterrupt):
      train.train(config, workdir)


def make_targets(config):
  """The shapes of a state and an iterator, to restore to."""
  mesh = parts.make_mesh(config.batch_size)
  source = sources.open_source(config.data)
  batches = input_pipeline.train_batches(source, config, skipped={})
  model = parts.make_model(config, num_classes=source.num_classes)
  tx, _, _ = parts.make_optimizer(config, images=len(source.train))
  grad_fn = methods.make_gradient(model, config, mesh)
  return parts.describe_state(config, model, tx, grad_fn, mesh), batches
