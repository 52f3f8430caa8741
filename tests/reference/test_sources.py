"""JPEGs and folders of them, against Pillow and hand-made damage."""

import gzip
import hashlib
import io
import pickle
import re
import struct

import ml_collections
import numpy as np
import pytest
from PIL import ExifTags, Image
from sklearn import datasets

from reference.data import augment, jpeg, sources


def smooth_image(seed=0, height=48, width=64):
  """Smooth enough that two JPEG decoders agree closely."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
  return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encode(image, **options):
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=95, **options)
  return file.getvalue()


def write_folder(folder, classes=('ant', 'bee'), held_out='val', count=3):
  for split in ('train', held_out):
    for label, name in enumerate(classes):
      (folder / split / name).mkdir(parents=True)
      for index in range(count):
        path = folder / split / name / f'{index}.jpg'
        path.write_bytes(encode(smooth_image(10 * label + index)))


def test_decodes_as_pillow_does():
  data = encode(smooth_image())
  expected = np.asarray(Image.open(io.BytesIO(data)))
  pixels = jpeg.decode(data, 'a.jpg')
  assert pixels.dtype == np.uint8
  assert pixels.shape == (48, 64, 3)
  assert np.abs(pixels.astype(int) - expected).max() <= 4


def test_greyscale_becomes_rgb():
  grey = smooth_image()[..., 0]
  pixels = jpeg.decode(encode(grey), 'a.jpg')
  assert pixels.shape == (48, 64, 3)
  assert np.array_equal(pixels[..., 0], pixels[..., 1])
  assert np.array_equal(pixels[..., 0], pixels[..., 2])
  assert np.abs(pixels[..., 0].astype(int) - grey).max() <= 8


@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize('share', [0.02, 0.3, 0.7, 0.99])
def test_truncated_is_named(share, progressive):
  data = encode(smooth_image(), progressive=progressive)
  with pytest.raises(jpeg.BadImageError, match=re.escape('folder/a.jpg')):
    jpeg.decode(data[: int(share * len(data))], 'folder/a.jpg')


def test_missing_last_bytes_is_truncated():
  with pytest.raises(jpeg.BadImageError, match='Premature end'):
    jpeg.decode(encode(smooth_image())[:-2], 'a.jpg')


@pytest.mark.parametrize(
  ('data', 'reason'),
  [
    (b'', 'it is empty'),
    (b'\x89PNG\r\n\x1a\n' + bytes(100), 'a damaged PNG'),
    (b'RIFF\xff\0\0\0WEBPVP8 ' + bytes(100), 'a damaged WebP'),
    (b'<html>404 Not Found</html>', 'not a JPEG but a page of HTML'),
    (b'\n<!DOCTYPE html>', 'not a JPEG but a page of HTML'),
    (b'GIF89a' + bytes(100), 'not a JPEG but a GIF'),
    (b'version https://git-lfs.github.com/spec/v1', 'not a JPEG but a pointer'),
    (bytes(range(1, 30)), 'not a JPEG but a file that begins with b'),
  ],
)
def test_no_image_at_all(data, reason):
  message = rf'must be a whole JPEG, PNG or WebP\. a\.jpg is not: {reason}'
  with pytest.raises(jpeg.BadImageError, match=message):
    jpeg.decode(data, 'a.jpg')


def as_cmyk(image, *, adobe):
  """A CMYK JPEG; Adobe's marker means that it is stored inverted."""
  file = io.BytesIO()
  Image.fromarray(image).convert('CMYK').save(file, 'JPEG', quality=95)
  data = file.getvalue()
  start = data.index(b'\xff\xee')
  [size] = struct.unpack_from('>H', data, start + 2)
  assert data[start + 4 :].startswith(b'Adobe')
  return data if adobe else data[:start] + data[start + 2 + size :]


@pytest.mark.parametrize('adobe', [True, False])
def test_cmyk_has_the_colours_that_pillow_gives_it(adobe):
  image = smooth_image()
  data = as_cmyk(image, adobe=adobe)
  opened = Image.open(io.BytesIO(data))
  assert opened.mode == 'CMYK'
  pixels = jpeg.decode(data, 'a.jpg').astype(int)
  assert pixels.shape == (48, 64, 3)
  assert np.abs(pixels - np.asarray(opened.convert('RGB'))).max() <= 2
  if adobe:
    assert np.abs(pixels - image).mean() < 3


@pytest.mark.parametrize(
  ('kind', 'mode'),
  [('PNG', x) for x in ('RGB', 'RGBA', 'L', 'P')]
  + [('WebP', x) for x in ('RGB', 'RGBA', 'L')],
)
def test_other_kinds_are_read_under_the_name_of_a_jpeg(kind, mode):
  image = Image.fromarray(smooth_image()).convert(mode)
  file = io.BytesIO()
  image.save(file, kind, lossless=True)
  data = file.getvalue()
  np.testing.assert_array_equal(
    jpeg.decode(data, 'a.JPEG'), np.asarray(image.convert('RGB'))
  )
  for share in (0.1, 0.3, 0.9):
    with pytest.raises(jpeg.BadImageError, match=f'a damaged {kind}'):
      jpeg.decode(data[: int(share * len(data))], 'a.JPEG')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WebP'])
