"""Eight CPU devices, strict promotion, and compilations kept between runs."""

import os
from importlib import metadata
from pathlib import Path

# Most of the time goes into compiling, which these make cheaper.
flags = ['--xla_backend_optimization_level=0']
if metadata.version('jaxlib').startswith('0.10.'):
  # A third of the time of all tests; later versions end at the unknown flag.
  flags.append('--xla_cpu_use_fusion_emitters=false')
# In the environment, so that the processes that tests start share it.
os.environ |= {
  'JAX_COMPILATION_CACHE_DIR': str(Path(__file__).parents[1] / '.jax_cache'),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  'XLA_FLAGS': ' '.join(flags),
}

import jax
import matplotlib

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
matplotlib.use('Agg')
