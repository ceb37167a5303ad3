"""Pure code: tables, store, encoding, losses, order, training, k-means, selection. Nothing here imports Ray."""
