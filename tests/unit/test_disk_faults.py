"""Refused writes: one line, nothing lost."""

import pytest

from sae_jax import errors
from sae_jax.training import log
from tests.support import runs, toy


def test_a_harvest_whose_folder_is_in_the_way_goes_on(texts, tmp_path):
  clean, url = tmp_path / 'clean', tmp_path / 'store'
  plan = toy.config(texts, n_tokens=300)
  toy.run(plan, clean)
  url.mkdir()
  # Without it the folder would be somebody else's.
  (url / 'plan.json').write_bytes((clean / 'plan.json').read_bytes())
  for name in ('documents', 'shards'):
    (url / name).write_text('')
    with pytest.raises(errors.UserError) as caught:
      toy.run(plan, url)
    said = str(caught.value)
    assert str(url) in said and 'check the path' in said and '\n' not in said
    (url / name).unlink()
  toy.run(plan, url)
  assert toy.stored(url) == toy.stored(clean)


def test_a_folder_that_nobody_may_make(texts):
  # The binaries add what to check.
  with pytest.raises(FileNotFoundError, match='/proc/none'):
    toy.run(toy.config(texts), '/proc/none/store')


def test_a_board_on_a_full_disk_does_not_stop_the_run(tmp_path, caplog):
  writer = log.Writer(str(tmp_path), 0)
  events = writer._board.file_writer.event_writer._ev_writer
  events._py_recordio_writer._writer._file = open('/dev/full', 'wb')  # noqa: SIM115
  # More than tensorboardX's queue holds when nobody takes from it.
  for step in range(1, 2001):
    writer.write(step, {'loss': 1 / step})
  writer.flush()
  writer.close()
  assert len(runs.rows(tmp_path)) == 2000
  assert caplog.text.count('No space left on device') == 1
