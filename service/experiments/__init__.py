"""Experiments: who sees which arm, and what is known of them. All but `acting` is pure: values in, values out."""
