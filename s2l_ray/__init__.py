"""s2l_ray: choose fine-tuning data from the loss trajectories of a small proxy model (S2L, NeurIPS 2024), on Ray."""

__version__ = "0.1.0"
