"""Electricity demand, forecast from a year or more of hourly data that ranks may share.

python -m examples.energy_forecasting --help
"""
