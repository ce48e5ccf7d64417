"""The independent forward pass in NumPy, by the short name that tests import it by."""
from research.telechat.doctor.reference import cross_entropy, forward, rotary_tables

__all__ = ["cross_entropy", "forward", "rotary_tables"]
