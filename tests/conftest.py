"""Eight CPU devices, strict promotion, and compilations kept between runs."""

import os

import jax
import matplotlib

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update(
  'jax_compilation_cache_dir',
  os.path.join(os.path.dirname(__file__), '..', '.jax_cache'),
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
matplotlib.use('Agg')
