"""Files of features that are damaged or hostile are refused in one line."""

import io
import os
import pickle
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.features import results, table
from tests.support import synthetic_features

N = 12


@pytest.fixture(scope='module')
def features():
  arrays, _, vocabulary = synthetic_features.make(
    n_latents=N, n_examples=3, window=8, n_tokens=2000
  )
  return arrays, len(vocabulary)


def packed(arrays, method=zipfile.ZIP_DEFLATED, names=None, extra=()):
  """The bytes of a zip of arrays, or of bytes in an array's place."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', method) as archive:
    for name, array in [*arrays.items(), *extra]:
      data = io.BytesIO()
      if isinstance(array, bytes):
        data.write(array)
      else:
        np.save(data, array, allow_pickle=True)
      file = (names or {}).get(name, f'{name}.npy')
      archive.writestr(file, data.getvalue())
  return out.getvalue()


def header(shape, dtype='<f4', version=b'\1\0'):
  """The head of an .npy file, without data."""
  text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}"
  text = text.encode().ljust(118) + b'\n'
  return b'\x93NUMPY' + version + len(text).to_bytes(2, 'little') + text


def refused(data, message, n_latents=N):
  with pytest.raises(errors.UserError, match=message) as raised:
    table.parse(data, 'P/features.npz', n_latents)
  text = str(raised.value)
  assert text.startswith('P/features.npz') and text.isprintable()


def test_a_sound_file_is_read(features):
  arrays, vocabulary_size = features
  for data in (table.to_bytes(arrays), packed(arrays, zipfile.ZIP_STORED)):
    read = table.parse(data, 'P/features.npz', N)
    table.check(read, vocabulary_size)
    for name, array in arrays.items():
      np.testing.assert_array_equal(read[name], array)
  # An array of which the columns lie together is written row by row.
  turned = {k: np.asfortranarray(v) for k, v in arrays.items()}
  assert table.parse(table.to_bytes(turned), '', N).keys() == read.keys()


class Harm:
  def __reduce__(self):
    return os.mkdir, ('harmed',)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'count': np.array([Harm()] * N, object)}, 'count.npy holds object, not'),
    ({'count': np.zeros(N, np.float64)}, 'holds float64, not int64'),
    ({'top_acts': np.zeros((N, 3), 'f4')}, r'top_acts has shape \(12, 3\)'),
    ({'count': np.zeros(N + 1, 'i8')}, 'count has 13 along N but latent_ids'),
    ({'count': header((2**40,), '<i8')}, r'bytes for the shape \(10995'),
    ({'count': header((10**30,), '<i8')}, 'bytes for the shape'),
    ({'count': header((-1,), '<i8')}, 'bytes for the shape'),
    ({'count': header("__import__('os').mkdir('harmed')")}, 'not a readable'),
    ({'count': header('(1,' * 30)}, 'not a readable npz'),
    ({'count': header((N,), '<U1000000000')}, 'not a readable npz'),
    ({'count': header((N,), version=b'\2\0')}, 'of another version'),
    ({'count': b''}, 'not a readable npz'),
  ],
)
def test_no_array_is_unpacked_that_is_not_as_declared(
  features, change, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  refused(packed(features[0] | change), message)
  assert not list(tmp_path.iterdir())


def test_names_and_methods_of_a_zip_are_those_of_numpy(features):
  arrays = features[0]
  for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
    refused(packed(arrays, method), 'not packed as numpy packs')
  refused(packed(arrays, names={'max': '../../max.npy'}), 'features lack max')
  extra = [('extra', arrays['max'])]
  refused(packed(arrays, extra=extra), 'it has 24 members for 23 arrays')
  with pytest.warns(UserWarning, match='Duplicate name'):
    twice = packed(arrays, extra=[('max', arrays['max'])])
  refused(twice, 'it has 24 members for 23 arrays')
  lacking = {k: v for k, v in arrays.items() if k != 'skew'}
  refused(packed(lacking), 'features lack skew: run sae-probe of this version')
  encrypted = bytearray(table.to_bytes(arrays))
  encrypted[encrypted.rfind(b'PK\x01\x02') + 8] |= 1
  refused(bytes(encrypted), 'not a readable npz')
  for data in (b'', pickle.dumps(Harm()), b'PK\x05\x06' + bytes(18)):
    refused(data, 'not a readable npz|features lack')


def test_sizes_are_compared_before_anything_is_unpacked(features):
  arrays = features[0]
  # 96 megabytes in a tenth of one.
  wide = np.zeros((N, 10**6), np.int64)
  data = table.to_bytes(
    arrays | {'hist_counts': wide, 'hist_edges': np.zeros(10**6 + 1, 'f4')}
  )
  del wide
  assert len(data) < 2**18
  narrow = table.to_bytes(arrays)
  tracemalloc.start()
  # The report is of other latents.
  refused(data, 'it holds 12 latents, the report is of 11: run', 11)
  refused(narrow, 'it holds 12 latents, the report is of 13: run', 13)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**22
  rows = {
    name: array[:1] if declared.axes[0] == 'N' else array
    for (name, declared), array in zip(table.ARRAYS.items(), arrays.values())
  }
  assert rows.keys() == arrays.keys()
  long = np.zeros((1, 2**21 + 1), np.int64)
  edges = np.zeros(2**21 + 2, np.float32)
  data = table.to_bytes(rows | {'hist_counts': long, 'hist_edges': edges})
  refused(data, 'hist_counts takes 16,777,224 bytes for a latent, more', 1)


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('top_acts', np.nan, 'top_acts holds numbers from nan to nan'),
    ('top_acts', -1.0, 'top_acts holds numbers from -1'),
    ('vote_up_logits', np.inf, 'vote_up_logits holds numbers from'),
    ('density', 1.5, 'density holds numbers from .* to 1.5, which is no share'),
    ('count', -1, 'count holds numbers from -1'),
    ('random_tokens', -2, 'random_tokens holds numbers from -2'),
    ('top_peak', 8, 'top_peak names places without a token in windows of 8'),
    ('random_document', -(2**31), 'random_document holds numbers from -214'),
    ('hist_edges', 1e9, 'hist_edges do not rise'),
    ('neighbour_cosines', np.nan, 'neighbour_cosines holds'),
    (
      'neighbour_cosines',
      1.5,
      'cosines holds numbers from .* to 1.5',
    ),
  ],
)
def test_numbers_that_cannot_be_are_refused(features, name, value, message):
  arrays, vocabulary_size = features
  odd = arrays[name].copy()
  odd.reshape(-1)[0] = value
  with pytest.raises(errors.UserError, match=message):
    table.check(arrays | {name: odd}, vocabulary_size)


def test_a_peak_is_on_a_token(features):
  arrays, vocabulary_size = features
  latent = int(np.flatnonzero(arrays['top_peak'][:, 0] >= 0)[0])
  tokens = arrays['top_tokens'].copy()
  tokens[latent, 0, arrays['top_peak'][latent, 0]] = -1
  with pytest.raises(errors.UserError, match='top_peak names places without'):
    table.check(arrays | {'top_tokens': tokens}, vocabulary_size)


@pytest.mark.parametrize(
  'odd',
  [{'subject': 3}, {'n_latents': '12'}, {'n_latents': True}, {'n_latents': {}}],
)
def test_a_report_says_what_its_features_are(features, tmp_path, odd):
  arrays, _ = features
  report = {'subject': 'made', 'n_latents': N}
  results.write(tmp_path, {}, report, arrays)
  read = results.read_report(tmp_path)
  assert read == report
  assert results.read_features(tmp_path, read).keys() == arrays.keys()
  results.write(tmp_path, {}, report | odd, arrays)
  key = next(iter(odd))
  with pytest.raises(errors.UserError, match=f'as {key}: run sae-probe again'):
    results.read_report(tmp_path)


def test_latents_are_those_of_the_report(features):
  arrays = features[0]
  ids = arrays['latent_ids'].copy()
  ids[3] = 2**31 - 1
  data = table.to_bytes(arrays | {'latent_ids': ids})
  refused(data, re.escape('latent_ids holds latent 2147483647 of 12'))
  # A table of some latents is read where no report says how many there are.
  table.parse(data, '')
