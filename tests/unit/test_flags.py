"""What flags take, in process; `test_cli` runs the binaries."""

import importlib
import logging
import os
import signal
import sys
import types

from absl import flags as absl_flags
from absl import logging as absl_logging
import jax
import numpy as np
import pytest

from sae_jax import config, errors
from sae_jax.browser.index import BrowseConfig
from sae_jax.cli import flags, huge_pages
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.probing.report import ProbeConfig
from sae_jax.training.config import TrainConfig
from tests.support import binaries

REQUIRED = ['--store=s', '--workdir=w']


def parse(values, *arguments):
  """Parses the arguments of a command."""
  given = [flag for flag in REQUIRED if flag[2:].split('=')[0] in values]
  values(['binary', *given, *arguments])
  return values


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('131072', 131072),
    ('1_000_000', 10**6),
    ('1e6', 10**6),
    ('10e9', 10**10),
    ('1.5e3', 1500),
    ('-1', -1),
    ('0', 0),
    # A float of 53 bits would round both.
    ('9007199254740993', 2**53 + 1),
    ('9007199254740.993e3', 2**53 + 1),
    (str(2**63 - 1), 2**63 - 1),
  ],
)
def test_an_integer_is_exact_in_every_spelling(text, value):
  with binaries.defined(lambda: flags.define_integer('many', 7, 'of it')) as f:
    assert parse(f).many == 7
    assert parse(f, f'--many={text}').many == value
    assert type(f.many) is int
    assert f['many'].serialize() == f'--many={value}'


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    ('1.5', 'is not an integer: write 131072, 1_000_000 or 10e9'),
    ('1e-3', 'is not an integer'),
    ('many', 'is not an integer'),
    ('', 'is not an integer'),
    ('inf', 'is not an integer'),
    ('nan', 'is not an integer'),
    ('1e99999999999999999999', 'is not an integer'),
    (str(2**63), 'does not fit into 64 bits'),
    ('1e999999999', 'does not fit into 64 bits'),
  ],
)
def test_what_is_no_integer_is_refused(text, part):
  with binaries.defined(lambda: flags.define_integer('many', 7, 'of it')) as f:
    with pytest.raises(absl_flags.IllegalFlagValueError) as error:
      parse(f, f'--many={text}')
    assert str(error.value).startswith(f'flag --many={text}: {text!r} ')
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
  ('name', 'some'),
  [
    ('sae-harvest', {'n_tokens', 'process_index', 'process_count'}),
    ('sae-plan', {'tokens', 'num_slices', 'compiles', 'batch_size'}),
    ('sae-train', {'steps', 'num_processes', 'process_id'}),
  ],
)
def test_every_integer_of_the_binaries_takes_an_exponent(name, some):
  ours = binaries.flags_of(name)
  with binaries.defined(binaries.MODULES[name].define) as values:
    integers = [flag for flag in ours if values[flag].flag_type() == 'int']
    assert some <= set(integers)
    for flag in integers:
      assert parse(values, f'--{flag}=1e3')[flag].value == 1000


def test_absl_takes_no_exponent():
  """Control: an integer flag that is not ours does not pass these tests."""
  with (
    binaries.defined(
      lambda: absl_flags.DEFINE_integer('many', 7, 'of it')
    ) as values,
    pytest.raises(absl_flags.IllegalFlagValueError),
  ):
    parse(values, '--many=1e3')


def test_bounds_of_a_field_hold_for_every_spelling():
  with binaries.defined(binaries.MODULES['sae-train'].define) as values:
    parse(values, '--seed=3e9')
    with pytest.raises(ValueError, match='seed 3000000000 must be 2147483647'):
      flags.read(TrainConfig)
    parse(values, '--seed=2e9')
    assert flags.read(TrainConfig).seed == 2 * 10**9


@pytest.mark.parametrize(
  ('name', 'kind'),
  [
    ('sae-harvest', HarvestConfig),
    ('sae-train', TrainConfig),
    ('sae-probe', ProbeConfig),
    ('sae-browse', BrowseConfig),
    ('sae-plan', TrainConfig),
  ],
)
def test_every_field_of_a_config_is_a_flag(name, kind):
  ours = binaries.flags_of(name)
  for field in config.leaves(kind):
    # Of an enum the help begins with its values.
    assert ours[field.name].endswith(field.metadata['help'])


@pytest.mark.parametrize('name', binaries.MODULES)
def test_help_lists_every_flag_whichever_module_defines_it(name):
  expected = binaries.flags_of(name)
  with binaries.defined(binaries.MODULES[name].define) as values:
    # Control: what absl lists where the main module is another.
    assert binaries.missing_in_help(values.main_module_help(), expected)
    assert not binaries.missing_in_help(flags.help_text(), expected)


