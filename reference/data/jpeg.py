"""Reads JPEGs, and tells the harmless oddities of real files from damage.

Among ImageNet's are CMYK and grey JPEGs and a PNG under a JPEG's name: all
become RGB.
"""

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
_PNG = b'\x89PNG\r\n\x1a\n'
# A damaged header may ask for gigabytes; a billion samples are read.
_MOST_PIXELS = 2**30 // 3

# Unreadable images by path, with the reason.
Skipped = dict[str, str]


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


def _decode_with_opencv(data: bytes) -> np.ndarray | None:
  """The pixels of an image in any common format, None where it is damaged."""
  try:
    return cv2.imdecode(
      np.frombuffer(data, np.uint8),
      cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
    )
  except cv2.error:
    return None


def decode(data: bytes, path: str) -> np.ndarray:
  """The pixels of a JPEG, uint8 (H, W, 3); greyscale and CMYK become RGB.

  A PNG is read too, without its transparency.

  Args:
    data: the file's content.
    path: its name, for the error.

  Raises:
    BadImageError: when it is neither, is truncated, is damaged, or is too large
      to be meant.
  """
  try:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    if height * width <= _MOST_PIXELS:
      return simplejpeg.decode_jpeg(data, colorspace='RGB', strict=True)
    reason = f'its header says {width} x {height} pixels'
  except ValueError as error:
    reason = str(error)
  is_png = data.startswith(_PNG)
  if not is_png and not any(text in reason for text in _HARMLESS):
    raise BadImageError(path, reason if data else 'it is empty')
  # OpenCV takes the same pixels from the same libjpeg and only prints the
  # warning; simplejpeg refuses one in the header even with `strict=False`. It
  # gives no image where damage follows, such as a missing end.
  image = _decode_with_opencv(data)
  if image is None:
    raise BadImageError(path, 'a damaged PNG' if is_png else reason)
  return image
