"""Progress: a bar on a terminal, plain lines elsewhere."""

import logging as python_logging
import sys

from absl import logging
import pytest

from sae_jax import progress


@pytest.fixture
def lines(monkeypatch):
  messages = []

  class Catch(python_logging.Handler):
    def emit(self, record):
      messages.append(record.getMessage())

  handler = Catch()
  logger = logging.get_absl_logger()
  logger.addHandler(handler)
  before = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  yield messages
  logging.set_verbosity(before)
  logger.removeHandler(handler)


def test_lines_are_few_and_end_with_all_done(lines):
  with progress.bar(total=5000, unit='tok', desc='read') as bar:
    for _ in range(5000):
      bar.update(1)
  assert len(lines) == 1
  assert 'read: 100%' in lines[0]
  assert 'tok/s' in lines[0]


def test_a_stage_that_breaks_off_says_where(lines):
  with (
    pytest.raises(ValueError, match='stop'),
    progress.bar(total=10, desc='read') as bar,
  ):
    bar.update(4)
    raise ValueError('stop')
  assert not any('100%' in line for line in lines)


def test_iterates_what_it_is_given(lines):
  assert list(progress.bar('abc')) == ['a', 'b', 'c']


def test_a_terminal_gets_a_bar(monkeypatch, lines):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
  with progress.bar(total=3) as bar:
    bar.update(3)
  assert not lines
