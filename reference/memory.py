"""How the C library keeps the memory of images that are done with."""

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_KEPT = 2**30


def keep_freed() -> None:
  """Lets what is freed serve this process again; without glibc, nothing.

  Else an image's memory goes back to the system and comes again page by page.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
    mallopt(_M_MMAP_THRESHOLD, _MOST_KEPT)
