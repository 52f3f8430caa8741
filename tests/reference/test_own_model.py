"""Models of the user's own, against the modules called by hand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from digit_steps import arrays, assert_close, make_batch, start, tiny
from flax import nnx
from own_models import ViT, batch_normed, grouped

import conadv_optax as conadv
from reference.command import Mistake
from reference.run import checks, objective, own_model, parts, train

IMAGES = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)


def build(name, **fields):
  fields = {'build': f'own_models:{name}', **fields}
  return own_model.build(ml_collections.ConfigDict(fields), 10)


def variables_of(model):
  init = jax.jit(model.init, static_argnames='train')
  return init(jax.random.key(0), IMAGES, train=False)


@pytest.mark.slow
def test_a_vit_trains_with_dropout_by_conadv():
  config = tiny(
    'conadv',
    **{
      'model.build': 'own_models:vit',
      'methods.conadv.shared_norm': True,
    },
  )
  checks.check_choices(config)
  state, take, place = start(config, tx=optax.sgd(0.1, momentum=0.9))
  # A ViT of the function's own width: the ResNet's fields were left out.
  assert state.params['Dense_0']['kernel'].shape == (8, 10)
  assert not jax.tree.leaves(state.model_state)
  losses = []
  for _ in range(25):
    state, values = take(state, place(make_batch(0)))
    losses.append((values['loss_main'], values['loss_adversarial']))
  first, last = np.mean(losses[1:4], axis=0), np.mean(losses[-3:], axis=0)
  assert (last < 0.8 * first).all()


@pytest.mark.slow
def test_the_key_of_the_step_is_that_of_dropout():
  """In training it draws, in evaluation it does not."""
  for name in ('vit', 'grouped'):
    config = tiny('vanilla', **{'model.build': f'own_models:{name}'})
    model = build(name)
    params = variables_of(model)['params']
    loss_fn = jax.jit(objective.make_loss(model, config))
    losses = [
      float(loss_fn(params, {}, make_batch(0), key=jax.random.key(seed))[0])
      for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
    # It takes no key.
    evaluate = jax.jit(objective.make_evaluation_loss(model, config))
    value = float(evaluate(params, {}, make_batch(0)))
    # The mean over dropout is near what there is without.
    assert min(losses) < value + 0.5


def test_a_linen_model_is_called_as_it_is():
  model = build('vit', width=16)
  variables = variables_of(model)
  by_hand = ViT(10, 16)
  expected = variables_of(by_hand)
  jax.tree.map(np.testing.assert_array_equal, variables, expected)
  logits, wanted = (
    jax.jit(x.apply, static_argnames='train')(variables, IMAGES, train=False)
    for x in (model, by_hand)
  )
  np.testing.assert_array_equal(logits, wanted)


@pytest.mark.slow
def test_an_nnx_step_is_that_of_nnx(monkeypatch):
  """Without dropout, so that nothing is drawn."""
  monkeypatch.setattr(nnx, 'Dropout', lambda *_, **__: lambda x: x)
  config = tiny('vanilla', **{'model.build': 'own_models:grouped'})
  state, take, place = start(config)
  before, batch = arrays(state).params, make_batch(0)
  assert sorted(before['convs']) == ['0', '1']

  model = grouped(num_classes=10, rngs=nnx.Rngs(0))
  for number, conv in enumerate(model.convs):
    conv.kernel[...] = before['convs'][str(number)]['kernel']
    conv.bias[...] = before['convs'][str(number)]['bias']
  for name in ('norm', 'head'):
    for leaf, value in before[name].items():
      getattr(getattr(model, name), leaf)[...] = value

  @nnx.jit
  @nnx.grad
  def gradient(model):
    image = ((batch['image'] / 255 - 0.305) / 0.376).astype(np.float32)
    labels = 0.9 * jax.nn.one_hot(batch['label'], 10) + 0.01
    return optax.softmax_cross_entropy(model(image), labels).mean()

  expected = gradient(model)
  state, _ = take(state, place(batch))
  after = arrays(state).params
  moved = jax.tree.map(lambda a, b: (a - b) / 0.25, before, after)
  for number in (0, 1):
    of_conv = expected['convs'][number]
    assert_close(moved['convs'][str(number)]['kernel'], of_conv['kernel'][...])
  assert_close(moved['head']['kernel'], expected['head']['kernel'][...])
  assert_close(moved['norm']['scale'], expected['norm']['scale'][...])


@pytest.mark.slow
def test_batch_statistics_of_an_nnx_model_are_kept_and_split():
  model = build('batch_normed')
  variables = variables_of(model)
  images = jnp.asarray(IMAGES)
  key = jax.random.key(1)
  logits, updated = model.apply(
    variables, images, train=True, mutable=['batch_stats'], rngs={'params': key}
  )
  assert logits.shape == (5, 10)
  by_hand = batch_normed(num_classes=10, rngs=nnx.Rngs(jax.random.key(0)))
  by_hand.eval()
  np.testing.assert_allclose(
    model.apply(variables, images, train=False), by_hand(images), rtol=1e-5
  )
  x = images
  for conv in by_hand.convs:
    x = nnx.relu(conv(x))
  np.testing.assert_allclose(
    updated['batch_stats']['norm']['mean'],
    0.1 * np.mean(x, axis=(0, 1, 2)),
    rtol=1e-5,
  )
  with_new = {**variables, **updated}
  assert not np.array_equal(
    model.apply(variables, images, train=False),
    model.apply(with_new, images, train=False),
  )
  params, stats = conadv.dual_bn.split(
    variables['params'], variables['batch_stats']
  )
  own = params.branches['adversarial']
  assert own['head']['kernel'] is None
  assert own['norm']['scale'].shape == (4,)
  assert sorted(stats.branches['adversarial']['norm']) == ['mean', 'var']


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('own_models', r'`package.module:function`. Given .*build=my_code:make`'),
    ('own_model:vit', r"no module 'own_model'.*PYTHONPATH="),
    ('own_models.deeper:vit', r"no module 'own_models.deeper'"),
    ('own_models:vti', r'no such name. Likely `.*build=own_models:vit`'),
    ('own_models:not_a_function', r'no function of that name'),
    ('own_models:positional', r'positional\(classes\).*num_classes, width'),
    ('own_models:without_train', r'Dense takes no `train`'),
    ('own_models:without_rngs', r'returns a Grouped.*rngs=rngs'),
    ('own_models:no_nnx', r'returns a ViT'),
    ('own_models:counting', r"Counting with \['counts'\]"),
    ('own_models:headless', r'shape \(5, 10\).*Given \(5, 3\)'),
  ],
)
def test_what_is_no_model_is_explained(name, message):
  with pytest.raises(Mistake, match=message):
    variables_of(
      own_model.build(ml_collections.ConfigDict({'build': name}), 10)
    )


def test_a_field_that_the_function_does_not_take_is_explained():
  with pytest.raises(Mistake, match=r"'widht'"):
    build('vit', widht=16)


def test_an_error_in_the_users_own_module_is_left_to_them(
  tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'needs_more.py').write_text('import not_installed_at_all')
  with pytest.raises(ModuleNotFoundError, match='not_installed_at_all'):
    own_model.build(ml_collections.ConfigDict({'build': 'needs_more:make'}), 10)


def test_branches_without_batch_norm_are_refused_or_shared():
  config = tiny('conadv', **{'model.build': 'own_models:grouped'})
  with pytest.raises(Mistake, match=r'needs BatchNorm.*shared_norm=True'):
    start(config)


def test_the_readme_s_model_is_one(tmp_path, monkeypatch):
  readme = (Path(train.__file__).parents[1] / 'README.md').read_text()
  section = readme.partition('## A model of your own')[2].partition('\n## ')[0]
  model, config = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
  assert len([line for line in model.splitlines() if line]) <= 20
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'my_models.py').write_text(model)
  names: dict = {}
  exec(config, names)
  config = names['get_config']()
  checks.check_choices(config)
  made = parts.make_model(config, num_classes=7)
  variables = jax.eval_shape(
    lambda: made.init(jax.random.key(0), jnp.zeros((2, 32, 32, 3)), train=False)
  )
  assert variables['params']['Conv_0']['kernel'].shape == (16, 16, 3, 128)
  assert variables['params']['Dense_0']['bias'].shape == (7,)
