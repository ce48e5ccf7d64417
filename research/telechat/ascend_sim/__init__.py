"""Compiling for Ascend on a machine without NPU and CANN: stub libraries, the compilation, and its accounting.

    elf.py         reads and writes shared objects
    runtime.py     what MindSpore's Ascend plug-in asks of CANN, the stubs for it, and the environment to load them
    compile.py     compiles one plan for one rank in a process of its own
    worker.py      that process
    shortcuts.py   what it leaves out: random parameters, layers of other pipeline stages
    mind_ir.py     types of the messages in which MindSpore stores a compiled graph
    account.py     operators, communication and memory of the compiled graph

Nothing can be executed: every stub does nothing and returns "success". What MindSpore's compiler does up to the graph
of one rank is real.
"""