def test_help_lists_no_flag_of_a_library():
  with binaries.defined(lambda: flags.define_integer('many', 7, 'of it')):
    listed = flags.help_text()
  assert '--many: of it' in listed
  assert '--verbosity' in absl_flags.FLAGS.get_help()
  assert '--verbosity' not in listed


@pytest.mark.parametrize(
  ('error', 'code'),
  [
    (errors.UserError('d is 0: use 8'), 2),
    (errors.DefectError('the step has no AuxK'), 1),
    (FloatingPointError('nan'), 1),
  ],
)
def test_an_error_is_one_line_and_an_exit_code(
  monkeypatch, capsys, error, code
):
  with pytest.raises(SystemExit) as stop:
    run_failing(monkeypatch, error)
  assert stop.value.code == code
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line.startswith(f'error: {error}')


@pytest.mark.parametrize(
  ('allocate', 'size'),
  [
    (lambda: np.zeros(10**15), 'Unable to allocate 7.11 PiB'),
    (lambda: jax.numpy.zeros(10**15), 'Out of memory allocating 4000000000'),
    (lambda: bytearray(10**15), 'MemoryError'),
  ],
)
def test_too_little_memory_is_one_line(allocate, size, monkeypatch, capsys):
  with pytest.raises(Exception) as raised:
    allocate()
  with pytest.raises(SystemExit) as stop:
    run_failing(monkeypatch, raised.value)
  assert stop.value.code == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line.startswith('error: there is too little memory (') and size in line
  assert len(line) < 300


def test_control_other_errors_keep_their_traceback(monkeypatch):
  with pytest.raises(ValueError, match='unforeseen'):
    run_failing(monkeypatch, ValueError('unforeseen'))


def run_failing(monkeypatch, error):
  """Runs a binary without flags, whose work raises an error."""

  def work():
    raise error

  monkeypatch.setattr(sys, 'argv', ['binary'])
  with binaries.defined(lambda: None):
    flags.run(work, '')


def closed_pipe():
  """A file that writes to a pipe whose other end is closed."""
  read, write = os.pipe()
  os.close(read)
  return open(write, 'w')


@pytest.mark.parametrize('name', binaries.MODULES)
def test_output_that_nobody_reads_is_no_error(name, monkeypatch, capsys):
  module, output = binaries.MODULES[name], closed_pipe()
  monkeypatch.setattr(flags, '_OUTPUTS', (output.fileno(),))
  monkeypatch.setattr(sys, 'stdout', output)
  monkeypatch.setattr(sys, 'argv', [name, '--help'])
  with binaries.defined(module.define), pytest.raises(SystemExit) as ended:
    flags.run(module.work, module.__doc__)
  # As a shell tells the end by SIGPIPE.
  assert ended.value.code == 141
  assert capsys.readouterr().err == ''
  # What is left in the buffer goes nowhere, and is no error at exit.
  output.close()


def test_control_another_pipe_that_breaks_is_an_error(monkeypatch, capsys):
  """Such as a connection of the work itself, while its output is read."""
  with pytest.raises(SystemExit) as ended:
    run_failing(monkeypatch, BrokenPipeError(32, 'Broken pipe', '/a/b'))
  assert ended.value.code == 2
  assert "Broken pipe: '/a/b': check the path" in capsys.readouterr().err


@pytest.mark.parametrize('name', binaries.MODULES)
def test_a_program_that_calls_a_stage_begins_once(name, monkeypatch, capsys):
  def starts_again():
    raise AssertionError

  handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  monkeypatch.setattr(huge_pages, 'use_huge_pages', starts_again)
  monkeypatch.setattr(sys, 'argv', [name, '--help'])
  main = importlib.import_module(f'sae_jax.cli.{name[4:]}').main
  with binaries.defined(lambda: None), pytest.raises(SystemExit) as ended:
    main()
  assert ended.value.code == 0
  assert capsys.readouterr().out.startswith(f'{name}: ')
  # Its signals stay its own.
  assert handlers == [
    signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)
  ]
  # Control: as the console script of the same name would.
  script = types.SimpleNamespace(__file__=f'/bin/{name}', __spec__=None)
  monkeypatch.setitem(sys.modules, '__main__', script)
  with pytest.raises(AssertionError):
    main()
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def test_after_a_stage_a_program_shows_its_own_records():
  def is_shown():
    record = logging.LogRecord(
      'absl', logging.ERROR, 'orbax/x.py', 1, 'no', (), (None, None, None)
    )
    return bool(absl_logging.get_absl_handler().filter(record))

  before = is_shown()
  # Flags need not be parsed any more.
  with flags._fewer_records(debug=False):
    assert not is_shown()
  with flags._fewer_records(debug=True):
    assert is_shown() == before
  assert is_shown() == before
