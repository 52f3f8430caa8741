"""Eight CPU devices, strict promotion, and compilations kept between runs."""

import gc
import os
from importlib import metadata
from pathlib import Path

# In the environment, so that the processes that tests start share it. Most of
# the time goes into compiling, which these flags make cheaper: nothing is
# optimized, and no program is cut up for threads, as each core has a worker of
# its own. The last is unknown to later versions, which end at it.
os.environ |= {
  'JAX_COMPILATION_CACHE_DIR': str(Path(__file__).parents[1] / '.jax_cache'),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  'XLA_FLAGS': '--xla_backend_optimization_level=0'
  ' --xla_cpu_parallel_codegen_split_count=1'
  + (
    ' --xla_cpu_use_fusion_emitters=false'
    if metadata.version('jaxlib').startswith('0.10.')
    else ''
  ),
}

import jax
import matplotlib

# Tracing makes many objects that last. Python looks through them at every 700
# new ones, which took 7 % of the time.
gc.set_threshold(50_000, 20, 20)

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
matplotlib.use('Agg')
