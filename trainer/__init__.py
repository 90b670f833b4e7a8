"""Weights and steps: the `.dat` container, NVFP4, models and training steps. Nothing here knows about behaviours."""