def test_an_orientation_is_not_followed(kind):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
  file = io.BytesIO()
  Image.fromarray(smooth_image()).save(file, kind, exif=exif)
  assert jpeg.decode(file.getvalue(), 'a.jpg').shape == (48, 64, 3)


@pytest.mark.parametrize('size', [(96, 60), (60, 96), (48, 48)])
def test_a_smaller_image_is_that_of_pillow(size):
  image = smooth_image(0, *size)
  data = encode(image)
  assert jpeg.shrink(data, 'a.jpg', short_side=max(size), quality=90) == data
  small = jpeg.shrink(data, 'a.jpg', short_side=24, quality=95)
  pixels = np.asarray(Image.open(io.BytesIO(small)))
  height, width = (round(24 * x / min(size)) for x in size)
  assert pixels.shape == (height, width, 3)
  expected = Image.fromarray(image).resize(
    (width, height), Image.Resampling.BOX
  )
  assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 6
  assert len(jpeg.shrink(data, 'a.jpg', short_side=24, quality=30)) < len(small)


def with_size(data, width, height):
  """Another size in the header, as damage may leave it."""
  frame = data.index(b'\xff\xc0')
  size = struct.pack('>HH', height, width)
  return data[: frame + 5] + size + data[frame + 9 :]


@pytest.mark.parametrize('odd', [False, True])
def test_a_header_that_asks_for_gigabytes_is_refused(odd):
  data = encode(smooth_image())
  data = with_extraneous_bytes(data) if odd else data
  with pytest.raises(jpeg.BadImageError, match=r'a\.jpg is not: ') as error:
    jpeg.decode(with_size(data, 65500, 65400), 'a.jpg')
  assert odd or '65500 x 65400' in str(error.value)


@pytest.mark.parametrize('size', [(1, 300), (300, 1), (1, 1), (2, 3)])
def test_one_pixel_wide_or_high(size):
  height, width = size
  image = smooth_image(height=height, width=width)
  pixels = jpeg.decode(encode(image), 'a.jpg')
  assert pixels.shape == (height, width, 3)
  rng = np.random.default_rng(0)
  for crop in (augment.resize, augment.center_crop):
    assert crop(pixels, 16).shape == (16, 16, 3)
  for crop in (augment.pad_crop, augment.random_resized_crop):
    for _ in range(20):
      assert augment.flip(crop(pixels, 16, rng), rng).shape == (16, 16, 3)


def with_extraneous_bytes(data):
  """Junk before the Huffman tables: libjpeg warns and reads on."""
  tables = data.index(b'\xff\xc4')
  return data[:tables] + bytes(3) + data[tables:]


def test_harmless_oddities_are_read():
  data = encode(smooth_image())
  expected = jpeg.decode(data, 'a.jpg')
  odd = with_extraneous_bytes(data)
  assert np.array_equal(jpeg.decode(odd, 'a.jpg'), expected)
  assert np.array_equal(jpeg.decode(data + b'trailing', 'a.jpg'), expected)


