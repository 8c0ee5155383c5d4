"""The workbench: command line, checks, measurements, demonstrations; no library code imports it."""
