"""Wrong input is told at trace time: the rule, what was given, the fix."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from error_checks import FGSM, assert_says, call, wrap
from helpers import init_model, loss_fn, make_batch

import conadv_optax as conadv


def test_the_calls_of_this_file_are_right_without_their_mistake():
  (loss, _), _, _ = call(wrap())
  chex.assert_tree_all_finite(loss)


@pytest.mark.parametrize('staleness', [0, 1])
def test_integer_images(staleness):
  batch = make_batch(0)
  batch['image'] = jnp.ones((16, 5), jnp.uint8)
  with pytest.raises(TypeError) as error:
    call(wrap(staleness), batch, [batch] * staleness)
  assert_says(error, 'floating', 'uint8[16,5]', '.astype(jnp.float32) / 255')


@pytest.mark.parametrize(
  ('inputs', 'given', 'hint'),
  [
    ('imgae', "'imgae'", "inputs='image'"),
    ('pixels', "'pixels'", "'label'"),
    (('image', 'raw'), "('image', 'raw')", "inputs='image'"),
    (0, '0', "'image'"),
  ],
)
def test_missing_or_misspelt_inputs(inputs, given, hint):
  with pytest.raises(KeyError) as error:
    call(wrap(inputs=inputs))
  assert_says(error, 'must name one leaf', given, hint)


def test_misspelt_extra_branch():
  with pytest.raises(KeyError) as error:
    call(wrap(extra_branches={'view': 'imagee'}))
  assert_says(error, "extra_branches['view']", "'imagee'", "'image'")


@pytest.mark.parametrize('inputs', [(len, 1), (len,), (len, len, len)])
def test_inputs_that_are_half_a_pair(inputs):
  with pytest.raises(TypeError) as error:
    wrap(inputs=inputs)
  assert_says(error, '(get, set) pair', 'inputs=(lambda b')


def test_inputs_that_name_no_array():
  with pytest.raises(KeyError, match='must name one leaf'):
    call(wrap(inputs=()))


@pytest.mark.parametrize(
  ('staleness', 'number'), [(0, 1), (1, 0), (1, 2), (3, 2)]
)
def test_first_batches_of_the_wrong_number(staleness, number):
  batches = [make_batch(t) for t in range(number)]
  with pytest.raises(ValueError) as error:
    call(wrap(staleness), first_batches=batches)
  assert_says(
    error, f'first {staleness} batches', f'Given {number}', 'grad_fn.staleness'
  )


@pytest.mark.parametrize(
  ('staleness', 'right'),
  [
    (0, '[]'),
    (1, '[batch]'),
    (2, '[next(batches) for _ in range(grad_fn.staleness)]'),
  ],
)
def test_first_batches_that_are_one_batch(staleness, right):
  with pytest.raises(TypeError) as error:
    call(wrap(staleness), first_batches=make_batch(0))
  assert_says(
    error, 'must be a list', f'here {staleness}', 'dict', f'(params, {right})`'
  )


@pytest.mark.parametrize(
  ('change', 'given'),
  [
    (lambda b: {k: v[:8] for k, v in b.items()}, 'float32[8,5]'),
    (lambda b: {**b, 'image': b['image'].astype(jnp.float16)}, 'float16'),
    (lambda b: {**b, 'weight': b['label']}, 'weight'),
  ],
)
@pytest.mark.parametrize('where', ['first', 'later'])
@pytest.mark.parametrize('reuse_gradient', [False, True])
def test_batches_that_are_not_alike(change, given, where, reuse_gradient):
  odd = change(make_batch(1))
  grad_fn = wrap(2, reuse_gradient=reuse_gradient)
  with pytest.raises(ValueError) as error:
    if where == 'first':
      call(grad_fn, first_batches=[make_batch(0), odd])
    else:
      call(grad_fn, odd)
  assert_says(error, 'takes its place in the queue', given)


def test_a_leaf_without_the_batch_axis_cannot_be_cut():
  batch = {**make_batch(0), 'temperature': jnp.ones([])}
  call(wrap(), batch, [batch])
  with pytest.raises(ValueError) as error:
    call(wrap(adversarial_fraction=0.5), batch, [batch])
  assert_says(error, 'leading batch axis of 16', 'temperature', 'float32[]')


def test_an_empty_batch():
  batch = make_batch(0, size=0)
  with pytest.raises(ValueError, match='at least one example'):
    call(wrap(), batch, [batch])


@pytest.mark.parametrize('make', [conadv.pgd, conadv.fgsm, conadv.fast_fgsm])
@pytest.mark.parametrize('epsilon', [-0.1, float('nan'), np.array([0.1, -1.0])])
def test_negative_epsilon(make, epsilon):
  with pytest.raises(ValueError) as error:
    make(epsilon)
  assert_says(error, 'must not be negative', 'epsilon=')


@pytest.mark.parametrize('value', [np.array([0.1, 0.2]), [0.1], {'w': 0.1}])
@pytest.mark.parametrize(
  'make',
  [
    lambda x: conadv.sam(conadv.plain(loss_fn), x),
    lambda x: conadv.sam(conadv.plain(loss_fn), 0.1, reuse_weight=x),
    lambda x: conadv.sam(conadv.plain(loss_fn), 0.1, gap_weight=x),
    lambda x: conadv.sparse_sam(
      conadv.plain(loss_fn), x, sparsity=0.5, refresh_every=1
    ),
    lambda x: conadv.extrapolate(conadv.plain(loss_fn), x),
    lambda x: conadv.sharpness(loss_fn, np.ones(2), {}, x, key=None),
  ],
)
def test_one_number_for_all_parameters(make, value):
  with pytest.raises(TypeError) as error:
    make(value)
  assert_says(error, 'one number for all parameters', '=values[i]')


def test_negative_step_size():
  with pytest.raises(ValueError) as error:
    conadv.pgd(0.1, step_size=-1.0)
  assert_says(error, 'must not be negative', 'step_size=-1.0')


@pytest.mark.parametrize(
  'bounds', [(1.0, 0.0), (0.0, jnp.array([1.0, -1.0])), (float('nan'), 1.0)]
)
def test_bounds_with_low_above_high(bounds):
  with pytest.raises(ValueError) as error:
    conadv.pgd(0.1, bounds=bounds)
  assert_says(error, '(low, high)', 'Given bounds=', 'swapped')


@pytest.mark.parametrize('probability', [-0.1, 1.1, float('nan')])
def test_probability_of_a_clean_start(probability):
  with pytest.raises(ValueError, match='a probability, in'):
    conadv.pgd(0.1, start_from_clean=probability)


def test_unknown_norm():
  with pytest.raises(ValueError, match="norm='l1'"):
    conadv.pgd(0.1, norm='l1')


@pytest.mark.parametrize('argument', ['epsilon', 'step_size', 'bounds'])
def test_an_array_that_does_not_broadcast(argument):
  odd = jnp.ones(4)
  kwargs = {
    'epsilon': {'epsilon': odd},
    'step_size': {'epsilon': 0.1, 'step_size': odd},
    'bounds': {'epsilon': 0.1, 'bounds': (0.0, odd)},
  }[argument]
  with pytest.raises(ValueError) as error:
    call(wrap(attack=conadv.pgd(random_start=False, **kwargs)))
  assert_says(error, argument, 'float32[4]', 'float32[16,5]', '(5,)')


def test_targets_on_labels_that_are_no_indices():
  batch = {**make_batch(0), 'label': jnp.ones((16, 3))}
  attack = conadv.pgd(0.1, targets=conadv.random_targets(3))
  with pytest.raises(TypeError) as error:
    call(wrap(attack=attack), batch, [batch], key=jax.random.key(0))
  assert_says(error, 'integers', 'float32[16,3]', 'one_hot')


@pytest.mark.parametrize('number', [1, 3.7, True])
def test_one_class_has_no_wrong_one(number):
  is_int = type(number) is int
  with pytest.raises(ValueError if is_int else TypeError) as error:
    conadv.random_targets(number)
  rule = 'at least 2' if is_int else 'a Python int'
  assert_says(error, rule, f'num_classes={number}')


def test_a_constant_channel_is_not_normalised():
  with pytest.raises(ValueError, match='must be positive'):
    conadv.normalized(0.1, 0.0, np.array([1.0, 0.0]))


@pytest.mark.parametrize('staleness', [1.0, True, '1', None, np.float32(1)])
def test_staleness_that_is_no_int(staleness):
  with pytest.raises(TypeError) as error:
    wrap(staleness)
  assert_says(error, 'Python int', f'staleness={staleness!r}', 'staleness=1')


def test_negative_staleness():
  with pytest.raises(ValueError) as error:
    wrap(-1)
  assert_says(error, '0 or more', 'staleness=-1')


def test_traced_staleness_is_told_to_be_static():
  with pytest.raises(TypeError, match='static'):
    jax.jit(lambda tau: wrap(tau).init({}, []))(1)


@pytest.mark.parametrize(
  'weights',
  [
    {'main': 1.0},
    {'main': 1.0, 'adversarial': 1.0, 'augmented': 1.0},
    {'clean': 1.0, 'adversarial': 1.0},
  ],
)
def test_weights_that_name_no_branch(weights):
  with pytest.raises(ValueError) as error:
    wrap(weights=weights)
  assert_says(error, 'one entry for each branch', "'adversarial': 0.5")


def test_extra_branches_that_take_a_taken_name():
  with pytest.raises(ValueError, match='are taken'):
    wrap(extra_branches={'main': 'label'})


@pytest.mark.parametrize('fraction', [0, -0.1, 1.5, float('nan')])
def test_fraction_outside_of_its_range(fraction):
  with pytest.raises(ValueError) as error:
    wrap(adversarial_fraction=fraction)
  assert_says(error, '(0, 1]', f'adversarial_fraction={fraction}')


@pytest.mark.parametrize(
  'attack',
  [
    conadv.pgd(0.1),
    conadv.pgd(0.1, steps=2, random_start=False),
    conadv.fgsm(0.1, targets=conadv.random_targets(3)),
  ],
)
def test_attacks_that_one_gradient_is_not_enough_for(attack):
  with pytest.raises(ValueError) as error:
    wrap(attack=attack, reuse_gradient=True)
  assert_says(error, 'one step', 'random start', 'conadv.fgsm(epsilon)')


def test_a_reused_gradient_without_staleness():
  with pytest.raises(ValueError) as error:
    wrap(0, reuse_gradient=True)
  assert_says(error, 'one step later', 'staleness=0', 'staleness=1')


def test_an_attack_that_was_not_called():
  with pytest.raises(TypeError) as error:
    wrap(attack=conadv.pgd)
  assert_says(error, 'conadv.Attack', 'function', 'conadv.pgd(8 / 255)')


@pytest.mark.parametrize('where', ['init', 'value_and_grad'])
def test_a_missing_key(where):
  grad_fn = wrap(attack=conadv.pgd(0.1))
  params, model_state = init_model()
  batch, kwargs = make_batch(0), {'model_state': model_state}
  with pytest.raises(ValueError) as error:
    if where == 'init':
      grad_fn.init(params, [batch], **kwargs)
    else:
      state = grad_fn.init(params, [batch], key=jax.random.key(0), **kwargs)
      grad_fn.value_and_grad(params, state, batch, **kwargs)
  assert_says(error, 'needs `key=`', '`key=jax.random.fold_in(key, step)`')


def test_no_key_is_needed_where_nothing_draws():
  call(wrap(attack=FGSM))


def wrong_loss(result):
  def fn(params, model_state, batch):
    loss, state = loss_fn(params, model_state, batch)
    return result(loss, state, batch)

  return fn


@pytest.mark.parametrize(
  ('result', 'given'),
  [
    (lambda loss, state, b: (jnp.ones(16) * loss, state), 'float32[16]'),
    (lambda loss, state, b: (jnp.int32(1), state), 'int32[]'),
  ],
)
def test_a_loss_that_is_no_floating_scalar(result, given):
  grad_fn = conadv.wrap(wrong_loss(result), attack=FGSM, has_state=True)
  with pytest.raises(TypeError) as error:
    call(grad_fn)
  assert_says(error, 'floating scalar', given, 'jnp.mean(losses)')


@pytest.mark.parametrize('has_aux', [False, True])
@pytest.mark.parametrize('has_state', [False, True])
def test_a_loss_that_returns_another_form(has_state, has_aux):
  def fn(params, *args):
    del args
    return jnp.sum(params['dense']['bias'])

  def too_much(params, *args):
    return fn(params), {}, {}, {}

  wrong = too_much if not (has_state or has_aux) else fn
  grad_fn = conadv.wrap(
    wrong, attack=FGSM, has_state=has_state, has_aux=has_aux
  )
  state = {} if has_state else None
  with pytest.raises(TypeError) as error:
    call(grad_fn, model_state=state)
  assert_says(error, 'must return', 'It returned')


def test_state_returned_without_has_state():
  def fn(params, batch):
    return loss_fn(params, init_model()[1], batch)

  with pytest.raises(TypeError) as error:
    call(conadv.wrap(fn, attack=FGSM), model_state=None)
  assert_says(error, 'the loss alone', 'tuple of 2', '`has_state=True`')


@pytest.mark.parametrize(
  ('change', 'given'),
  [
    (lambda state: {'batch_stats': state}, "('batch_stats', 'norm', 'mean')"),
    (lambda state: jax.tree.map(lambda x: x[:4], state), 'float32[4]'),
    (
      lambda state: jax.tree.map(lambda x: x.astype(jnp.bfloat16), state),
      'bfloat16[8]',
    ),
  ],
)
def test_a_model_state_that_changes_its_form(change, given):
  fn = wrong_loss(lambda loss, state, b: (loss, change(state)))
  with pytest.raises(TypeError) as error:
    call(conadv.wrap(fn, attack=FGSM, has_state=True))
  assert_says(error, 'structure, shapes and dtypes', given)


def test_a_missing_model_state():
  with pytest.raises(ValueError) as error:
    call(wrap(), model_state=None)
  assert_says(error, 'has_state=True', 'Given none', 'model_state=model_state')


def test_a_model_state_that_the_loss_does_not_take():
  with pytest.raises(ValueError) as error:
    call(conadv.wrap(lambda p, b: jnp.sum(b['image']), attack=FGSM))
  assert_says(error, 'has_state=False', 'conadv.plain(loss_fn, has_state')


def test_branched_parameters_with_plain_state():
  params, _ = conadv.dual_bn.split(*init_model())
  grad_fn = wrap()
  with pytest.raises(ValueError) as error:
    grad_fn.init(params, [make_batch(0)], model_state=init_model()[1])
  assert_says(error, '`Branched`', 'params, model_state = conadv.dual_bn.split')


@pytest.mark.slow
def test_a_branch_that_was_not_split():
  params, model_state = conadv.dual_bn.split(*init_model())
  batch = {**make_batch(0), 'view': make_batch(1)['image']}
  grad_fn = wrap(extra_branches={'augmented': 'view'})
  state = grad_fn.init(params, [batch], model_state=model_state)
  with pytest.raises(KeyError) as error:
    grad_fn.value_and_grad(params, state, batch, model_state=model_state)
  assert_says(error, "no branch 'augmented'", "('adversarial', 'augmented')")


def test_lars_without_parameters():
  tx = conadv.lars(0.1, weight_decay=0.0)
  params, _ = init_model()
  with pytest.raises(ValueError) as error:
    tx.update(params, tx.init(params))
  assert_says(
    error, 'norm of its weights', 'tx.update(grads, opt_state, params)'
  )


@pytest.mark.parametrize('name', ['trust_ratio', 'momentum_over'])
def test_unknown_form_of_lars(name):
  with pytest.raises(ValueError, match=f"{name}='both'"):
    conadv.lars(0.1, weight_decay=0.0, **{name: 'both'})


def test_negative_weight_decay():
  with pytest.raises(ValueError, match=r'weight_decay=-0\.1'):
    conadv.lars(0.1, weight_decay=-0.1)


@pytest.mark.parametrize(
  ('mask', 'rule'),
  [
    (conadv.exclude_norm_and_bias, 'function of the parameters'),
    (
      functools.partial(conadv.exclude_norm_and_bias, model_state={}),
      'Given a single integer',
    ),
    (lambda params: jax.tree.map(lambda x: x.ndim > 1, params), 'mask=False'),
    (lambda params: jax.tree.map(jnp.zeros_like, params), 'made of bools'),
  ],
)
def test_a_mask_that_became_a_schedule(mask, rule):
  params, _ = init_model()
  tx = optax.inject_hyperparams(conadv.lars)(
    learning_rate=0.1, weight_decay=0.0, mask=mask
  )
  wrong = ValueError if rule == 'mask=False' else TypeError
  with pytest.raises(wrong) as error:
    tx.update(params, tx.init(params), params)
  assert_says(error, rule, "static_args='mask'")


def test_a_mask_of_another_optimizer_that_became_a_schedule():
  params, _ = init_model()
  tx = optax.inject_hyperparams(optax.adamw)(
    0.1, mask=conadv.exclude_norm_and_bias
  )
  with pytest.raises(TypeError) as error:
    tx.init(params)
  assert_says(error, 'int32[]', "static_args='mask'")
