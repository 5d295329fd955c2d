"""Names of the parts of the method, for profiles and plans.

Code of a part runs under `jax.named_scope` of its name. XLA keeps it in the
op_name of every instruction, so that profiles show it and
`plan.program.parts` reads it, wherever the code stands.
"""

PREPROCESSING = 'preprocessing'
ENCODER = 'encoder'
DECODER = 'decoder'
ENCODER_AND_DECODER = 'encoder and decoder'
WEIGHT_GRADIENTS = 'weight gradients'
EXCHANGE = 'top-k over shards'
AUXK = 'AuxK'
OPTIMIZER = 'optimizer'

# Of the pass over a store when probing.
CODES = 'codes'
PAIRS = 'sorting of pairs'
STATISTICS = 'statistics'
TOP = 'top examples'
RANDOM = 'random examples'
NEAR = 'near misses'
METRICS = 'metrics'
COMPONENTS = 'principal components'
