"""`python -m nnscaler_ring` is the command `nnscaler-ring`."""

from nnscaler_ring.tools.cli import main

if __name__ == "__main__":  # spawned ranks import this module too
    main()