def test_harmless_oddity_does_not_hide_truncation():
  odd = with_extraneous_bytes(encode(smooth_image()))
  with pytest.raises(jpeg.BadImageError, match=r'a\.jpg'):
    jpeg.decode(odd[: len(odd) * 3 // 4], 'a.jpg')


def test_harmless_oddity_does_not_hide_a_broken_header():
  odd = with_extraneous_bytes(encode(smooth_image()))
  frame = odd.index(b'\xff\xc0')
  broken = odd[:frame] + b'\xff\xfe' + odd[frame + 2 :]
  with pytest.raises(jpeg.BadImageError, match=r'a\.jpg'):
    jpeg.decode(broken, 'a.jpg')


def test_the_error_survives_a_worker_process():
  error = jpeg.BadImageError('a.jpg', 'Premature end')
  again = pickle.loads(pickle.dumps(error))
  assert str(again) == str(error)
  assert again.path == 'a.jpg'


def test_a_fingerprint_is_of_names_and_labels(tmp_path, monkeypatch):
  folder = tmp_path / 'images'
  write_folder(folder)
  source = sources.jpeg_folder(str(folder))
  assert source.classes == ('ant', 'bee')
  lines = ['ant', 'bee', '']
  for _ in ('train', 'val'):
    lines += [f'{label}/{i}.jpg' for label in (0, 1) for i in range(3)] + ['']
  text = ''.join(f'{line}\n' for line in lines)
  assert source.fingerprint == hashlib.sha256(text.encode()).hexdigest()

  moved = folder.rename(tmp_path / 'elsewhere')
  assert sources.jpeg_folder(f'{moved}//').fingerprint == source.fingerprint
  monkeypatch.setenv('HOME', str(tmp_path))
  config = {'source': 'jpeg_folder', 'folder': '~/elsewhere'}
  opened = sources.open_source(ml_collections.ConfigDict(config))
  assert opened.fingerprint == source.fingerprint
  (moved / 'train' / 'ant' / '0.jpg').write_bytes(encode(smooth_image(9)))
  assert sources.jpeg_folder(str(moved)).fingerprint == source.fingerprint
  seen = {source.fingerprint}
  for old, new in (
    ('train/ant/0.jpg', 'train/bee/9.jpg'),
    ('val/ant/0.jpg', 'val/ant/00.jpg'),
    ('val/ant/1.jpg', 'train/ant/1_.jpg'),
  ):
    (moved / old).rename(moved / new)
    seen.add(sources.jpeg_folder(str(moved)).fingerprint)
  for split in ('train', 'val'):
    (moved / split / 'bee').rename(moved / split / 'wasp')
  seen.add(sources.jpeg_folder(str(moved)).fingerprint)
  assert len(seen) == 5


def test_digits_are_whole_and_disjoint():
  source = sources.digits()
  assert (len(source.train), len(source.held_out)) == (1437, 360)
  assert source.classes == tuple('0123456789')
  records = [source.read(record) for record in source.train + source.held_out]
  images = np.stack([image for image, _ in records])
  assert images.dtype == np.uint8
  assert images.shape == (1797, 8, 8, 1)
  assert images.max() == 255
  # The same images as scikit-learn's, each once.
  levels = np.rint(images[..., 0] / (255 / 16))
  labels = [label for _, label in records]
  data = datasets.load_digits()
  found = zip(map(np.ndarray.tobytes, levels), labels, strict=True)
  expected = zip(
    map(np.ndarray.tobytes, data.images), data.target.tolist(), strict=True
  )
  assert sorted(found) == sorted(expected)


IDX_FILES = (
  'train-images-idx3-ubyte.gz',
  'train-labels-idx1-ubyte.gz',
  't10k-images-idx3-ubyte.gz',
  't10k-labels-idx1-ubyte.gz',
)


def write_idx(folder):
  """Two training images and one held out, as MNIST's files hold them."""
  rng = np.random.default_rng(0)
  images = rng.integers(256, size=(3, 4, 5), dtype=np.uint8)
  labels = np.array([1, 0, 1], np.uint8)
  for name, array in zip(
    IDX_FILES, (images[:2], labels[:2], images[2:], labels[2:]), strict=True
  ):
    header = struct.pack(f'>HBB{array.ndim}i', 0, 8, array.ndim, *array.shape)
    with gzip.open(folder / name, 'wb') as file:
      file.write(header + array.tobytes())
  return images, labels


def test_idx_files_are_read(tmp_path):
  images, labels = write_idx(tmp_path)
  source = sources.idx_folder(str(tmp_path))
  records = [source.read(x) for x in (*source.train, *source.held_out)]
  assert (len(source.train), len(source.held_out)) == (2, 1)
  assert source.classes == ('0', '1')
  for (image, label), expected, number in zip(
    records, images, labels, strict=True
  ):
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected[..., None])
    assert (type(label), label) == (int, number)


def test_a_fingerprint_without_names_is_of_the_labels(tmp_path):
  write_idx(tmp_path)
  first = sources.idx_folder(str(tmp_path)).fingerprint
  assert sources.idx_folder(f'{tmp_path}/').fingerprint == first
  with gzip.open(tmp_path / IDX_FILES[1], 'wb') as file:
    file.write(struct.pack('>HBBi', 0, 8, 1, 2) + bytes([0, 1]))
  assert sources.idx_folder(str(tmp_path)).fingerprint != first


def test_missing_idx_files_are_named(tmp_path):
  write_idx(tmp_path)
  (tmp_path / IDX_FILES[3]).unlink()
  with pytest.raises(ValueError) as error:
    sources.idx_folder(str(tmp_path))
  for name in IDX_FILES:
    assert name in str(error.value)
  assert f'in which {IDX_FILES[3]} is missing' in str(error.value)
  assert 'apt-get install dataset-fashion-mnist' in str(error.value)


@pytest.mark.parametrize('name', IDX_FILES)
@pytest.mark.parametrize('kept', [0, 3, 8, -1])
def test_damaged_idx_files_are_named(tmp_path, name, kept):
  write_idx(tmp_path)
  with gzip.open(tmp_path / name) as file:
    data = file.read()
  with gzip.open(tmp_path / name, 'wb') as file:
    file.write(data[:kept])
  with pytest.raises(ValueError) as error:
    sources.idx_folder(str(tmp_path))
  assert str(tmp_path / name) in str(error.value)


def test_a_torn_gzip_file_is_named(tmp_path):
  write_idx(tmp_path)
  path = tmp_path / IDX_FILES[0]
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError) as error:
    sources.idx_folder(str(tmp_path))
  assert str(path) in str(error.value)
