"""What is kept of each latent while the rows of a store pass by.

A reducer has four functions. `init(n_own)` is the state before any row, whose
arrays have the shard's latents as their first axis. `update(state, pairs)` adds
a batch, as part of a jitted step, without a collective. `merge(a, b)` joins the
states of two sets of rows that share none, in any order. `finish(state)` gives
columns of the feature table from a state on the host. No result depends on how
rows are cut into batches, in which order they come or on the mesh: integers are
equal, sums agree to 1e-12.
"""

from sae_jax.probing.scan.reducers.count import Count
from sae_jax.probing.scan.reducers.statistics import Statistics
from sae_jax.probing.scan.reducers.top import Top

__all__ = ['Count', 'Statistics', 'Top']
