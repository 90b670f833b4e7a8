"""Behaviours, verdicts and runs: what a model must do, whether it does, and the loop that gets it there."""
