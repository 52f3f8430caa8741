"""What a resumed run must agree in with its checkpoint, and what may change."""

from pathlib import Path

import pytest

from reference import command
from reference.run import agreement

WORKDIR = Path('runs/1')
CONFIG = {
  'processes': 1,
  'devices': 8,
  'method': 'conadv',
  'epochs': 30.0,
  'lars.peak': 8.0,
  'stages': [1, 1],
  'data.folder': '/mnt/a',
}
DATASET = {
  'classes': ['cat', 'dog'],
  'images': 60,
  'held_out_images': 20,
  'fingerprint': 'f0',
}
STORED = agreement.About(CONFIG, DATASET, [])
STORED_LOOKSAM = STORED._replace(config=CONFIG | {'method': 'conadv_looksam'})
# As checkpoints were before.
BARE = agreement.About(
  {name: x for name, x in CONFIG.items() if name != 'devices'}, None, []
)


def check(stored=STORED, accept=(), **changes):
  agreement.check_config(WORKDIR, 7, stored, CONFIG | changes, accept)


def check_images(accept=(), stored=STORED, **changes):
  agreement.check_dataset(WORKDIR, 7, stored, DATASET | changes, accept)


def test_what_agrees_goes_on():
  check()
  check_images()
  check(BARE)
  check(BARE, devices=4)
  check_images(stored=BARE, fingerprint='f1')


def test_the_same_images_elsewhere_are_the_same():
  check(**{'data.folder': '/mnt/b/'})
  # Unless nothing says which they were.
  with pytest.raises(command.Mistake, match=r'data\.folder: given'):
    check(BARE, **{'data.folder': '/mnt/b'})


def test_fields_that_came_later_say_what_was_done_without():
  before = {
    'label_smoothing': 0.1,
    'method': 'conadv',
    'methods.conadv.targets': 'none',
    'methods.sam.radius': 0.1,
  }
  later = {
    'attack.label_smoothing': 0.1,
    'methods.agvm.beta': 0.9,
    'methods.conadv.every': 1,
    'model.build': '',
    'model.padding': 'same',
  }
  stored = agreement.About(before, None, [])
  agreement.check_config(WORKDIR, 7, stored, before | later, ())
  for name, value in {
    'attack.label_smoothing': 0.0,
    'methods.conadv.every': 5,
    'model.padding': 'symmetric',
    'methods.sam.new_field': 1,
  }.items():
    with pytest.raises(
      command.Mistake, match=f'{name}: given {value!r}'
    ) as error:
      agreement.check_config(
        WORKDIR, 7, stored, before | later | {name: value}, ()
      )
    assert (f'`--config.{name}={later.get(name)}`' in str(error.value)) == (
      name in later
    )


@pytest.mark.parametrize(
  ('changes', 'accept', 'message'),
  [
    ({'epochs': 60.0}, (), r'epochs: given 60\.0, stored 30\.0\n.*`--extend`'),
    ({'lars.peak': 4.0}, ('data', 'devices'), '--extend'),
    ({'devices': 4}, (), 'batch statistics of its own.*--accept=devices'),
    ({'devices': 4}, ('schedule',), '--accept=devices'),
    ({'method': 'sam'}, ('schedule',), 'changes epochs, .* alone.*--workdir='),
    ({'method': 'sam', 'epochs': 1.0}, (), r"given 'sam'.*--workdir=runs/1_2"),
    ({'processes': 2}, ('devices', 'data', 'schedule'), 'processes: given 2'),
    ({'new_field': 1}, (), "new_field: given 1, stored 'nothing'"),
    (
      {'stages': [2, 2]},
      (),
      r"`--config\.stages='\[1, 1\]'`",
    ),
  ],
)
def test_another_config_is_refused(changes, accept, message):
  with pytest.raises(command.Mistake, match='holds step 7') as error:
    check(accept=accept, **changes)
  error.match(f'(?s){message}')


def test_on_purpose_it_is_not():
  check(accept=('schedule',), epochs=60.0, **{'lars.peak': 4.0})
  check(accept=('devices',), devices=4)
  with pytest.raises(command.Mistake, match=r'7 of 8.*--init_from=runs/1'):
    check(STORED_LOOKSAM, ('devices',), devices=4, method='conadv_looksam')
  check(accept=('devices', 'schedule'), devices=4, epochs=60.0)
  check_images(('data',), images=66, fingerprint='f1')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'images': 66}, 'training images: 6 more, 66 for 60\n'),
    ({'held_out_images': 15}, 'held-out images: 5 fewer, 15 for 20\n'),
    ({}, 'the names of images or their labels\n'),
    (
      {'classes': ['cat', 'wolf']},
      "gone, 1: 'dog'\n  classes that are new, 1: 'wolf'\n",
    ),
    ({'classes': ['dog', 'cat']}, 'the order of the classes'),
  ],
)
def test_other_images_are_refused_and_told(changes, message):
  with pytest.raises(command.Mistake, match=message) as error:
    check_images(fingerprint='f1', **changes)
  error.match('--accept=data')
  check_images(('data',), fingerprint='f1', **changes)


def test_what_is_unreadable_may_be_skipped_from_now_on():
  stored = STORED._replace(config=CONFIG | {'data.on_bad_image': 'stop'})
  now = {'data.on_bad_image': 'skip'}
  check(stored, **now)
  found = agreement.go_on(stored, STORED._replace(config=CONFIG | now), 7)
  assert agreement.lines(found) == [
    'From step 7 on: data.on_bad_image stop -> skip.'
  ]
  with pytest.raises(command.Mistake, match='epochs: given') as error:
    check(stored, epochs=60.0, **now)
  assert 'on_bad_image' not in str(error.value)


def test_another_number_of_classes_is_another_model():
  classes = [*DATASET['classes'], *(f'new_{i:03}' for i in range(1000))]
  with pytest.raises(command.Mistake, match='is another model') as error:
    check_images(('data',), classes=classes)
  error.match("new, 1000: 'new_000', .*'new_004' and 995 more\n")
  assert len(str(error.value)) < 600


def test_the_record_says_what_changed_and_where():
  now = STORED._replace(config=CONFIG | {'epochs': 60.0})
  longer = agreement.go_on(STORED, now, 337)
  assert longer.changes == [{'step': 337, 'epochs': [30.0, 60.0]}]
  assert longer.config['epochs'] == 60.0
  # The same command again.
  assert agreement.go_on(longer, now, 400) == longer

  other = {**DATASET, 'classes': ['cat', 'wolf'], 'fingerprint': 'f1'}
  both = agreement.go_on(longer, now._replace(dataset=other), 500)
  assert both.changes[:1] == longer.changes
  assert agreement.lines(both) == [
    'From step 337 on: epochs 30.0 -> 60.0.',
    'From step 500 on: classes, fingerprint f0 -> f1.',
  ]


def test_names_of_classes_need_not_agree():
  named = STORED._replace(names=['tabby cat', 'dog'])
  for then, now in ((STORED, named), (named, STORED)):
    assert agreement.go_on(then, now, 7) == now


def test_a_checkpoint_of_before_says_nothing_new():
  assert agreement.go_on(BARE, STORED, 7).changes == []
