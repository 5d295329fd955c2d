"""The packaged subject's attention sinks, found by their norm."""

from sae_jax import store
from sae_jax.harvesting import harvest
from sae_jax.harvesting.config import HarvestConfig


def test_the_packaged_subject_s_sinks_are_found_by_their_norm(tmp_path):
  config = HarvestConfig(
    sources=('python-stdlib',),
    n_tokens=1500,
    context_length=64,
    max_contexts_per_document=2,
    mask_first=False,
    mask_norm_multiple=10.0,
  )
  manifest = harvest.harvest(config, str(tmp_path))
  opened = store.open_store(str(tmp_path))
  assert 100 < manifest.mask['median_norm'][config.sites[0]] < 250
  assert 0 not in opened.positions()[opened.stream_index()]
  # All first tokens, and hardly another.
  firsts = (opened.positions() == 0).sum()
  assert firsts <= manifest.mask['masked_norm'] <= firsts + 5
