"""Choose fine-tuning data from the loss trajectories of a small proxy model (S2L), on Ray."""

__version__ = "0.1.0"
