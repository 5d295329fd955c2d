"""Stores with something wrong in any file: named, or without effect.

SAE_JAX_DAMAGES sets how many damages of each kind are tried, from the seed
SAE_JAX_DAMAGES_FROM on.
"""

import json
import os
import random

import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax.storage import signed as signed_lib
from sae_jax.store import manifest
from tests.support import small

COUNT = int(os.environ.get('SAE_JAX_DAMAGES', 20))
FIRST = int(os.environ.get('SAE_JAX_DAMAGES_FROM', 0))
ODD = (
  None, -1, 0, 1, 3, 0.5, 1e308, float('nan'), float('inf'), 2**31, 2**40,
  10**30, '', 'x', '../../x', '/etc/passwd', 'a\x00b', '\x1b[31m', [], {}, [[]],
  [None], [-1], [2**62], [[2**31, 2**31]] * 3, {'a': 1}, True, '1' * 10_000,
)  # fmt: skip


def flipped(data, rng):
  """One bit."""
  data = bytearray(data)
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return bytes(data)


def broken(data, rng):
  """Bytes that are gone, repeated, no text or too deep."""
  at = rng.randrange(len(data))
  return rng.choice(
    (data[:at], data[:at] + b'\xff' + data[at:], b'', 2 * data, b'[' * 200_000)
  )


def odd(data, rng):
  """A JSON file in which one value is another, or gone."""
  value = json.loads(data)
  inner, key = value, rng.choice(sorted(value))
  while (
    isinstance(inner[key], (dict, list)) and inner[key] and rng.random() < 0.8
  ):
    inner = inner[key]
    keys = range(len(inner)) if isinstance(inner, list) else sorted(inner)
    key = rng.choice(keys)
  if rng.random() < 0.1:
    del inner[key]
  else:
    inner[key] = rng.choice(ODD)
  return json.dumps(value).encode()


def signed(data, rng):
  """The same, with digests that agree: what else a reader depends on."""
  value = json.loads(odd(data, rng))
  value.pop('sha256', None)
  if 'identity' in value:
    value['identity'] = manifest.identity(value)
  return json.dumps(value | {'sha256': signed_lib.digest(value)}).encode()


def read(url, unsealed):
  """All that a store gives."""
  opened = store.open_store(url, unsealed=unsealed)
  arrays = (
    opened.read_rows(0, opened.manifest.n_rows),
    opened.gather(range(0, opened.manifest.n_rows, 7)),
    opened.tokens(),
    opened.documents(),
    opened.positions(),
    opened.stream_index(),
  )
  if not unsealed:
    opened.verify()
  return opened.manifest, arrays


@pytest.fixture(scope='module', params=['sealed', 'begun'])
def whole(request, tmp_path_factory):
  folder, unsealed = tmp_path_factory.mktemp('made'), request.param == 'begun'
  if unsealed:
    small.begin(str(folder), small.data(), 2)
  else:
    small.write(str(folder), small.data())
  return folder, unsealed, read(str(folder), unsealed)


@pytest.mark.parametrize('damage', [flipped, broken, odd, signed])
def test_damage_is_named_or_without_effect(whole, damage):
  folder, unsealed, (sound, sound_arrays) = whole
  named = 0
  names = sorted(small.files(folder))
  if damage in (odd, signed):
    names = [name for name in names if name.endswith('.json')]
  for seed in range(FIRST, FIRST + COUNT):
    rng = random.Random(f'{damage.__name__} {seed}')
    path = folder / rng.choice(names)
    data = path.read_bytes()
    path.write_bytes(damage(data, rng))
    try:
      content, arrays = read(str(folder), unsealed)
      if damage is not signed:
        assert content == sound, (seed, path)
      for got, want in zip(arrays, sound_arrays):
        np.testing.assert_array_equal(got, want)
    except errors.UserError as error:
      assert str(error).isprintable()
      named += 1
    finally:
      path.write_bytes(data)
  assert named >= COUNT // 4
  read(str(folder), unsealed)
