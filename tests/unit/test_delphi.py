"""delphi's latent cache, read back as delphi does, against a float64 encode."""

import dataclasses
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax.dashboards import latent_cache
from sae_jax.dashboards.config import DashboardConfig
from tests.support import binaries, probed, synthetic_features

LATENTS, CONTEXT = 24, 8
TARGET = 'blocks.1.mlp_out'
CONFIG = DashboardConfig()
TYPES = {'U16': '<u2', 'U32': '<u4', 'F16': '<f2', 'I64': '<i8'}


def write_results(workdir, data, trained, **changes):
  """Finished results of an autoencoder of a store."""
  table, report, _ = synthetic_features.make(LATENTS, 2, 8, 2000)
  made_from = {
    'sae_fingerprint': checkpoint.fingerprint(trained.sae),
    'store': data.manifest.identity,
    'step': trained.step,
    'probe_config': {'average': True},
  }
  report |= {'made_from': made_from, 'subject': 'made'}
  report |= {'site': str(probed.SITE)}
  synthetic_features.write_results(workdir, made_from, report, table | changes)


def read_file(path):
  """The tensors of a safetensors file."""
  data = path.read_bytes()
  (length,) = struct.unpack('<Q', data[:8])
  tensors = {}
  for name, of in json.loads(data[8 : 8 + length]).items():
    start, stop = (8 + length + place for place in of['data_offsets'])
    values = np.frombuffer(data[start:stop], TYPES[of['dtype']])
    tensors[name] = values.reshape(of['shape'])
  return tensors


def read(folder):
  """Tokens [rows, context], and activations [rows, context, N]."""
  files = sorted(
    folder.glob('*.safetensors'), key=lambda p: int(p.stem.split('_')[0])
  )
  tokens, acts, end = None, None, 0
  for path in files:
    first, last = map(int, path.stem.split('_'))
    assert first == end
    end = last + 1
    of = read_file(path)
    tokens = of['tokens'] if tokens is None else tokens
    np.testing.assert_array_equal(of['tokens'], tokens)
    acts = np.zeros((*tokens.shape, LATENTS)) if acts is None else acts
    row, place, latent = of['locations'].astype(int).T
    assert latent.max(initial=0) <= last - first
    # In the order of the text.
    assert (np.diff(row * tokens.shape[1] + place) >= 0).all()
    acts[row, place, latent + first] += of['activations']
  assert end == LATENTS and len(files) == 5
  return tokens, acts


def expected(data, trained, first=0):
  """What there should be of the text from a token on, in float64."""
  raw_RD = data.read_rows(0, data.manifest.n_rows)[:, : probed.D_MODEL]
  x_RD, _ = probed.inputs(trained, raw_RD)
  acts_LN = np.zeros((data.manifest.n_stream, LATENTS))
  acts_LN[data.stream_index()] = probed.latents(trained, x_RD)
  stop = first + (len(acts_LN) - first) // CONTEXT * CONTEXT
  tokens = data.tokens()[first:stop].reshape(-1, CONTEXT)
  return tokens, acts_LN[first:stop].reshape(-1, CONTEXT, LATENTS)


def same(got, want):
  """Whether activations are equal, but for float16 and float32."""
  return np.allclose(got, want, rtol=2e-3, atol=2e-5)


