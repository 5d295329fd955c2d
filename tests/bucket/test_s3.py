"""Every stage with s3:// URLs, on a server of this process: as on a disk."""

import json
import logging
import re

from etils import epath
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest
import tensorstore as ts

from sae_jax import checkpoint, errors, subject
from sae_jax.storage import claim, files
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import url as url_lib
from sae_jax.text import corpus
from sae_jax.training import train
from tests.support import hf_folder, pipeline, planted, runs, s3_server, toy


@pytest.fixture(scope='module')
def s3():
  with s3_server.serve() as bucket:
    yield bucket


def test_every_stage_in_s3_is_that_on_disk(on_disk, s3, monkeypatch, tmp_path):
  texts, root = on_disk
  monkeypatch.chdir(tmp_path)
  pipeline.run(texts, 's3://bucket/deep')
  state = runs.saved_state('s3://bucket/deep/run')
  pipeline.assert_as_on_disk(s3.objects('deep'), state, root)
  # Of a URL that it does not know Orbax makes a local path.
  assert not list(tmp_path.iterdir())
  trained = checkpoint.load('s3://bucket/deep/run')
  want = checkpoint.load(str(root / 'run'))
  assert trained.step == want.step == pipeline.STEPS
  runs.assert_same_bits(trained.sae, want.sae)


def test_control_without_its_entry_a_pipeline_ends_in_one_line(
  on_disk, s3, monkeypatch
):
  rest = tuple(found for found in url_lib.BACKENDS if found.scheme != 's3')
  monkeypatch.setattr(url_lib, 'BACKENDS', rest)
  with pytest.raises(errors.UserError) as error:
    pipeline.run(on_disk[0], 's3://bucket/unknown')
  assert str(error.value) == (
    's3://bucket/unknown/store is no URL that is known: '
    'use a local path or a gs:// URL'
  )
  assert not s3.names('unknown')


def test_a_command_takes_the_url(s3):
  planted.write_store('s3://bucket/command/store')
  url = 's3://bucket/command'
  _, said = runs.run(runs.command(f'{url}/store', f'{url}/run', steps=4))
  # It tells nothing of what is as it should be.
  assert 'OCDBT' not in said and '.aws' not in said
  lines = s3.objects('command/run')['metrics.jsonl'].splitlines()
  assert {json.loads(line)['step'] for line in lines} == {1, 2, 3, 4}


def requests(caplog):
  """Method and object of every request since the last call."""
  found = [
    re.search(r'(GET|HEAD|PUT) /bucket/(\S*)', message)
    for message in caplog.messages
  ]
  caplog.clear()
  return [match.groups() for match in found if match]


def test_of_two_writers_the_first_one_s_bytes_stay(s3, caplog):
  caplog.set_level(logging.INFO, 'werkzeug')
  spec = url_lib.kvstore('s3://bucket/two')
  folder = ts.KvStore.open(spec).result()
  requests(caplog)
  assert files.create(folder, 'a', b'first')
  # In one request: between two another writer's could come.
  assert requests(caplog) == [('PUT', 'two/a')]
  assert not files.create(folder, 'a', b'second')
  assert files.create(folder, 'a', b'first')
  assert s3.objects('two') == {'a': b'first'}
  # Control: what TensorStore does by itself.
  requests(caplog)
  plain = ts.KvStore.open(spec | {'use_conditional_write': False}).result()
  assert files.create(plain, 'b', b'first')
  assert requests(caplog) == [('HEAD', 'two/b'), ('PUT', 'two/b')]


def test_a_checkpoint_without_its_last_object_is_not_there(s3, caplog):
  url = 's3://bucket/torn'
  planted.write_store(f'{url}/store')
  done = planted.train_config(steps=20)
  train.train(done, f'{url}/store', f'{url}/run')
  want = runs.saved_state(f'{url}/run')
  assert int(want.step) == 20
  s3.delete('torn/run/checkpoints/20/commit_success.txt')
  assert checkpoint.load(f'{url}/run').step == 10
  # Control: Orbax's own settings, which look for names of unfinished ones.
  folder = epath.Path(f'{url}/run/checkpoints')
  with ocp.training.Checkpointer(folder) as checkpointer:
    assert [found.step for found in checkpointer.checkpoints] == [10, 20]
  # The run goes on from the one that is whole, to the same end.
  train.train(done, f'{url}/store', f'{url}/run')
  runs.assert_same_bits(runs.saved_state(f'{url}/run'), want)


