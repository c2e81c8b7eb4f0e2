"""Answers that match a grammar: which tokens may come next, and which must."""
