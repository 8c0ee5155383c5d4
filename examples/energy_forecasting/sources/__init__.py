"""Where hourly series come from: EIA, CAISO, plain CSV, and optionally gridstatus."""
