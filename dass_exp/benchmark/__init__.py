"""``make bench``: each method against the forward passes that it cannot avoid, peak memory, and what large models need."""
