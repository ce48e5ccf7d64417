"""Names and units of the remainders of 16-bit parameters, for all that read or write checkpoints. No MindSpore.

What they are and how exact: training/remainder.py.
"""
REMAINDER_PREFIX = "adam_r."               # adam_r.NAME is the remainder of the parameter NAME
REMAINDER_SCALE = 4096.0                   # a remainder is (master - parameter) times this, in float16
