"""Functions of the user's own, which a config names."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from reference.command import Mistake


def load(name: str, field: str) -> Callable[..., Any]:
  """The function that is named `package.module:function`.

  What `python -m` finds, it finds: the folder in which the command was started,
  and what is installed.

  Args:
    name: of the function.
    field: of the config, in which the name stands.

  Raises:
    Mistake: when there is no such module or function. An error in the module
      itself is left as it is.
  """
  module_name, _, function_name = name.partition(':')
  if not module_name or not function_name:
    raise Mistake(
      f'`{field}` names a function as `package.module:function`. Given '
      f'{name!r}. For `make` in my_code.py: `--config.{field}=my_code:make`.'
    )
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    if not f'{module_name}.'.startswith(f'{error.name}.'):
      raise
    raise Mistake(
      f'`{field}` names a function in a module that can be imported. Given '
      f'{name!r}, and there is no module {error.name!r}. Likely its folder is '
      'not the one in which the command was started: `PYTHONPATH=/path/to/the/'
      'folder/that/holds/it python -m reference.main`.'
    ) from None
  function = getattr(module, function_name, None)
  if not callable(function):
    there = [
      key
      for key, value in vars(module).items()
      if callable(value) and not key.startswith('_')
    ]
    nearest = difflib.get_close_matches(function_name, there, n=1, cutoff=0.0)
    what = 'no such name' if function is None else 'no function of that name'
    likely = f' Likely `--config.{field}={module_name}:{nearest[0]}`.'
    raise Mistake(
      f'`{field}` names a function. Given {name!r}, but {module.__file__} has '
      f'{what}.{likely if nearest else ""}'
    )
  return function
