"""Failures of the storage are told in a sentence, and others as they are."""

import errno

import pytest

from reference import command
from reference.run import storage

ADVICE = {
  errno.ENOSPC: 'No space left on device. Likely the disk is full.*`df -h ',
  errno.EDQUOT: 'Disk quota exceeded. Likely the disk is full',
  errno.EROFS: 'Read-only file system. It is mounted read-only: `findmnt',
  errno.EACCES: 'Permission denied.*`sudo chown "\\$USER"',
  errno.EIO: 'Input/output error.*the storage is away',
}


@pytest.mark.parametrize('number', ADVICE)
@pytest.mark.parametrize('form', ['system', 'array', 'within another'])
def test_a_failure_of_the_storage(number, form, tmp_path):
  with (
    pytest.raises(command.Mistake, match=ADVICE[number]) as error,
    storage.explained(tmp_path),
  ):
    if form == 'array':
      raise ValueError(f"OUT_OF_RANGE: x [os_error_code='{number}']")
    try:
      raise OSError(number, 'any words')
    except OSError as cause:
      if form == 'system':
        raise
      raise RuntimeError('the save failed') from cause
  error.match(f'could not write to {tmp_path}: ')
  error.match('whole: mend it, and the same command resumes')


@pytest.mark.parametrize('other', [ValueError('x'), command.Mistake('x')])
def test_what_is_not_the_storage_is_not_explained(other, tmp_path):
  with pytest.raises(type(other), match=r'^x$'), storage.explained(tmp_path):
    raise other
