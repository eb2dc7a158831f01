"""Experiments: who sees which arm. Pure: values in, values out."""
