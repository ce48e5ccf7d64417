"""Executing the compiled graphs of all ranks of a plan in NumPy, to compare the plan with the unsharded model.

    ir.py            reads a graph: nodes, constants, parameters
    operators.py     the semantics of each operator; attention.py, norm.py and cache.py: the fused kernels
    rank.py          executes the graph of one rank up to the next communication
    collectives.py   runs the communication between ranks
    features.py      the properties of a plan that determine its graph
    shrink.py        makes a recipe and its plan small enough
    graphs.py        compiles all ranks and caches the graphs
    weights.py       random weights: sharded for the ranks, merged again, compared
    training.py      steps of a plan and of the unsharded plan
    cpu_step.py      those steps with the real model
    prediction.py    prefill and decoding of a plan and of the unsharded plan

Semantics are written from the documentation of the operators and are independent of MindSpore's kernels. Unknown
operators are refused by name.
"""
