"""Tables from records. Nothing here runs a model."""
