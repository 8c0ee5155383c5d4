"""`RingAttentionTester` under the path that programs import it from; it is one of the tools.

The only module of the library that imports a tool, and nothing of the library imports it: not
until somebody asks for the tester is it loaded.
"""

from nnscaler_ring.tools.ring_attention_tester import RingAttentionTester, TestResult, main

__all__ = ["RingAttentionTester", "TestResult", "main"]
