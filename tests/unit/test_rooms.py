"""The rooms: CONTRIBUTING's table of them is what the imports are."""

import ast
import itertools
import pathlib
import re

import pytest

from tests.support import documents

ROOT = documents.ROOT
MOST_LINES = 400


def table(text):
  """The rooms that each room may import, in the table's order."""
  _, _, below = text.partition('| room | holds | may import |\n')
  rows = below.partition('\n\n')[0].splitlines()[1:]
  cells = [row.strip('|').split('|') for row in rows]
  # A room is written as its folder or file.
  return {
    re.search(r'\w+', room)[0]: set(re.findall(r'\w+', others))
    for room, _, others in cells
  }


def room_of(module):
  """The room of a module's name: a folder, or a file of the root."""
  parts = module.split('.')
  return parts[1] if len(parts) > 1 else '__init__'


def imports(folder):
  """(room, room, module) of every import between rooms of a package.

  The package by itself is imported with whatever is in it, so that naming it
  (for its version) is no import.
  """
  modules = {}
  for path in folder.rglob('*.py'):
    parts = path.relative_to(folder.parent).with_suffix('').parts
    modules['.'.join(p for p in parts if p != '__init__')] = path
  for module, path in modules.items():
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.ImportFrom) and node.module:
        names = [f'{node.module}.{alias.name}' for alias in node.names]
      elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      for name in names:
        if name.startswith(f'{folder.name}.'):
          here, there = room_of(module), room_of(name)
          if here != there and f'{folder.name}.{there}' in modules:
            yield here, there, module


def complaints(allowed, found):
  """What is wrong with imports, or with the table that allows them.

  Args:
    allowed: the rooms that each room may import, in order.
    found: (room, room, module) of each import.
  """
  found = list(found)
  order = list(allowed)
  said = []
  for here, there, module in found:
    if here not in allowed or there not in allowed:
      said.append(f'{module}: {here} or {there} has no row')
    elif there not in allowed[here]:
      said.append(f'{module}: {here} may not import {there}')
  used = {pair[:2] for pair in found}
  for here, others in allowed.items():
    for there in others:
      if there not in allowed:
        said.append(f'{here}: {there} has no row')
      elif order.index(there) > order.index(here):
        said.append(f'{here}: {there} is below it')
      if (here, there) not in used:
        said.append(f'{here}: {there} is not imported')
  return sorted(set(said))


def test_imports_are_those_of_the_table():
  allowed = table((ROOT / 'CONTRIBUTING.md').read_text())
  assert complaints(allowed, imports(ROOT / 'sae_jax')) == []
  files = (ROOT / 'sae_jax').iterdir()
  rooms = {p.stem for p in files if p.suffix == '.py' or list(p.glob('*.py'))}
  assert rooms == set(allowed)


TABLE = """
| room | holds | may import |
|---|---|---|
| `errors.py` | words | |
| `store/` | rows | `errors` |
| `feed/` | batches | `errors`, `store` |
"""
GOOD = (
  ('store', 'errors', 'sae_jax.store.reader'),
  ('feed', 'errors', 'sae_jax.feed.order'),
  ('feed', 'store', 'sae_jax.feed.order'),
)


def made_table():
  allowed = table(TABLE)
  assert list(allowed) == ['errors', 'store', 'feed']
  return allowed


@pytest.mark.parametrize(
  ('table', 'found', 'said'),
  [
    ({}, GOOD, []),
    (
      {},
      [*GOOD, ('store', 'feed', 'sae_jax.store.reader')],
      ['sae_jax.store.reader: store may not import feed'],
    ),
    (
      {},
      [*GOOD, ('store', 'probing', 'sae_jax.store.x')],
      ['sae_jax.store.x: store or probing has no row'],
    ),
    ({}, GOOD[:2], ['feed: store is not imported']),
    (
      {'store': {'errors', 'feed'}},
      [*GOOD, ('store', 'feed', 'sae_jax.store.reader')],
      ['store: feed is below it'],
    ),
    (
      {'feed': {'errors', 'store', 'text'}},
      GOOD,
      ['feed: text has no row', 'feed: text is not imported'],
    ),
  ],
)
def test_control_each_kind_of_mistake_is_told(table, found, said):
  assert complaints(made_table() | table, found) == said


def test_control_imports_are_seen_wherever_they_are(tmp_path):
  folder = tmp_path / 'sae_jax'
  for name in ('store', 'feed'):
    (folder / name).mkdir(parents=True)
    (folder / name / '__init__.py').write_text('')
  (folder / '__init__.py').write_text('import sae_jax\n')
  (folder / 'errors.py').write_text('')
  (folder / 'feed' / 'order.py').write_text(
    'from sae_jax import errors, store as s\nimport sae_jax.feed\n'
    'def late():\n  from sae_jax.store.reader import open_store\n'
  )
  here = 'sae_jax.feed.order'
  assert set(imports(folder)) == {
    ('feed', 'errors', here),
    ('feed', 'store', here),
  }


def long_files(*folders):
  """Python files of more lines than are read at once, with their lines."""
  paths = itertools.chain(*(folder.rglob('*.py') for folder in folders))
  lines = {path: len(path.read_text().splitlines()) for path in paths}
  return {str(p): n for p, n in lines.items() if n > MOST_LINES}


def test_no_file_is_too_long_to_be_read():
  folders = (ROOT / name for name in ('sae_jax', 'tests', 'experiments'))
  assert long_files(*folders) == {}


def test_control_a_long_file_is_seen(tmp_path):
  (tmp_path / 'long.py').write_text('\n' * (MOST_LINES + 1))
  (tmp_path / 'short.py').write_text('\n' * MOST_LINES)
  assert [pathlib.Path(p).name for p in long_files(tmp_path)] == ['long.py']
