"""Buckets that forbid writing: one line, nothing lost."""

import pytest

from sae_jax import errors
from sae_jax.training import train
from tests.support import planted, toy
from tests.support.gcs.served import bucket


@pytest.mark.parametrize('allowed', [0, 1, 40])
def test_a_bucket_that_forbids_writing_is_named(
  texts, tmp_path, monkeypatch, allowed
):
  """It forbids all, all but reading, or the second half."""
  plan, left = toy.config(texts), [allowed]

  def forbids(method, what, target):
    left[0] -= what == 'write'
    return left[0] < 0 or not allowed

  with bucket(monkeypatch) as server:
    server.forbids = forbids
    with pytest.raises(errors.UserError) as caught:
      toy.run(plan, 'gs://bucket/store')
    said = str(caught.value)
    assert 'gs://bucket/store' in said and 'PERMISSION_DENIED' in said
    assert 'your access' in said and '\n' not in said
    # Asking again would not help.
    assert sum(method == 'POST' for method, *_ in server.log) <= allowed + 1
    assert len(server.objects['bucket']) == allowed
    server.forbids = lambda *_: False
    toy.run(plan, 'gs://bucket/store')
  toy.run(plan, tmp_path / 'store')
  assert toy.stored(tmp_path / 'store') == {
    name.removeprefix('store/'): o.data
    for name, o in server.objects['bucket'].items()
  }


def test_a_workdir_that_cannot_be_written(store, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  for workdir in (str(tmp_path / 'file' / 'run'), '/proc/none'):
    with pytest.raises(OSError, match=workdir):
      train.train(planted.train_config(), store, workdir)
  with bucket(monkeypatch) as server:
    server.forbids = lambda method, what, target: what == 'write'
    with pytest.raises(OSError, match=r'gs://bucket/run/.*: PERMISSION_DENIED'):
      train.train(planted.train_config(), store, 'gs://bucket/run')
    assert len(server.log) < 40
  assert not server.objects['bucket']
