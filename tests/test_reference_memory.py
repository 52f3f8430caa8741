"""What was freed is used again."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In a process of its own, as the setting stays. Above 32 MiB glibc would ask
# the system each time, whatever was freed before.
FAULTS = """
import resource
import numpy as np
from reference import memory
memory.keep_freed()
np.ones(2**26, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
  np.ones(2**26, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc alone')
def test_freed_memory_costs_no_more_page_faults():
  result = subprocess.run(
    [sys.executable, '-c', FAULTS],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert int(result.stdout) < 100
