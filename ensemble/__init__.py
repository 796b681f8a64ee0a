"""Compose remote and local models as a typed graph written in YAML.

This version does not contain the graph engine yet: there is nothing here to import.
"""
