"""Codes on disk: what is written is read, in the same bytes in any way."""

import pathlib

import numpy as np
import pytest
import zarr

from sae_jax import errors
from sae_jax.probing.scan import codes as codes_lib
from tests.support import scans

ROWS, START = 700, 0


@pytest.fixture(autouse=True)
def _shards(monkeypatch):
  scans.small_shards(monkeypatch)


def made(width, most):
  """Codes of which row 600 has `most`, and others fewer than five."""
  rng = np.random.default_rng(0)
  vals_RK = -np.sort(-rng.random((ROWS, width)).astype(np.float32), axis=1)
  active_R = rng.integers(0, min(5, most), ROWS)
  active_R[600] = most
  vals_RK[np.arange(width) >= active_R[:, None]] = 0
  idx_RK = rng.integers(0, 1000, vals_RK.shape).astype(np.int32)
  return vals_RK, np.where(vals_RK > 0, idx_RK, 0)


def cuts(size):
  """Batches that end where a shard does."""
  edges = {*range(0, ROWS, size), *range(0, ROWS, codes_lib.SHARD_ROWS), ROWS}
  return list(zip(sorted(edges), sorted(edges)[1:], strict=False))


def write(url, vals_RK, idx_RK, fixed, size=100, processes=1, most=0):
  """Writes them as so many processes do; the width grows on the way."""
  writers = [
    codes_lib.Writer(url, START, fixed, number, processes)
    for number in range(processes)
  ]
  for start, stop in cuts(size):
    # Only as many columns as have been needed.
    width = fixed or max(1, int((vals_RK[:stop] > 0).sum(1).max()))
    for writer in writers:
      if writer.owns(start):
        writer.append(vals_RK[start:stop, :width], idx_RK[start:stop, :width])
      else:
        writer.skip(stop - start)
  for writer in writers:
    codes = writer.seal(most)
  writers[0].record(codes)
  return codes_lib.open_codes(url)


def files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in pathlib.Path(folder).rglob('*')
    if path.is_file()
  }


@pytest.mark.parametrize('fixed, width', [(5, 5), (None, 11)])
def test_what_was_written_is_read(tmp_path, fixed, width):
  vals_RK, idx_RK = made(width, width)
  url = str(tmp_path / 'codes')
  codes = write(url, vals_RK, idx_RK, fixed, most=width)
  assert (codes.start, codes.n_rows) == (0, ROWS)
  assert codes.k == (fixed or 16)
  for start, stop in ((0, ROWS), (250, 260), (511, 513), (699, 700), (3, 3)):
    got = codes.read(start, stop)
    for of, want in zip(got, (vals_RK, idx_RK)):
      np.testing.assert_array_equal(of[:, :width], want[start:stop])
      assert of.dtype == want.dtype and not of[:, width:].any()
  for start, stop in ((-1, 4), (0, ROWS + 1)):
    with pytest.raises(IndexError):
      codes.read(start, stop)
  # Without our code.
  array = zarr.open_array(tmp_path / 'codes' / 'idx', mode='r')
  np.testing.assert_array_equal(array[:, :width], idx_RK)
  # In other batches and by other processes the bytes are the same.
  for number, ways in enumerate(({'size': 33}, {'processes': 3})):
    other = tmp_path / str(number)
    write(str(other), vals_RK, idx_RK, fixed, most=width, **ways)
    assert files(other) == files(url)


def test_one_that_goes_on_with_what_waited_writes_the_same_bytes(tmp_path):
  vals_RK, idx_RK = made(5, 5)
  write(str(tmp_path / 'whole'), vals_RK, idx_RK, 5)
  url = str(tmp_path / 'parts')
  writer, waiting = codes_lib.Writer(url, START, 5), None
  for number, (start, stop) in enumerate(cuts(100)):
    writer.append(vals_RK[start:stop], idx_RK[start:stop])
    if number == 4:
      waiting = writer.row, *writer.unwritten()
  assert 0 < len(waiting[1]) < codes_lib.SHARD_ROWS
  again = codes_lib.Writer(url, START, 5)
  again.resume(*waiting)
  for start, stop in cuts(100)[5:]:
    again.append(vals_RK[start:stop], idx_RK[start:stop])
  again.record(again.seal(5))
  assert files(url) == files(tmp_path / 'whole')
  # Control: without what waited a shard is another.
  forgetful = codes_lib.Writer(url, START, 5)
  forgetful.resume(waiting[0], waiting[1][:0], waiting[2][:0])
  for start, stop in cuts(100)[5:]:
    forgetful.append(vals_RK[start:stop], idx_RK[start:stop])
  assert files(url) != files(tmp_path / 'whole')


def test_what_is_not_finished_or_lost_is_no_codes(tmp_path):
  url = str(tmp_path / 'codes')
  with pytest.raises(errors.UserError, match='holds no finished codes'):
    codes_lib.open_codes(url)
  codes = write(url, *made(11, 11), None, most=11)
  (tmp_path / 'codes' / 'vals' / 'c' / '1' / '2').unlink()
  codes.read(600, 700)
  with pytest.raises(errors.UserError, match='cannot read the codes'):
    codes.read(300, 400)
  path = tmp_path / 'codes' / 'vals' / 'c' / '2' / '0'
  data = bytearray(path.read_bytes())
  data[20] ^= 1
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match='cannot read the codes'):
    codes_lib.open_codes(url).read(512, 700)
