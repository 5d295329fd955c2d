"""What other libraries make of autoencoders that we wrote.

  python -m experiments.interchange.loaded WORKDIR OPENAI_MODEL

It runs where those libraries are and sae_jax is not; `compare` calls it.
"""

from collections.abc import Callable
import importlib.util
import json
import pathlib
import shutil
import sys

from circuit_tracer.transcoder import single_layer_transcoder as ct
from dictionary_learning import utils as dl_utils
import numpy as np
import sae_lens
from sparsify import SparseCoder
import torch
import yaml

# Latents and reconstruction of activations, and what saves it to a path.
Loaded = tuple[torch.Tensor, torch.Tensor]


def saelens(url: pathlib.Path, x: torch.Tensor, saved: pathlib.Path) -> Loaded:
  sae_lens.SAE.load_from_disk(url).save_model(saved)
  sae = sae_lens.SAE.load_from_disk(url, dtype='float64')
  return sae.encode(x), sae(x)


def sparsify(url: pathlib.Path, x: torch.Tensor, saved: pathlib.Path) -> Loaded:
  sae = SparseCoder.load_from_disk(url)
  sae.save_to_disk(saved)
  sae = sae.double()
  values, index, _ = sae.encode(x)
  z = torch.zeros(len(x), sae.num_latents, dtype=x.dtype)
  return z.scatter_(-1, index, values), sae(x).sae_out


def dictionary_learning(
  url: pathlib.Path, x: torch.Tensor, saved: pathlib.Path
) -> Loaded:
  sae, config = dl_utils.load_dictionary(str(url), 'cpu')
  saved.mkdir()
  torch.save(sae.state_dict(), saved / 'ae.pt')
  (saved / 'config.json').write_text(json.dumps(config))
  sae = sae.double()
  z = sae.encode(x)
  return z, sae.decode(z)


def circuit_tracer(
  url: pathlib.Path, x: torch.Tensor, saved: pathlib.Path
) -> Loaded:
  """As its loader of local folders does, which needs an older hub."""
  config = yaml.safe_load((url.parent / 'config.yaml').read_text())
  assert config['model_kind'] == 'transcoder_set'
  layers = ct.load_transcoder_set(
    {0: str(url)},
    config['scan'],
    config['feature_input_hook'],
    config['feature_output_hook'],
    lazy_encoder=False,
    lazy_decoder=False,
  )
  saved.parent.mkdir()
  layers[0].to_safetensors(str(saved))
  shutil.copy(url.parent / 'config.yaml', saved.parent)
  sae = layers[0].double()
  z = sae.encode(x)
  return z, sae.decode(z, x)


def openai_by(source: str) -> Callable:
  spec = importlib.util.spec_from_file_location('openai_model', source)
  model = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(model)

  def openai(url: pathlib.Path, x: torch.Tensor, saved: pathlib.Path) -> Loaded:
    sae = model.Autoencoder.from_state_dict(torch.load(url))
    state = sae.state_dict()
    # With today's torch the activation is there twice, which is not read back.
    for key in [key for key in state if key.startswith('activation.')]:
      del state[key]
    torch.save(state, saved)
    sae = sae.double()
    z, info = sae.encode(x)
    return z, sae.decode(z, info)

  return openai


def main() -> None:
  workdir, source = pathlib.Path(sys.argv[1]), sys.argv[2]
  loaders = {
    loader.__name__: loader
    for loader in (saelens, sparsify, dictionary_learning, circuit_tracer)
  }
  if source:
    loaders['openai'] = openai_by(source)
  records = json.loads((workdir / 'records.json').read_text())['records']
  for record in records:
    folder, url = pathlib.Path(record['folder']), pathlib.Path(record['url'])
    x = torch.from_numpy(np.load(folder / 'x.npy')).double()
    saved = folder / 'resaved' / url.relative_to(folder)
    (folder / 'resaved').mkdir()
    with torch.no_grad():
      z, y = loaders[record['format']](url, x, saved)
    np.savez(folder / 'theirs.npz', z=z.numpy(), y=y.numpy())


if __name__ == '__main__':
  main()
