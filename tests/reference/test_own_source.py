"""Images of the user's own, which a config names."""

import itertools
import re
from pathlib import Path

import ml_collections
import pytest
from tiny_runs import tiny

from reference.command import Mistake
from reference.data import input_pipeline, jpeg, sources
from reference.run import checks


def make_config(name):
  return tiny(
    **{
      'batch_size': 4,
      'data.source': f'own_sources:{name}',
      'data.size': 8,
      'data.crop': 'resize',
      'data.mean': (0.5, 0.5, 0.5),
      'data.std': (0.2, 0.2, 0.2),
      'data.on_bad_image': 'skip',
    }
  )


def take(config, *, batches):
  """Level and label of the images of some batches, and of those held out."""
  checks.check_choices(config)
  source = sources.open_source(config.data)
  checks.check_classes(config, source.num_classes)
  skipped = {}
  iterator = input_pipeline.train_batches(source, config, skipped=skipped)
  train = list(itertools.islice(iterator, batches))
  iterator.close()
  held_out = input_pipeline.held_out_batches(
    source, config, batch_size=4, skipped=skipped
  )
  return (
    source,
    skipped,
    *(
      sorted(
        (int(image[0, 0, 0]), int(label))
        for batch in split
        for image, label in zip(batch['image'], batch['label'], strict=True)
      )
      for split in (train, held_out)
    ),
  )


def squares(numbers):
  return [(20 * i, int(i >= 6)) for i in numbers]


def test_arrays_with_labels():
  source, _, train, held_out = take(make_config('arrays'), batches=4)
  assert source.classes == ('dark', 'light')
  assert train == sorted(2 * squares(range(8)))
  assert held_out == squares(range(8, 12))
  # Images without names are told apart by their number.
  names = ['dark', 'light', '8 and 4 images']
  assert source.fingerprint == sources.fingerprint(names, [], [])


def test_encoded_images_with_labels():
  _, skipped, train, _ = take(make_config('encoded'), batches=7)
  assert train == sorted(4 * squares([0, 1, 3, 4, 5, 6, 7]))
  [(name, reason)] = skipped.items()
  assert name.startswith('image with CRC')
  assert reason == 'a damaged PNG'


def test_the_first_record_may_be_damaged_too():
  config = make_config('first_cut_short')
  _, skipped, train, _ = take(config, batches=6)
  assert train == sorted(4 * squares([1, 3, 4, 5, 6, 7]))
  assert len(skipped) == 2
  config.data.on_bad_image = 'stop'
  with pytest.raises(jpeg.BadImageError, match='a damaged PNG'):
    sources.open_source(config.data)


def test_a_function_that_reads():
  source, _, train, held_out = take(make_config('generated'), batches=4)
  assert source.fingerprint == 'mine'
  assert source.classes == ('dark', 'light')
  assert train == sorted(2 * [(i, i % 2) for i in range(8)])
  assert held_out == [(i, i % 2) for i in range(8, 12)]


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('in_floats', r'float64 and shape \(8, 8, 3\).*np\.uint8'),
    ('without_channels', r'shape \(8, 8\)\. Likely .*\[\.\.\., None\]'),
    ('grey', r'an image of 1\. Likely `--config\.data\.mean="\(0\.5,\)"'),
    ('from_one', 'from 0. Given .*a label 2. Likely .*label - 1'),
    ('empty', 'with 0, 1 and 2'),
    ('no_source', r'returns a list. Write `return sources\.Source'),
    ('misspelt', 'no such name'),
  ],
)
def test_what_is_no_source(name, message):
  with pytest.raises(Mistake, match=message):
    sources.open_source(ml_collections.ConfigDict(make_config(name).data))


def test_a_record_of_another_form_is_refused_when_it_is_read():
  with pytest.raises(Mistake, match=r'a label 2\. Likely .*label - 1'):
    take(make_config('late_from_one'), batches=2)


def test_the_sources_of_the_readme(tmp_path, monkeypatch):
  readme = (Path(checks.__file__).parents[1] / 'README.md').read_text()
  section = readme.partition('## Images of your own kind')[2]
  section = section.partition('\n## ')[0]
  blocks = re.findall('```python\n(.*?)```', section, re.S)
  (tmp_path / 'my_data.py').write_text('\n\n'.join(blocks))
  monkeypatch.syspath_prepend(tmp_path)
  for name in ('squares', 'generated'):
    config = make_config('')
    config.data.source = f'my_data:{name}'
    source, skipped, train, held_out = take(config, batches=2)
    assert len(source.classes) == 2
    assert skipped == {}
    assert len(train) == 8
    assert len(held_out) == len(source.held_out) == 100
