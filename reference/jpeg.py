"""Reads JPEGs, and tells the harmless oddities of real files from damage."""

import cv2
import numpy as np
import simplejpeg

# libjpeg's warnings that leave every pixel right. All others mean damage.
_HARMLESS = (
  'extraneous bytes before marker',
  'Invalid SOS parameters',
  'unknown JFIF revision',
  'Unknown Adobe color transform',
  'bad ICC marker',
)


class BadImageError(ValueError):
  """An image file that cannot be read whole.

  Attributes:
    path: of the file.
    reason: what is wrong with it.
  """

  def __init__(self, path: str, reason: str):
    super().__init__(path, reason)
    self.path = path
    self.reason = reason

  def __str__(self) -> str:
    return (
      f'An image must be a whole JPEG. {self.path} is not: {self.reason}. Copy '
      'the file again, or read past such images, which are then counted: '
      '`--config.data.on_bad_image=skip`.'
    )


def decode(data: bytes, path: str) -> np.ndarray:
  """The pixels of a JPEG, uint8 (H, W, 3); greyscale becomes RGB.

  Args:
    data: the file's content.
    path: its name, for the error.

  Raises:
    BadImageError: when it is no JPEG, is truncated, or is damaged.
  """
  try:
    return simplejpeg.decode_jpeg(data, colorspace='RGB', strict=True)
  except ValueError as error:
    reason = str(error)
  if not any(text in reason for text in _HARMLESS):
    raise BadImageError(path, reason)
  # OpenCV takes the same pixels from the same libjpeg and only prints the
  # warning; simplejpeg refuses one in the header even with `strict=False`. It
  # gives no image where damage follows, such as a missing end.
  image = cv2.imdecode(
    np.frombuffer(data, np.uint8),
    cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION,
  )
  if image is None:
    raise BadImageError(path, reason)
  return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
