"""The search over latents as the TPU compiler makes it."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sae_jax import autoencoder
from sae_jax import mesh as mesh_lib
from sae_jax.probing import newton, search

N_LATENTS, WIDTH, PROMPTS = 131_072, 768, 1024


def test_a_device_holds_a_block_and_no_more(line):
  config = autoencoder.SaeConfig(WIDTH, N_LATENTS, 64)

  def shaped(spec, *shape, dtype=jnp.float32):
    sharding = NamedSharding(line, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  arrays = {
    'w_enc_ND': (N_LATENTS, WIDTH),
    'w_dec_ND': (N_LATENTS, WIDTH),
    'b_lat_N': (N_LATENTS,),
    'b_pre_D': (WIDTH,),
    'data_mean_D': (WIDTH,),
    'data_scale': (),
  }
  sae = autoencoder.Sae(
    **{
      name: shaped(mesh_lib.RULES.spec(mesh_lib.letters(name)), *shape)
      for name, shape in arrays.items()
    }
  )
  everywhere = PartitionSpec()
  with jax.set_mesh(line):
    layout = search._layout(N_LATENTS, line, 8)
    block = layout.per_call * layout.width
    lowered = search._fit.lower(
      layout,
      config,
      sae,
      shaped(PartitionSpec('latent'), 4 * block, WIDTH),
      shaped(everywhere, newton.padded(PROMPTS), WIDTH),
      shaped(everywhere, WIDTH),
      shaped(everywhere, 2, newton.padded(PROMPTS)),
      shaped(everywhere, dtype=jnp.int32),
    )
  # Blocks are those of a TPU, not of the machine that compiles.
  assert layout.width == newton._COLUMNS and layout.n_blocks == 4
  taken = lowered.compile().memory_analysis().temp_size_in_bytes
  block_bytes = 4 * newton.padded(PROMPTS) * block
  # Columns as they are and standardised, of latents, shuffled labels and random
  # directions, are six blocks; of all latents of a device they were 24.
  assert 6 * block_bytes <= taken < 12 * block_bytes
