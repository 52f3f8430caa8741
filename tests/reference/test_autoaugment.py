"""AutoAugment's operations against Pillow's, and its policy as a table."""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from reference.data import autoaugment

GREY = (128, 128, 128)
LEVELS = range(10)
# Operation, probability, level; copied from the paper's table.
POLICY = """
  Posterize .4 8, Rotate .6 9 | Solarize .6 5, AutoContrast .6 5 |
  Equalize .8 8, Equalize .6 3 | Posterize .6 7, Posterize .6 6 |
  Equalize .4 7, Solarize .2 4 | Equalize .4 4, Rotate .8 8 |
  Solarize .6 3, Equalize .6 7 | Posterize .8 5, Equalize 1 2 |
  Rotate .2 3, Solarize .6 8 | Equalize .6 8, Posterize .4 6 |
  Rotate .8 8, Color .4 0 | Rotate .4 9, Equalize .6 2 |
  Equalize 0 7, Equalize .8 8 | Invert .6 4, Equalize 1 8 |
  Color .6 4, Contrast 1 8 | Rotate .8 8, Color 1 2 |
  Color .8 8, Solarize .8 7 | Sharpness .4 7, Invert .6 8 |
  ShearX .6 5, Equalize 1 9 | Color .4 0, Equalize .6 3 |
  Equalize .4 7, Solarize .2 4 | Solarize .6 5, AutoContrast .6 5 |
  Invert .6 4, Equalize 1 8 | Color .6 4, Contrast 1 8 |
  Equalize .8 8, Equalize .6 3
"""
NAMES = {
  'posterize': 'Posterize',
  'rotate': 'Rotate',
  'solarize': 'Solarize',
  'auto_contrast': 'AutoContrast',
  'equalize': 'Equalize',
  'invert': 'Invert',
  'color': 'Color',
  'contrast': 'Contrast',
  'sharpness': 'Sharpness',
  'shear_x': 'ShearX',
}
SIGNED = {'rotate', 'shear_x', 'color', 'contrast', 'sharpness'}


def make_images():
  """Noise, smooth, few values, dark, grey as RGB, one value; odd sizes too."""
  rng = np.random.default_rng(0)
  noise = rng.integers(256, size=(37, 52, 3), dtype=np.uint8)
  small = Image.fromarray(noise[:4, :5])
  smooth = np.asarray(small.resize((61, 45), Image.Resampling.BICUBIC))
  return {
    'noise': noise,
    'smooth': smooth,
    'few_values': rng.choice(np.uint8([3, 200, 201]), size=(40, 40, 3)),
    'dark': smooth // 5 + 7,
    'grey': np.repeat(smooth[..., :1], 3, axis=-1),
    'one_value': np.full((9, 9, 3), 77, np.uint8),
    'flipped': smooth[:, ::-1],
    'narrow': noise[:, :1],
    'low': noise[:1],
    'pixel': noise[:1, :1],
    'two_by_two': noise[:2, :2],
  }


IMAGES = make_images()


def with_pillow(name, image, level, sign, factor=1.0):
  """The definition, in Pillow's operations; `level` may be a fraction."""
  image = Image.fromarray(np.ascontiguousarray(image))
  level = level * factor
  match name:
    case 'rotate':
      degrees = sign * 30 * level / 9
      return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=GREY)
    case 'shear_x':
      return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (1, sign * 0.3 * level / 9, 0, 0, 1, 0),
        Image.Resampling.NEAREST,
        fillcolor=GREY,
      )
    case 'posterize':
      return ImageOps.posterize(image, 8 - round(4 * level / 9))
    case 'solarize':
      return ImageOps.solarize(image, 255 * (9 - level) / 9)
    case 'auto_contrast':
      return ImageOps.autocontrast(image)
    case 'equalize':
      return ImageOps.equalize(image)
    case 'invert':
      return ImageOps.invert(image)
  enhancer = getattr(ImageEnhance, NAMES[name])(image)
  return enhancer.enhance(1 + sign * 0.9 * level / 9)


