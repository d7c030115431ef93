"""The stability laboratory: what a run shows of itself, what it does when it spikes, and how to make it spike.

config.py      the schema of stability.*
gradients.py   the reduced gradients of a rank, whatever ZeRO stage holds them
groups.py      the model's tensors by name, and the groups whose norms are shown
guard.py       stands round the optimizer's step: measures, clips, detects, leaves an update out
clipping.py    AdaGC and ZClip
detector.py    what a spike is
update_size.py how far a step moves the weights, in every step
weight_size.py whether a tensor of weights has grown at once
telemetry.py   norms of gradients, weights, updates and activations, read with the other metrics
reactions.py   what is done about a spike, one step later; acts at given steps
stress.py      faults planted on purpose
report.py      python -m train.stability.report run_dirs=[…]: runs beside each other
figure.py      its PNG
"""
