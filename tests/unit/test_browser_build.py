"""A page is reused if each of its files is as written, else built again."""

import json
import re

from etils import epath
import numpy as np
import pytest

import sae_jax
from sae_jax.browser import build, index, static
from sae_jax.storage import finished
from tests.support import synthetic_features


@pytest.fixture(scope='module')
def made():
  return synthetic_features.make(
    n_latents=12, n_examples=2, window=8, n_tokens=2000
  )


@pytest.fixture
def probed(made, tmp_path, monkeypatch):
  """A workdir of sae-probe and how often a page was built from it."""
  features, report, vocabulary = made
  synthetic_features.write_results(tmp_path / 'probe', {}, report, features)
  monkeypatch.setattr(build, 'vocabulary', lambda *_: vocabulary)
  builds = []
  build_index = index.build_index

  def counted(*args):
    builds.append(args)
    return build_index(*args)

  monkeypatch.setattr(index, 'build_index', counted)
  return tmp_path / 'probe', builds


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def damages(content, rng):
  """A file's content with a flipped bit, cut, and gone."""
  flipped = bytearray(content)
  flipped[rng.integers(len(content))] ^= 1 << rng.integers(7)
  return bytes(flipped), content[: len(content) // 2], None


def put(path, content):
  if content is None:
    path.unlink()
  else:
    path.write_bytes(content)


def test_damage_to_any_file_is_seen(made, tmp_path):
  config = index.BrowseConfig(features_per_shard=7)
  synthetic_features.build(*made, tmp_path, config)
  inputs = index.inputs(made[1], config)
  rng = np.random.default_rng(0)
  whole = contents(tmp_path)
  assert len(whole) > 15
  for name, content in whole.items():
    for damaged in damages(content, rng):
      put(tmp_path / name, damaged)
      assert not finished.vouches(tmp_path, inputs, index.NAMES), name
      put(tmp_path / name, content)
  assert finished.vouches(tmp_path, inputs, index.NAMES)


def test_a_damaged_page_is_built_again(probed, tmp_path):
  probe, builds = probed
  page = tmp_path / 'page'
  build.browse(index.BrowseConfig(), str(probe), str(page))
  whole = contents(page)
  build.browse(index.BrowseConfig(), str(probe), str(page))
  assert len(builds) == 1
  for name in ('data/columns.json', 'finished.json', 'app.js'):
    before = len(builds)
    put(page / name, whole[name][:-300])
    build.browse(index.BrowseConfig(), str(probe), str(page))
    assert contents(page) == whole, name
    assert len(builds) == before + 1, name


@pytest.mark.parametrize(
  'change',
  [
    lambda patch, copy: patch.setattr(sae_jax, '__version__', '99'),
    lambda patch, copy: patch.setattr(np, '__version__', '99'),
    lambda patch, copy: patch.setattr(static, 'PAGE', copy),
  ],
)
def test_another_version_builds_again(probed, tmp_path, monkeypatch, change):
  probe, builds = probed
  config = index.BrowseConfig()
  build.browse(config, str(probe), str(tmp_path / 'page'))
  copy = epath.Path(tmp_path / 'copy')

  copy.mkdir()
  (copy / 'app.js').write_text('// changed')
  change(monkeypatch, copy)
  for _ in range(2):
    build.browse(config, str(probe), str(tmp_path / 'page'))
    assert len(builds) == 2


def test_a_build_removes_what_a_killed_one_left(made, tmp_path):
  synthetic_features.build(*made, tmp_path)
  names = sorted(contents(tmp_path))
  own = ['data/labels.json', 'notes.partial', 'data/features/mine.json']
  left = ['.index.html.17.partial', 'data/.meta.json.5.partial']
  left += ['data/features/.00000.json.12345.partial']
  for name in own + left:
    (tmp_path / name).write_text('')
  synthetic_features.build(*made, tmp_path)
  assert sorted(contents(tmp_path)) == sorted(names + own)


def test_addresses_of_scripts_change_with_the_page(tmp_path, monkeypatch):
  def addresses():
    found = set()
    for text in static.contents().values():
      found |= set(re.findall(r'[\w.]+\.(?:js|css|svg)\?\w*', text.decode()))
    return found

  names = {path.name for path in static.PAGE.iterdir()}
  before = addresses()
  digest = static.digest()
  # All but the page itself are named, and with the digest.
  assert before == {f'{n}?{digest}' for n in names - {'index.html'}}
  for text in static.contents().values():
    assert not re.search(r"from '\./\w+\.js'", text.decode())
  copy = epath.Path(tmp_path)
  for source in static.PAGE.iterdir():
    (copy / source.name).write_bytes(source.read_bytes())
  monkeypatch.setattr(static, 'PAGE', copy)
  assert addresses() == before
  (copy / 'dom.js').write_text((copy / 'dom.js').read_text() + '\n')
  assert addresses() and not addresses() & before


def test_bytes_of_a_character_stay_apart_from_text_that_looks_alike(
  made, tmp_path
):
  features, report, vocabulary = made
  tokens = [b'\xe6\x88', b'\x91', '\\xe6', *vocabulary[3:]]
  synthetic_features.build(features, report, tokens, tmp_path)
  written = json.loads((tmp_path / 'data' / 'vocabulary.json').read_text())
  assert written[:3] == [[0xE6, 0x88], [0x91], '\\xe6']
