"""Solves as native code: a field's program, its pullback and the loop, compiled and kept."""
