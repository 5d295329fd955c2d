"""Claims of work by several workers: one at a time, until they lapse."""

import threading

import pytest

from sae_jax import errors
from sae_jax.storage import leases as leases_lib


class Clock:
  def __init__(self):
    self.at = 1000.0

  def __call__(self):
    return self.at


def worker(tmp_path, name, clock, seconds=60):
  return leases_lib.Leases(f'{tmp_path}/claims', name, seconds, clock)


def test_one_worker_alone_has_a_piece_of_work(tmp_path):
  clock = Clock()
  one, other = (worker(tmp_path, name, clock) for name in ('one', 'other'))
  assert one.take('a') and not other.take('a') and other.take('b')
  assert one.holder('a').worker == 'one' and one.holder('c') is None
  # What is one's own is taken again.
  assert one.take('a')
  one.give_up('a')
  assert other.take('a') and not one.take('a')
  # It was not this one's to give up.
  one.give_up('a')
  assert other.holder('a').worker == 'other'


def test_a_claim_lapses_and_a_renewed_one_does_not(tmp_path):
  clock = Clock()
  one, other = (worker(tmp_path, name, clock) for name in ('one', 'other'))
  assert one.take('a') and one.take('b')
  clock.at += 59
  assert not other.take('a')
  one.renew()
  clock.at += 59
  assert not other.take('a') and not one.lost.is_set()
  clock.at += 2
  assert other.take('a')
  one.renew()
  assert one.lost.is_set() and other.holder('a').worker == 'other'
  # The other piece is still its own.
  assert one.holder('b') == leases_lib.Holder('one', clock.at, 60)


def test_of_many_that_take_at_once_one_gets_it(tmp_path):
  clock = Clock()
  workers = [worker(tmp_path, str(i), clock) for i in range(8)]
  start, got = threading.Barrier(8), []

  def take(own):
    start.wait()
    if own.take('a'):
      got.append(own.worker)

  threads = [threading.Thread(target=take, args=(w,)) for w in workers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert got == [workers[0].holder('a').worker]


def test_claims_are_renewed_while_open_and_given_up_at_the_end(tmp_path):
  one = leases_lib.Leases(f'{tmp_path}/claims', 'one', 0.2)
  renewed = threading.Event()
  renew = one.renew

  def count():
    renew()
    renewed.set()

  one.renew = count
  with one:
    assert one.take('a')
    assert renewed.wait(10)
    assert one.holder('a').worker == 'one'
  assert one.holder('a') is None


def test_what_is_given_up_while_claims_are_renewed_is_free(tmp_path):
  one = worker(tmp_path, 'one', Clock())
  assert one.take('a')
  write, begun, go_on = one._write, threading.Event(), threading.Event()

  def slow(name, generation):
    begun.set()
    assert go_on.wait(10)
    return write(name, generation)

  one._write = slow
  renewing = threading.Thread(target=one.renew)
  renewing.start()
  assert begun.wait(10)
  giving_up = threading.Thread(target=one.give_up, args=('a',))
  giving_up.start()
  # Without a lock it would be given up by now, and then claimed again.
  giving_up.join(0.2)
  go_on.set()
  renewing.join()
  giving_up.join()
  assert one.holder('a') is None and not one.lost.is_set()


def test_a_damaged_claim_is_nobodys(tmp_path):
  one = worker(tmp_path, 'one', Clock())
  (tmp_path / 'claims').mkdir()
  (tmp_path / 'claims' / 'a').write_text('{"worker": ')
  assert one.holder('a') is None and one.take('a')


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'claims').write_text('a file')
  with pytest.raises(errors.UserError, match='cannot use the claims in'):
    worker(tmp_path, 'one', Clock()).take('a')
