"""The autoencoders that other libraries made, in tests/data/interchange."""

import json
import pathlib
import shutil

import numpy as np
import yaml

from sae_jax.interchange import imported, registry

FOLDER = pathlib.Path(__file__).parent.parent / 'data/interchange'
K = 4
# Those that are a file.
_FILES = {'openai': 'sae.pt', 'qwen_scope': 'layer0.sae.pt'}
_CONFIGS = {
  'saelens': 'cfg.json',
  'sparsify': 'cfg.json',
  'llama_scope': 'hyperparams.json',
  'circuit_tracer': 'config.yaml',
  'gemma_scope2': 'config.json',
  'dictionary_learning': 'config.json',
}
NAMES = tuple(
  str(path.parent.relative_to(FOLDER))
  for path in sorted(FOLDER.rglob('expected.npz'))
  if path.parent.name != 'files'
)


def format_of(name):
  return name.partition('/')[0]


def url_of(folder, name):
  return folder / _FILES.get(format_of(name), '')


def given(name):
  return imported.Given(k=K) if format_of(name) == 'qwen_scope' else None


def read(name, folder=None):
  return registry.read(url_of(folder or FOLDER / name, name), given(name))


def expected(name):
  return dict(np.load(FOLDER / name / 'expected.npz'))


def config(name):
  """What the config of an autoencoder says, {} if there is none."""
  kind = format_of(name)
  if kind == 'qwen_scope':
    return {'k': K}
  if kind not in _CONFIGS:
    return {}
  text = (FOLDER / name / _CONFIGS[kind]).read_text()
  return yaml.safe_load(text) if kind == 'circuit_tracer' else json.loads(text)


def copy(name, folder, **changes):
  """A copy of an autoencoder, keys of whose config are others.

  Args:
    name: the autoencoder.
    folder: where the copy is made; what it has is deleted.
    changes: key -> value; None removes it, and 'a__b' is b of the mapping a.
  """
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(FOLDER / name, folder)
  (folder / 'expected.npz').unlink()
  if changes:
    values = config(name)
    for key, value in changes.items():
      *outer, last = key.split('__')
      inner = values
      for step in outer:
        inner = inner[step]
      if value is None:
        del inner[last]
      else:
        inner[last] = value
    # JSON is YAML too.
    (folder / _CONFIGS[format_of(name)]).write_text(json.dumps(values))
  return folder
