"""One pass over the rows of a store: what each latent does, and metrics.

run         the loop over batches, which goes on where it was
config      what it is asked for
rows        which rows serve what, and reading them ahead
state       what a step works on: plan, state on the devices, batch
step        a batch under jit
candidates  the latents that a shard offers for a token, and their places
pairs       active pairs as `reducers/` take them; `best`, `order`, `runs`
            and `counter_hash` are what those are made of
quality     metrics and their curves; `scatter` for principal components
double      numbers of 48 bits, of which all sums are; `sums` of trees of them
codes       the codes on disk
saving      the state on disk
result      what was found, by blocks of latents
"""
