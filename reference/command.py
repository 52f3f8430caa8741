"""How a command begins and ends."""

import importlib.util
import io
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

flags.DEFINE_bool('debug', False, 'Shows where a mistake was found.')
# `--help` shows the flag --config as one of the command's own.
flags.disclaim_key_flags()


def _end_quietly_at_ctrl_c() -> None:
  """Without a traceback, until a run finishes a step at it."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


_PROGRAM = sys.modules['__main__'].__spec__
if _PROGRAM is not None and _PROGRAM.name.startswith('reference.'):
  # Now, as a command loads modules for seconds before it runs.
  _end_quietly_at_ctrl_c()


class _Lasting(io.FileIO):
  """Output whose reader may leave: a closed terminal, a `tee` at Ctrl-C.

  What it would have read is lost, and the run goes on.
  """

  def write(self, data: Any) -> int:
    try:
      return super().write(data) or 0
    except OSError:
      return len(data)


def _lasting(stream: Any) -> Any:
  return io.TextIOWrapper(
    io.BufferedWriter(_Lasting(stream.fileno(), 'w', closefd=False)),
    stream.encoding,
    stream.errors,
    # Also into a file, as what is in a buffer is lost at a kill.
    line_buffering=True,
  )


class Mistake(ValueError):
  """What the user can mend: the message alone says what and how."""


def run(main: Callable[[], None]) -> None:
  """Runs a command, in place of `app.run`.

  A `Mistake` ends in its message on standard error and status 2, and so do
  flags that cannot be read and what the library refuses. Any other error is
  ours and has a traceback.

  Args:
    main: takes nothing, as all else must be flags.
  """

  def start(argv: list[str]) -> None:
    del argv
    if not flags.FLAGS['verbosity'].present:
      # At absl's default Orbax tells of every file.
      logging.set_verbosity(logging.WARNING)
    main()

  _end_quietly_at_ctrl_c()
  if sys.stdout is sys.__stdout__:
    sys.stdout, sys.stderr = map(_lasting, (sys.stdout, sys.stderr))
  try:
    app.run(start, flags_parser=_parse)
  except Mistake as mistake:
    _end(mistake)
  except (TypeError, ValueError) as error:
    if not _is_of_the_library(error):
      raise
    _end(
      Mistake(
        f'{error} The library says so, whose arguments are fields of the '
        'config: likely one of `--config.methods`. `--debug` shows where.'
      )
    )


def _is_of_the_library(error: Exception) -> bool:
  """Whether the library raised it, which it does at its edge alone."""
  *_, frame = traceback.extract_tb(error.__traceback__)
  library = importlib.util.find_spec('conadv_optax')
  return library is not None and Path(frame.filename).is_relative_to(
    Path(library.origin or '').parent
  )


def define_config(
  default: Path | None,
) -> flags.FlagHolder[config_dict.ConfigDict]:
  """The flag --config.

  Args:
    default: the config file where none is given.
  """
  try:
    return config_flags.DEFINE_config_file(
      'config',
      None if default is None else str(default),
      'The config file; --config.FIELD=VALUE overrides a field of it.',
    )
  except Exception as error:
    # Overrides of the default are read already here.
    _end(_explain(error))


def define_names(
  name: str, known: Collection[str], text: str
) -> flags.FlagHolder[list[str]]:
  """A flag of some of the known names, with commas between; by default all."""

  def check(given: list[str]) -> bool:
    if unknown := [x for x in given if x not in known]:
      raise flags.ValidationError(
        f'{", ".join(unknown)} is none of {", ".join(known)}.'
      )
    return True

  holder = flags.DEFINE_list(name, list(known), text)
  flags.register_validator(name, check)
  return holder


def _end(mistake: Mistake) -> NoReturn:
  # Not the flag's value, as flags may be what could not be read.
  if '--debug' in sys.argv:
    raise mistake
  sys.stdout.flush()
  print(mistake, file=sys.stderr, flush=True)
  sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    # A file that is not there is told at the first look at a field.
    hasattr(getattr(flags.FLAGS, 'config', None), 'lock')
  except Exception as error:
    raise _explain(error) from error
  if len(rest) > 1:
    raise Mistake(
      f'Everything is a flag; given {rest[1:]}. Likely the dashes are missing: '
      f'`--{rest[1]}`.'
    )
  return rest


def _explain(error: Exception) -> Mistake:
  """Flags and config files are the user's, whatever goes wrong with them."""
  inner = error.args[0] if error.args else None
  if isinstance(error, AttributeError) and isinstance(inner, KeyError):
    field, _, hint = inner.args[0].partition('\n')
    return Mistake(f'The config has no field {field}. {hint}'.rstrip())
  # The lines before are a traceback. A bare assertion says nothing.
  reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
  if isinstance(error, flags.Error):
    return Mistake(f'{reason}\n`--help` names the flags.')
  return Mistake(f'The config cannot be read. {reason}\n`--debug` shows where.')
