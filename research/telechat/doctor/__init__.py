"""A self-test of device, cards and installation: compares what this project computes there with NumPy.

    checks.py        a check, its outcome, and the loop over all of them
    registry.py      all checks in their order
    kernel_checks.py, cache_checks.py, attention_checks.py      single kernels
    model_checks.py  small models of every family
    collective_checks.py, plan_checks.py, checkpoint_checks.py  several cards, training, checkpoints
    reference.py     the models in NumPy, from the official formulas; small_models.py their sizes and random weights
    device.py        the interface of a device; hardware.py, hardware_models.py, collectives.py, steps.py implement it
    report.py        the table and the JSON

Checks do not import MindSpore: they ask a `Device` for results.
"""
