"""From a public call to the engine: checks, the call as values, the registered ops."""
