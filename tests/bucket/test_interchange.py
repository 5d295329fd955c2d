"""Autoencoders of other libraries in a bucket."""

import dataclasses

from etils import epath
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax.interchange import convert, formats, registry
from sae_jax.interchange.files import pt_writer, reading
from sae_jax.storage import safetensors, tensors
from tests.support import golden_autoencoders as golden
from tests.support import interchange_reference as reference
from tests.support import planted, runs
from tests.support.gcs import served

WRITERS = {'a.pt': pt_writer.write, 'a.safetensors': safetensors.write}


@pytest.fixture
def bucket(monkeypatch):
  """The objects of gs://bucket, by name."""
  with served.bucket(monkeypatch) as server:
    yield server.objects['bucket']


@pytest.mark.parametrize('name', WRITERS)
def test_a_bucket_holds_the_same_bytes_as_a_folder(name, tmp_path, bucket):
  array = np.random.default_rng(0).normal(size=(50, 30)).astype('f')
  content = {'w': tensors.from_array(array)}
  url = f'gs://bucket/deep/{name}'
  WRITERS[name](url, content)
  WRITERS[name](tmp_path / name, content)
  assert bucket[f'deep/{name}'].data == (tmp_path / name).read_bytes()
  tensor = reading.open_tensors(url).tensors['w']
  np.testing.assert_array_equal(tensor.read(10, 30), array[10:30])
  np.testing.assert_array_equal(tensor.T.read(10, 12), array.T[10:12])
  short = tensors.Tensor((60, 30), array.dtype, lambda ranges: array)
  with pytest.raises(ValueError, match='gave 6,000 bytes, not 7,200'):
    WRITERS[name](url, {'w': short})
  assert bucket[f'deep/{name}'].data == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
  'name',
  [
    'llama_scope/L0R',
    'sparsify/layers.1',
    'dictionary_learning/AutoEncoderNew',
  ],
)
def test_a_folder_of_a_bucket(name, bucket, tmp_path):
  folder = golden.copy(name, tmp_path / 'a')
  for path in folder.rglob('*'):
    if path.is_file():
      url = f'gs://bucket/run/{path.relative_to(folder)}'
      with epath.Path(url).open('wb') as file:
        file.write(path.read_bytes())
  x = golden.expected(name)['x']
  remote = registry.read('gs://bucket/run/')
  for one, other in zip(
    reference.evaluate(remote, x),
    reference.evaluate(golden.read(name, folder), x),
  ):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('kind', formats.WRITTEN)
def test_a_folder_that_is_written_to_a_bucket(kind, bucket, tmp_path):
  name = {'circuit_tracer': 'circuit_tracer/relu', 'openai': 'openai/topk'}
  autoencoder = golden.read(name.get(kind, 'sparsify/layers.1'))
  url = 'gs://bucket/deep/sae'
  registry.write(autoencoder, kind, url)
  registry.write(autoencoder, kind, tmp_path / 'sae')
  local = tmp_path / 'sae'
  for path in [local] if local.is_file() else local.iterdir():
    key = f'deep/{path.relative_to(tmp_path)}'
    assert bucket[key].data == path.read_bytes()
  remote = registry.read(url)
  assert remote.semantics == registry.read(tmp_path / 'sae').semantics
  objects = {key: value.data for key, value in bucket.items()}
  with pytest.raises(errors.UserError, match='is there already'):
    registry.write(autoencoder, kind, url)
  assert objects == {key: value.data for key, value in bucket.items()}


def test_a_checkpoint_in_a_bucket(bucket, tmp_path):
  """It has the bits of one on disk, and is read back as a file."""
  planted.write_store(str(tmp_path / 'store'), 500)
  rng = np.random.default_rng(0)
  shapes = {
    'w_enc_ND': (24, 16),
    'w_dec_ND': (24, 16),
    'b_enc_N': (24,),
    'b_dec_D': (16,),
  }
  drawn = {
    name: tensors.from_array(rng.normal(size=shape).astype('f'))
    for name, shape in shapes.items()
  }
  one = golden.read('saelens/standard')
  one = dataclasses.replace(
    one, d_in=16, d_out=16, n_latents=24, tensors=drawn, transposed=frozenset()
  )
  registry.write(one, 'plain', tmp_path / 'plain')
  places = str(tmp_path / 'run'), 'gs://bucket/run'
  for place in places:
    convert.convert(
      convert.ConvertConfig(),
      str(tmp_path / 'plain'),
      place,
      str(tmp_path / 'store'),
    )
  on_disk, remote = map(checkpoint.load, places)
  runs.assert_same_bits(remote.sae, on_disk.sae)
  assert any(name.startswith('run/checkpoints/0/sae') for name in bucket)
  convert.convert(
    convert.ConvertConfig(to='plain'), places[1], str(tmp_path / 'again')
  )
  again = registry.read(str(tmp_path / 'again')).tensors['w_dec_ND']
  np.testing.assert_array_equal(again.read(), drawn['w_dec_ND'].read())