def write(workdir, data, trained, out, config=CONFIG):
  """Writes the cache by small batches; its folder."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, 'load', lambda *a, **k: trained)
    said = latent_cache.write(
      config, str(workdir), 'C', data.url, str(out), 16, CONTEXT
    )
  folder = out / 'latents' / str(probed.SITE)
  assert said.folder == str(folder)
  return folder, said


@pytest.mark.parametrize('activation', ['topk', 'relu', 'transcoder'])
def test_every_activation_of_a_text_is_there(activation, data, tmp_path):
  if activation == 'transcoder':
    trained = probed.make_trained(data)
    data = probed.write_store(str(tmp_path / 'S'), target_site=TARGET)
    assert data.width == 2 * probed.D_MODEL
    zeros_D = jnp.zeros(probed.D_MODEL)
    target = {'target_mean_D': zeros_D, 'target_scale': jnp.float32(1)}
    trained = dataclasses.replace(
      trained,
      sae=trained.sae.replace(b_pre_D=zeros_D, target=target),
      config=dataclasses.replace(trained.config, target_site=TARGET),
      metadata=dataclasses.replace(trained.metadata, dataset=data.about),
    )
  else:
    trained = probed.make_trained(data, activation=activation)
  write_results(str(tmp_path / 'P'), data, trained)
  folder, said = write(tmp_path / 'P', data, trained, tmp_path / 'D')
  tokens, acts = read(folder)
  want_tokens, want_acts = expected(data, trained)
  np.testing.assert_array_equal(tokens, want_tokens)
  assert said.tokens == tokens.size > 100
  assert said.activations == (acts > 0).sum() > 300
  assert same(acts, want_acts)
  assert (acts[want_acts == 0] == 0).all()
  # Controls: a text that is one token further, latents or places that are
  # others.
  flat = acts.reshape(-1, LATENTS)
  assert not same(np.roll(flat, 1, 0).reshape(acts.shape), want_acts)
  assert not same(np.roll(acts, 1, 2), want_acts)
  assert not same(acts[:CONTEXT].swapaxes(0, 1), want_acts[:CONTEXT])
  record = json.loads((folder / 'config.json').read_text())
  assert record == {
    'dataset_repo': 'made',
    'cache_ctx_len': CONTEXT,
    'n_tokens': tokens.size,
    'n_splits': 5,
    'model_name': 'made',
  }


@pytest.fixture
def workdir(data, trained, tmp_path):
  folder = tmp_path / 'P'
  write_results(str(folder), data, trained)
  return folder


def test_the_end_of_a_text_is_taken(data, trained, workdir, tmp_path):
  config = DashboardConfig(delphi_tokens=50)
  folder, _ = write(workdir, data, trained, tmp_path / 'D', config)
  tokens, acts = read(folder)
  # From where the first context begins.
  position_L = data.positions()
  n_stream = data.manifest.n_stream
  first = n_stream - 50 + int(np.argmax(position_L[-50:] == 0))
  assert first > n_stream - 50 and position_L[first] == 0
  want_tokens, want_acts = expected(data, trained, first)
  np.testing.assert_array_equal(tokens, want_tokens)
  assert same(acts, want_acts)
  few = DashboardConfig(delphi_tokens=CONTEXT - 1)
  with pytest.raises(errors.UserError, match='delphi_tokens 7 are no 8 tokens'):
    write(workdir, data, trained, tmp_path / 'F', few)


def test_a_cache_is_whole_or_not_read(
  data, trained, workdir, tmp_path, monkeypatch
):
  whole, _ = write(workdir, data, trained, tmp_path / 'W')
  written = []

  def failing(url, content):
    if len(written) == 3:
      raise OSError(28, 'no space')
    written.append(url)
    safetensors_write(url, content)

  safetensors_write = latent_cache.safetensors.write
  folder = tmp_path / 'D' / 'latents' / str(probed.SITE)
  with monkeypatch.context() as patch:
    patch.setattr(latent_cache.safetensors, 'write', failing)
    with pytest.raises(OSError, match='no space'):
      write(workdir, data, trained, tmp_path / 'D')
  assert len(list(folder.glob('*.safetensors'))) == 3
  assert not (folder / 'config.json').exists()
  # What a process leaves that is killed.
  (folder / '.activations').mkdir()
  (folder / '.activations' / '0').write_bytes(b'12345')
  write(workdir, data, trained, tmp_path / 'D')
  files = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert files == {path.name: path.read_bytes() for path in whole.iterdir()}
  with pytest.raises(errors.UserError, match='is a whole cache already'):
    write(workdir, data, trained, tmp_path / 'D')
  (folder / 'config.json').unlink()
  with pytest.raises(errors.UserError, match='results of other inputs'):
    other = DashboardConfig(delphi_tokens=50)
    write(workdir, data, trained, tmp_path / 'D', other)


def test_what_does_not_fit_is_one_line(data, trained, workdir, tmp_path):
  sae = trained.sae.replace(b_lat_N=trained.sae.b_lat_N + 1)
  other = dataclasses.replace(trained, sae=sae)
  with pytest.raises(errors.UserError, match='results of other weights'):
    write(workdir, data, other, tmp_path / 'D')
  rows = probed.write_store(str(tmp_path / 'S'), share_kept=0.5)
  with pytest.raises(errors.UserError, match='the one that sae-probe'):
    write(workdir, rows, trained, tmp_path / 'D')
  loud = np.full(LATENTS, 1e5, np.float32)
  write_results(str(tmp_path / 'L'), data, trained, max=loud)
  with pytest.raises(errors.UserError, match='100000, beyond the float16'):
    write(tmp_path / 'L', data, trained, tmp_path / 'D')
  # Also of rows that the table has not seen.
  sae = trained.sae.replace(b_lat_N=trained.sae.b_lat_N + 1e5)
  loud = dataclasses.replace(trained, sae=sae)
  write_results(str(tmp_path / 'M'), data, loud)
  with pytest.raises(errors.UserError, match='beyond the float16'):
    write(tmp_path / 'M', data, loud, tmp_path / 'E')


@pytest.mark.parametrize(
  ('n_latents', 'n_files'), [(3, 3), (2**16 * 5, 5), (2**20 + 1, 17)]
)
def test_files_of_many_latents(n_latents, n_files, tmp_path):
  starts = latent_cache._starts(n_latents)
  assert starts[0] == 0 and starts[-1] == n_latents
  assert len(starts) == n_files + 1 and (np.diff(starts) > 0).all()
  for n_rows, kind in ((2**16, '<u2'), (2**16 + 1, '<u4')):
    folder = tmp_path / str(n_rows)
    folder.mkdir()
    splits = latent_cache._Splits(starts, n_rows, 2, folder)
    codes = np.array([[2.0, 0]]), np.array([[n_latents - 1, 0]])
    splits.add(np.array([2 * n_rows - 1]), *codes)
    content = splits.content(n_files - 1, np.zeros(2 * n_rows, np.int32))
    assert content['locations'].dtype == np.dtype(kind)
    latent = n_latents - 1 - starts[-2]
    assert content['locations'].read().tolist() == [[n_rows - 1, 1, latent]]
    assert content['activations'].read().tolist() == [2]
    assert splits.counts == [*[0] * (n_files - 1), 1]


def test_the_command_writes_a_cache(
  data, trained, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(checkpoint, 'load', lambda *a, **k: trained)
  stage = binaries.MODULES['sae-probe']

  def run(data, name):
    write_results(str(tmp_path / name), data, trained)
    with binaries.defined(stage.define) as values:
      values([
        '-',
        f'--workdir={tmp_path / name}',
        '--checkpoint=C',
        f'--store={data.url}',
        f'--export_delphi={tmp_path / "D"}',
      ])  # fmt: skip
      stage.work()

  # The whole text is no row of delphi's.
  with pytest.raises(errors.UserError, match='no 256 tokens'):
    run(data, 'P')
  run(probed.write_store(str(tmp_path / 'S'), 2 * probed.LENGTHS), 'Q')
  (line,) = capsys.readouterr().out.splitlines()
  folder = tmp_path / 'D' / 'latents' / str(probed.SITE)
  tokens, acts = read(folder)
  assert tokens.shape == (1, 256)
  assert line == f'{folder}: {(acts > 0).sum()} activations on 256 tokens'
