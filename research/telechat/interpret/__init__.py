"""Executing compiled graphs of all ranks of a plan in NumPy, to compare the plan with the uncut model.

    ir.py            reads a graph: nodes, constants, parameters
    operators.py     what each operator computes; attention.py, norm.py and cache.py the fused kernels
    rank.py          executes the graph of one rank up to the next communication
    collectives.py   lets the ranks meet
    features.py      what of a plan decides which graph it becomes
    shrink.py        makes a recipe small enough, with its plan
    graphs.py        compiles all ranks, and keeps what was compiled
    weights.py       random weights: cut for the ranks, merged again, compared
    training.py      steps of a plan and of the uncut plan
    cpu_step.py      those steps of the real model
    prediction.py    prefill and decoding of a plan and of the uncut plan

Semantics are written from the documentation of the operators and are independent of MindSpore's kernels. What it does
not know it refuses by name.
"""
