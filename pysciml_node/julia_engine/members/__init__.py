"""Ensembles: all members by one call into Julia, forward and backward."""
