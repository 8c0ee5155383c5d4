"""Other packages' names and parameters for our ops: change the import, keep the calls."""
