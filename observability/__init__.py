"""Dashboards and alert rules, generated from the metric table of twinkle_serve."""
