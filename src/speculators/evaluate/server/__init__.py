"""Measuring a draft that a server has loaded."""
