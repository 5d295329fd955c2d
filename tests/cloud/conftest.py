"""A cloud for the scripts."""

import pytest

from tests.support.cloud.stand_in import Cloud


@pytest.fixture
def cloud(tmp_path):
  made = Cloud(tmp_path)
  yield made
  for host in (tmp_path / 'hosts').iterdir():
    made.kill(host)
