"""How near pruning and scoring come to the passes that they cannot avoid: ``make bench``."""
