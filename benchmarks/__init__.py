"""Measurements beside the alternatives; none of them is a test."""
