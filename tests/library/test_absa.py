"""The controller against plain Python, and the loop against large batches."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cross_entropy, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv

EIGENVALUES = st.one_of(
  st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -8.0]),
  st.sampled_from([2.0**k for k in range(-6, 7)]),
  st.floats(2**-6, 2**6, width=32),
)


class NaiveController:
  """The rule in plain Python, one `if` after the other."""

  def __init__(self, largest, first, growth, shrink, patience, until):
    self.largest, self.first, self.growth = largest, first, growth
    self.shrink, self.patience, self.until = shrink, patience, until
    self.size, self.reference, self.waited, self.total = first, None, 0, 0

  def evaluate(self, eigenvalue):
    self.total += 1
    self.waited += 1
    means_something = math.isfinite(eigenvalue) and eigenvalue > 0
    grow = False
    if means_something and self.reference is None:
      self.reference = eigenvalue
    elif (
      means_something
      and self.shrink is not None
      and eigenvalue <= self.shrink * self.reference
    ):
      self.reference = eigenvalue
      grow = True
    if self.patience is not None and self.waited >= self.patience:
      grow = True
    if grow:
      self.size = min(self.growth * self.size, self.largest)
      self.waited = 0

  def row(self):
    on = self.size < self.largest
    if self.until is not None and self.total >= self.until:
      on = False
    return (
      self.size,
      self.first if on else 0,
      self.size / self.first,
      self.reference or 0,
      self.waited,
      self.total,
    )


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
  eigenvalues=st.lists(EIGENVALUES, max_size=12),
  first=st.integers(1, 3),
  largest=st.integers(3, 40),
  growth=st.integers(2, 3),
  shrink=st.sampled_from([None, 0.5, 0.25]),
  patience=st.sampled_from([None, 1, 3, 10]),
  until=st.sampled_from([None, 0, 4]),
)
def test_controller_is_the_rule_in_plain_python(
  eigenvalues, first, largest, growth, shrink, patience, until
):
  controller = conadv.absa(
    largest,
    micro_batches=first,
    growth=growth,
    shrink=shrink,
    patience=patience,
    adversarial_evaluations=until,
  )
  naive = NaiveController(largest, first, growth, shrink, patience, until)
  state = controller.init()
  np.testing.assert_allclose(np.stack(state), naive.row(), rtol=1e-6)
  for eigenvalue in eigenvalues:
    state = controller.update(np.float32(eigenvalue), state)
    naive.evaluate(eigenvalue)
    np.testing.assert_allclose(np.stack(state), naive.row(), rtol=1e-6)


def test_published_defaults():
  # 128 to 16,384 images; half of the reference, or ten evaluations.
  controller = conadv.absa(128, adversarial_evaluations=45)
  state = controller.init()
  sizes = []
  for eigenvalue in (8.0, 4.1, 4.0, 3.0, 2.0):
    state = controller.update(eigenvalue, state)
    sizes.append(int(state.micro_batches))
  assert sizes == [1, 1, 2, 2, 4]
  for _ in range(9):
    state = controller.update(2.0, state)
  assert int(state.micro_batches) == 4
  state = controller.update(2.0, state)
  assert int(state.micro_batches) == 8
  assert float(state.reference) == 2, 'Patience does not move the reference.'


def test_a_negative_eigenvalue_is_not_a_flat_loss():
  # Signed power iteration returns the likes of it, and grew every time.
  controller = conadv.absa(64, patience=None)
  state = controller.init()
  for eigenvalue in (4.0, -4.0, -1.0, math.nan, 0.0, 3.0):
    state = controller.update(eigenvalue, state)
  assert int(state.micro_batches) == 1
  assert float(state.reference) == 4


def test_state_is_compiled_once_and_keeps_its_dtypes():
  controller, traces = conadv.absa(64), []

  @jax.jit
  def update(eigenvalue, state):
    traces.append(0)
    return controller.update(eigenvalue, state)

  state = first = controller.init()
  for eigenvalue in (8.0, 4.0, 2.0, -1.0):
    state = update(jnp.float32(eigenvalue), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
  assert int(state.micro_batches) == 4
  assert len(traces) == 1


FRACTION, EPSILON, SIZE = 0.25, 0.1, 8
ATTACK = conadv.fgsm(EPSILON)


def loss_fn(kernel, batch):
  return cross_entropy(batch['image'] @ kernel, batch['label'])


gradient = jax.jit(jax.grad(loss_fn))


def make_kernel():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


def make_step(tx, traces):
  @jax.jit
  def step(kernel, opt_state, plan, micro_batch):
    traces.append(0)
    micro_batch = jax.lax.cond(
      opt_state.index < plan.attacked,
      lambda batch: conadv.perturb(
        loss_fn,
        kernel,
        batch,
        attack=ATTACK,
        adversarial_fraction=FRACTION,
      ),
      lambda batch: batch,
      micro_batch,
    )
    grads = jax.grad(loss_fn)(kernel, micro_batch)
    updates, opt_state = tx.update(
      grads,
      opt_state,
      kernel,
      micro_batches=plan.micro_batches,
      learning_rate_scale=plan.learning_rate_scale,
    )
    return optax.apply_updates(kernel, updates), opt_state

  return step


def train(epochs, mesh=None):
  """ABSA over epochs of six micro-batches, which growth does not divide."""
  controller = conadv.absa(8, micro_batches=2)
  tx = conadv.adaptive_multi_steps(optax.sgd(0.1, momentum=0.9))
  traces, sizes = [], []
  step = make_step(tx, traces)
  kernel, plan = make_kernel(), controller.init()
  opt_state = tx.init(kernel)
  if mesh is not None:
    kernel, plan, opt_state = jax.device_put(
      (kernel, plan, opt_state), NamedSharding(mesh, P())
    )
  update = jax.jit(controller.update)
  t = 0
  for eigenvalue in epochs:
    for _ in range(6):
      micro_batch = make_batch(t, size=SIZE)
      if mesh is not None:
        micro_batch = jax.device_put(
          micro_batch, NamedSharding(mesh, P('data'))
        )
      kernel, opt_state = step(kernel, opt_state, plan, micro_batch)
      t += 1
    plan = update(jnp.float32(eigenvalue), plan)
    sizes.append(int(plan.micro_batches))
  assert sizes[-1] == 8
  assert len(traces) == 1, 'Growth changes a count alone.'
  return kernel


@jax.jit
def naive_fgsm(kernel, batch, count):
  slope = jax.grad(lambda x: loss_fn(kernel, {**batch, 'image': x}))
  image = batch['image']
  moved = image + EPSILON * jnp.sign(slope(image))
  attacked = jnp.arange(SIZE)[:, None] < count
  return {**batch, 'image': jnp.where(attacked, moved, image)}


def naive_train(steps):
  """Momentum on whole batches, each of so many micro-batches in one piece."""
  kernel, velocity, t = make_kernel(), 0.0, 0
  for size in steps:
    parts = []
    for i in range(size):
      count = 2 if i < 2 and size < 8 else 0
      parts.append(naive_fgsm(kernel, make_batch(t, size=SIZE), count))
      t += 1
    batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    velocity = np.float32(0.9) * velocity + gradient(kernel, batch)
    kernel = kernel - np.float32(0.1 * (size / 2)) * velocity
  return kernel


def test_loop_is_training_with_whole_batches():
  # It grows to 4 after 12 micro-batches and to 8 after 24, between two steps.
  epochs = (8.0, 4.0, 4.0, 2.0, 2.0, 2.0)
  steps = (2,) * 6 + (4,) * 3 + (8,)
  chex.assert_trees_all_close(
    train(epochs[:5]), naive_train(steps[:9]), rtol=1e-4, atol=1e-6
  )
  chex.assert_trees_all_close(
    train(epochs), naive_train(steps), rtol=1e-4, atol=1e-6
  )


def test_a_step_under_way_ends_as_it_began():
  epochs = (8.0, 4.0, 2.0, 2.0)
  controller = conadv.absa(8, micro_batches=2)
  state = controller.init()
  sizes = [
    int((state := controller.update(value, state)).micro_batches)
    for value in epochs
  ]
  assert sizes == [2, 4, 8, 8]
  # It grows to 8 after 18 micro-batches, in the middle of a step of 4.
  chex.assert_trees_all_close(
    train(epochs), naive_train((2,) * 6 + (4, 4)), rtol=1e-4, atol=1e-6
  )


def test_loop_on_eight_devices_is_the_same():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  epochs = (8.0, 4.0, 2.0, 2.0)
  chex.assert_trees_all_close(
    train(epochs, mesh), train(epochs), rtol=1e-4, atol=1e-6
  )


def test_without_thresholds_it_is_plain_sgd():
  controller = conadv.absa(
    64, shrink=None, patience=None, adversarial_evaluations=0
  )
  sgd = optax.sgd(0.1, momentum=0.9)
  tx = conadv.adaptive_multi_steps(sgd)
  step, plan = make_step(tx, []), controller.init()
  kernel = expected = make_kernel()
  opt_state, sgd_state = tx.init(kernel), sgd.init(kernel)
  for t, eigenvalue in enumerate((64.0, 8.0, 1.0, 1e-3, -1.0) * 3):
    batch = make_batch(t, size=SIZE)
    kernel, opt_state = step(kernel, opt_state, plan, batch)
    plan = controller.update(eigenvalue, plan)
    updates, sgd_state = sgd.update(
      gradient(expected, batch), sgd_state, expected
    )
    expected = optax.apply_updates(expected, updates)
  chex.assert_trees_all_close(kernel, expected, rtol=1e-6)


def test_curvature_drives_it():
  """The eigenvalue of a real loss, which falls as the model gets confident."""
  controller = conadv.absa(8, patience=None)
  tx = conadv.adaptive_multi_steps(optax.sgd(1.0))
  batch = make_batch(0, size=64)
  batch['label'] = jnp.argmax(batch['image'][:, :3], axis=1).astype(jnp.int32)

  @jax.jit
  def curvature(kernel):
    matvec = conadv.hessian.operator(loss_fn, kernel, batch, micro_batches=4)
    key = jax.random.key(0)
    pairs = conadv.hessian.top_eigenpairs(
      matvec, kernel, 1, key=key, iterations=10
    )
    return pairs.values[0]

  step, plan = make_step(tx, []), controller.init()
  kernel = jnp.zeros((5, 3))
  opt_state, eigenvalues = tx.init(kernel), []
  for _ in range(40):
    eigenvalues.append(float(curvature(kernel)))
    plan = controller.update(eigenvalues[-1], plan)
    for _ in range(4):
      kernel, opt_state = step(kernel, opt_state, plan, batch)
  flat = jax.jit(jax.hessian(lambda w: loss_fn(w.reshape(5, 3), batch)))(
    kernel.ravel()
  )
  np.testing.assert_allclose(
    curvature(kernel), np.linalg.eigvalsh(flat)[-1], rtol=1e-3
  )
  halvings = math.floor(math.log2(eigenvalues[0] / min(eigenvalues)))
  assert halvings >= 1
  assert 2 <= int(plan.micro_batches) <= 2**halvings


def test_errors_say_what_is_wrong():
  with pytest.raises(ValueError, match=r'micro_batches=8 above.*swapped'):
    conadv.absa(4, micro_batches=8)
  with pytest.raises(ValueError, match='micro_batches=0'):
    conadv.absa(4, micro_batches=0)
  with pytest.raises(TypeError, match=r'max_micro_batches=4\.0'):
    conadv.absa(4.0)
  with pytest.raises(ValueError, match='growth=1'):
    conadv.absa(4, growth=1)
  with pytest.raises(ValueError, match='patience=0'):
    conadv.absa(4, patience=0)
  with pytest.raises(ValueError, match='shrink=2'):
    conadv.absa(4, shrink=2)
  with pytest.raises(ValueError, match='adversarial_evaluations=-1'):
    conadv.absa(4, adversarial_evaluations=-1)


@pytest.mark.parametrize('jit', [False, True])
def test_arguments_in_another_order_are_told(jit):
  controller = conadv.absa(4)
  update = jax.jit(controller.update) if jit else controller.update
  state, write = controller.init(), r'`controller\.update\(pairs\.values'
  with pytest.raises(TypeError, match=rf'Given AbsaState.*{write}'):
    update(state, 3.0)
  with pytest.raises(TypeError, match=rf'Given float32\[3\].*{write}'):
    update(jnp.ones(3), state)
  with pytest.raises(TypeError, match=rf'in place of the AbsaState.*{write}'):
    update(3.0, tuple(state))
