"""What iterates over passes or rows: DKM over the passes of a backend, its fixed point, and the tuned hard k-means."""