def with_code(name, image, level, sign, factor=1.0):
  operation = autoaugment.OPERATIONS[name]
  return operation.apply(image, sign * factor * level / 9)


def ties(name, shape, level, sign):
  """Where the source lies so near to two pixels that rounding decides."""
  height, width = shape[:2]
  y, x = np.mgrid[:height, :width] + 0.5
  if name == 'rotate':
    angle = np.deg2rad(sign * 30 * level / 9)
    from_x, from_y = x - width / 2, y - height / 2
    x = np.cos(angle) * from_x - np.sin(angle) * from_y + width / 2
    y = np.sin(angle) * from_x + np.cos(angle) * from_y + height / 2
  else:
    x = x + sign * 0.3 * level / 9 * y
  return (np.abs(x - np.rint(x)) < 0.01) | (np.abs(y - np.rint(y)) < 0.01)


signs = pytest.mark.parametrize('sign', [1, -1])
images = pytest.mark.parametrize('kind', IMAGES)


@images
@pytest.mark.parametrize('factor', [1.0, 0.8])
@pytest.mark.parametrize('name', ['posterize', 'solarize'])
def test_tables_are_pillows(name, factor, kind):
  image = IMAGES[kind]
  for level in LEVELS:
    np.testing.assert_array_equal(
      with_code(name, image, level, 1, factor),
      with_pillow(name, image, level, 1, factor),
      err_msg=f'level {level}',
    )


@images
@pytest.mark.parametrize('name', ['auto_contrast', 'equalize', 'invert'])
def test_operations_without_a_level_are_pillows(name, kind):
  image = IMAGES[kind]
  expected = with_pillow(name, image, 0, 1)
  for level in LEVELS:
    np.testing.assert_array_equal(with_code(name, image, level, 1), expected)


@images
@pytest.mark.parametrize('name', ['color', 'contrast', 'sharpness'])
@signs
def test_enhancers_are_pillows_up_to_rounding(name, sign, kind):
  """Pillow rounds twice, and down at the end."""
  image = IMAGES[kind]
  for level in LEVELS:
    result = with_code(name, image, level, sign)
    expected = np.asarray(with_pillow(name, image, level, sign))
    difference = np.abs(result.astype(int) - expected)
    assert difference.max() <= 1, f'level {level}'


@images
@pytest.mark.parametrize('name', ['rotate', 'shear_x'])
@signs
def test_geometry_is_pillows_but_for_ties(name, sign, kind):
  image = IMAGES[kind]
  for level in LEVELS:
    result = with_code(name, image, level, sign)
    expected = np.asarray(with_pillow(name, image, level, sign))
    differ = (result != expected).any(axis=-1)
    wrong = differ & ~ties(name, image.shape, level, sign)
    assert not wrong.any(), f'level {level}'


@pytest.mark.parametrize('name', ['rotate', 'shear_x'])
def test_few_pixels_are_ties(name):
  """Otherwise the test before this one would say little."""
  shape = IMAGES['smooth'].shape
  share = [ties(name, shape, level, 1).mean() for level in LEVELS[1:]]
  assert np.median(share) < 0.05


@pytest.mark.parametrize('name', ['color', 'contrast', 'sharpness'])
@signs
def test_the_strength_is_not_lost(name, sign):
  """Each level is nearer to Pillow's than the levels beside it are."""
  image = IMAGES['noise']
  results = [
    with_code(name, image, level, sign).astype(int) for level in LEVELS
  ]
  for level in LEVELS:
    expected = np.asarray(with_pillow(name, image, level, sign))
    distances = [np.abs(result - expected).mean() for result in results]
    assert np.argmin(distances) == level


@images
@pytest.mark.parametrize('name', autoaugment.OPERATIONS)
@signs
def test_form_and_input_are_kept(name, kind, sign):
  image = IMAGES[kind]
  before = image.copy()
  result = with_code(name, image, 9, sign)
  assert result.dtype == np.uint8
  assert result.shape == image.shape
  np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize('name', sorted(set(NAMES) - {'color'}))
