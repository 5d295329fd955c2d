"""What training does to autoencoders, each finding with seeds and an interval.

cells      trains what a finding compares, and keeps each run's figures
effects    from figures of several seeds to an effect, its interval, a verdict
pairs      findings that differ in one setting
dead       AuxK and the transposed start against dead latents
baselines  TopK beside ReLU and JumpReLU at equal L0
rates      the exponent of the best learning rate
page       the table of all findings
measure    the command
"""
