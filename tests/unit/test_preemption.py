"""A notice to stop, taken within a process."""

import signal
import threading

from sae_jax.training import preemption, run, train
from tests.support import planted, runs


def test_a_notice_lasts_as_long_as_it_is_open():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.Notice() as notice:
    assert not notice.asked(1)
    signal.raise_signal(signal.SIGTERM)
    assert notice.asked(2) and notice.asked(3)
  assert signal.getsignal(signal.SIGTERM) is before
  with preemption.Notice() as notice:
    assert not notice.asked(1)


def test_a_process_that_has_trained_ends_by_itself(monkeypatch):
  monkeypatch.setattr('sys.argv', ['sae-train'])
  before = signal.getsignal(signal.SIGTERM)
  try:
    preemption.listen()
    with preemption.Notice():
      pass
    # A handler of Python's is gone, and SIGTERM deadly, as Python ends.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGTERM, before)


def test_outside_of_the_main_thread_nothing_is_noticed(store, tmp_path):
  before, states = signal.getsignal(signal.SIGTERM), []

  def work():
    config = planted.train_config(steps=3)
    states.append(train.train(config, store, str(tmp_path / 'run')))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert int(states[0].step) == 3
  assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_between_steps_saves_that_step(store, tmp_path, monkeypatch):
  advance = run.Run.advance

  def raises(self, *args):
    advance(self, *args)
    if self.done == 17:
      signal.raise_signal(signal.SIGTERM)

  config = planted.train_config()
  whole = train.train(config, store, str(tmp_path / 'whole'))
  monkeypatch.setattr(run.Run, 'advance', raises)
  workdir = str(tmp_path / 'run')
  state = train.train(config, store, workdir)
  assert int(state.step) == 17
  assert runs.saved_steps(workdir)[-1] == 17
  monkeypatch.undo()
  state = train.train(config, store, workdir)
  runs.assert_same_bits(state, whole)
  runs.assert_same_run(workdir, str(tmp_path / 'whole'))
