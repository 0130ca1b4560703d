"""What holds between the passes, one file per section of ``docs/ir.md``: predicates that raise where it does not.

A pass names in ``ensures`` the contracts that hold after it. They are verified in tests and by ``bactrian-opt
--verify-contracts``.
"""