@pytest.mark.parametrize('level', [0, 8])
def test_grey_stays_grey(name, level):
  result = with_code(name, IMAGES['grey'], level, 1)
  np.testing.assert_array_equal(result, result[..., :1].repeat(3, axis=-1))


@pytest.fixture
def applied(monkeypatch):
  """Records operations in place of applying them."""
  calls = []

  def recorder(name):
    def record(image, strength):
      calls.append((name, strength))
      return image

    return record

  monkeypatch.setattr(
    autoaugment,
    'OPERATIONS',
    {
      name: operation._replace(apply=recorder(name))
      for name, operation in autoaugment.OPERATIONS.items()
    },
  )
  return calls


def draw(applied, count, **options):
  """What each of `count` calls applied, with strengths as signed levels."""
  rng = np.random.default_rng(0)
  image = np.zeros((1, 1, 3), np.uint8)
  drawn = []
  for _ in range(count):
    applied.clear()
    autoaugment.auto_augment(image, rng, **options)
    drawn.append([(name, 9 * strength) for name, strength in applied])
  return drawn


def expected_frequencies():
  """The probability of every sequence of (operation, level)."""
  frequencies = collections.Counter()
  subpolicies = [
    [part.split() for part in line.split(',')] for line in POLICY.split('|')
  ]
  assert len(subpolicies) == 25
  for subpolicy in subpolicies:
    for kept in itertools.product([True, False], repeat=2):
      probability, sequence = 1 / 25, []
      for keep, (name, chance, level) in zip(kept, subpolicy, strict=True):
        probability *= float(chance) if keep else 1 - float(chance)
        sequence += [(name, int(level))] if keep else []
      frequencies[tuple(sequence)] += probability
  return frequencies


def test_subpolicies_and_skipped_operations_are_as_frequent_as_they_should_be(
  applied,
):
  count = 50_000
  observed = collections.Counter(
    tuple((NAMES[name], round(abs(level), 9)) for name, level in sequence)
    for sequence in draw(applied, count)
  )
  expected = expected_frequencies()
  assert sum(expected.values()) == pytest.approx(1)
  assert set(observed) <= {key for key, value in expected.items() if value}
  for sequence, probability in expected.items():
    deviation = np.sqrt(count * probability * (1 - probability))
    assert abs(observed[sequence] - count * probability) <= 4.5 * deviation


def test_signs_are_random_where_there_is_one(applied):
  by_name = collections.defaultdict(list)
  for sequence in draw(applied, 20_000):
    for name, level in sequence:
      if level:
        by_name[name].append(level < 0)
  for name, negative in by_name.items():
    if name in SIGNED:
      deviation = 0.5 / np.sqrt(len(negative))
      assert abs(np.mean(negative) - 0.5) < 4.5 * deviation
    else:
      assert not any(negative)


def test_the_level_factor_multiplies_every_level(applied):
  whole, scaled = draw(applied, 2_000), draw(applied, 2_000, level_factor=0.8)
  for a, b in zip(whole, scaled, strict=True):
    assert [name for name, _ in a] == [name for name, _ in b]
    np.testing.assert_allclose(
      [level for _, level in b], [0.8 * level for _, level in a]
    )


def test_the_generator_decides_all():
  image = IMAGES['smooth']

  def run(seed):
    rng = np.random.default_rng(seed)
    return [
      autoaugment.auto_augment(image, rng, level_factor=0.8).tobytes()
      for _ in range(50)
    ]

  assert run(0) == run(0)
  assert run(0) != run(1)
  assert len(set(run(0))) > 20


@images
def test_every_subpolicy_keeps_the_form(kind):
  rng = np.random.default_rng(0)
  for _ in range(150):
    result = autoaugment.auto_augment(IMAGES[kind], rng)
    assert result.shape == IMAGES[kind].shape
    assert result.dtype == np.uint8
