"""Models with something wrong in their files: read, or refused in one line.

SAE_JAX_DAMAGES sets how many damages of each format are tried, from the seed
SAE_JAX_DAMAGES_FROM on.
"""

import os
import pathlib
import random
import struct

import gguf
import numpy as np
import pytest

from sae_jax import errors, subject
from sae_jax.subject.formats import gguf as gguf_lib
from tests.support import damages, gguf_models, hf_folder

COUNT = int(os.environ.get('SAE_JAX_DAMAGES', 20))
FIRST = int(os.environ.get('SAE_JAX_DAMAGES_FROM', 0))
MODELS = ('gpt2', 'llama 3 stretched positions', 'gemma 2, caps and windows')


def read(path):
  """Reads a model, or is refused in a line that can be shown."""
  try:
    return subject.load(path)
  except errors.UserError as error:
    assert str(error).isprintable()
    assert len(str(error)) < 1100
    return None


@pytest.mark.parametrize('name', MODELS)
def test_a_damaged_gguf_file(name, tmp_path):
  path = gguf_models.write(tmp_path / 'm.gguf', hf_folder.golden()[name])
  whole = pathlib.Path(path).read_bytes()
  head = whole.rfind(b'.weight') + 60
  for seed in range(FIRST, FIRST + COUNT):
    rng = random.Random(f'{name} {seed}')
    damage = rng.choice(damages.OF_BYTES)
    pathlib.Path(path).write_bytes(damage(whole, rng, head))
    read(path)


@pytest.mark.parametrize('name', MODELS)
def test_a_damaged_folder(name, tmp_path):
  url = hf_folder.write(tmp_path, hf_folder.golden()[name], n_files=2)
  paths = [
    path for path in sorted(tmp_path.iterdir()) if 'tokenizer' not in path.name
  ]
  for seed in range(FIRST, FIRST + COUNT):
    rng = random.Random(f'{name} {seed}')
    path = rng.choice(paths)
    whole = path.read_bytes()
    odd = damages.odd_json if path.suffix == '.json' else damages.odd_tensors
    path.write_bytes(odd(whole, rng))
    read(url)
    path.write_bytes(whole)
  assert read(url) is not None


def test_an_array_has_no_more_values_than_the_file_has_bytes(
  tmp_path, monkeypatch
):
  record = hf_folder.golden()['gpt2']
  path = gguf_models.write(tmp_path / 'm.gguf', record)
  data = bytearray(pathlib.Path(path).read_bytes())
  at = data.find(b'token_type') + len(b'token_type') + 8
  assert struct.unpack_from('<Q', data, at)[0] == 97
  # The file ends behind a whole value, 2,000 further on.
  del data[at + 8 + 4 * 2000 :]
  struct.pack_into('<Q', data, at, 2**20)
  pathlib.Path(path).write_bytes(data)
  with pytest.raises(errors.UserError, match='it ends before byte'):
    subject.load_tokenizer(path)
  struct.pack_into('<Q', data, at, 2**63 - 1)
  pathlib.Path(path).write_bytes(data)
  with pytest.raises(errors.UserError, match=r'of 9,223,372,036,854,775,807 v'):
    subject.load_tokenizer(path)
  # Control: gguf's own reader goes on behind the end of the file.
  monkeypatch.setattr(gguf_lib, '_Reader', Counting)
  with pytest.raises(Endless):
    subject.load_tokenizer(path)


class Endless(Exception):
  """It would not have ended."""


class Counting(gguf.GGUFReader):
  """gguf's reader, stopped when it has read nothing a thousand times."""

  empty = 0

  def _get(self, *args, **kwargs):
    values = super()._get(*args, **kwargs)
    self.empty += not values.size
    if self.empty > 1000:
      raise Endless
    return values


def test_a_tensor_lies_behind_the_one_before(tmp_path):
  record = hf_folder.golden()['gpt2']
  path = gguf_models.write(tmp_path / 'm.gguf', record)
  data = bytearray(pathlib.Path(path).read_bytes())
  # The second tensor's offset is that of the first one.
  reader = gguf.GGUFReader(path)
  second = reader.tensors[1].field
  offset = second.parts[-1]
  at = second.offset + sum(int(part.nbytes) for part in second.parts) - 8
  assert struct.unpack_from('<Q', data, at)[0] == offset[0] > 0
  struct.pack_into('<Q', data, at, 0)
  pathlib.Path(path).write_bytes(data)
  with pytest.raises(errors.UserError, match='where the one before it ends'):
    subject.load(path)


def test_weights_that_are_no_real_or_no_finite_numbers(tmp_path, caplog):
  record = hf_folder.golden()['gpt2']
  weights = hf_folder.tensors(record)
  name = 'transformer.h.0.mlp.c_fc.weight'
  bad = weights[name].copy()
  bad[0, :3] = (np.nan, np.inf, -np.inf)
  url = hf_folder.write(tmp_path / 'a', record, weights=weights | {name: bad})
  subject.load(url)
  assert 'h.0.mlp.c_fc.weight' in caplog.text
  assert '3 of 9216 values' in caplog.text
  whole = weights | {name: weights[name].astype(np.int8)}
  url = hf_folder.write(tmp_path / 'b', record, weights=whole)
  with pytest.raises(errors.UserError, match='is of the type int8, and not of'):
    subject.load(url)


def test_two_tensors_of_one_name_are_refused(tmp_path):
  record = hf_folder.golden()['gpt2']
  weights = hf_folder.tensors(record)
  weights['ln_f.bias'] = weights['transformer.ln_f.bias'] + 1
  url = hf_folder.write(tmp_path, record, weights=weights)
  with pytest.raises(errors.UserError, match=r'tensor ln_f\.bias twice, as'):
    subject.load(url)
