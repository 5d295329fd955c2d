"""The text of a harvest, and which of its tokens are rows, in a store.

It is the store that the harvest would make without its activations: the same
shards of the same contexts, rows of the same numbers, the same documents held
out. The subject runs on it only if a rule on activations leaves tokens out.
"""

from collections.abc import Mapping
import contextlib

import jax
from jax.experimental import multihost_utils

from sae_jax import progress
from sae_jax import store as store_lib
from sae_jax import subject as subject_lib
from sae_jax.harvesting import cutting, filling, harvest, pools
from sae_jax.harvesting import source as source_lib
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.storage import joined
from sae_jax.store import layout
from sae_jax.store import manifest as manifest_lib
from sae_jax.store import writer as writer_lib


def write(
  config: HarvestConfig,
  url: str,
  subject: subject_lib.Subject,
  d_model: int,
  median_norm: Mapping[str, float],
  forward: pools.Forward | None = None,
) -> store_lib.Manifest:
  """Writes the text; every process of a mesh calls it, and the first writes.

  Shards that are complete are left as they are, so that it goes on where it was
  stopped; a finished one is left alone.

  Args:
    config: of the harvest.
    url: folder of the text, local or in a bucket, of these inputs alone.
    subject: gives the tokenizer.
    d_model: D, width of the sites.
    median_norm: the median norm at each site, to which limits on norms refer.
    forward: runs the subject for the norms at all sites; None to keep what the
      rule on positions keeps.

  Returns:
    Its manifest.

  Raises:
    UserError: if a source cannot be read, no token is kept, documents cannot be
      held out, or the text cannot be written.
  """
  manifest = layout.read_manifest(url)
  if manifest is None:
    writer = writer_lib.StoreWriter(
      url, harvest.store_plan(config, subject, (), d_model)
    )
    # The pools are those of the mesh.
    working = config if forward is None else forward.config
    mask = manifest_lib.make_mask(
      list(median_norm.values()), config.mask_norm_multiple
    )
    text = source_lib.documents(config)
    with (
      contextlib.closing(
        source_lib.contexts(config, text, subject)
      ) as contexts,
      progress.bar(total=config.n_tokens, unit='tok', desc='text') as bar,
    ):
      shards = cutting.Shards(working, contexts, writer)
      # All have looked for shards before the first one writes any.
      _wait('text is looked for')
      filling.write(
        working,
        forward,
        shards.missing((0, 1), bar),
        None,
        mask,
        writer,
        bar,
        is_written=jax.process_index() == 0,
      )

    def seal():
      complete = writer.complete(shards.number)
      harvest.seal(config, shards.expected, complete, dict(median_norm), writer)

    joined.by_first(url, seal)
    manifest = layout.read_manifest(url)
  return manifest


def _wait(reached: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(reached)
