"""Stores that are damaged, edited or cannot be written: named in one line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from sae_jax import config, errors, store
from sae_jax.store import layout
from tests.support import small


def test_a_damaged_chunk_does_not_read(tmp_path):
  small.write(str(tmp_path), small.data())
  shard = tmp_path / 'activations' / small.SITES[0] / 'c' / '1' / '0'
  damaged = bytearray(shard.read_bytes())
  damaged[5] ^= 1
  shard.write_bytes(damaged)
  opened = store.open_store(str(tmp_path))
  first = opened.starts[1]
  opened.read_rows(0, first)
  with pytest.raises(errors.UserError, match='cannot read an array'):
    opened.read_rows(first, first + 1)
  with pytest.raises(errors.UserError, match=r'1 objects .*/c/1/0 cannot read'):
    opened.verify()


@pytest.mark.parametrize('name', ['activations', 'tokens', 'stream_index'])
def test_verify_finds_another_store_s_data(tmp_path, name):
  data = small.data()
  # As many tokens are kept of each context, but others.
  keep = np.concatenate(
    [np.sort(part) for part in np.split(data['keep_mask'], range(16, 150, 16))]
  )
  assert (keep != data['keep_mask']).any()
  other = data | {'tokens': small.flip(data['tokens']), 'keep_mask': keep}
  other['kept'] = small.flip(data['kept'])
  small.write(str(tmp_path / 'a'), data)
  small.write(str(tmp_path / 'b'), other)
  shutil.rmtree(tmp_path / 'a' / name)
  shutil.copytree(tmp_path / 'b' / name, tmp_path / 'a' / name)
  opened = store.open_store(str(tmp_path / 'a'))
  opened.read_rows(0, opened.manifest.n_rows)
  with pytest.raises(
    errors.UserError, match=f'{name}.*c/[0-9].* is not what was written'
  ):
    opened.verify()
  store.open_store(str(tmp_path / 'b')).verify()


def test_verify_finds_an_edited_manifest(tmp_path):
  manifest = small.write(str(tmp_path), small.data())
  path = tmp_path / 'manifest.json'
  edited = dataclasses.replace(manifest, seed=7)
  path.write_text(config.to_json(edited))
  with pytest.raises(errors.UserError, match='was edited'):
    store.open_store(str(tmp_path)).verify()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'d_model': 5}, r'activations.* its manifest says float32 \(128, 5\)'),
    ({'dtype': 'bfloat16'}, 'manifest says bfloat16'),
    ({'format_version': 9}, 'format version 9, this sae_jax reads version 3'),
    ({'colour': 'red'}, 'no field colour'),
  ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, message):
  small.write(str(tmp_path), small.data())
  path = tmp_path / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.UserError, match=message):
    store.open_store(str(tmp_path))


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
  (tmp_path / 'manifest.json').write_text('{')
  with pytest.raises(errors.UserError, match=r'manifest\.json in .* damaged'):
    store.open_store(str(tmp_path))


def test_a_missing_array_is_named(tmp_path):
  small.write(str(tmp_path), small.data())
  shutil.rmtree(tmp_path / 'documents')
  opened = store.open_store(str(tmp_path))
  with pytest.raises(errors.UserError, match='cannot read documents of store'):
    opened.documents()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot write store') as caught:
    small.begin(str(tmp_path / 'file' / 'store'), small.data())
  assert '\n' not in str(caught.value)
  assert 'tensorstore_spec' not in str(caught.value)


def test_a_disk_that_fails_midway(tmp_path):
  folder = tmp_path / 'store'
  small.begin(str(folder), small.data(), 1)
  shutil.rmtree(folder / 'activations')
  (folder / 'activations').write_text('in the way')
  (folder / 'shards' / '000000.json').unlink()
  with pytest.raises(errors.UserError, match='cannot write store'):
    small.begin(str(folder), small.data(), 1)
  assert layout.read_manifest(str(folder)) is None
  # With the obstacle gone it goes on.
  (folder / 'activations').unlink()
  small.write(str(folder), small.data())
  store.open_store(str(folder)).verify()


def test_a_lost_shard_does_not_pass_for_zeros(tmp_path):
  small.write(str(tmp_path), small.data())
  lost = tmp_path / 'activations' / small.SITES[0] / 'c' / '1' / '0'
  assert lost.exists()
  lost.unlink()
  opened = store.open_store(str(tmp_path))
  with pytest.raises(errors.UserError, match=r'is missing.*harvest it again'):
    opened.read_rows(0, opened.manifest.n_rows)
