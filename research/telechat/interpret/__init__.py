"""Executing compiled graphs of all ranks of a plan in NumPy, to compare the plan with the uncut model.

    ir.py            reads a graph: nodes, constants, parameters
    operators.py     what each operator computes; attention.py, norm.py, cache.py and dropout.py the fused kernels
    rank.py          executes the graph of one rank up to the next communication
    collectives.py   lets the ranks meet
    shrink.py        makes a recipe small enough, with its plan
    graphs.py        compiles all ranks, and keeps what was compiled
    weights.py       random weights: cut for the ranks, merged again, compared
    training.py      steps of a plan, of the uncut plan, and of the real model on the CPU
    prediction.py    prefill and decoding of a plan and of the uncut plan

Semantics are written from the documentation of the operators and are independent of MindSpore's kernels. What it does
not know it refuses by name.
"""
