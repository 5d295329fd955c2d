"""The evaluations of an autoencoder: a file each, with controls and intervals.

`evaluations` is their registry; `measured` is the suite as a part of sae-probe;
`run` measures evaluations and keeps what is finished; `figures` turns what they
sum up into figures with intervals; `compare` tests differences.
"""
