"""Config dataclasses as absl flags, and the frame of every binary."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import decimal
import logging as python_logging
import os
import select
import signal
import sys
from typing import Any, TypeVar

from absl import app, flags, logging
import jax

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import backend
from sae_jax.storage import url as url_lib

_Config = TypeVar('_Config')
_USER_ERROR = 2
_OUTPUTS = (1, 2)
_OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED'
_urls: list[str] = []
_HELP = {'--help', '-help', '-h', '--helpshort', '--helpfull'}


def define(kind: type) -> None:
  """Defines a flag for every field of a config, nested ones included."""
  for field in config_lib.leaves(kind):
    text = field.metadata['help']
    choices = field.metadata.get('choices')
    if choices:
      flags.DEFINE_enum(field.name, field.default, choices, text)
    elif isinstance(field.default, bool):
      flags.DEFINE_bool(field.name, field.default, text)
    elif isinstance(field.default, int):
      define_integer(field.name, field.default, text)
    elif isinstance(field.default, float):
      flags.DEFINE_float(field.name, field.default, text)
    elif isinstance(field.default, tuple):
      flags.DEFINE_list(field.name, list(field.default), text)
    else:
      flags.DEFINE_string(field.name, field.default, text)
    if field.name == 'from_checkpoint':
      # A field cannot be called so.
      flags.DEFINE_alias('from', field.name)


class _IntegerParser(flags.IntegerParser):
  """Reads 131072, 1_000_000 and 10e9 alike, exactly, and no fraction."""

  def convert(self, argument: int | str) -> int:
    if not isinstance(argument, str):
      return super().convert(argument)
    try:
      value = decimal.Decimal(argument)
    except decimal.InvalidOperation:
      value = decimal.Decimal('nan')
    if not value.is_finite() or value != value.to_integral_value():
      raise ValueError(
        f'{argument!r} is not an integer: write 131072, 1_000_000 or 10e9'
      )
    # Checked before int(), which would write 1e999999999 in a billion digits.
    if not -(2**63) <= value < 2**63:
      raise ValueError(f'{argument!r} does not fit into 64 bits')
    return int(value)


def integer(text: str) -> int:
  """An exact integer, as flags take them.

  Raises:
    ValueError: if it is none.
  """
  return _IntegerParser().parse(text)


def define_integer(name: str, default: int, text: str) -> None:
  """Defines a flag for an exact integer, as 131072, 1_000_000 or 10e9."""
  flags.DEFINE(
    _IntegerParser(),
    name,
    default,
    text,
    serializer=flags.ArgumentSerializer(),
  )


def define_url(name: str, text: str, required: bool = True) -> None:
  """Defines a flag for a local path or the URL of a bucket."""
  if required:
    _urls.append(name)
  flags.DEFINE_string(
    name, None, f'{text} ({url_lib.kinds()})', required=required
  )


def define_processes() -> None:
  """Defines the flags of a run on many hosts, for `mesh.start_processes`."""
  flags.DEFINE_string(
    'coordinator',
    '',
    "how the processes of a run on many hosts find each other: 'auto' on a TPU"
    ' slice, otherwise host:port of the first process; empty for a run of one '
    'process',
  )
  define_integer(
    'num_processes',
    0,
    'number of processes of the run, with --coordinator=host:port',
  )
  define_integer(
    'process_id',
    -1,
    'number of this process, from 0, with --coordinator=host:port',
  )


def help_text() -> str:
  """All flags of this program with their help; not those of libraries."""
  values, program = flags.FLAGS, sys.argv[0]
  for module, defined in values.flags_by_module_dict().items():
    if module.partition('.')[0] == __name__.partition('.')[0]:
      for flag in defined:
        values.register_key_flag_for_module(program, flag)
  return values.main_module_help()


flags.DEFINE_bool('debug', False, 'show the traceback of an error')


def read(kind: type[_Config]) -> _Config:
  """The config that the parsed flags give.

  Raises:
    UserError: if a value is not allowed.
  """
  values = {}
  for field in config_lib.leaves(kind):
    value = flags.FLAGS[field.name].value
    values[field.name] = tuple(value) if isinstance(value, list) else value
  return config_lib.from_flat(kind, values)


def values_of(
  texts: list[str],
  flag: str,
  others: Mapping[str, Callable[[str], Any]] | None = None,
) -> dict[str, tuple]:
  """The values of fields from texts such as k=16,32, as their flags read them.

  Args:
    texts: one for each field.
    flag: the flag that has them.
    others: what reads a value of what is no flag, by name.

  Raises:
    UserError: if a text names no flag or no value, or a field twice.
  """
  values = {}
  for text in texts:
    name, _, listed = text.partition('=')
    read_value = (others or {}).get(name)
    if read_value is None and name in flags.FLAGS:
      read_value = flags.FLAGS[name].parser.parse
    if read_value is None or not listed or name in values:
      raise errors.UserError(
        f'--{flag}={text} is not a field of its own and its values: '
        f'write --{flag}=k=16,32, once for each field'
      )
    try:
      values[name] = tuple(read_value(value) for value in listed.split(','))
    except ValueError as error:
      raise errors.UserError(f'--{flag}={text}: {error}') from error
  return values


def url(name: str) -> str:
  """A URL flag's value; local paths are made absolute, ~ is expanded.

  Raises:
    UserError: if it is empty or of a kind of storage that is not supported.
  """
  value = flags.FLAGS[name].value
  if value is None:
    raise errors.UserError(f'--{name} is required; --help lists the flags')
  return _absolute(name, value)


def urls(name: str) -> tuple[str, ...]:
  """The URLs of a flag that has several, separated by commas; see `url`."""
  values = flags.FLAGS[name].value
  if not values:
    raise errors.UserError(f'--{name} is required; --help lists the flags')
  return tuple(_absolute(name, value) for value in values)


def _absolute(name: str, value: str) -> str:
  if not value:
    raise errors.UserError(f'{name} is empty: give {url_lib.kinds()}')
  try:
    return url_lib.absolute(os.path.expanduser(value))
  except errors.UserError as error:
    raise errors.UserError(f'{name} {error}') from error


def run(main: Callable[[], Any], description: str) -> None:
  """Runs a binary: parses flags, calls main, turns errors into one line.

  Exit codes: 0, 2 for what the user can mend (wrong flags, missing files,
  shapes that do not fit), 1 for everything else.

  Args:
    main: the binary's work; reads its flags by `read` and `url`.
    description: what --help says first.
  """

  def parse(argv: list[str]) -> list[str]:
    # absl's own --help exits with 1 and lists the flags of __main__ alone.
    if _HELP & set(argv[1:]):
      print(f'{description}\n{help_text()}')
      sys.exit(0)
    try:
      rest = flags.FLAGS(argv)
    except flags.Error as error:
      absent = [n for n in _urls if flags.FLAGS[n].value is None]
      if absent and 'other than None' in str(error):
        _fail(f'--{absent[0]} is required; --help lists the flags', _USER_ERROR)
      _fail(f'{error}; --help lists the flags', _USER_ERROR)
    if len(rest) > 1:
      _fail(f'{rest[1]!r} is not a flag: write --name=value', _USER_ERROR)
    return rest

  def guarded(_) -> None:
    backend.skip_absent_tpu()
    try:
      with _fewer_records(flags.FLAGS.debug):
        main()
    except errors.UserError as error:
      if flags.FLAGS.debug:
        raise
      _fail(str(error), _USER_ERROR)
    except OSError as error:
      if flags.FLAGS.debug or _unread():
        raise
      _fail(f'{error}: check the path, free space and your access', _USER_ERROR)
    except (
      errors.DefectError,
      FloatingPointError,
      MemoryError,
      jax.errors.JaxRuntimeError,
    ) as error:
      if flags.FLAGS.debug:
        raise
      if isinstance(error, MemoryError) or _OUT_OF_MEMORY in str(error):
        # XLA's message has a table of the largest arrays below.
        _fail(
          f'there is too little memory ({errors.reason(error)}): use smaller '
          'sizes, or more devices (--debug shows where)',
          _USER_ERROR,
        )
      _fail(f'{errors.printable(error)} (--debug shows where)', 1)
    except KeyboardInterrupt:
      if flags.FLAGS.debug:
        raise
      _fail('interrupted; the same command goes on or starts over', 130)

  with _quiet_where_unread():
    app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def _quiet_where_unread() -> Iterator[None]:
  """Ends the process as SIGPIPE would where nobody reads its output any more.

  SIGPIPE itself stays ignored, as it would also come of sockets.
  """
  try:
    try:
      yield
    finally:
      # Not at exit, where Python would complain.
      if sys.stdout is not None:
        sys.stdout.flush()
  except BrokenPipeError:
    if not _unread():
      raise
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in _OUTPUTS:
      os.dup2(nowhere, number)
    sys.exit(128 + signal.SIGPIPE)


def _unread() -> bool:
  """Whether the output or the errors go to a pipe that nobody reads."""
  poll = select.poll()
  for number in _OUTPUTS:
    poll.register(number, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


@contextlib.contextmanager
def _fewer_records(debug: bool) -> Iterator[None]:
  """Shows all warnings while it is open, but INFO only if it is ours.

  A program that has called a stage's `main` shows its own records again.
  """
  own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  shown = (own, os.path.abspath(sys.argv[0]))

  def is_shown(record: python_logging.LogRecord) -> bool:
    # Orbax logs its exceptions, several times, and raises them too.
    if record.exc_info and 'orbax' in record.pathname and not debug:
      return False
    return record.levelno >= python_logging.WARNING or (
      record.pathname.startswith(shown)
    )

  handler = logging.get_absl_handler()
  handler.addFilter(is_shown)
  # After an error it stays: threads of Orbax may log while the process ends.
  yield
  handler.removeFilter(is_shown)


def _fail(message: str, code: int) -> None:
  print('error: ' + ' '.join(message.split()), file=sys.stderr)
  sys.stderr.flush()
  sys.exit(code)
