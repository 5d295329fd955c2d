"""Claims of work in buckets, whose answers may be lost."""

import threading

import pytest

from sae_jax.storage import leases as leases_lib
from tests.support import s3_server
from tests.support.gcs import gcs_faults, served


def take_turns(url):
  """Workers claim, renew, lose and give up pieces of work."""
  clock = [1000.0]
  one, other = (
    leases_lib.Leases(url, name, 60, lambda: clock[0])
    for name in ('one', 'other')
  )
  for name in 'abcdefgh':
    assert one.take(name) and not other.take(name)
  one.give_up('a')
  assert one.holder('a') is None and other.take('a') and not one.take('a')
  clock[0] += 50
  one.renew()
  clock[0] += 50
  assert not other.take('b')
  clock[0] += 20
  assert other.take('b') and not one.lost.is_set()
  one.renew()
  assert one.lost.is_set()
  assert other.holder('b').worker == 'other'
  assert all(one.holder(name).worker == 'one' for name in 'cdefgh')


def crowd(url):
  """Many take the same piece at once; those that got it."""
  workers = [leases_lib.Leases(url, str(i), 60) for i in range(6)]
  start, holders = threading.Barrier(len(workers)), []

  def take(own):
    start.wait()
    if own.take('x'):
      holders.append(own.worker)

  threads = [threading.Thread(target=take, args=(w,)) for w in workers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return holders


@pytest.mark.parametrize('seed', range(3))
def test_claims_in_a_bucket_whose_answers_are_lost(monkeypatch, seed):
  faults = gcs_faults.Faults(seed, 0.3, ('503', '429', 'drop', 'drop-after'))
  with served.bucket(monkeypatch, faults) as server:
    take_turns('gs://bucket/claims')
    holders = crowd('gs://bucket/crowd')
    assert server.faults_met.total() > 5
  assert len(holders) == 1


def test_claims_in_s3():
  with s3_server.serve():
    take_turns('s3://bucket/claims')
    assert len(crowd('s3://bucket/crowd')) == 1