def test_control_orbax_itself_writes_to_a_local_folder(s3):
  from orbax.checkpoint._src.serialization import tensorstore_utils

  orbax_lib.context('s3://bucket/x')
  build = tensorstore_utils.build_kvstore_tspec
  want = url_lib.kvstore('s3://bucket/x/name')
  assert build('s3://bucket/x', 'name', use_ocdbt=False) == want
  with pytest.raises(ValueError, match='s3://bucket/x is not opened with OCDB'):
    build('s3://bucket/x', 'name')
  plain = build.__wrapped__
  assert plain('s3://bucket/x', 'name', use_ocdbt=False) == {
    'driver': 'file',
    'path': 's3:/bucket/x/name',
  }
  for known in ('gs://bucket/x', '/x'):
    assert build(known, 'name') == plain(known, 'name')


def test_what_another_writer_put_there_is_seen(s3):
  folder = epath.Path('s3://bucket/seen')
  s3.put('seen/a', b'1')
  assert [path.name for path in folder.iterdir()] == ['a']
  s3.put('seen/a', b'two')
  s3.put('seen/b', b'')
  assert (folder / 'a').read_text() == 'two'
  assert (folder / 'b').exists()
  s3.delete('seen/a')
  assert [path.name for path in folder.iterdir()] == ['b']
  # Control: with s3fs's own settings.
  plain = s3_server.s3fs.S3FileSystem(use_listings_cache=True)
  assert plain.ls('bucket/seen') == ['bucket/seen/b']
  s3.put('seen/a', b'3')
  assert not plain.exists('bucket/seen/a')


def test_small_files_appear_whole(s3):
  with claim.claim('s3://bucket/small'), claim.claim('s3://bucket/small'):
    files.write_text('s3://bucket/small/deep/a', 'one')
    files.write_text('s3://bucket/small/deep/a', 'é')
  assert s3.objects('small') == {'deep/a': 'é'.encode()}
  with pytest.raises(OSError, match='cannot write s3://nobody/a: '):
    files.write_text('s3://nobody/a', '')
  with pytest.raises(errors.UserError, match='cannot write store s3://nobody'):
    planted.write_store('s3://nobody/store')


def test_a_bucket_that_is_not_there_is_not_made(s3, store):
  message = 'there is no bucket s3://nobody: make it, or check the URL'
  with pytest.raises(errors.UserError, match=message):
    train.train(planted.train_config(), store, 's3://nobody/run')
  with pytest.raises(errors.UserError, match='no checkpoints under s3://nobo'):
    checkpoint.load('s3://nobody/run')
  assert not epath.Path('s3://nobody').exists()
  # Control: what Orbax does, and etils with it.
  epath.Path('s3://nobody/run').mkdir(parents=True)
  assert epath.Path('s3://nobody').exists()


def test_texts_are_those_on_disk(s3, tmp_path):
  path = toy.write_texts(tmp_path)
  s3.put('texts/texts.jsonl', path.read_bytes())

  def texts(source):
    return [found.text for found in corpus.documents((source,), 0, 1000)]

  want = texts(str(path))
  assert len(want) == 80
  for place in ('texts.jsonl', '', '*.jsonl'):
    assert texts(f's3://bucket/texts/{place}') == want


def test_a_subject_is_that_on_disk(s3, tmp_path):
  record = hf_folder.golden()['llama 3 stretched positions']
  record = record | {'config': record['config'] | {'num_hidden_layers': 1}}
  folder = hf_folder.write(tmp_path, record, n_files=2)
  for path in tmp_path.iterdir():
    s3.put(f'subject/plain/{path.name}', path.read_bytes())
  local = subject.load(folder)
  remote = subject.load('s3://bucket/subject/plain')
  subject.save(remote, 's3://bucket/subject/saved')
  names = s3.names('subject/saved')
  assert 'params/commit_success.txt' in names
  again = subject.load('s3://bucket/subject/saved')
  for found in (remote, again):
    assert found.weights_sha256 == local.weights_sha256
    assert found.config == local.config
    jax.tree.map(np.testing.assert_array_equal, found.params, local.params)
