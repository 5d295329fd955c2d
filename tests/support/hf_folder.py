"""Folders as transformers writes them, of models drawn from their names."""

import functools
import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers

from experiments.parity import models

_GOLDEN = pathlib.Path(__file__).parent.parent / 'data' / 'family_golden.json'


@functools.cache
def golden():
  """Model's name -> its config, tensors and numbers that transformers gave.

  Made by `python -m experiments.parity.compare --golden=...`.
  """
  return json.loads(_GOLDEN.read_text())['models']


def tensors(record, *, without=None):
  """The model's tensors by their names in transformers."""
  n_layers = record['config'].get(
    'num_hidden_layers', record['config'].get('n_layer')
  )
  names = {}
  for pattern, shape in record['tensors'].items():
    for block in range(n_layers if '{}' in pattern else 1):
      names[pattern.format(block)] = tuple(shape)
  return {
    name: models.draw(name, shape, record['config']['model_type'])
    for name, shape in names.items()
    if name != without
  }


def write(folder, record, *, n_files=1, weights=None, tokenizer=True):
  """Writes config.json, the weights and a tokenizer; returns the URL.

  Args:
    folder: the folder.
    record: a model of `golden`.
    n_files: how many files hold the weights; several have an index.
    weights: tensors by name; None for all of the record's.
    tokenizer: whether to write one.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(exist_ok=True, parents=True)
  weights = tensors(record) if weights is None else weights
  (folder / 'config.json').write_text(json.dumps(record['config']))
  if n_files == 1:
    safetensors.numpy.save_file(weights, folder / 'model.safetensors')
  else:
    file_of = {
      name: f'model-{1 + i % n_files:05}-of-{n_files:05}.safetensors'
      for i, name in enumerate(weights)
    }
    for file in set(file_of.values()):
      inside = {name: x for name, x in weights.items() if file_of[name] == file}
      safetensors.numpy.save_file(inside, folder / file)
    index = {'metadata': {}, 'weight_map': file_of}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  if tokenizer:
    words = {f'w{i}': i for i in range(record['config']['vocab_size'])}
    word_level = tokenizers.Tokenizer(
      tokenizers.models.WordLevel(words, unk_token='w0')
    )
    word_level.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    word_level.save(str(folder / 'tokenizer.json'))
  return str(folder)


def tokens(record):
  """The tokens for which transformers gave its numbers."""
  rng = np.random.default_rng(1)
  return rng.integers(0, record['config']['vocab_size'], (2, 40))
