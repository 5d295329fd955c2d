"""The public surface: all of it is there, and none of it before it is used."""

import ast
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

import sae_jax


def loaded_by(statement):
  """The modules that a fresh Python has after a statement."""
  output = subprocess.run(
    [
      sys.executable,
      '-c',
      f'{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))',
    ],
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  return set(json.loads(output))


def test_the_package_imports_nothing_heavy():
  modules = loaded_by('import sae_jax; dir(sae_jax)')
  assert 'sae_jax' in modules
  heavy = {'jax', 'numpy', 'orbax', 'tensorstore', 'matplotlib', 'tokenizers'}
  assert not heavy & modules
  assert not [name for name in modules if name.startswith('sae_jax.')]
  # Control: a name that is used is imported.
  assert {'jax', 'sae_jax.autoencoder'} <= loaded_by(
    'import sae_jax; sae_jax.SaeConfig'
  )


def test_every_public_name_is_there():
  for name in sae_jax.__all__:
    assert getattr(sae_jax, name) is not None
    assert name in dir(sae_jax)
  with pytest.raises(AttributeError, match="'sae_jax' has no attribute 'bake'"):
    sae_jax.bake  # noqa: B018


def test_type_checkers_see_the_same_objects():
  """The imports that only they execute name what `__getattr__` gives."""
  tree = ast.parse(pathlib.Path(sae_jax.__file__).read_text())
  guarded = next(node for node in tree.body if isinstance(node, ast.If))
  imported = {
    alias.asname or alias.name: (node.module, alias.name)
    for node in guarded.body
    for alias in node.names
  }
  assert set(imported) == set(sae_jax.__all__) == set(sae_jax._PLACES)
  for name, (module, attribute) in imported.items():
    there = getattr(importlib.import_module(module), attribute)
    assert there is getattr(sae_jax, name)


def test_functions_and_folders_have_names_of_their_own():
  import sae_jax.harvesting.harvest
  import sae_jax.probing.report
  import sae_jax.training.train

  for name, folder in (
    ('harvest', 'harvesting'), ('train', 'training'), ('probe', 'probing'),
    ('browse', 'browser'), ('load', 'checkpoint'),
  ):  # fmt: skip
    assert callable(getattr(sae_jax, name))
    module = importlib.import_module(f'sae_jax.{folder}')
    assert getattr(sae_jax, folder) is module
    assert getattr(sae_jax, name).__module__.startswith(module.__name__)
