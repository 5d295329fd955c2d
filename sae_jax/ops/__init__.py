"""The sparse operations of a TopK autoencoder, a folder each.

`api` holds the public function with its custom VJP and the choice of
implementation, `reference` the same in plain jax.numpy. Inside
`jax.shard_map` every function works on one shard; `dispatch` says which
implementation a shape gets.
"""

from sae_jax.ops.autoencode.api import autoencode
from sae_jax.ops.autoencode.coded import Diagnostics
from sae_jax.ops.autoencode.retry import with_few_candidates
from sae_jax.ops.decode.api import decode
from sae_jax.ops.dense import matmul
from sae_jax.ops.dispatch import choose
from sae_jax.ops.encode_topk.api import encode_topk
from sae_jax.ops.pairs import least_micro_batches
from sae_jax.ops.top_k.api import global_top_k, ranks, top_k, winners
from sae_jax.ops.weight_grad.api import weight_grad

__all__ = [
  'Diagnostics',
  'autoencode',
  'choose',
  'decode',
  'encode_topk',
  'global_top_k',
  'least_micro_batches',
  'matmul',
  'ranks',
  'top_k',
  'weight_grad',
  'winners',
  'with_few_candidates',
]
