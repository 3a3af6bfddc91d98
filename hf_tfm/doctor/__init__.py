"""Checks that find the causes of a failing run in a minute on a CPU, before it starts."""
