"""Reads images, and tells the harmless oddities of real files from damage.

JPEGs are what the pipeline is made for; PNGs and WebPs are read too, whatever
their names. Among ImageNet's are CMYK and grey JPEGs and a PNG under a JPEG's
name: all become RGB. An orientation in the file is not followed, as in the
published recipes.
"""

import errno

import cv2
import numpy as np
import simplejpeg

from reference.command import Mistake

# libjpeg's warnings that leave every pixel right. All others mean damage.
_HARMLESS = (
  'extraneous bytes before marker',
  'Invalid SOS parameters',
  'unknown JFIF revision',
  'Unknown Adobe color transform',
  'bad ICC marker',
)
_JPEG = b'\xff\xd8'
_PNG = b'\x89PNG\r\n\x1a\n'
# What lies under the names of images, by how it begins.
_OTHERS = {
  b'GIF8': 'a GIF',
  b'BM': 'a BMP',
  b'II*\0': 'a TIFF',
  b'MM\0*': 'a TIFF',
  b'<': 'a page of HTML or XML',
  b'version https://git-lfs': 'a pointer of Git LFS; `git lfs pull` fetches it',
  b'\0\0\0': 'a HEIC or AVIF or a video',
}
# A damaged header may ask for gigabytes; a billion samples are read.
_MOST_PIXELS = 2**30 // 3
_NOT_OF_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# Unreadable images by path, with the reason.
Skipped = dict[str, str]


class BadImageError(Mistake):
  """An image file that cannot be read whole.

  Attributes:
    path: of the file.
    reason: what is wrong with it.
  """

  def __init__(self, path: str, reason: str):
    super().__init__(path, reason)
    self.path = path
    self.reason = reason

  @classmethod
  def of_file(cls, path: str, error: OSError) -> 'BadImageError':
    """For a file that cannot be read.

    Raises:
      OSError: the error, where it is the process's trouble and not the file's.
    """
    if error.errno in _NOT_OF_THE_FILE:
      raise error
    return cls(path, f'it cannot be read, {error.strerror}')

  def __str__(self) -> str:
    return (
      f'An image must be a whole JPEG, PNG or WebP. {self.path} is not: '
      f'{self.reason}. Copy the file again, or read past such images, which '
      'are then counted: `--config.data.on_bad_image=skip`.'
    )


def read_file(path: str) -> bytes:
  """The content of a file.

  Raises:
    BadImageError: when it cannot be read, as where a link leads nowhere.
  """
  try:
    with open(path, 'rb', buffering=0) as file:
      return file.read()
  except OSError as error:
    raise BadImageError.of_file(path, error) from error


def is_webp(data: bytes) -> bool:
  """Whether a file is a WebP, by how it begins."""
  return data[:4] == b'RIFF' and data[8:12] == b'WEBP'


def _decode_with_opencv(data: bytes) -> np.ndarray | None:
  """The pixels of an image in any common format, None where it is damaged."""
  try:
    return cv2.imdecode(
      np.frombuffer(data, np.uint8),
      cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
    )
  except cv2.error:
    return None


def _decode_jpeg(data: bytes, path: str) -> np.ndarray:
  try:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    if height * width <= _MOST_PIXELS:
      return simplejpeg.decode_jpeg(data, colorspace='RGB', strict=True)
    reason = f'its header says {width} x {height} pixels'
  except ValueError as error:
    reason = str(error)
  # OpenCV takes the same pixels from the same libjpeg and only prints the
  # warning; simplejpeg refuses one in the header even with `strict=False`. It
  # gives no image where the end is missing. Other damage behind such an oddity
  # is not seen: libjpeg has words for its first warning alone.
  is_harmless = any(text in reason for text in _HARMLESS)
  image = _decode_with_opencv(data) if is_harmless else None
  if image is None:
    raise BadImageError(path, reason)
  return image


def decode(data: bytes, path: str) -> np.ndarray:
  """The pixels of an image, uint8 (H, W, 3); greyscale and CMYK become RGB.

  PNGs and WebPs are read without their transparency, of moving ones the first
  picture.

  Args:
    data: the file's content.
    path: its name, for the error.

  Raises:
    BadImageError: when it is no such file, is truncated, is damaged, or is too
      large to be meant.
  """
  if data.startswith(_JPEG):
    return _decode_jpeg(data, path)
  kind = 'PNG' if data.startswith(_PNG) else 'WebP'
  if kind == 'WebP' and not is_webp(data):
    if not data:
      raise BadImageError(path, 'it is empty')
    begin = data[:256].lstrip()
    names = (name for mark, name in _OTHERS.items() if begin.startswith(mark))
    found = next(names, f'a file that begins with {data[:16]!r}')
    raise BadImageError(path, f'not a JPEG but {found}')
  image = _decode_with_opencv(data)
  if image is None:
    raise BadImageError(path, f'a damaged {kind}')
  return image


def shrink(data: bytes, path: str, *, short_side: int, quality: int) -> bytes:
  """A JPEG with fewer pixels; an image that has few enough is left as it is.

  Args:
    data: the file's content.
    path: its name, for the error.
    short_side: pixels of the new image's shorter side.
    quality: of the JPEG, 1 to 100.

  Raises:
    BadImageError: as `decode` does.
  """
  pixels = decode(data, path)
  height, width, _ = pixels.shape
  shorter = min(height, width)
  if shorter <= short_side:
    return data
  size = tuple(round(x * short_side / shorter) for x in (width, height))
  small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
  return simplejpeg.encode_jpeg(
    small, quality=quality, colorspace='RGB', colorsubsampling='420'
  )
