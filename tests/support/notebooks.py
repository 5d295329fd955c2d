"""The notebooks of experiments/colab, their cells run in this process."""

import os
import sys

import nbformat
import pytest

from tests.support import documents

FOLDER = documents.ROOT / 'experiments' / 'colab'
NAMES = sorted(path.name for path in FOLDER.glob('*.ipynb'))


def read(name):
  """A notebook, checked against its format."""
  notebook = nbformat.read(FOLDER / name, as_version=4)
  nbformat.validate(notebook)
  return notebook


def cells(name):
  """The sources of a notebook's code cells."""
  return [c.source for c in read(name).cells if c.cell_type == 'code']


def execute(sources, settings, space=None):
  """Runs cells as a kernel that was started beside the notebook would.

  Args:
    sources: the cells.
    settings: what a user would have written into the cell of the settings, by
      name: it is that which gives the first of them.
    space: the names that earlier cells have left.

  Returns:
    The names that the cells leave.
  """
  space, first = {} if space is None else space, next(iter(settings))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'path', sys.path.copy())
    patch.chdir(documents.ROOT if space else FOLDER)
    for source in sources:
      known = first in space
      exec(compile(source, '<cell>', 'exec'), space)
      if first in space and not known:
        space.update(settings)
    assert os.getcwd() == str(documents.ROOT)
  return space
