"""Is dilated attention over ranks right on this machine?

python examples/test_ring_attention.py --device cpu --dtype float64 --ranks 3 --verbose
"""

import sys

from nnscaler_ring.tools.ring_attention_tester import main

if __name__ == "__main__":
    sys.exit(main())
